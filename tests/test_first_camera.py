"""docs/first-camera.md from its first line to its last, with short videos and few steps."""

from __future__ import annotations

import csv
import json
import urllib.request
from pathlib import Path

import pytest
from commands import ANY_PORT, PATIENCE_S, command_lines, wait_for
from following import Place

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "first-camera.md"
SHORTER = {
    "python docs/stick_figure.py videos": f"python {ROOT}/docs/stick_figure.py videos 5 25",
    "--set snippet_stage.steps=200": "--set snippet_stage.steps=60 "
    "--set instance_stage.steps=60 --set threads=1",
    " --open": "",
    **{f"tcp://127.0.0.1:555{n}": ANY_PORT for n in (5, 6, 7)},
}


def ask(url: str, data: bytes | None = None, **headers: str) -> tuple[bytes, str]:
    """What a page of hrpro label would ask; the answer and its ETag."""
    method = "GET" if data is None else "PUT"
    headers["Origin"] = "/".join(url.split("/")[:3])
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return answer.read(), answer.headers["ETag"] or ""


def truth(folder: Path) -> dict[str, list[tuple[str, float, float]]]:
    """What the drawn figure does, from when to when."""
    rows: dict[str, list[tuple[str, float, float]]] = {}
    with (folder / "videos" / "truth.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            times_s = float(row["start_s"]), float(row["end_s"])
            rows.setdefault(row["video"], []).append((row["action"], *times_s))
    return rows


def label(place: Place, line: str) -> None:
    """Press a key in the middle of each action."""
    actions = truth(place.folder)
    with place.beside(line) as page:
        assert page.stdout is not None
        assert "0 so far" in page.stdout.readline()
        url = page.stdout.readline().split()[1]
        for number in range(4):
            points = f"{url}api/videos/{number}/points"
            version = ask(points)[1]
            pressed = [
                (action, (start_s + end_s) / 2)
                for action, start_s, end_s in actions[f"clip{number + 1}"]
            ]
            ask(points, json.dumps(pressed).encode(), **{"If-Match": version})
        page.terminate()
        assert page.wait(PATIENCE_S) == 0


def test_from_nothing_to_events(tmp_path: Path) -> None:
    place = Place(tmp_path, **SHORTER)
    (draw,) = [line for line in PAGE.read_text().splitlines() if "stick_figure.py videos" in line]
    place.shell(draw)
    for line in command_lines(PAGE, "2. Features"):
        place.shell(line)
    (page, check) = command_lines(PAGE, "3. Points")
    label(place, page)
    checked = place.shell(check)
    assert "0 errors, 1 warnings" in checked
    assert "no annotated action in the test split: nothing can be measured" in checked
    (train,) = command_lines(PAGE, "4. Training")
    place.shell(train)
    (export,) = command_lines(PAGE, "5. A bundle")
    place.shell(export)
    (serve, watch, _dashboard, video, _camera) = command_lines(PAGE, "6. Live")
    with place.beside(serve, "--json") as served:
        assert served.stdout is not None
        ready = json.loads(served.stdout.readline())
        place.puts |= {
            "tcp://127.0.0.1:5555": ready["feed"],
            "tcp://127.0.0.1:5556": ready["events"],
        }
        with place.beside(watch, "--jsonl", "seen.jsonl"):
            assert place.shell(video + " --speed max").startswith("clip5: 39 snippets, 0 skipped")
            seen = place.folder / "seen.jsonl"
            wait_for(lambda: seen.exists() and '"kind": "ended"' in seen.read_text())

    said = [json.loads(each) for each in seen.read_text().splitlines()]
    found = [each for each in said if each["type"] == "event" and each["kind"] == "end"]
    done = truth(place.folder)["clip5"]
    assert [each["label"] for each in found] == [action for action, _, _ in done]
    for event, (_, start_s, end_s) in zip(found, done, strict=True):
        assert event["start_s"] == pytest.approx(start_s, abs=1.3)
        assert event["end_s"] == pytest.approx(end_s, abs=1.3)
