"""`hrpro label` in a real browser: keys that are pressed, and what the CSV has of them."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from subprocess import Popen

import pytest
from coded_video import BLOCK, BLOCKS, HEIGHT, write_video
from commands import PATIENCE_S, environment, running, wait_for
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--disable-sync",
    "--disable-gpu",
]
PATIENCE_MS = 30_000
FRAME_MS = 40
REFRESH_MS = 17

# Frames at odd times, as telephones record: in ms.
STAMPS = [22 * n + 6 * (n % 3) + 400 * (n > 100) for n in range(240)]

# What the picture on the screen says as each key comes, before the page has it, and how late it is.
WATCH_KEYS = f"""() => {{
  const video = document.getElementById("video");
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [{BLOCKS * BLOCK}, {HEIGHT}];
  const draw = canvas.getContext("2d", {{ willReadFrequently: true }});
  window.pictured = () => {{
    draw.drawImage(video, 0, 0, canvas.width, canvas.height);
    let number = 0;
    for (let bit = 0; bit < {BLOCKS}; bit += 1) {{
      const light = draw.getImageData(bit * {BLOCK} + {BLOCK // 2}, 24, 1, 1).data[1];
      if (light > 128) number += 2 ** bit;
    }}
    return number;
  }};
  window.pressed = [];
  const see = (event) => {{
    const late = performance.now() - event.timeStamp;
    window.pressed.push([event.key, window.pictured(), late]);
  }};
  window.addEventListener("keydown", see, {{ capture: true }});
}}"""


@dataclass(frozen=True)
class Labelling:
    process: Popen[str]
    url: str
    data: Path

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The CSV without its first line."""
        with (self.data / "point_labels" / "points.csv").open(newline="") as file:
            return [tuple(row) for row in csv.reader(file)][1:]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium here: the page of hrpro label was not tried")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that has no error of a script and asks no other host for anything."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    wrong: list[str] = []
    asked: set[str] = set()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.add(request.url.split("/")[2]))
    yield page
    page.close()
    assert not wrong
    assert len(asked) == 1


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "odd.mp4"
    return write_video(path, STAMPS, Fraction(1, 1000), g="60")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def labelling(data: Path, *arguments: object) -> Iterator[Labelling]:
    cache = {**environment(), "XDG_CACHE_HOME": str(data.parent / "cache")}
    with running("label", *arguments, "--data", data, env=cache) as process:
        assert process.stdout is not None and process.stderr is not None
        lines = [process.stdout.readline() for _ in range(2)]
        assert lines[1].startswith("page "), process.stderr.read()
        yield Labelling(process, lines[1].split()[1], data)
        if process.poll() is None:
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
        assert process.stderr.read() == ""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, video: Path) -> Iterator[Labelling]:
    data = tmp_path_factory.mktemp("shared") / "data"
    yield from labelling(data, video, "--classes", "wave,jump")


@pytest.fixture
def labelled(shared: Labelling) -> Labelling:
    """Two classes and no point yet."""
    (shared.data / "point_labels" / "points.csv").unlink(missing_ok=True)
    return shared


def visit(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.locator("#preparing")).to_be_hidden()
    page.evaluate(WATCH_KEYS)


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def saved(page: Page) -> None:
    expect(page.locator("#saved")).to_have_text(re.compile("^saved in "))


def pictured(page: Page, number: int) -> None:
    """Waits until this frame is meant, and its picture on the screen."""
    expect(page.locator("#frame")).to_have_text(re.compile(f"^frame {number} of"))
    wait_for(lambda: page.evaluate("() => window.pictured()") == number)


def frame_text(number: int) -> str:
    """The column `point` for a frame of the odd video."""
    return f"{STAMPS[number] / 40:.3f}".rstrip("0").rstrip(".")


def test_a_step_and_a_key_store_the_time_of_that_frame(page: Page, labelled: Labelling) -> None:
    visit(page, labelled.url)
    press(page, *["ArrowRight"] * 7, "1", *["ArrowRight"] * 30, "ArrowLeft", "2", "End", "1")
    saved(page)
    assert labelled.rows == [
        ("wave", "odd", frame_text(7)),
        ("jump", "odd", frame_text(36)),
        ("wave", "odd", frame_text(239)),
    ]
    expect(page.locator("#time")).to_have_text(f"0:0{STAMPS[239] / 1000:.3f}")
    for number, key in ((0, "Home"), (1, "ArrowRight")):
        press(page, key)
        expect(page.locator("#frame")).to_have_text(f"frame {number} of 0 to 239")
    # What is on the screen is that frame, however it was come to.
    for point, number in ((2, 239), (0, 7), (1, 36)):
        page.locator("#points button").nth(point).click()
        pictured(page, number)


def test_a_key_while_it_plays_stores_the_frame_on_the_screen(
    page: Page, labelled: Labelling
) -> None:
    visit(page, labelled.url)
    press(page, "Space")
    for passed in ("1?[0-9]", "[0-9]?[0-9]", "1?[0-9]?[0-9]"):  # until it is at 20, 100, 200
        expect(page.locator("#frame")).to_have_text(re.compile(rf"^frame (?!{passed} of)"))
        press(page, "2")
    press(page, "Space")
    saved(page)
    pressed = page.evaluate("() => window.pressed.filter(([key]) => key === '2')")
    assert [label for label, _, _ in labelled.rows] == ["jump"] * 3
    for (_, _, point), (_, number, late_ms) in zip(labelled.rows, pressed, strict=True):
        stored = [frame_text(n) for n in range(len(STAMPS))].index(point)
        # Within a frame, of 40 ms or longer, or two: a canvas is given what the next refresh of the
        # screen will show, and on a busy machine a page hears of a key late.
        next_one = min(stored + 1, len(STAMPS) - 1)  # the last one stays
        left_ms = STAMPS[number] - STAMPS[next_one]  # how long it was no longer shown
        ahead_ms = STAMPS[stored] - STAMPS[number]
        assert abs(stored - number) <= 1 or (
            left_ms <= 2 * REFRESH_MS + late_ms and ahead_ms <= 2 * FRAME_MS
        )
    assert [number >= least for (_, number, _), least in zip(pressed, (20, 100, 200), strict=True)]


def test_points_are_nudged_moved_reclassed_deleted_and_all_of_it_undone(
    page: Page, labelled: Labelling
) -> None:
    visit(page, labelled.url)
    seen: list[list[tuple[str, str]]] = [[]]

    def then(*keys: str) -> list[tuple[str, str]]:
        press(page, *keys)
        saved(page)
        seen.append([(label, point) for label, _, point in labelled.rows])
        return seen[-1]

    assert then(*["ArrowRight"] * 3, "1") == [("wave", frame_text(3))]
    assert then("d") == [("wave", frame_text(4))]
    assert then("a", "a")[0] == ("wave", frame_text(2))
    pictured(page, 2)
    assert then("Shift+Digit2") == [("jump", frame_text(2))]
    assert then("Shift+ArrowRight", "m") == [("jump", frame_text(48))]
    assert then("Home", "1") == [("wave", "0"), ("jump", frame_text(48))]
    assert then("1") == seen[-2]  # there is one of this class at this frame
    assert then("ArrowDown", "Delete") == [("wave", "0")]

    assert then("z") == [("wave", "0"), ("jump", frame_text(48))]
    assert then("z", "z") == [("jump", frame_text(2))]
    assert then("Shift+Z", "Control+y") == [("wave", "0"), ("jump", frame_text(48))]
    assert then(*["Control+z"] * 9) == []
    expect(page.locator("#undo")).to_be_disabled()


def test_a_file_that_is_there_is_kept_and_gone_on_with(page: Page, data: Path, video: Path) -> None:
    """Rows of other recordings and further columns stay as they are, and in their order."""
    folder = data / "point_labels"
    folder.mkdir(parents=True)
    lines = [
        "class,class_index,start_frame,stop_frame,video_id,point",
        'run,2,10,30,"far, away",20',
        "wave,1,0,9,odd,4",
        "jump,0,1,70,odd,65",
        "run,2,40,60,other,50",
        "wave,1,0,9,other,4",
    ]
    (folder / "given.csv").write_text("\n".join(lines) + "\n")
    for run in labelling(data, video):
        visit(page, run.url)
        names = page.locator("#classes .name")
        expect(names).to_have_text(["jump", "run", "wave"])
        expect(page.locator("#points button")).to_have_count(2)
        press(page, "Home", "3", "ArrowDown", "ArrowDown", "Delete")
        saved(page)
    lines[2:4] = ["wave,,,,odd,0", "wave,1,0,9,odd,4"]
    assert (folder / "given.csv").read_text().splitlines() == lines
    assert sorted(each.name for each in folder.iterdir()) == [".given.csv.lock", "given.csv"]


@pytest.fixture
def own(data: Path, video: Path) -> Iterator[Labelling]:
    """As `labelled`, for one test alone."""
    yield from labelling(data, video, "--classes", "wave,jump")


def test_classes_are_chosen_by_name_and_added(page: Page, own: Labelling) -> None:
    visit(page, own.url)
    field, hint = page.locator("#class-name"), page.locator("#class-hint")
    press(page, "ArrowRight", "c")
    field.press_sequentially("JU")
    expect(hint).to_have_text("Enter: a point of jump; Shift+Enter: new class JU")
    press(page, "Enter", "ArrowRight", "c")
    field.press_sequentially("stand still")
    press(page, "Enter")
    names = page.locator("#classes .name")
    expect(names).to_have_text(["wave", "jump", "stand still"])
    press(page, "c")
    field.press_sequentially("jum")
    press(page, "Shift+Enter")
    expect(names).to_have_text(["wave", "jump", "stand still", "jum"])
    press(page, "ArrowRight", "4")
    saved(page)
    assert [row[::2] for row in own.rows] == [
        ("jump", frame_text(1)),
        ("stand still", frame_text(2)),
        ("jum", frame_text(3)),
    ]
    page.get_by_role("button", name="Remove the class wave").click()
    expect(names).to_have_text(["jump", "stand still", "jum"])
    assert (own.data / "classes.txt").read_text() == "jump\nstand still\njum\n"
    press(page, "c")
    field.press_sequentially("a/b")
    press(page, "Enter")
    expect(page.locator("#problem-text")).to_have_text(re.compile("without '/'"))


def test_a_video_that_no_browser_plays_is_converted_frame_by_frame(
    page: Page, data: Path, video: Path
) -> None:
    path = write_video(data.parent / "film.avi", range(90), codec="mpeg4", g="45")
    for run in labelling(data, video, path, "--classes", "wave"):
        visit(page, run.url)
        press(page, "ArrowRight", "1", "n")
        expect(page).to_have_title(re.compile("^film "))
        expect(page.locator("#preparing")).to_be_hidden()
        expect(page.locator("#points button")).to_have_count(0)
        press(page, *["ArrowRight"] * 31, "1", "l")
        saved(page)
        pictured(page, 89)
        press(page, "ArrowUp")
        pictured(page, 31)
        press(page, "p")
        expect(page).to_have_title(re.compile("^odd "))
        expect(page.locator("#frame")).to_have_text("frame 1 of 0 to 239")  # where one has stopped
        assert run.rows == [("wave", "odd", frame_text(1)), ("wave", "film", "31")]


def test_times_count_from_the_first_frame(page: Page, data: Path) -> None:
    """Whatever its own time stamp is."""
    mp4 = write_video(data.parent / "late.mp4", range(12, 60))
    webm = write_video(data.parent / "later.webm", range(20, 60), codec="libvpx")
    for run in labelling(data, mp4, webm, "--classes", "wave"):
        visit(page, run.url)
        for name in ("late", "later"):
            expect(page).to_have_title(re.compile(f"^{name} "))
            expect(page.locator("#preparing")).to_be_hidden()
            press(page, "1", *["ArrowRight"] * 10, "1")
            saved(page)
            pictured(page, 10)
            assert [point for _, each, point in run.rows if each == name] == ["0", "10"]
            press(page, "n")


def test_a_kill_loses_nothing_that_was_saved_and_the_page_takes_no_more(
    page: Page, own: Labelling
) -> None:
    visit(page, own.url)
    press(page, "1", "ArrowRight", "2")
    saved(page)
    own.process.kill()
    own.process.wait(PATIENCE_S)
    press(page, "ArrowRight", "1")
    expect(page.locator("#saved")).to_have_text("not saved")
    expect(page.get_by_role("alert")).to_have_text(re.compile("hrpro label does not answer"))
    press(page, "ArrowRight", "1")
    expect(page.locator("#points button")).to_have_count(3)
    assert [label for label, _, _ in own.rows] == ["wave", "jump"]


def test_a_disk_that_is_full_for_a_while_loses_nothing(page: Page, labelled: Labelling) -> None:
    visit(page, labelled.url)
    in_the_way = labelled.data / "point_labels" / "points.csv.part"
    in_the_way.mkdir()
    press(page, "1")
    expect(page.get_by_role("alert")).to_have_text(re.compile("not saved: .*Is a directory"))
    press(page, "ArrowRight", "2")  # is not taken
    in_the_way.rmdir()
    saved(page)
    expect(page.get_by_role("alert")).to_be_hidden()
    press(page, "2")
    saved(page)
    assert [row[::2] for row in labelled.rows] == [("wave", "0"), ("jump", frame_text(1))]


def test_a_second_page_does_not_undo_what_the_first_has_saved(
    page: Page, browser: Browser, labelled: Labelling
) -> None:
    visit(page, labelled.url)
    other = browser.new_page()
    visit(other, labelled.url)
    press(page, "1")
    saved(page)
    press(other, "ArrowRight", "2")
    expect(other.locator("#problem-text")).to_have_text(re.compile("has been changed by another"))
    other.locator("#reload").click()
    expect(other.get_by_role("button", name="0:00.000 wave")).to_be_visible()  # the first one's
    press(other, "2")
    saved(other)
    other.close()
    assert [row[::2] for row in labelled.rows] == [("wave", "0"), ("jump", frame_text(1))]


def test_the_page_can_be_used_and_heard_without_seeing_it(page: Page, labelled: Labelling) -> None:
    visit(page, labelled.url)
    press(page, "ArrowRight", "2")
    expect(page.get_by_role("log")).to_have_text("odd: 0 pointsjump at 0:00.028")
    slider = page.get_by_role("slider", name="Timeline")
    expect(slider).to_have_attribute("aria-valuetext", "0:00.028")
    expect(page.get_by_role("button", name="0:00.028 jump")).to_have_attribute(
        "aria-current", "true"
    )
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, progress")].filter(
          (each) => !(each.ariaLabel || each.textContent.trim() || each.labels?.length))
          .map((each) => each.outerHTML)"""
    )
    assert nameless == []
    press(page, "h")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    press(page, "1")  # not while the dialog is open
    press(page, "Escape")
    expect(page.get_by_role("dialog", name="Keys")).to_be_hidden()
    page.get_by_role("button", name="Play").focus()
    press(page, "Space")  # the button's own
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    assert len(labelled.rows) == 1
    press(page, "Space", "Home")
    page.get_by_role("button", name="wave").first.focus()
    press(page, "Enter", "ArrowRight", "Enter")  # the focus stays where it is
    expect(page.locator("#points button")).to_have_count(3)
    saved(page)
    assert [row[::2] for row in labelled.rows][::2] == [("wave", "0"), ("wave", frame_text(1))]
