"""What a data set may bring that is odd but allowed: what comes of it is defined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_data import CLASSES, tiny_truth, write_tiny_data

from hrpro.engine.config import WindowConfig
from hrpro.engine.settings import SettingsError
from hrpro.training.config import (
    InstanceStageConfig,
    ModelConfig,
    SnippetStageConfig,
    TrainingConfig,
)
from hrpro.training.data import read_test_split, read_training_split
from hrpro.training.data_config import DataError
from hrpro.training.evaluate import evaluate
from hrpro.training.optimisation import precision
from hrpro.training.session import train_run
from hrpro.training.snippet_stage import snippet_scores
from hrpro.training.train import TrainedModel, train

QUICK = TrainingConfig(
    threads=1,
    model=ModelConfig(blocks=1, attention_past=8, instance_width=16),
    snippet_stage=SnippetStageConfig(steps=20, batch_size=8, crop_snippets=40, learning_rate=1e-2),
    instance_stage=InstanceStageConfig(steps=20, batch_size=32),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_data(tmp_path / "tiny")
    return tmp_path / "tiny"


def trained(folder: Path, config: TrainingConfig = QUICK) -> TrainedModel:
    def report(stage: str, step: int, losses: dict[str, float]) -> None:
        assert all(np.isfinite(value) for value in losses.values()), (stage, step, losses)

    return train(config, read_training_split(folder, config.data), report)


def shorten(folder: Path, name: str, length: int) -> None:
    """Leave the first snippets of a recording, and the points that lie in them."""
    split = "train" if name.startswith("train") else "test"
    path = folder / "features" / split / f"{name}.npy"
    np.save(path, np.load(path)[:length])
    points = folder / "point_labels" / "points.csv"
    header, *rows = points.read_text().splitlines()
    kept = [r for r in rows if r.split(",")[1] != name or int(r.split(",")[2]) < 16 * length]
    points.write_text("\n".join([header, *kept]) + "\n")


def add_points(folder: Path, *rows: str) -> None:
    with (folder / "point_labels" / "points.csv").open("a") as file:
        file.write("".join(f"{row}\n" for row in rows))


@pytest.mark.parametrize("length", [1, 2])
def test_a_recording_shorter_than_the_kernel(folder: Path, length: int) -> None:
    for name in ("train0", "test0"):
        shorten(folder, name, length)
    add_points(folder, "hop,train0,0")
    model = trained(folder)
    data = read_test_split(folder, CLASSES)
    assert len(data.recordings[0]) == length
    output = snippet_scores(model.snippet, data.recordings[0].features)
    assert output.scores.shape == (length, 2) and np.isfinite(output.scores).all()
    # Its ground truth lies behind its end and stays: those instances are missed.
    found = evaluate(
        model,
        data,
        tiny_truth(folder),
        QUICK.localization,
    )
    assert found.both_stages.instances == 12


def test_a_point_on_the_last_frame(folder: Path) -> None:
    add_points(folder, "hop,train0,959")  # 60 snippets of 16 frames: 0 to 959
    data = read_training_split(folder)
    assert (data.recordings[0].point_index[-1], data.recordings[0].point_label[-1]) == (59, 0)
    trained(folder)
    add_points(folder, "hop,train0,975")  # a video has frames behind its last whole snippet
    assert read_training_split(folder).recordings[0].point_index[-1] == 59
    add_points(folder, "hop,train0,976")
    with pytest.raises(DataError, match=r"line 28.*frame 976 \(snippet 61\).*snippets 0 to 59"):
        read_training_split(folder)


def test_two_points_in_one_snippet_are_one(folder: Path) -> None:
    """Of the same class they say the same; weights come out as with one of them."""
    alone = trained(folder)
    row = (folder / "point_labels" / "points.csv").read_text().splitlines()[1]
    label, name, frame = row.split(",")
    add_points(folder, f"{label},{name},{int(frame) + 3}")
    both = trained(folder)
    for one, other in zip(alone.snippet.parameters(), both.snippet.parameters(), strict=True):
        assert torch.equal(one, other)


def test_two_classes_at_one_point_are_both_learnt(folder: Path) -> None:
    rows = (folder / "point_labels" / "points.csv").read_text().splitlines()[1:]
    frames = [row.split(",")[1:] for row in rows if row.startswith("hop")]
    add_points(folder, *(f"spin,{name},{frame}" for name, frame in frames))
    changed = {"steps": 60, "contrastive_weight": 1.0}  # holds none of them against the other
    config = QUICK.model_copy(
        update={"snippet_stage": QUICK.snippet_stage.model_copy(update=changed)}
    )
    model = trained(folder, config)
    name, frame = frames[0]
    recording = next(r for r in read_training_split(folder).recordings if r.name == name)
    scores = snippet_scores(model.snippet, recording.features).scores
    assert scores[int(frame) // 16].min() > 0.5


def test_a_class_without_points_is_refused(folder: Path) -> None:
    (folder / "classes.txt").write_text("hop\nspin\nroll\n")
    with pytest.raises(DataError, match=r"no training point for roll; each class needs"):
        read_training_split(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # 1 block of 8 back and 0 ahead, and 1 for the convolution
        ({"window_snippets": 10}, r"expected at least 11 \(context 9 \+ hop 1 \+ look-ahead 1\)"),
        ({"window_snippets": 12, "hop_snippets": 3}, r"expected at least 13 \(context 9 \+ hop 3 "),
    ],
)
def test_a_window_that_is_too_short_is_refused_before_training(
    folder: Path, tmp_path: Path, settings: dict[str, int], message: str
) -> None:
    window = WindowConfig.model_validate(settings)
    config = QUICK.model_copy(update={"window": window})
    with pytest.raises(SettingsError, match=rf"^window\.window_snippets: {message}"):
        train_run(folder, tmp_path / "run", config, Console(quiet=True))
    # So with full attention, where a window is exact nowhere.
    full = QUICK.model.model_copy(update={"attention_past": None})
    config = config.model_copy(update={"model": full})
    with pytest.raises(SettingsError, match=r"\(context 64 \+ hop . \+ look-ahead 4\)"):
        train_run(folder, tmp_path / "run", config, Console(quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused(folder: Path, value: float) -> None:
    path = folder / "features" / "train" / "train2.npy"
    features = np.load(path)
    features[7, 3] = value
    np.save(path, features)
    with pytest.raises(DataError, match=r"train2\.npy: snippet 7 is not finite"):
        read_training_split(folder)


def test_an_empty_recording_is_refused(folder: Path) -> None:
    shorten(folder, "train0", 0)
    with pytest.raises(DataError, match=r"train0\.npy: expected .* D >= 1, got float32 \(0, 6\)"):
        read_training_split(folder)


@pytest.mark.parametrize(
    ("chosen", "hardware", "expected"),
    [
        ("auto", {"avx512_bf16": True, "amx_bf16": False}, True),
        ("auto", {"avx512_bf16": False, "amx_bf16": True}, True),
        ("auto", {"avx512_bf16": False, "amx_bf16": False}, False),
        ("auto", {"neon": True}, False),
        ("float32", {"avx512_bf16": True}, False),
        ("bfloat16", {}, True),
    ],
)
def test_precision_is_that_of_the_hardware_unless_it_is_set(
    monkeypatch: pytest.MonkeyPatch, chosen: str, hardware: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: hardware)
    config = TrainingConfig.model_validate({"precision": chosen})
    with precision(config, torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == expected


def test_an_older_torch_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    with precision(TrainingConfig(), torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
def test_a_model_learns_in_either_precision(folder: Path, chosen: str) -> None:
    config = QUICK.model_copy(
        update={
            "precision": chosen,
            "snippet_stage": QUICK.snippet_stage.model_copy(update={"steps": 60}),
            "instance_stage": QUICK.instance_stage.model_copy(update={"steps": 60}),
        }
    )
    model = trained(folder, config)
    assert all(each.dtype == torch.float32 for each in model.snippet.parameters())
    data = read_test_split(folder, CLASSES)
    found = evaluate(
        model,
        data,
        tiny_truth(folder),
        config.localization,
    )
    assert found.both_stages.average > 0.85
