"""What is recorded of a run that is stopped and goes on: each step once."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hrpro.training.config import InstanceStageConfig, SnippetStageConfig, TrainingConfig
from hrpro.training.recorder import Recorder

CONFIG = TrainingConfig(
    snippet_stage=SnippetStageConfig(steps=50), instance_stage=InstanceStageConfig(steps=30)
)


SNIPPET_STEPS, INSTANCE_STEPS = range(1, 51), range(1, 31)


@pytest.fixture(autouse=True)
def _a_second_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files are read in the order of the seconds in their names, as runs go on."""
    seconds = itertools.count(1_000_000_000)
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))


def record(
    folder: Path, resumed: tuple[str, int] | None, snippet: range, instance: range, loss: float
) -> None:
    with Recorder(folder, CONFIG, Console(quiet=True), resumed) as recorder:
        for stage, steps in (("snippet", snippet), ("instance", instance)):
            for step in steps:
                recorder(stage, step, {"loss": loss})


def recorded(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and loss by stage as TensorBoard has them, which is what metrics.jsonl has."""
    scalars: dict[str, list[tuple[int, float]]] = {}
    for stage in ("snippet", "instance"):
        events = EventAccumulator(str(folder / "tensorboard" / stage))
        events.Reload()
        tags = events.Tags()["scalars"]
        assert tags in ([], [f"{stage}/loss"])
        scalars[stage] = [(each.step, each.value) for tag in tags for each in events.Scalars(tag)]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {
        stage: [(line["step"], line["loss"]) for line in lines if line["stage"] == stage]
        for stage in scalars
    } == scalars
    return scalars


NOTHING = range(0)


@pytest.mark.parametrize(
    ("snippet", "instance", "resumed", "kept_snippet", "kept_instance"),
    [
        # Stopped after step 30, but saved after 25: 10 and 20 stay.
        (range(1, 31), NOTHING, ("snippet", 25), [10, 20], []),
        # The step that was saved is done, and not to come.
        (range(1, 31), NOTHING, ("snippet", 20), [10, 20], []),
        # Steps of the first stage stay whatever the step of the second one.
        (SNIPPET_STEPS, range(1, 21), ("instance", 10), [10, 20, 30, 40, 50], [10]),
        # Stage 2 was begun, but nothing was saved since step 40 of stage 1.
        (SNIPPET_STEPS, range(1, 21), ("snippet", 40), [10, 20, 30, 40], []),
    ],
)
def test_after_going_on_each_step_is_there_once(
    snippet: range,
    instance: range,
    resumed: tuple[str, int],
    kept_snippet: list[int],
    kept_instance: list[int],
    tmp_path: Path,
) -> None:
    record(tmp_path, None, snippet, instance, loss=1.0)
    stage, step = resumed
    rest = {
        "snippet": (range(step + 1, 51), INSTANCE_STEPS),
        "instance": (NOTHING, range(step + 1, 31)),
    }[stage]
    record(tmp_path, resumed, *rest, loss=2.0)
    # What was kept is of the first time, the rest of the second.
    assert recorded(tmp_path) == {
        "snippet": [(each, 1.0 if each in kept_snippet else 2.0) for each in range(10, 51, 10)],
        "instance": [(each, 1.0 if each in kept_instance else 2.0) for each in range(10, 31, 10)],
    }


def test_a_run_that_begins_again_has_nothing_of_the_one_before(tmp_path: Path) -> None:
    record(tmp_path, None, SNIPPET_STEPS, INSTANCE_STEPS, loss=1.0)
    record(tmp_path, None, range(1, 11), NOTHING, loss=2.0)
    assert recorded(tmp_path) == {"snippet": [(10, 2.0)], "instance": []}


def test_what_is_recorded_is_in_the_files_at_once(tmp_path: Path) -> None:
    """A run that is killed closes nothing."""
    with Recorder(tmp_path, CONFIG, Console(quiet=True)) as recorder:
        recorder("snippet", 10, {"loss": 0.5})
        recorder("instance", 30, {"loss": 0.25})  # the last one
        assert recorded(tmp_path) == {"snippet": [(10, 0.5)], "instance": [(30, 0.25)]}
