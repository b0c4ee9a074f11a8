"""Stage 2: instance-level action completeness learning, on the proposals of stage 1."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrpro.training.candidates import find_candidates
from hrpro.training.checkpoint import Checkpoints
from hrpro.training.config import InstanceStageConfig, TrainingConfig
from hrpro.training.data import DataSet, Recording
from hrpro.training.instance import InstanceHeads, InstanceModel, refined_borders
from hrpro.training.losses import (
    instance_loss,
    mean_where,
    regression_loss,
    score_loss,
    temporal_iou,
)
from hrpro.training.model import SnippetModel
from hrpro.training.optimisation import (
    Stage,
    TrainingError,
    as_run,
    over_processes,
    precision,
)
from hrpro.training.parallel import share
from hrpro.training.ranking import rank_proposals
from hrpro.training.roi import RegionPooling, Regions
from hrpro.training.snippet_stage import SnippetScores, snippet_scores


def new_instance_model(
    config: TrainingConfig, snippet: SnippetModel, points: Tensor | None = None
) -> InstanceModel:
    """An untrained stage 2 for the embedding of ``snippet``, to be trained on so many ``points`` of
    each class, (C,); None: its trust is going to be read."""
    localization, stage = config.localization, config.instance_stage
    heads = InstanceHeads(
        width=snippet.width,
        class_count=snippet.class_count,
        hidden=config.model.instance_width,
        dropout=stage.dropout,
    )
    pooling = RegionPooling(localization.border_ratio, float(localization.border_limit))
    trust = 1.0
    if points is not None:
        # Shrinkage as of James and Stein: what is learnt from nearly nothing is left out. By the
        # median: mAP is the mean over classes, and a few with many points do not speak for it.
        trust = max(0.0, 1 - stage.trust_points / float(points.double().quantile(0.5)))
    return InstanceModel(heads, pooling, stage.score_weight > 0, stage.regression_weight > 0, trust)


@dataclass(frozen=True)
class _ProposalTable:
    """The ranked proposals of all recordings; borders are in snippets of their own recording."""

    embedding: Tensor  # (M, W), all recordings one after the other
    borders: Tensor  # (N, 2)
    row: Tensor  # (N, 1) row of snippet 0 of the proposal's recording
    highest: Tensor  # (N, 1) last snippet of it
    completeness: Tensor  # (N, C)
    reliable: Tensor  # (N, 2)
    own_iou: Tensor  # (N,)
    negative: Tensor  # (N,) bool


def _proposal_table(
    config: TrainingConfig,
    data: DataSet,
    model: SnippetModel,
    scratch: Path | None,
    checkpoints: Checkpoints,
) -> _ProposalTable:
    """Rank the proposals of each recording; the embedding goes to a file in ``scratch``."""
    columns, first = [], 0
    with tempfile.TemporaryFile(dir=scratch) as file:
        for recording in data.recordings:
            checkpoints.check()
            output = snippet_scores(model, recording.features)
            file.write(np.ascontiguousarray(output.embedding, np.float32).data)
            columns.append(_ranked_columns(config, recording, output, len(data.classes), first))
            first += len(recording)
        file.flush()
        embedding = np.memmap(file, np.float32, "r+", shape=(first, model.width))
    stacked = [torch.from_numpy(np.concatenate(each)) for each in zip(*columns, strict=True)]
    tensors = [each.float() if each.dtype == torch.float64 else each for each in stacked]
    return _ProposalTable(torch.from_numpy(embedding), *tensors)


def _ranked_columns(
    config: TrainingConfig, recording: Recording, output: SnippetScores, classes: int, row: int
) -> tuple[NDArray[Any], ...]:
    """The columns of `_ProposalTable` for one recording, whose embedding begins at a row."""
    stage = config.instance_stage
    ranked = rank_proposals(
        find_candidates(output.scores, config.localization),
        recording.point_index,
        recording.point_label,
        output.attention,
        stage.negative_thresholds,
        classes,
        stage.reliable,
    )
    N = len(ranked.borders)
    return (
        ranked.borders,
        np.full((N, 1), row),
        np.full((N, 1), len(recording) - 1),
        ranked.completeness,
        ranked.reliable,
        ranked.own_iou,
        ranked.negative,
    )


class InstanceStage(Stage[InstanceModel]):
    """Stage 2 while it is trained; the snippet model stays as it is."""

    name = "instance"

    def __init__(
        self,
        config: TrainingConfig,
        data: DataSet,
        snippet: SnippetModel,
        device: torch.device,
        scratch: Path | None,
        checkpoints: Checkpoints,
    ) -> None:
        stage = config.instance_stage
        table = _proposal_table(config, data, snippet.to(device), scratch, checkpoints)
        if table.negative.all():  # also where there is nothing at all
            raise TrainingError(
                "stage 1 gives no proposal on the training recordings: no score exceeds "
                f"localization.peak_gate {config.localization.peak_gate:g}; "
                "train longer (snippet_stage.steps) or lower the gate"
            )
        self._positives = (~table.negative).nonzero()[:, 0]
        self._negatives = table.negative.nonzero()[:, 0]
        labels = np.concatenate([recording.point_label for recording in data.recordings])
        points = torch.from_numpy(np.bincount(labels, minlength=snippet.class_count))
        model = new_instance_model(config, snippet, points).to(device)
        super().__init__(model, stage, stage.average_decay, config.seed)
        self._config = config
        self._stage = stage
        self._device = device
        self._table = table
        self._run = as_run(model.heads, config)

    def step(self, number: int) -> dict[str, Tensor]:
        """Proposals -> regions -> completeness and borders -> losses -> weights."""
        table, device = self._table, self._device
        chosen = share(
            _draw_proposals(self._positives, self._negatives, self._stage, self._generator)
        )
        borders = table.borders[chosen]
        pooling = self._model.pooling
        highest, row = table.highest[chosen], table.row[chosen]
        regions = pooling(table.embedding, borders, torch.zeros_like(row), highest, row)
        with precision(self._config, device):
            completeness, offset = self._run(Regions(*(each.to(device) for each in regions)))
        refined = refined_borders(borders.to(device), offset, pooling.border(borders).to(device))
        losses = self._losses(chosen, completeness, refined)
        self._descent.step(losses["loss"])
        self._averaged.update(number)
        return over_processes(losses)

    def _losses(self, chosen: Tensor, completeness: Tensor, refined: Tensor) -> dict[str, Tensor]:
        target, reliable, own_iou = (
            column[chosen].to(self._device)
            for column in (self._table.completeness, self._table.reliable, self._table.own_iou)
        )
        matched = own_iou >= self._stage.regression_floor
        score = score_loss(completeness, target, self._stage.score_loss)
        regression = regression_loss(refined, reliable, matched)
        return {
            "loss": instance_loss(score, regression, self._stage),
            "score": score,
            "regression": regression,
            "iou_gain": mean_where(temporal_iou(refined, reliable) - own_iou, matched),
        }


def _draw_proposals(
    positives: Tensor, negatives: Tensor, stage: InstanceStageConfig, generator: torch.Generator
) -> Tensor:
    """Indices of a batch with the wanted share of negative proposals, where there are any."""
    count = round(stage.negative_share * stage.batch_size) if len(negatives) else 0
    parts = []
    for rows, size in ((positives, stage.batch_size - count), (negatives, count)):
        if size:
            parts.append(rows[torch.randint(len(rows), (size,), generator=generator)])
    return torch.cat(parts)
