"""A small model with random weights, its bundle, and recordings for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hrpro.engine.config import LocalizationConfig
from hrpro.export import export
from hrpro.export.bundle import Bundle
from hrpro.training.config import ModelConfig, TrainingConfig
from hrpro.training.instance_stage import new_instance_model
from hrpro.training.run import RunDescription, begin_run, finish_run, write_weights
from hrpro.training.snippet_stage import new_snippet_model
from hrpro.training.train import TrainedModel

DIM = 8
CLASSES = ("jump", "run", "throw")
PAST, FUTURE, BLOCKS = 6, 1, 2
# Each block reaches so far back and ahead, the convolution one further.
CONTEXT, LOOKAHEAD = BLOCKS * PAST + 1, BLOCKS * FUTURE + 1


def tiny_config() -> TrainingConfig:
    return TrainingConfig(
        model=ModelConfig(
            blocks=BLOCKS, attention_heads=2, attention_past=PAST, attention_future=FUTURE,
            instance_width=16,
        ),
        localization=LocalizationConfig(history_snippets=128),
    )  # fmt: skip


def tiny_description(config: TrainingConfig) -> RunDescription:
    return RunDescription(
        config=config,
        data_set="tiny",
        classes=CLASSES,
        feature_dim=DIM,
        recordings=1,
        points=3,
        data_digest="",
    )


def tiny_model(config: TrainingConfig, seed: int = 0) -> TrainedModel:
    """Untrained, but with scores all over the range and with borders that move."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        snippet = new_snippet_model(config, DIM, len(CLASSES))
        instance = new_instance_model(config, snippet)
        with torch.no_grad():
            snippet.prototypes.normal_()
            snippet.feature_mean.normal_(std=0.1)
            snippet.classify.weight.mul_(12)
            snippet.attend.weight.mul_(6)
            snippet.attend.bias.fill_(0.5)
            instance.heads.score[-1].weight.mul_(4)
            instance.heads.regress[-1].weight.mul_(4)
    return TrainedModel(snippet.eval(), instance.eval())


def tiny_bundle(target: Path) -> Bundle:
    config = tiny_config()
    return export.export_bundle(tiny_description(config), tiny_model(config), {}, target)


def copy_graphs(patch: pytest.MonkeyPatch, folder: Path, *kinds: str) -> None:
    """An export takes the graphs of these kinds from a bundle of the same weights: tracing a model
    takes most of its time."""

    def copied(name: str) -> Callable[..., None]:
        return lambda *arguments: shutil.copyfile(folder / name, arguments[-1])

    for kind in kinds:
        patch.setattr(export, f"export_{kind}_graph", copied(f"{kind}.onnx"))


def tiny_run(folder: Path, seed: int, classes: tuple[str, ...] = CLASSES) -> Path:
    """The run of a `tiny_model`."""
    config = tiny_config()
    model = tiny_model(config, seed)
    begin_run(folder)
    write_weights(folder, "snippet", model.snippet)
    write_weights(folder, "instance", model.instance)
    finish_run(folder, tiny_description(config).model_copy(update={"classes": classes}))
    return folder


def tiny_recording(length: int, seed: int = 0) -> NDArray[np.float32]:
    """Features (T, D) in which neighbours resemble each other."""
    random = np.random.default_rng(seed)
    steps = random.standard_normal((length, DIM))
    features = np.zeros((length, DIM))
    for t in range(length):
        features[t] = 0.8 * features[t - 1] + 0.6 * steps[t]
    return features.astype(np.float32)
