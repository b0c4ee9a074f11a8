"""How good the whole is, on real recordings: the demo, and SBHAR where it is there.

The slowest tests; nothing but the figures and what they rest on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Trained, hrpro_json, running

from hrpro.training.run import read_run

pytest_plugins = ("cli_fixtures",)

SBHAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "sbhar"
PATIENCE_S = 1800.0
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def check_nothing_is_lost(figures: dict[str, Any]) -> None:
    assert figures["snippets_sent"] == figures["snippets_processed"] > 0
    assert figures["lost"] == figures["duplicated"] == 0


def finish(*arguments: object) -> str:
    """A command that may take minutes; returns what it prints on stdout."""
    with running(*arguments) as process:
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, stderr
    return str(stdout)


def test_the_demo_finds_the_actions(tmp_path: Path) -> None:
    out, file = tmp_path / "demo", tmp_path / "figures.json"
    shown = finish("demo", "--speed", "max", "--json", file, "--out", out)
    figures = json.loads(file.read_text())
    assert figures["offline_average_map"] >= 0.7
    assert figures["retention"] >= 0.95
    assert figures["lookahead_s"] <= 4.0
    check_nothing_is_lost(figures)
    named = [line.split(": ", 1)[1] for line in shown.splitlines() if line.startswith("picture: ")]
    assert len(named) == 2
    for picture in map(Path, named):
        assert picture.is_relative_to(out)
        assert picture.read_bytes().startswith(PNG_SIGNATURE)


def test_sbhar(tmp_path: Path) -> None:
    if not SBHAR.is_dir():
        pytest.skip(f"{SBHAR} IS NOT THERE: the accuracy on SBHAR was NOT measured")
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    finish("train", SBHAR, "--out", run, "--seed", 0)
    offline = json.loads(finish("evaluate", run, "--data", SBHAR, "--json"))
    assert offline["average_map"] >= 0.75
    finish("export", run, "--out", bundle)
    figures = json.loads(finish("stream-eval", bundle, "--data", SBHAR, "--json"))
    # The engine's arithmetic is not torch's, but the accuracy is the same.
    assert figures["offline_average_map"] == pytest.approx(offline["average_map"], abs=0.002)
    assert figures["retention"] >= 0.95
    assert figures["lookahead_s"] <= 4.0
    check_nothing_is_lost(figures)


def test_training_looks_at_no_test_labels(trained: Trained, tmp_path: Path) -> None:
    data = Path(shutil.copytree(trained.data, tmp_path / "data"))
    (data / "gt_full.json").unlink()
    shutil.rmtree(data / "features" / "test")
    (data / "split_test.txt").unlink()
    run = tmp_path / "run"
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads((trained.run / "run.json").read_text())["config"]))
    summary = hrpro_json("train", data, "--out", run, "--config", config)
    assert summary["points"] == trained.summary["points"]
    expected, got = read_run(trained.run)[1], read_run(run)[1]
    for one, other in ((expected.snippet, got.snippet), (expected.instance, got.instance)):
        weights, others = one.state_dict(), other.state_dict()
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights)
