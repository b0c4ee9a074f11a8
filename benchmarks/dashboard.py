"""What the dashboard costs, and its pictures: python benchmarks/dashboard.py BUNDLE --data DATA

An engine, feeders at the pace of the snippet clock, `hrpro dashboard` and headless Chromium, each a
process of its own. The streams are the recordings of DATA, one after the other, each stream
beginning with another one. Measured, over some seconds in which all streams are live:

    frames       from one frame of the page to the next
    page         share of one core that the page's main thread works, and of that in scripts
    browser      CPU time of all of Chromium's processes, of one core
    server       CPU time of the dashboard's server, of one core

With --pictures FOLDER, two screenshots of five streams are made instead, light and dark.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from hrpro.clients.engine_process import running_module

CHROMIUM = "/usr/bin/chromium"
CHROMIUM_ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
HRPRO = (sys.executable, "-m", "hrpro.clients.cli")
ANY_PORT = "tcp://127.0.0.1:*"
PATIENCE_S = 120.0
PICTURE_STREAMS, PICTURE_SPEED, PICTURE_SPAN_S = 5, 6.0, 110.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

# The intervals of the page's frames, in ms.
FRAMES = """seconds => new Promise(resolve => {
    const intervals = [];
    const until = performance.now() + 1000 * seconds;
    let before = performance.now();
    const frame = at => {
        intervals.push(at - before);
        before = at;
        if (at < until) requestAnimationFrame(frame); else resolve(intervals);
    };
    requestAnimationFrame(frame);
})"""


def main() -> None:
    """Prints one JSON object, or writes the pictures."""
    arguments = _arguments()
    count = PICTURE_STREAMS if arguments.pictures else arguments.streams
    speed = PICTURE_SPEED if arguments.pictures else 1.0
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = write_streams(arguments.data, Path(folder), count, minutes=15)
        engine = stack.enter_context(running_module(_engine_command(arguments.bundle)))
        feeding = _process("feed", "features", *files, "--to", engine.addresses.feed)
        stack.enter_context(_running([*feeding, "--speed", str(speed)]))
        sides = ("--events", engine.addresses.events, "--control", engine.addresses.control)
        command = _process("dashboard", *sides, "--http", "127.0.0.1:0", "--json")
        server = stack.enter_context(_running(command))
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=list(CHROMIUM_ARGUMENTS)
        )
        if arguments.pictures:
            take_pictures(browser, url, arguments.pictures)
        else:
            print(json.dumps(measure(browser, url, count, arguments.seconds, server.pid)))
        browser.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--pictures", type=Path)
    return parser.parse_args()


def write_streams(data: Path, folder: Path, count: int, minutes: float) -> list[Path]:
    """Recordings of so many minutes (25 frames/s, 16 frames a snippet), one after the other."""
    recordings = [
        np.load(file, allow_pickle=False) for file in sorted(data.glob("features/*/*.npy"))
    ]
    files = []
    for n in range(count):
        first = n % len(recordings)
        turned = np.concatenate(recordings[first:] + recordings[:first])
        turned = np.roll(turned, -7 * n, axis=0)
        snippets = int(minutes * 60 * 25 / 16)
        files.append(folder / f"cam{n + 1}.npy")
        np.save(files[-1], np.resize(turned, (snippets, turned.shape[1])))
    return files


def _engine_command(bundle: Path) -> list[str]:
    sides = [part for side in ("feed", "events", "control") for part in (f"--{side}", ANY_PORT)]
    command = ["hrpro.clients.cli", "serve", str(bundle), "--json", "--state", "none", *sides]
    return [*command, "--set", "threads=1"]


def _process(*arguments: object) -> list[str]:
    return [*HRPRO, *map(str, arguments)]


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# ---- measuring ---------------------------------------------------------------------------------


def measure(browser: Browser, url: str, count: int, seconds: float, server: int) -> dict[str, Any]:
    """Of a page of 1280 x 800 on which all streams are live, and have been for a while."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(url)
    live = f"document.querySelectorAll('.chip[data-state=live]').length >= {min(count, 8)}"
    _until(page, f"document.querySelectorAll('.row').length === {count} && {live}")
    page.wait_for_timeout(15_000)  # so that there are actions, and curves of some length
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    before, began_s = _spent(browser, session, server), time.monotonic()
    intervals = np.sort(page.evaluate(FRAMES, seconds))
    after, took_s = _spent(browser, session, server), time.monotonic() - began_s
    shares = {name: round((after[name] - before[name]) / took_s, 3) for name in before}
    p50, p99 = np.percentile(intervals, [50, 99])
    return {
        "streams": count,
        "drawn": page.locator("canvas").count(),
        "bars": page.locator(".bar-of-action").count(),
        "frame_ms": {
            "p50": round(float(p50), 1),
            "p99": round(float(p99), 1),
            "max": round(float(intervals[-1]), 1),
        },
        "shares_of_a_core": shares,
    }


def _spent(browser: Browser, session: Any, server: int) -> dict[str, float]:
    """CPU seconds so far."""
    metrics = {
        each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]
    }
    processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    fields = Path(f"/proc/{server}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return {
        "page": metrics["TaskDuration"],
        "page_scripts": metrics["ScriptDuration"],
        "browser": sum(each["cpuTime"] for each in processes),
        "server": (int(fields[11]) + int(fields[12])) / _TICKS_PER_S,
    }


# ---- pictures ----------------------------------------------------------------------------------


def take_pictures(browser: Browser, url: str, folder: Path) -> None:
    """Once there are two minutes of each stream, and something goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    page.goto(url)
    page.evaluate("import('/static/main.js').then(({ model }) => { window.model = model; })")
    _until(
        page,
        f"""model.rows.size === {PICTURE_STREAMS} && model.openActions().length > 2
            && [...model.rows.values()].every(each => each.head * model.snippetS > {PICTURE_SPAN_S})
        """,
    )
    for theme in ("light", "dark"):
        _picture(page, theme, folder / f"dashboard-{theme}.png")


def _until(page: Page, expression: str) -> None:
    """Asked from outside: the page's policy forbids Playwright to evaluate in it."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not page.evaluate(expression):
        assert time.monotonic() < deadline_s, f"it did not happen: {expression}"
        page.wait_for_timeout(100)


def _picture(page: Page, theme: str, file: Path) -> None:
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    page.wait_for_timeout(500)
    page.screenshot(path=file)
    with Image.open(file) as picture:  # a palette is a third of the bytes
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    main()
