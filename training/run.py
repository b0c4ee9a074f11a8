"""The folder of a training run: configuration, what it was trained on, and the weights.

RUN/
  run.json         configuration, data set, classes, D
  snippet.pt       weights of stage 1, written when it is through (a state dict)
  instance.pt      weights of stage 2
  checkpoint.pt    while it is trained: the state to go on from
  metrics.jsonl    losses, one line every few steps
  tensorboard/     the same as scalars
  figures.json     what hrpro evaluate measured last; goes into the bundle

RunError    the folder is not a finished run
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from torch import nn

from hrpro.engine.settings import Settings, differences
from hrpro.engine.wire import HrproError
from hrpro.training.checkpoint import (
    CHECKPOINT,
    UNREADABLE,
    read_checkpoint,
    read_tensors,
    reason_of,
    write_atomically,
)
from hrpro.training.config import TrainingConfig
from hrpro.training.data import DataSet, in_blocks
from hrpro.training.files import replaced_file
from hrpro.training.instance_stage import new_instance_model
from hrpro.training.model import SnippetModel
from hrpro.training.snippet_stage import new_snippet_model
from hrpro.training.train import TrainedModel

DESCRIPTION = "run.json"
WEIGHTS = {"snippet": "snippet.pt", "instance": "instance.pt"}
FIGURES = "figures.json"


class RunError(HrproError, ValueError):
    """A folder that is not a finished training run."""


class RunDescription(Settings):
    """run.json."""

    config: TrainingConfig
    data_set: str
    classes: tuple[str, ...]
    feature_dim: int
    recordings: int
    points: int
    data_digest: str


def describe_run(config: TrainingConfig, data: DataSet) -> RunDescription:
    """What a run on ``data`` is."""
    return RunDescription(
        config=config,
        data_set=data.name,
        classes=data.classes,
        feature_dim=data.feature_dim,
        recordings=len(data.recordings),
        points=sum(len(recording.point_index) for recording in data.recordings),
        data_digest=data_digest(data),
    )


def check_unused(folder: Path) -> None:
    """Raise RunError where a run was begun or finished in the folder: its results would go."""
    for name in (DESCRIPTION, CHECKPOINT):
        if (folder / name).exists():
            raise RunError(
                f"{folder}: expected no run, found {name}; --resume goes on with it, a new run "
                "needs another folder"
            )


def begin_run(folder: Path) -> None:
    """Make the folder of a run; one that was there counts as unfinished from here on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (DESCRIPTION, FIGURES, CHECKPOINT, *WEIGHTS.values()):
        (folder / name).unlink(missing_ok=True)


def write_weights(folder: Path, stage: str, model: nn.Module) -> None:
    """Write the weights of a stage that is through."""
    write_atomically(folder / WEIGHTS[stage], model.state_dict())


def finish_run(folder: Path, description: RunDescription) -> None:
    """Write the description: a folder that has one is a finished run."""
    _write_json(folder / DESCRIPTION, description.model_dump(mode="json"))
    (folder / CHECKPOINT).unlink(missing_ok=True)


def data_digest(data: DataSet) -> str:
    """A digest of the training data, of all points and features."""
    digest = hashlib.sha256()
    for recording in data.recordings:
        features = recording.features
        digest.update(f"{recording.name} {features.shape}".encode())
        digest.update(recording.point_index.tobytes() + recording.point_label.tobytes())
        for _, rows in in_blocks(features):
            digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()


def read_state(folder: Path, description: RunDescription) -> dict[str, Any] | None:
    """The state to go on from, None if there is none; RunError if it is not of this run."""
    state = read_checkpoint(folder)
    if state is not None:
        _check_is_same(folder / CHECKPOINT, state["made_by"], description)
    return state


def check_finished_run(folder: Path, description: RunDescription) -> None:
    """Raise RunError unless the finished run in the folder is the one described."""
    found, _ = read_run(folder)
    _check_is_same(folder / DESCRIPTION, found.model_dump(mode="json"), description)


def _check_is_same(path: Path, was: Mapping[str, Any], description: RunDescription) -> None:
    """What says how it is computed, not what, may differ."""
    now = description.model_dump(mode="json")
    changed = [
        f"{name} was {json.dumps(old)}, is {json.dumps(new)}"
        for name, old, new in differences(was["config"], now["config"])
        if name not in _FREE_TO_CHANGE
    ]
    if changed:
        raise RunError(f"{path}: made with other settings: {'; '.join(changed)}")
    if was["classes"] != now["classes"] or was["data_digest"] != now["data_digest"]:
        raise RunError(
            f"{path}: made with other data: expected the recordings and points of the data set "
            f"{was['data_set']!r} that the run was begun with, got {now['data_set']!r}"
        )


_FREE_TO_CHANGE = {"checkpoint_s", "threads", "device", "compile"}


def is_finished(folder: Path) -> bool:
    """Whether a run in the folder came to its end."""
    return (folder / DESCRIPTION).exists()


def read_snippet_stage(folder: Path, config: TrainingConfig, data: DataSet) -> SnippetModel:
    """Stage 1 of a run that was stopped in stage 2."""
    model = new_snippet_model(config, data.feature_dim, len(data.classes))
    _load_weights(folder / WEIGHTS["snippet"], model)
    return model.eval()


def write_figures(folder: Path, figures: dict[str, float | str]) -> None:
    """Note what was measured of a run."""
    _write_json(folder / FIGURES, figures)


def read_figures(folder: Path) -> dict[str, float | str]:
    """What was measured of a run; nothing if it was not evaluated."""
    path = folder / FIGURES
    if not path.exists():
        return {}
    try:
        figures = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path}: expected figures by name: {error}") from None
    if not isinstance(figures, dict):
        raise RunError(f"{path}: expected figures by name, got {figures!r}")
    return figures


def _write_json(path: Path, content: object) -> None:
    with replaced_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_run(folder: Path) -> tuple[RunDescription, TrainedModel]:
    """Read a finished run; the models are in evaluation mode. Raises RunError."""
    path = folder / DESCRIPTION
    try:
        description = RunDescription.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"{path}: file is missing; expected a run finished by hrpro train") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(f"{path}: {where}: {first['msg']}") from None
    snippet = new_snippet_model(
        description.config, description.feature_dim, len(description.classes)
    )
    instance = new_instance_model(description.config, snippet)
    _load_weights(folder / WEIGHTS["snippet"], snippet)
    _load_weights(folder / WEIGHTS["instance"], instance)
    return description, TrainedModel(snippet.eval(), instance.eval())


def _load_weights(path: Path, model: nn.Module) -> None:
    try:
        model.load_state_dict(read_tensors(path))
    except UNREADABLE as error:
        raise RunError(f"{path}: expected the weights of this run: {reason_of(error)}") from None
