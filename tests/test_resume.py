"""Stopping and going on: bit for bit, and only with the same settings and data."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import assignments, hrpro, refusal, running
from rich.console import Console
from tiny_data import write_tiny_data

from hrpro.training import checkpoint, instance_stage
from hrpro.training.checkpoint import TrainingStopped, write_atomically
from hrpro.training.config import TrainingConfig
from hrpro.training.data import read_training_split
from hrpro.training.run import RunError, data_digest, read_run
from hrpro.training.session import train_run

# Saved after every step: what is left by a kill -9 is then just one step old.
OFTEN = ("--set", "checkpoint_s=0")
SET = assignments(
    {
        "threads": 1,
        "model": {"blocks": 1, "attention_past": 8, "instance_width": 16},
        "snippet_stage": {"steps": 40, "batch_size": 4, "crop_snippets": 40},
        "instance_stage": {"steps": 40, "batch_size": 32},
    }
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "tiny"
    write_tiny_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path) -> Path:
    """A run that was never stopped."""
    run = data.parent / "whole"
    hrpro("train", data, "--out", run, *SET)
    return run


@pytest.fixture
def config(whole: Path) -> TrainingConfig:
    """As it was given by the command, for training in this process."""
    return TrainingConfig.model_validate(read_run(whole)[0].config.model_dump())


def stopped(
    data: Path, run: Path, stage: str, step: int, number: signal.Signals, *more: str
) -> tuple[str, int]:
    """Train until a step is recorded, then send a signal; what was said and the exit code."""
    metrics = run / "metrics.jsonl"
    wanted = f'{{"stage": "{stage}", "step": {step},'
    with running("train", data, "--out", run, *SET, "--json", *more) as process:
        while process.poll() is None:
            if metrics.exists() and wanted in metrics.read_text():
                process.send_signal(number)
                break
        _, said = process.communicate(timeout=60)
        return said, process.returncode


def same(run: Path, other: Path) -> None:
    assert (run / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    for name in ("snippet.pt", "instance.pt"):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (run, other))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_that_was_stopped_twice_ends_as_if_it_had_not_been(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    said, code = stopped(data, run, "snippet", 10, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert "SIGTERM: stopped; the state is saved in" in said
    assert not (run / "run.json").exists() and not (run / "snippet.pt").exists()
    # kill -9 saves nothing: it goes on from the last state.
    said, code = stopped(data, run, "instance", 10, signal.SIGKILL, "--resume", *OFTEN)
    assert code == -signal.SIGKILL
    said = hrpro("train", data, "--out", run, *SET, "--resume").stdout
    assert "going on after step" in said and "of stage instance" in said
    same(run, whole)
    assert not (run / "checkpoint.pt").exists()


def test_without_a_state_resume_begins(
    data: Path, whole: Path, config: TrainingConfig, tmp_path: Path
) -> None:
    train_run(data, tmp_path / "run", config, Console(quiet=True), resume=True)
    same(tmp_path / "run", whole)


def test_a_signal_between_the_stages_finds_the_first_one_saved(
    data: Path,
    whole: Path,
    config: TrainingConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rank = instance_stage.rank_proposals

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return rank(*arguments)

    monkeypatch.setattr(instance_stage, "rank_proposals", signalled)
    run = tmp_path / "run"
    with pytest.raises(TrainingStopped, match="the state is saved in"):
        train_run(data, run, config, Console(quiet=True))
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 40
    monkeypatch.undo()
    train_run(data, run, config, Console(quiet=True), resume=True)
    same(run, whole)


def test_a_signal_while_processes_agree_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stage:
        name, steps = "snippet", 40

        def state_dict(self) -> dict[str, Any]:
            return {"weights": torch.ones(2)}

        def load_state_dict(self, state: Any) -> None:
            raise NotImplementedError

    def signalled(votes: torch.Tensor) -> torch.Tensor:
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGTERM)  # this process has voted already
        return votes

    monkeypatch.setattr(checkpoint, "total", signalled)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.after_step(Stage(), 7)
        assert not (tmp_path / "checkpoint.pt").exists()  # the others go on
        with pytest.raises(TrainingStopped, match="SIGTERM: stopped"):
            checkpoints.after_step(Stage(), 8)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 8


def test_a_loss_that_is_no_number_ends_training(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rate = ("--set", "snippet_stage.learning_rate=1e30")
    said = hrpro("train", data, "--out", run, *SET, *OFTEN, *rate, status=1).stderr
    assert "of stage snippet: the loss is nan; expected a finite number, lower " in said
    state = torch.load(run / "checkpoint.pt", weights_only=True)  # the last good one
    assert all(torch.isfinite(each).all() for each in state["state"]["model"].values())


def test_a_finished_run_is_left_alone(data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = (run / "snippet.pt").stat().st_mtime_ns
    assert "the run is finished" in hrpro("train", data, "--out", run, *SET, "--resume").stdout
    said = refusal("train", data, "--out", run, *SET, "--resume", "--seed", 1)
    assert "run.json: made with other settings: seed was 0, is 1" in said
    (run / "run.json").write_text((run / "run.json").read_text().replace('"hop"', '"hip"'))
    said = refusal("train", data, "--out", run, *SET, "--resume")
    assert "run.json: made with other data" in said
    assert (run / "snippet.pt").stat().st_mtime_ns == before


def test_nothing_is_trained_over_a_run(data: Path, whole: Path, halfway: Path) -> None:
    for run, name in ((whole, "run.json"), (halfway, "checkpoint.pt")):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        said = refusal("train", data, "--out", run, *SET)
        assert said == (
            f"{run}: expected no run, found {name}; --resume goes on with it, a new run needs "
            "another folder"
        )
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_any_value_that_changes_is_seen(
    data: Path, whole: Path, config: TrainingConfig, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(data, tmp_path / "data"))
    before = data_digest(read_training_split(other))
    assert before == data_digest(read_training_split(data))
    path = other / "features" / "train" / "train3.npy"
    features = np.load(path)
    features[17, 2] += np.float32(0.5)  # neither at an end nor in the middle
    np.save(path, features)
    assert data_digest(read_training_split(other)) != before
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    with pytest.raises(RunError, match=r"run\.json: made with other data"):
        train_run(other, run, config, Console(quiet=True), resume=True)


def test_a_damaged_bit_is_seen(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "instance.pt"
    content = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["heads.score.0.weight"].numpy().tobytes()
    content[content.index(weights) + len(weights) // 2] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)  # torch says nothing
    with pytest.raises(RunError, match=r"instance\.pt: expected the weights .* is damaged"):
        read_run(tmp_path / "run")


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    write_atomically(path, {"step": 1})
    with pytest.raises(pickle.PicklingError):  # a class of nowhere
        write_atomically(path, {"step": 2, "more": type("Local", (), {})()})
    assert torch.load(path, weights_only=True) == {"step": 1}


@pytest.fixture(scope="module")
def interrupted(data: Path) -> Path:
    run = data.parent / "interrupted"
    stopped(data, run, "snippet", 10, signal.SIGINT)
    assert (run / "checkpoint.pt").exists()
    return run


@pytest.fixture
def halfway(interrupted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def test_what_does_not_belong_together_is_refused(data: Path, halfway: Path) -> None:
    said = refusal(
        "train", data, "--out", halfway, *SET, "--resume",
        "--set", "model.blocks=2", "--set", "threads=2",
    )  # fmt: skip
    assert "made with other settings: model.blocks was 1, is 2" in said and "threads" not in said

    other = data.parent / "other"
    if not other.exists():
        shutil.copytree(data, other)
        points = other / "point_labels" / "points.csv"
        points.write_text(points.read_text().replace("hop", "spin", 1))
    assert "made with other data" in refusal("train", other, "--out", halfway, *SET, "--resume")

    checkpoint = halfway / "checkpoint.pt"
    torn = checkpoint.read_bytes()[:-100]
    checkpoint.write_bytes(torn)
    assert "checkpoint.pt: expected the state of a run" in refusal(
        "train", data, "--out", halfway, *SET, "--resume"
    )
    assert checkpoint.read_bytes() == torn  # it is for the user to remove


def test_a_torn_line_of_the_record_is_dropped(
    data: Path, whole: Path, config: TrainingConfig, halfway: Path
) -> None:
    with (halfway / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "snippet", "st')
    train_run(data, halfway, config, Console(quiet=True), resume=True)
    same(halfway, whole)
    steps = [
        json.loads(line)["step"] for line in (whole / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [10, 20, 30, 40] * 2
