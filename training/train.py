"""Training: stage 1 on crops with points, then stage 2 on the proposals of stage 1.

What is kept is the moving average of the weights after the last step: nothing is chosen by any
score, so no label beyond the training points is ever looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hrpro.training.config import TrainingConfig
from hrpro.training.data import DataSet
from hrpro.training.instance import InstanceModel
from hrpro.training.instance_stage import train_instance_stage
from hrpro.training.model import SnippetModel
from hrpro.training.optimisation import Report
from hrpro.training.snippet_stage import train_snippet_stage


@dataclass(frozen=True)
class TrainedModel:
    """Both stages after training, in evaluation mode."""

    snippet: SnippetModel
    instance: InstanceModel


def train(
    config: TrainingConfig,
    data: DataSet,
    report: Report,
    checkpoint: Callable[[str, nn.Module], None] | None = None,
) -> TrainedModel:
    """Train both stages on the training split; deterministic under ``config.seed`` on a CPU.

    ``checkpoint`` is called with the name and the model of each stage that is through.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    snippet = train_snippet_stage(config, data, report)
    if checkpoint is not None:
        checkpoint("snippet", snippet)
    instance = train_instance_stage(config, data, snippet, report)
    if checkpoint is not None:
        checkpoint("instance", instance)
    return TrainedModel(snippet, instance)
