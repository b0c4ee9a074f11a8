"""The folder of a training run: configuration, what it was trained on, and the weights.

RUN/
  run.json         configuration, data set, classes, D
  snippet.pt       checkpoint of stage 1, written when it is through (a state dict)
  instance.pt      checkpoint of stage 2
  metrics.jsonl    losses, one line every few steps
  tensorboard/     the same as scalars
  figures.json     what hrpro evaluate measured last; goes into the bundle

RunError    the folder is not a finished run
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from hrpro.engine.settings import Settings
from hrpro.engine.wire import HrproError
from hrpro.training.config import TrainingConfig
from hrpro.training.data import DataSet
from hrpro.training.instance_stage import new_instance_model
from hrpro.training.snippet_stage import new_snippet_model
from hrpro.training.train import TrainedModel

DESCRIPTION = "run.json"
CHECKPOINTS = {"snippet": "snippet.pt", "instance": "instance.pt"}
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


def describe_run(config: TrainingConfig, data: DataSet) -> RunDescription:
    """What a run on ``data`` is."""
    return RunDescription(
        config=config,
        data_set=data.name,
        classes=data.classes,
        feature_dim=data.feature_dim,
        recordings=len(data.recordings),
        points=sum(len(recording.point_index) for recording in data.recordings),
    )


def begin_run(folder: Path) -> None:
    """Make the folder of a run; one that was there counts as unfinished from here on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (DESCRIPTION, FIGURES, *CHECKPOINTS.values()):
        (folder / name).unlink(missing_ok=True)


def write_checkpoint(folder: Path, stage: str, model: nn.Module) -> None:
    """Write the weights of a stage that is through."""
    path = folder / CHECKPOINTS[stage]
    temporary = path.with_name(path.name + ".part")
    torch.save(model.state_dict(), temporary)
    temporary.replace(path)


def finish_run(folder: Path, description: RunDescription) -> None:
    """Write the description: a folder that has one is a finished run."""
    _write_json(folder / DESCRIPTION, description.model_dump(mode="json"))


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
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


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
    _load_checkpoint(folder / CHECKPOINTS["snippet"], snippet)
    _load_checkpoint(folder / CHECKPOINTS["instance"], instance)
    return description, TrainedModel(snippet.eval(), instance.eval())


def _load_checkpoint(path: Path, model: nn.Module) -> None:
    try:
        model.load_state_dict(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path}: expected the weights of this run: {reason}") from None
