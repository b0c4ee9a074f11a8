"""Two processes on one global batch learn what one process learns from it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import assignments, environment, hrpro
from tiny_data import write_tiny_data

# What is dropped is drawn by each process for itself: nothing here. bfloat16 would round what the
# order of sums changes to 1/256.
SET = assignments(
    {
        "threads": 1,
        "device": "cpu",
        "precision": "float32",
        "model": {"blocks": 1, "attention_past": 8, "instance_width": 16, "dropout": 0},
        "snippet_stage": {"steps": 20, "batch_size": 6, "crop_snippets": 40},
        "instance_stage": {"steps": 20, "batch_size": 32, "dropout": 0},
    }
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel") / "tiny"
    write_tiny_data(folder)
    return folder


def torchrun(*arguments: object) -> list[str]:
    """A command as two processes that talk over loopback (gloo)."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    return [*run, *rendezvous, "-m", "hrpro.clients.cli", *map(str, arguments)]


def by_two(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        torchrun(*arguments),
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_learn_what_one_learns(data: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    hrpro("train", data, "--out", one, *SET)
    said = by_two("train", data, "--out", two, *SET, "--json")
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["recordings"] == 6  # the first process alone speaks
    assert len(rows(one)) == len(rows(two)) == 4
    for expected, got in zip(rows(one), rows(two), strict=True):
        assert got.pop("stage") == expected.pop("stage")
        # Sums over processes are added up in another order.
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name in ("snippet.pt", "instance.pt"):
        expected, got = (torch.load(run / name, weights_only=True) for run in (one, two))
        for key in expected:
            torch.testing.assert_close(got[key], expected[key], rtol=1e-3, atol=1e-4)


def test_a_batch_that_cannot_be_shared_is_refused(data: Path, tmp_path: Path) -> None:
    said = by_two(
        "train", data, "--out", tmp_path / "run", *SET, "--set", "snippet_stage.batch_size=5"
    )
    assert said.returncode != 0
    assert "snippet_stage.batch_size: expected a multiple of 2 processes, got 5" in said.stderr


def test_two_processes_that_were_stopped_go_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    dropping = (*SET, "--set", "model.dropout=0.3", "--set", "instance_stage.dropout=0.3")
    dropping += ("--set", "snippet_stage.steps=200")  # the signal comes long before the end
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert by_two("train", data, "--out", whole, *dropping).returncode == 0
    command = torchrun("train", data, "--out", run, *dropping)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        # Once both have made steps: before, one of them may not be in training yet.
        while process.poll() is None and not _size(run / "metrics.jsonl"):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)  # torchrun hands it on
        _, said = process.communicate(timeout=60)
    assert not (run / "run.json").exists() and (run / "checkpoint.pt").exists(), said
    assert by_two("train", data, "--out", run, *dropping, "--resume").returncode == 0
    assert (run / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
