"""`hrpro label` in a real browser: keys that are pressed, and what the CSV has of them."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import pytest
from coded_video import BLOCK, BLOCKS, HEIGHT, write_video
from commands import PATIENCE_S, environment, running
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox --disable-background-networking --disable-component-update --no-first-run "
    "--disable-sync --disable-gpu"
).split()
PATIENCE_MS = 30_000

# Frames at odd times, as telephones record: in ms.
STAMPS = [20 * n + 13 * (n % 3) + 400 * (n > 100) for n in range(240)]

# The number that the picture on the screen says, as each key is pressed and before the page has it.
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
  const see = () => window.pressed.push(window.pictured());
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
    wrong: list[Error] = []
    asked: set[str] = set()
    page.on("pageerror", wrong.append)
    page.on("request", lambda request: asked.add(request.url.split("/")[2]))
    yield page
    page.close()
    assert not wrong
    assert len(asked) == 1


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fractions import Fraction

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


@pytest.fixture
def labelled(data: Path, video: Path) -> Iterator[Labelling]:
    yield from labelling(data, video, "--classes", "wave,jump")


def visit(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.locator("#preparing")).to_be_hidden()
    page.evaluate(WATCH_KEYS)


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def saved(page: Page) -> None:
    expect(page.locator("#saved")).to_have_text(re.compile("^saved in "))


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
    for point, number in enumerate((7, 36, 239)):
        page.locator("#points button").nth(point).click()
        expect(page.locator("#frame")).to_have_text(f"frame {number} of 0 to 239")
        page.evaluate(
            "() => new Promise((done) => requestVideoFrame(done))".replace(
                "requestVideoFrame(done)", "setTimeout(done, 0)"
            )
        )
        assert page.evaluate("() => window.pictured()") == number


@pytest.mark.parametrize("faster", [0, 3])
def test_a_key_while_it_plays_stores_the_frame_on_the_screen(
    page: Page, labelled: Labelling, faster: int
) -> None:
    visit(page, labelled.url)
    press(page, *["f"] * faster, "Space")
    for number in (20, 60, 110):
        expect(page.locator("#frame")).to_have_text(re.compile(rf"^frame ({number}|{number + 1}|"))
