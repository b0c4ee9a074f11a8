"""Training: stage 1 on crops with points, then stage 2 on the proposals of stage 1.

What is kept is the moving average of the weights after the last step: nothing is chosen by any
score, so no label beyond the training points is ever looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hrpro.training.checkpoint import Checkpoints
from hrpro.training.config import TrainingConfig
from hrpro.training.data import DataSet
from hrpro.training.instance import InstanceModel
from hrpro.training.instance_stage import InstanceStage
from hrpro.training.model import SnippetModel
from hrpro.training.optimisation import Report, TrainingError, run_stage, training_device
from hrpro.training.parallel import process_count
from hrpro.training.snippet_stage import SnippetStage


@dataclass(frozen=True)
class TrainedModel:
    """Both stages after training, in evaluation mode."""

    snippet: SnippetModel
    instance: InstanceModel


def train(
    config: TrainingConfig,
    data: DataSet,
    report: Report,
    finished: Callable[[str, nn.Module], None] | None = None,
    checkpoints: Checkpoints | None = None,
    snippet: SnippetModel | None = None,
    scratch: Path | None = None,
) -> TrainedModel:
    """Train both stages on the training split; deterministic under ``config.seed`` on a CPU.

    ``finished`` is called with the name and the model of each stage that is through.
    ``checkpoints`` may hold the state to go on from; if that is one of stage 2, ``snippet`` is
    stage 1. ``scratch`` is a folder for a file as large as the features. Raises TrainingError and
    TrainingStopped.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = training_device(config)
    _check_batches(config)
    checkpoints = checkpoints or Checkpoints()
    if snippet is None:
        snippet = train_snippet_stage(config, data, report, checkpoints)
        if finished is not None:
            finished("snippet", snippet)
    torch.manual_seed(config.seed)  # stage 2 is the same after a stage 1 that was read
    second = InstanceStage(config, data, snippet, device, scratch, checkpoints)
    run_stage(second, report, checkpoints)
    instance = second.result()
    if finished is not None:
        finished("instance", instance)
    return TrainedModel(snippet.cpu(), instance)


def train_snippet_stage(
    config: TrainingConfig,
    data: DataSet,
    report: Report,
    checkpoints: Checkpoints | None = None,
) -> SnippetModel:
    """Train stage 1 alone; as `train`."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    stage = SnippetStage(config, data, training_device(config))
    run_stage(stage, report, checkpoints or Checkpoints())
    return stage.result()


def _check_batches(config: TrainingConfig) -> None:
    for name, stage in (
        ("snippet_stage", config.snippet_stage),
        ("instance_stage", config.instance_stage),
    ):
        if stage.batch_size % process_count():
            raise TrainingError(
                f"{name}.batch_size: expected a multiple of {process_count()} processes, "
                f"got {stage.batch_size}"
            )
