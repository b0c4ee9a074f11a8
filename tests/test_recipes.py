"""docs/recipes.md as it stands: commands and programs, with other ports and bundles of ours."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from commands import (
    ANY_PORT,
    PATIENCE_S,
    command_lines,
    engine,
    published_in_process,
    read_json_lines,
    wait_for,
)
from following import Place
from other_bundles import changed_bundle, rewritten_bundle
from tiny_model import tiny_recording
from triton_server import free_port

from hrpro.engine.messages import ActionEvent, FinalProposal

if TYPE_CHECKING:
    from hrpro.export.bundle import Bundle

RECIPES = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
LENGTH = 60


@pytest.fixture
def place(bundle: Bundle, tmp_path: Path) -> Place:
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    changed_bundle(bundle.folder, tmp_path / "other-bundle", "localization.event_start=0.6")
    np.save(tmp_path / "cam1.npy", tiny_recording(LENGTH, seed=3))
    return Place(tmp_path)


def ends(bundle: Path) -> list[ActionEvent]:
    """The actions of cam1."""
    recording = tiny_recording(LENGTH, seed=3)
    published = published_in_process(bundle, {"cam1": recording})["cam1"]
    return [each for each in published if isinstance(each, ActionEvent) and each.kind == "end"]


def near(*times_s: float | None) -> Any:
    """Times, but for how other batches round."""
    return pytest.approx(times_s, abs=1e-4)


FEED = "hrpro feed features cam1.npy --to tcp://127.0.0.1:5555 --speed max"


def test_alert_program_and_table(place: Place) -> None:
    (webhook,) = command_lines(RECIPES, "An alert by webhook")
    (on_event,) = command_lines(RECIPES, "A program for each event")
    (events,) = command_lines(RECIPES, "A table of what happened")
    place.puts["8080"] = str(free_port())
    receiver = [sys.executable, "-W", "error", place.save(RECIPES, "webhook")]
    place.save(RECIPES, "on_event")
    actions = place.folder / "actions.txt"
    expected = ends(place.folder / "bundle")
    jumps = [each for each in expected if each.label == "jump"]
    assert 1 < len(jumps) < len(expected)
    with (
        engine(place.folder / "bundle", state=place.folder / "state") as served,
        subprocess.Popen(receiver, stdout=subprocess.PIPE, text=True) as alerts,
    ):
        place.at(served)
        with place.beside(webhook), place.beside(on_event):
            place.shell(FEED)
            wait_for(
                lambda: actions.exists() and len(actions.read_text().splitlines()) == len(jumps)
            )
            assert alerts.stdout is not None
            assert alerts.stdout.readline() == "cam1: jump\n"
        alerts.kill()
    for line, each in zip(actions.read_text().splitlines(), jumps, strict=True):
        assert line.split()[:2] == [each.stream, each.label]
        assert [float(time_s) for time_s in line.split()[2:]] == near(each.start_s, each.end_s)

    place.shell(events[: events.index(" >")] + " > events.jsonl")
    place.save(RECIPES, "table")
    rows = list(csv.DictReader(place.shell("python -W error table.py").splitlines()))
    expected.sort(key=lambda each: each.start_s)
    assert [row["label"] for row in rows] == [each.label for each in expected]
    assert [float(row["start_s"]) for row in rows] == near(*(each.start_s for each in expected))


def test_another_sensor(place: Place, bundle: Bundle) -> None:
    changes = {"frames_per_s": 50, "snippet_frames": 32}
    wrist = rewritten_bundle(bundle.folder, place.folder / "wrist", changes)
    random = np.random.default_rng(0)
    np.save(place.folder / "samples.npy", random.standard_normal((50 * 32 + 7, 4)))
    with engine(wrist.folder) as served:
        place.at(served)
        place.save(RECIPES, "sensor")
        said = place.shell("python -W error sensor.py")
    assert said.startswith("Ended(stream='wrist', next_index=50, ")


def test_record_replay_and_another_model(place: Place) -> None:
    (record, replay) = command_lines(RECIPES, "Record a problem, and play it again")
    (other, serve, feed) = command_lines(RECIPES, "Try another model on what was recorded")
    with engine(place.folder / "bundle", state=place.folder / "state") as served:
        place.at(served)
        place.puts["tcp://127.0.0.1:5565"] = ANY_PORT
        with place.beside(record, "--json") as recorder:
            assert recorder.stdout is not None
            relay = json.loads(recorder.stdout.readline())["feed"]
            place.shell(FEED.replace("tcp://127.0.0.1:5555", relay))
            recorder.terminate()
            assert recorder.wait(PATIENCE_S) == 0
    place.shell(replay)
    place.shell(other)
    replayed = map(json.loads, (place.folder / "other.jsonl").read_text().splitlines())
    expected = ends(place.folder / "other-bundle")
    starts = [each["start_s"] for each in replayed if each.get("kind") == "end"]
    assert starts == near(*(each.start_s for each in expected))
    assert len(expected) < len(ends(place.folder / "bundle"))

    place.puts |= {f"tcp://127.0.0.1:655{n}": ANY_PORT for n in (5, 6, 7)}
    with place.beside(serve, "--json") as second:
        assert second.stdout is not None
        addresses = json.loads(second.stdout.readline())
        place.puts["tcp://127.0.0.1:6555"] = addresses["feed"]
        place.shell(feed)


def test_surer_events_for_one_camera_first_and_back(place: Place) -> None:
    (canary, watch, everywhere, back) = command_lines(RECIPES, "A new bundle for one camera first")
    (change,) = command_lines(RECIPES, "Fewer, surer events, without training")
    place.shell(change)
    with engine(place.folder / "bundle", state=place.folder / "state") as served:
        place.at(served)

        def bundles() -> tuple[str, str | None]:
            said = json.loads(place.shell("hrpro status tcp://127.0.0.1:5557 --json"))
            return said["bundle_id"], said["canary_bundle_id"]

        first, none = bundles()
        assert none is None
        place.shell(canary)
        assert (chosen := bundles()[1]) not in (None, first)
        with place.beside(watch, "--jsonl", "seen.jsonl"):
            place.shell(FEED)
            seen = place.folder / "seen.jsonl"
            wait_for(lambda: seen.exists() and '"kind": "ended"' in seen.read_text())
        finals = [each for each in read_json_lines(seen) if isinstance(each, FinalProposal)]
        assert {each.bundle_id for each in finals} == {chosen}
        place.shell(everywhere)
        assert bundles() == (chosen, None)
        place.shell(back)
        assert bundles() == (first, None)


def test_a_camera_in_another_network(place: Place) -> None:
    lines = command_lines(RECIPES, "A camera in another network")
    (door, screen, serve, feed, watch) = lines
    shutil.copy(place.folder / "cam1.npy", place.folder / "door1.npy")
    place.shell(door)
    place.shell(screen)
    place.puts |= {f"tcp://192.0.2.1:{port}": ANY_PORT for port in (5555, 5556)}
    place.puts["tcp://127.0.0.1:5557"] = ANY_PORT
    with place.beside(serve, "--json") as served:
        assert served.stdout is not None
        addresses = json.loads(served.stdout.readline())
        place.puts |= {
            "tcp://192.0.2.1:5555": addresses["feed"], "tcp://192.0.2.1:5556": addresses["events"],
        }  # fmt: skip
        with place.beside(watch, "--jsonl", "seen.jsonl"):
            place.shell(feed + " --speed max")
            seen = place.folder / "seen.jsonl"
            wait_for(lambda: seen.exists() and '"kind": "ended"' in seen.read_text())
    assert {each.stream for each in read_json_lines(seen)} == {"door1"}
