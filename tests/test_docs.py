"""The site of docs/: it builds, asks nobody else, its reference is the code's."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from commands import PATIENCE_S, engine
from playwright.sync_api import sync_playwright
from prometheus_client.parser import text_string_to_metric_families
from typer.main import get_command

import hrpro.clients
from hrpro.clients.cli import app
from hrpro.engine.config import EngineConfig
from hrpro.engine.settings import describe
from hrpro.engine.wire import ERROR_CODES
from hrpro.training.config import TrainingConfig

if TYPE_CHECKING:
    from hrpro.export.bundle import Bundle

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CHROMIUM = shutil.which("chromium")


# ---- the site ----------------------------------------------------------------------------------


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "properdocs", "build", "--strict", "--config-file", config]
    return subprocess.run(
        [*map(str, command), "--site-dir", str(site)],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    built = build(ROOT / "mkdocs.yml", folder)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


class Page(HTMLParser):
    """What a page loads by itself, and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = ("src", "srcset", "data", "poster") + (("href",) if tag == "link" else ())
        self.loads += [value for name, value in attributes if name in names and value]
        self.loads += styled(dict(attributes).get("style") or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def styled(css: str) -> list[str]:
    return re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""", css)


def test_a_page_asks_no_other_host_for_anything(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    loads = {load for page in pages for load in Page(page).loads}
    for sheet in site.rglob("*.css"):
        loads |= set(styled(sheet.read_text(encoding="utf-8")))
    assert {load for load in loads if load.endswith(".svg")} == {"data-path.svg"}
    assert len(loads) > 10
    assert not [load for load in loads if re.match(r"(?!data:)(\w+:)?//", load)]
    for script in site.rglob("*.js"):
        assert "fonts.googleapis" not in script.read_text(encoding="utf-8")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: no page was looked at")
def test_pages_work_in_a_browser(site: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{server.server_port}"
    wrong: list[object] = []
    asked: set[str] = set()
    with server, sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-background-networking", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page()
        page.on("pageerror", lambda error: wrong.append((page.url, error)))
        page.on("request", lambda request: asked.add(request.url.split("/")[2]))
        for file in sorted(site.rglob("*.html")):
            page.goto(f"{at}/{file.relative_to(site)}")
        with page.expect_console_message(lambda said: "search ready" in said.text):
            page.goto(f"{at}/index.html")
        page.get_by_role("link", name="Search").click()
        page.locator("#properdocs-search-query").press_sequentially("webhook")
        page.locator("#properdocs-search-results a", has_text="An alert by webhook").wait_for()
        browser.close()
        server.shutdown()
    assert not wrong
    assert asked == {at.removeprefix("http://")}


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    config = tmp_path / "mkdocs.yml"
    generate = DOCS / "reference" / "generate.py"
    config.write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\nhooks: [{generate}]\n")
    page = tmp_path / "docs" / "faq.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(f"{text}\n[away](nowhere.md) [far](concepts.md#nowhere)\n")
    built = build(config, tmp_path / "site")
    assert built.returncode != 0
    assert "contains a link 'nowhere.md'" in built.stderr
    assert "does not contain an anchor '#nowhere'" in built.stderr
    page.write_text(f"{text}\n[away](../engine/nowhere.py)\n")
    built = build(config, tmp_path / "site")
    assert built.returncode != 0
    assert "faq.md: '../engine/nowhere.py' is no file of the project" in built.stderr


# ---- the reference -----------------------------------------------------------------------------


def reference(site: Path, name: str) -> str:
    return Page(site / "reference" / f"{name}.html").text


def test_every_command_and_option_is_in_the_reference(site: Path) -> None:
    text = reference(site, "command-line")

    def look(command: object, name: str) -> int:
        assert name in text
        for option in (opt for each in command.params for opt in each.opts):  # type: ignore[attr-defined]
            assert not option.startswith("--") or option == "--help" or option in text
        inner = getattr(command, "commands", {})
        return 1 + sum(look(each, f"{name} {key}") for key, each in inner.items())

    assert look(get_command(app), "hrpro") > 40


@pytest.mark.parametrize(
    ("name", "model"), [("engine-settings", EngineConfig), ("training-settings", TrainingConfig)]
)
def test_every_setting_is_in_the_reference(site: Path, name: str, model: type) -> None:
    text = reference(site, name)
    for row in describe(model):
        assert row.path in text
        assert " ".join(row.description.split()) in text


def test_what_python_exports_is_in_the_reference(site: Path) -> None:
    text = reference(site, "python")
    for name in hrpro.clients.__all__:
        assert f"\n{name}" in text
    assert "send(features: NDArray[np.float32], timeout_s: float | None = None) -> None" in text


def test_error_codes_are_in_the_reference(site: Path) -> None:
    text = reference(site, "error-codes")
    for code, meaning in ERROR_CODES.items():
        assert code in text and meaning in text


def test_the_metrics_of_the_reference_are_those_of_an_engine(site: Path, bundle: Bundle) -> None:
    told = set(re.findall(r"\bhrpro_\w+", reference(site, "metrics").split("make docs")[1]))
    with (
        engine(bundle.folder, "--metrics", "127.0.0.1:0") as served,
        urllib.request.urlopen(served.metrics, timeout=10) as answer,
    ):
        families = [*text_string_to_metric_families(answer.read().decode())]
    ending = {"counter": "_total", "info": "_info"}
    named = {family.name + ending.get(family.type, "") for family in families}
    # Which a text does not say to be of the distribution that they belong to.
    apart = ("_gcount", "_gsum")
    assert told == {each for each in named if each[:6] == "hrpro_" and not each.endswith(apart)}
