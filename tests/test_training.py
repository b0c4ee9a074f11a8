"""Crops, descent, and training as a whole on a small data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_data import CLASSES, TRAIN, tiny_truth, write_tiny_data

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.timebase import SnippetClock
from hrpro.engine.wire import HrproError
from hrpro.training.batches import CropSampler
from hrpro.training.config import (
    InstanceStageConfig,
    ModelConfig,
    SnippetStageConfig,
    TrainingConfig,
)
from hrpro.training.data import DataSet, Recording, read_test_split, read_training_split
from hrpro.training.evaluate import Evaluation, evaluate
from hrpro.training.run import (
    RunError,
    begin_run,
    describe_run,
    finish_run,
    read_figures,
    read_run,
    write_figures,
    write_weights,
)
from hrpro.training.train import TrainedModel, train

QUICK = TrainingConfig(
    threads=1,
    model=ModelConfig(blocks=1, attention_heads=2, attention_past=8, instance_width=16),
    snippet_stage=SnippetStageConfig(steps=60, batch_size=8, crop_snippets=40, learning_rate=1e-2),
    instance_stage=InstanceStageConfig(steps=60, batch_size=64, learning_rate=1e-2),
)


def silent(stage: str, step: int, losses: dict[str, float]) -> None:
    assert stage in ("snippet", "instance") and step >= 1
    assert all(np.isfinite(value) for value in losses.values()), losses


def shorter(config: TrainingConfig, steps: int, **changes: object) -> TrainingConfig:
    return config.model_copy(
        update={
            "snippet_stage": config.snippet_stage.model_copy(update={"steps": steps}),
            "instance_stage": config.instance_stage.model_copy(update={"steps": steps}),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_tiny_data(folder)
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> DataSet:
    return read_training_split(folder)


@pytest.fixture(scope="module")
def trained(data: DataSet) -> TrainedModel:
    return train(QUICK, data, silent)


# --- crops ---------------------------------------------------------------------------------------


def numbered(lengths: list[int], points: list[list[int]]) -> DataSet:
    """Recordings whose features say where they are from: (recording, snippet)."""
    recordings = []
    for number, (length, index) in enumerate(zip(lengths, points, strict=True)):
        features = np.stack([np.full(length, number), np.arange(length)], axis=1)
        at = np.array(index, np.int64)
        recordings.append(Recording(str(number), features.astype(np.float32), at, at % 2))
    return DataSet("numbered", ("even", "odd"), SnippetClock(), tuple(recordings))


def test_crops_are_stretches_of_recordings_with_their_points() -> None:
    points = [[0, 3, 11], [2], []]
    lengths = [12, 4, 9]
    data = numbered(lengths, points)
    sampler = CropSampler(data, 6, torch.Generator().manual_seed(0))
    starts: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for _ in range(20):
        crops = sampler.draw(8)
        assert crops.features.shape == (8, 6, 2)
        assert crops.points.shape == (8, 6, 2) and crops.valid.shape == (8, 6)
        for features, marked, valid in zip(*crops, strict=True):
            number, start = (int(value) for value in features[0])
            n = int(valid.sum())
            assert valid.tolist() == [True] * n + [False] * (6 - n)
            assert n == min(6, lengths[number])
            expected = data.recordings[number].features[start : start + n]
            assert features[:n].tolist() == expected.tolist()
            assert not features[n:].any()
            got = {(start + t, c) for t, c in marked.nonzero().tolist()}
            assert got == {(t, t % 2) for t in points[number] if start <= t < start + n}
            starts[number].add(start)
    # Every place is drawn sooner or later: 12 - 6 + 1, one, 9 - 6 + 1.
    assert starts == {0: set(range(7)), 1: {0}, 2: set(range(4))}


def test_a_crop_is_no_longer_than_the_longest_recording() -> None:
    sampler = CropSampler(numbered([5, 7], [[0], [1]]), 100, torch.Generator().manual_seed(0))
    assert sampler.draw(4).features.shape == (4, 7, 2)


# --- training ------------------------------------------------------------------------------------


def evaluated(model: TrainedModel, folder: Path) -> Evaluation:
    data = read_test_split(folder, CLASSES)
    return evaluate(
        model,
        data,
        tiny_truth(folder),
        QUICK.localization,
    )


def test_what_can_be_told_apart_is_found(
    folder: Path, data: DataSet, trained: TrainedModel
) -> None:
    assert (data.name, data.classes, data.feature_dim) == ("tiny", CLASSES, 6)
    found = evaluated(trained, folder)
    assert (found.recordings, found.both_stages.instances) == (3, 12)
    assert found.both_stages.average > 0.9
    assert found.stage1.average > 0.8
    assert list(found.both_stages.by_tiou) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


def test_an_untrained_model_finds_little(folder: Path, data: DataSet) -> None:
    assert evaluated(train(shorter(QUICK, 1), data, silent), folder).both_stages.average < 0.5


def test_prototypes_are_near_the_means_of_the_points(data: DataSet, trained: TrainedModel) -> None:
    # Class c stands out by 2 in feature c.
    prototypes = trained.snippet.prototypes.numpy()
    np.testing.assert_allclose(prototypes[:, :2], 2 * np.eye(2), atol=0.2)
    np.testing.assert_allclose(prototypes[:, 2:], 0, atol=0.2)


def test_models_come_in_evaluation_mode(trained: TrainedModel) -> None:
    assert not trained.snippet.training and not trained.instance.training
    assert not any(module.training for module in trained.snippet.modules())


def weights(model: TrainedModel) -> list[torch.Tensor]:
    return [*model.snippet.state_dict().values(), *model.instance.state_dict().values()]


def test_the_same_seed_gives_the_same_weights(data: DataSet) -> None:
    first = weights(train(shorter(QUICK, 5), data, silent))
    torch.manual_seed(99)  # what was drawn elsewhere does not matter
    second = weights(train(shorter(QUICK, 5), data, silent))
    other = weights(train(shorter(QUICK, 5, seed=1), data, silent))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("mining", ["attention", "class", "points"])
def test_every_way_of_mining_trains(data: DataSet, mining: str) -> None:
    stage = QUICK.snippet_stage.model_copy(update={"steps": 2, "mining": mining})
    mined: list[float] = []

    def report(stage: str, step: int, losses: dict[str, float]) -> None:
        if stage == "snippet":
            mined.append(losses["pseudo_action"])

    config = QUICK.model_copy(
        update={
            "snippet_stage": stage,
            "instance_stage": QUICK.instance_stage.model_copy(update={"steps": 2}),
        }
    )
    train(config, data, report)
    assert len(mined) == 2 and min(mined) > 0


def test_without_any_proposal_stage_2_has_nothing_to_learn_from(data: DataSet) -> None:
    none = LocalizationConfig(thresholds=(0.999,), peak_gate=1.0)
    with pytest.raises(HrproError, match="proposal"):
        train(shorter(QUICK, 2, localization=none), data, silent)


# --- runs ----------------------------------------------------------------------------------------


def write(folder: Path, data: DataSet, model: TrainedModel) -> None:
    begin_run(folder)
    write_weights(folder, "snippet", model.snippet)
    write_weights(folder, "instance", model.instance)
    finish_run(folder, describe_run(QUICK, data))


def test_each_stage_is_handed_over_when_it_is_through(data: DataSet) -> None:
    order: list[str] = []

    def report(stage: str, step: int, losses: dict[str, float]) -> None:
        order.append(f"{stage} {step}")

    handed: dict[str, torch.nn.Module] = {}

    def checkpoint(stage: str, model: torch.nn.Module) -> None:
        order.append(stage)
        handed[stage] = model

    model = train(shorter(QUICK, 2), data, report, checkpoint)
    assert order == ["snippet 1", "snippet 2", "snippet", "instance 1", "instance 2", "instance"]
    assert handed == {"snippet": model.snippet, "instance": model.instance}


def test_a_run_comes_back_as_it_was(tmp_path: Path, data: DataSet, trained: TrainedModel) -> None:
    write(tmp_path / "new" / "run", data, trained)
    description, model = read_run(tmp_path / "new" / "run")
    assert description == describe_run(QUICK, data)
    assert (description.recordings, description.points) == (len(TRAIN), 4 * len(TRAIN))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(trained), strict=True))
    assert not model.snippet.training and not model.instance.training


def test_figures_belong_to_the_run_that_they_were_measured_of(
    tmp_path: Path, data: DataSet, trained: TrainedModel
) -> None:
    write(tmp_path, data, trained)
    assert read_figures(tmp_path) == {}
    write_figures(tmp_path, {"average_map": 0.5})
    assert read_figures(tmp_path) == {"average_map": 0.5}
    begin_run(tmp_path)
    assert read_figures(tmp_path) == {}
    assert not list(tmp_path.iterdir())


def test_what_is_no_run_is_refused(tmp_path: Path, data: DataSet, trained: TrainedModel) -> None:
    with pytest.raises(RunError, match=r"run\.json: file is missing"):
        read_run(tmp_path)
    write(tmp_path, data, trained)
    for name in ("instance.pt", "snippet.pt"):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(RunError, match=rf"{name}: expected the weights of this run"):
            read_run(tmp_path)
    write_weights(tmp_path, "snippet", trained.instance)  # weights, but others
    with pytest.raises(RunError, match=r"snippet\.pt: expected the weights of this run"):
        read_run(tmp_path)
    (tmp_path / "figures.json").write_text("[]")
    with pytest.raises(RunError, match=r"figures\.json: expected figures by name"):
        read_figures(tmp_path)
    (tmp_path / "run.json").write_text('{"config": {"seed": -1}}')
    with pytest.raises(RunError, match=r"run\.json: config\.seed: "):
        read_run(tmp_path)
    begin_run(tmp_path)  # a new run that does not come to its end
    with pytest.raises(RunError, match=r"run\.json: file is missing"):
        read_run(tmp_path)
