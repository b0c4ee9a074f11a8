"""The dashboard's page in a real browser, with a real engine behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
from commands import Engine, engine, published_in_process
from dashboards import (
    CHROMIUM,
    CHROMIUM_ARGUMENTS,
    MODEL,
    PATIENCE_MS,
    SNIPPET_S,
    TOKEN,
    Dashboard,
    dashboard,
    until,
)
from driving import Drive, engine_config
from playwright.sync_api import Browser, Page, sync_playwright
from tiny_model import CLASSES, DIM, tiny_recording

from hrpro.clients import FeatureFeeder, SnippetClock
from hrpro.clients.cameras.thumbnails import ThumbnailRing, thumbnail_server
from hrpro.engine.messages import ActionEvent, Publication

if TYPE_CHECKING:
    from hrpro.export.bundle import Bundle

pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(),
    reason=f"the dashboard's page was not tested: no {CHROMIUM} (apt-get install chromium)",
)

# 96 s, within the two minutes that a timeline shows.
SNIPPETS = 150
RECORDING = tiny_recording(SNIPPETS, seed=3)
# So that some actions are retracted.
SETTING = "localization.event_confirm=0.45"
SETTINGS = ("--set", SETTING)
STREAM = "cam1"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=list(CHROMIUM_ARGUMENTS)
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def served(bundle: Bundle) -> Iterator[Engine]:
    with engine(bundle.folder, *SETTINGS, "--set", "max_streams=64") as running_engine:
        yield running_engine


@pytest.fixture(scope="module")
def shown(served: Engine) -> Iterator[Dashboard]:
    """A dashboard that has seen a whole stream."""
    with dashboard(served) as running_dashboard:
        running_dashboard.wait_subscribed()
        feed(served, STREAM, RECORDING)
        yield running_dashboard


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        opened = context.new_page()
        opened.set_default_timeout(PATIENCE_MS)
        problems: list[str] = []
        opened.on("pageerror", lambda error: problems.append(str(error)))
        yield opened
        assert problems == []


def feed(served: Engine, stream: str, features: np.ndarray[Any, Any], first: int = 0) -> None:
    with FeatureFeeder(served.feed, stream, DIM, first_index=first) as feeder:
        for start in range(0, len(features), 8):
            feeder.send(features[start : start + 8])
        feeder.end()


def visit(page: Page, shown: Dashboard) -> None:
    """The page once it knows what the server knows, and has drawn it."""
    page.goto(shown.url)
    page.evaluate(MODEL)
    until(page, "model.engine.status && document.querySelector('#health div')")


def actions(published: list[Publication]) -> list[ActionEvent]:
    """Each action as it was told last."""
    newest: dict[int, ActionEvent] = {}
    for each in published:
        if isinstance(each, ActionEvent):
            newest[each.id] = each
    return list(newest.values())


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> list[ActionEvent]:
    published = published_in_process(bundle.folder, {STREAM: RECORDING}, SETTING)
    found = actions(published[STREAM])
    assert {each.kind for each in found} == {"end", "retract"}
    assert len(found) > 6
    return found


# ---- what is shown -----------------------------------------------------------------------------

BARS = """stream => [...document.querySelectorAll(`[data-stream="${stream}"] .bar-of-action`)].map(
    bar => ({
        state: bar.dataset.state, label: bar.textContent,
        start: Number(bar.dataset.start), end: Number(bar.dataset.end),
        left: parseFloat(bar.style.left), width: parseFloat(bar.style.width),
        colour: getComputedStyle(bar).getPropertyValue("--class"),
    }))"""


def test_actions_are_bars_and_events(
    page: Page, shown: Dashboard, expected: list[ActionEvent]
) -> None:
    visit(page, shown)
    until(page, f"model.rows.get('{STREAM}')?.state === 'ended'")
    page.wait_for_selector(f"[data-stream={STREAM}] .bar-of-action")
    bars = page.evaluate(BARS, STREAM)
    states = {"end": "ended", "retract": "retracted"}
    told = sorted((bar["label"], bar["state"], bar["start"], bar["end"]) for bar in bars)
    wanted = sorted((each.label, states[each.kind], each.start_s, each.end_s) for each in expected)
    assert [each[:2] for each in told] == [each[:2] for each in wanted]
    assert np.allclose([each[2:] for each in told], [each[2:] for each in wanted], atol=1e-3)
    # Two minutes, and the newest snippet at the right edge.
    newest_s = SNIPPETS * SNIPPET_S
    for bar in bars:
        assert bar["left"] == pytest.approx((bar["start"] - newest_s + 120) / 1.2, abs=0.01)
        assert bar["width"] == pytest.approx((bar["end"] - bar["start"]) / 1.2, abs=0.01)
    assert len({bar["colour"] for bar in bars}) == len({bar["label"] for bar in bars})

    rows = page.locator("#events-rows tr")
    assert rows.count() == len(expected) + 2  # opened and ended
    newest = page.locator("#events-rows tr").first.inner_text().split()
    assert newest[:3] == ["stream", "ended", STREAM]
    told_words = [set(text.split()) for text in rows.all_inner_texts()]
    for each in expected:
        words = {each.label, f"{each.score:.2f}", clock(each.start_s), clock(each.end_s or 0)}
        assert any(words <= told for told in told_words), words


def clock(seconds: float) -> str:
    tenths = round(seconds * 10)
    return f"{tenths // 600}:{tenths % 600 / 10:04.1f}"


def test_curves_are_the_scores_of_the_engine(page: Page, shown: Dashboard, bundle: Bundle) -> None:
    from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend

    config = engine_config(bundle.manifest, max_streams=1)
    drive = Drive(bundle.manifest, OnnxRuntimeBackend(bundle, config), config, {STREAM: RECORDING})
    drive.finish(8)
    scores = drive.scores(STREAM)  # (T, C)
    visit(page, shown)
    until(page, f"model.scores.get('{STREAM}')?.size === {SNIPPETS}")
    columns = page.evaluate(f"model.scores.get('{STREAM}').columns(0, {SNIPPETS}, [0, 1, 2])")
    drawn = np.array(columns[1:]).T
    assert np.abs(drawn - np.where(scores < 0.01, 0, scores)).max() < 0.011
    assert np.abs(drawn - scores).mean() < 0.002
    attention = np.array(columns[0])
    assert (attention + 0.001 >= drawn.max(axis=1)).all()  # P = A * S
    assert attention.min() >= 0 and attention.max() <= 1
    # The legend has the newest values, and each curve its pixels.
    curves = page.locator(f"[data-stream={STREAM}] .legend [data-curve]")
    assert set(curves.evaluate_all("all => all.map(each => each.dataset.curve)")) == {
        "attention", *CLASSES
    }  # fmt: skip
    for name, value in zip(CLASSES, drawn[-1], strict=True):
        shown_value = curves.locator(f"xpath=self::*[@data-curve='{name}']").inner_text().split()
        assert shown_value == [name, f"{value:.2f}"] or abs(float(shown_value[1]) - value) < 0.006
    page.wait_for_selector(f"[data-stream={STREAM}] canvas")
    painted = page.evaluate(
        """stream => { const canvas = document.querySelector(`[data-stream="${stream}"] canvas`);
            const context = canvas.getContext("2d");
            const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
            return new Set(Array.from({ length: data.length / 4 }, (_, n) =>
                data[4 * n + 3] > 200 ? data.slice(4 * n, 4 * n + 3).join() : "")).size; }""",
        STREAM,
    )
    assert painted > len(CLASSES)


def test_an_action_that_goes_on_is_shown_and_announced(
    page: Page, served: Engine, shown: Dashboard, bundle: Bundle
) -> None:
    stream = "live"
    published = published_in_process(bundle.folder, {stream: RECORDING}, SETTING)[stream]
    starts = [each for each in published if isinstance(each, ActionEvent) and each.kind == "start"]
    stop = starts[0].published_index + 1
    visit(page, shown)
    with FeatureFeeder(served.feed, stream, DIM) as feeder:
        for index in range(stop):
            feeder.send(RECORDING[index])
        bar = page.wait_for_selector(f"[data-stream={stream}] .bar-of-action[data-state=now]")
        label = bar.text_content() or ""
        assert label in {each.label for each in starts if each.published_index < stop}
        box, frame = (
            bar.bounding_box(),
            page.locator(f"[data-stream={stream}] .lanes").bounding_box(),
        )
        assert box and frame
        assert box["x"] + box["width"] == pytest.approx(frame["x"] + frame["width"], abs=1)
        now = page.locator("#now .now-item", has_text=stream)
        assert any(label in text for text in now.all_inner_texts())
        said = page.wait_for_selector("#announcements p")
        assert said.inner_text().startswith("Started: ")
        assert f"{label} in {stream}" in said.inner_text()
        figure = page.locator(f"[data-stream={stream}] figure")
        said_of_it = figure.get_attribute("aria-label") or ""
        assert label in said_of_it and "going on" in said_of_it
        chip = page.locator(f"[data-stream={stream}] .chip")
        until(page, "text => text.textContent === 'live'", chip.element_handle())
        until(
            page,  # nothing comes any more
            "text => text.textContent.startsWith('quiet')",
            chip.element_handle(),
        )
        feeder.end()
    until(page, "chip => chip.textContent === 'ended'", chip.element_handle())
    until(page, "![...document.querySelectorAll('#now .now-item')].length")


def test_health_is_that_of_the_status(page: Page, shown: Dashboard, bundle: Bundle) -> None:
    visit(page, shown)
    figures = page.locator("#health div").evaluate_all(
        "all => Object.fromEntries(all.map(each => "
        "[each.dataset.figure, each.querySelector('dd').textContent]))"
    )
    assert figures["bundle"] == bundle.manifest.bundle_id
    assert figures["provider"] == "cpu"
    assert int(figures["snippets"]) >= SNIPPETS
    assert (figures["dropped"], figures["missing"], figures["refused"]) == ("0", "0", "0")
    assert page.locator("#engine-state").inner_text() == "serving"
    assert page.locator("#problem").is_hidden()


# ---- filter and search -------------------------------------------------------------------------


def test_filter_and_search(page: Page, shown: Dashboard, expected: list[ActionEvent]) -> None:
    visit(page, shown)
    page.locator("#events-filter [name=stream]").select_option(STREAM)
    ended = [each for each in expected if each.kind == "end"]
    label = ended[0].label
    cases: list[tuple[str, str, Callable[[ActionEvent], bool] | None]] = [
        ("what", "ended", lambda each: each.kind == "end"),
        ("label", label, lambda each: each.kind == "end" and each.label == label),
        (
            "score",
            "0.5",
            lambda each: each.kind == "end" and each.label == label and each.score >= 0.5,
        ),
    ]
    for name, value, is_wanted in cases:
        field = page.locator(f"#events-filter [name={name}]")
        field.fill(value) if name == "score" else field.select_option(value)
        wanted = [each for each in expected if is_wanted and is_wanted(each)]
        until(page, f"document.querySelectorAll('#events-rows tr').length === {len(wanted)}")
        assert page.locator("#events-count").inner_text() == str(len(wanted))
    page.get_by_role("button", name="Clear").click()
    search = page.get_by_role("searchbox", name="Search")
    search.fill(f"RETRACTED {STREAM}")
    wanted = [each for each in expected if each.kind == "retract"]
    until(page, f"document.querySelectorAll('#events-rows tr').length === {len(wanted)}")
    search.fill("nothing is like that")
    page.wait_for_selector("#events-none:text('No event is like that.')")
    page.locator("#streams-filter").fill("nowhere")
    page.wait_for_selector("#rows-none:text('No stream has this name.')")


# ---- restarts ----------------------------------------------------------------------------------


def test_an_engine_that_is_killed_and_comes_back(
    page: Page, bundle: Bundle, tmp_path: Path, expected: list[ActionEvent]
) -> None:
    options: dict[str, Any] = {"state": tmp_path / "state", "quiet": False}
    half = SNIPPETS // 2
    with (
        engine(bundle.folder, *SETTINGS, **options) as first,
        dashboard(first) as shown,
        FeatureFeeder(first.feed, STREAM, DIM, timeout_s=60.0) as feeder,
    ):
        feeder.send(RECORDING[:half])
        visit(page, shown)
        until(page, f"model.rows.get('{STREAM}')?.head === {half}")
        first.kill()
        problem = page.wait_for_selector("#problem:not([hidden])")
        assert problem.inner_text().startswith("Engine away since ")
        assert page.locator("#engine-state").inner_text() == "engine away"
        assert page.locator("body.stale").count() == 1
        with engine(bundle.folder, *SETTINGS, addresses=first.addresses, **options):
            feeder.send(RECORDING[half:])
            feeder.end()
            until(page, f"model.rows.get('{STREAM}')?.state === 'ended'")
            page.wait_for_selector("#problem", state="hidden")
            assert page.locator("body.stale").count() == 0
            bars = page.evaluate(BARS, STREAM)
    # Nothing twice, nothing left open, nothing lost.
    told = sorted((bar["label"], round(bar["start"], 2)) for bar in bars)
    assert told == sorted((each.label, round(each.start_s, 2)) for each in expected)
    assert {bar["state"] for bar in bars} == {"ended", "retracted"}


def test_a_dashboard_that_is_killed_and_comes_back(page: Page, served: Engine) -> None:
    with dashboard(served) as first:
        visit(page, first)
        first.kill()
        problem = page.wait_for_selector("#problem:not([hidden])")
        assert problem.inner_text().startswith("The dashboard's server is away since ")
        with dashboard(served, http=first.address):
            page.wait_for_selector("#problem", state="hidden")
            until(page, "model.engine.hears.includes('events')")
            feed(served, "later", RECORDING[:8])
            page.wait_for_selector("[data-stream=later]")


# ---- for everybody -----------------------------------------------------------------------------

FOCUSED = """() => { const at = document.activeElement;
    return at.id || at.name || at.getAttribute("aria-label") || at.textContent.trim(); }"""


def test_everything_can_be_reached_by_keyboard(page: Page, shown: Dashboard) -> None:
    visit(page, shown)
    page.locator("#streams-filter").fill(STREAM)
    until(page, "document.querySelectorAll('.row').length === 1")
    page.evaluate("document.querySelector('.skip').focus()")
    reached = [page.evaluate(FOCUSED)]
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(FOCUSED))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", reached[-1]
        if reached[-1].startswith("Recent events"):
            break
    assert reached == [
        "Skip to the streams", "Skip to the events", "pause", "announce", "theme",
        "streams-filter", "span", f"Table of {STREAM}", "text", "stream", "label", "what", "score",
        "Clear", "Recent events, newest first",
    ]  # fmt: skip

    table = page.get_by_role("button", name=f"Table of {STREAM}")
    table.focus()
    page.keyboard.press("Enter")
    assert table.get_attribute("aria-expanded") == "true"
    rows = page.get_by_role("table", name=f"Actions of {STREAM}").get_by_role("row")
    until(page, f"document.querySelectorAll('#table-of-{STREAM} tbody tr').length > 3")
    assert rows.first.inner_text().split() == ["Action", "From", "To", "Score", "State"]
    pause = page.get_by_role("button", name="Pause")
    pause.focus()
    page.keyboard.press("Space")
    assert pause.get_attribute("aria-pressed") == "true"


def test_parts_have_roles_and_names(page: Page, shown: Dashboard) -> None:
    visit(page, shown)
    for role in ("banner", "main"):
        assert page.get_by_role(role).count() == 1
    for name in ("Engine health", "Streams", "Now", "Events"):
        assert page.get_by_role("region", name=name).count() >= 1, name
    assert page.get_by_role("log", name="New actions").get_attribute("aria-live") == "polite"
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, input, select")].filter(each =>
            !each.labels?.length && !each.ariaLabel && !each.textContent.trim()).length"""
    )
    assert nameless == 0
    assert page.locator("[tabindex]:not([tabindex='0']):not([tabindex='-1'])").count() == 0


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2)."""
    parts = [float(each) / 255 for each in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)


COLOURS = """() => { const probe = document.body.appendChild(document.createElement("i"));
    const of = name => {
        probe.style.color = `var(--${name})`;
        return getComputedStyle(probe).color;
    };
    const names = ["ground", "panel", "text", "quiet", "good", "warn", "bad", "bad-ground",
        "accent", ...Array.from({ length: 10 }, (_, n) => `class-${n}`)];
    return Object.fromEntries(names.map(name => [name, of(name)])); }"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_are_legible(page: Page, shown: Dashboard, theme: str) -> None:
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    visit(page, shown)
    colours = page.evaluate(COLOURS)
    assert (luminance(colours["ground"]) > 0.5) == (theme == "light")
    for name in ("text", "quiet", "good", "warn", "bad", "accent"):
        assert contrast(colours[name], colours["panel"]) >= 4.5, name
    assert contrast(colours["bad"], colours["bad-ground"]) >= 4.5
    on_bars = "rgb(255, 255, 255)" if theme == "light" else "rgb(11, 15, 19)"
    for n in range(10):
        assert contrast(colours[f"class-{n}"], colours["panel"]) >= 3, n
        assert contrast(colours[f"class-{n}"], on_bars) >= 4.5, n


def test_the_theme_can_be_chosen_and_is_kept(page: Page, shown: Dashboard) -> None:
    page.emulate_media(color_scheme="light")
    visit(page, shown)
    ground = "getComputedStyle(document.body).backgroundColor"
    button = page.locator("#theme")
    auto = page.evaluate(ground)
    assert button.inner_text() == "Theme: auto"
    button.click()
    assert (button.inner_text(), page.evaluate(ground)) == ("Theme: light", auto)
    button.click()
    assert button.inner_text() == "Theme: dark"
    dark = page.evaluate(ground)
    assert luminance(dark) < 0.1 < luminance(auto)
    visit(page, shown)
    assert (button.inner_text(), page.evaluate(ground)) == ("Theme: dark", dark)


def test_nothing_moves_by_itself_where_that_is_not_wanted(page: Page, shown: Dashboard) -> None:
    page.emulate_media(reduced_motion="reduce")
    visit(page, shown)
    moving = page.evaluate(
        """[...document.querySelectorAll("*")].filter(each => {
            const style = getComputedStyle(each);
            return style.animationName !== "none" || parseFloat(style.transitionDuration) > 0;
        }).length"""
    )
    assert moving == 0


def test_a_phone_has_all_of_it_in_one_column(page: Page, shown: Dashboard) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    visit(page, shown)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for name in ("streams", "events", "health", "now"):
        box = page.locator(f"#{name}").bounding_box()
        assert box is None or box["x"] + box["width"] <= 390


# ---- closed by default -------------------------------------------------------------------------


def test_no_request_leaves_the_host(page: Page, shown: Dashboard) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    visit(page, shown)
    page.wait_for_selector("canvas")
    assert len(asked) > 10
    hosts = {url.split("/")[2] for url in asked}
    assert hosts == {shown.address}
    assert f"ws://{shown.address}/live" in asked


def test_the_page_runs_nothing_but_its_own_files(page: Page, shown: Dashboard) -> None:
    visit(page, shown)
    violations = page.evaluate(
        """async () => {
            const seen = [];
            const note = each => seen.push(each.effectiveDirective);
            document.addEventListener("securitypolicyviolation", note);
            const script = document.createElement("script");
            script.textContent = "window.injected = true";
            document.body.append(script);
            document.body.setAttribute("style", "color: red");
            await fetch("http://127.0.0.1:9/").catch(() => {});
            await new Promise(resolve => setTimeout(resolve));
            return [seen.sort(), window.injected ?? false];
        }"""
    )
    assert violations == [["connect-src", "script-src-elem", "style-src-attr"], False]


def test_labels_of_others_are_text(page: Page, served: Engine, shown: Dashboard) -> None:
    feed(served, "a.b:c-d_e", RECORDING[:8])
    visit(page, shown)
    page.wait_for_selector('[data-stream="a.b:c-d_e"] h3:text("a.b:c-d_e")')


def test_the_token_is_asked_for(browser: Browser, served: Engine, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    with (
        dashboard(served, "--token-file", file) as guarded,
        browser.new_context() as context,
    ):
        page = context.new_page()
        page.goto(guarded.url)
        assert page.url == f"{guarded.url}login"
        page.get_by_label("Token of this dashboard").fill("not the token at all")
        page.keyboard.press("Enter")
        assert page.get_by_role("alert").inner_text() == "That is not the token."
        page.get_by_label("Token of this dashboard").fill(TOKEN)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_selector("#engine-state[data-level=good]")
        assert page.url == guarded.url
        assert page.evaluate("document.cookie") == ""  # no script can read it
        page.get_by_role("button", name="Log out").click()
        page.wait_for_url(f"{guarded.url}login")
        page.goto(guarded.url)
        assert page.url == f"{guarded.url}login"


# ---- many streams, pictures --------------------------------------------------------------------


def test_fifty_streams(page: Page, served: Engine, shown: Dashboard) -> None:
    names = [f"many{n}" for n in range(50)]
    feeders = [FeatureFeeder(served.feed, name, DIM) for name in names]
    try:
        visit(page, shown)
        for feeder in feeders:
            feeder.send(RECORDING[:16])
        page.locator("#streams-filter").fill("many")
        until(page, "document.querySelectorAll('.row').length === 50")
        assert page.locator("#streams-count").inner_text().startswith("50 of ")
        until(page, "[...model.rows.values()].filter(each => each.head === 16).length >= 50")
        order = page.locator(".row h3").all_text_contents()
        assert order == names  # many2 before many10
        page.wait_for_selector("[data-stream=many0] canvas")
        drawn = page.locator("canvas").count()
        assert 3 < drawn < 20  # those in sight, and some beside
        last = page.locator("[data-stream=many49]")
        assert last.locator("canvas").count() == 0
        until(page, "each => each.textContent", last.locator(".chip").element_handle())
        said = last.locator("figure").get_attribute("aria-label") or ""
        assert said.startswith("Timeline of many49, the last 2 min: ")
        page.locator("[data-stream=many49]").scroll_into_view_if_needed()
        page.wait_for_selector("[data-stream=many49] canvas")
        until(page, "!document.querySelector('[data-stream=many0] canvas')")
        assert page.locator("canvas").count() < 20
    finally:
        for feeder in feeders:
            feeder.close()


def test_pictures_of_a_camera_client(page: Page, served: Engine) -> None:
    stream, ring = "yard", ThumbnailRing(SnippetClock())
    with (
        thumbnail_server("127.0.0.1:0", {stream: ring}, None) as url,
        dashboard(served, "--thumbnails", url) as shown,
    ):
        shown.wait_subscribed()
        visit(page, shown)
        until(page, f"model.thumbnails.has('{stream}')")
        for index in range(0, SNIPPETS, 2):
            grey = np.full((90, 160, 3), index, np.uint8)
            ring.offer(index, av.VideoFrame.from_ndarray(grey, "rgb24"))
        feed(served, stream, RECORDING)
        loaded = "[...document.querySelectorAll('#events-rows img')].filter(e => e.naturalWidth)"
        until(page, f"{loaded}.length > 5")
        pictures = page.evaluate(
            f"""Promise.all({loaded}.map(async each => {{
                await each.decode();
                const canvas = new OffscreenCanvas(9, 9).getContext("2d");
                canvas.drawImage(each, 0, 0, 9, 9);
                return [each.src, each.alt, canvas.getImageData(4, 4, 1, 1).data[0]];
            }}))"""
        )
    for source, alt, level in pictures:
        prefix = f"{shown.url}thumbnail/{stream}/"
        assert source.startswith(prefix)
        index = int(source.removeprefix(prefix).removesuffix(".jpg"))
        assert abs(level - index // 2 * 2) < 5  # the picture is that of the snippet
        assert alt.startswith(f"{stream} at ")
