"""Stage 2: instance-level action completeness learning, on the proposals of stage 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.localizer import candidates
from hrpro.engine.wire import HrproError
from hrpro.training.config import InstanceStageConfig, TrainingConfig
from hrpro.training.data import DataSet
from hrpro.training.instance import InstanceModel
from hrpro.training.losses import regression_loss, score_loss, temporal_iou
from hrpro.training.model import SnippetModel
from hrpro.training.optimisation import AveragedModel, Descent, Report
from hrpro.training.ranking import Candidates, rank_proposals
from hrpro.training.roi import RegionPooling
from hrpro.training.snippet_stage import SnippetScores, snippet_scores


class TrainingError(HrproError):
    """Training cannot go on; the message says why."""


def new_instance_model(config: TrainingConfig, snippet: SnippetModel) -> InstanceModel:
    """An untrained stage 2 for the embedding of ``snippet``."""
    localization = config.localization
    return InstanceModel(
        width=snippet.width,
        class_count=snippet.class_count,
        hidden=config.model.instance_width,
        pooling=RegionPooling(localization.border_ratio, float(localization.border_limit)),
        dropout=config.instance_stage.dropout,
    )


@dataclass(frozen=True)
class _ProposalTable:
    """The ranked proposals of all recordings; borders count from the first row of ``embedding``."""

    embedding: Tensor  # (M, W), all recordings one after the other
    borders: Tensor  # (N, 2)
    lowest: Tensor  # (N, 1) first row of the proposal's recording
    highest: Tensor  # (N, 1) last row of it
    completeness: Tensor  # (N, C)
    reliable: Tensor  # (N, 2)
    own_iou: Tensor  # (N,)
    negative: Tensor  # (N,) bool


def _proposal_table(config: TrainingConfig, data: DataSet, model: SnippetModel) -> _ProposalTable:
    embedding, columns, first = [], [], 0
    for recording in data.recordings:
        output = snippet_scores(model, recording.features)
        ranked = rank_proposals(
            _candidates(output, config.localization),
            recording.point_index,
            recording.point_label,
            output.attention,
            config.instance_stage.negative_thresholds,
            len(data.classes),
        )
        N = len(ranked.borders)
        columns.append(
            (
                ranked.borders + first,
                np.full((N, 1), first),
                np.full((N, 1), first + len(recording) - 1),
                ranked.completeness,
                ranked.reliable + first,
                ranked.own_iou,
                ranked.negative,
            )
        )
        embedding.append(output.embedding)
        first += len(recording)
    stacked = [torch.from_numpy(np.concatenate(each)) for each in zip(*columns, strict=True)]
    tensors = [each.float() if each.dtype == torch.float64 else each for each in stacked]
    return _ProposalTable(torch.from_numpy(np.concatenate(embedding)), *tensors)


def _candidates(output: SnippetScores, config: LocalizationConfig) -> Candidates:
    """All runs of a recording before soft-NMS, scored by contrast alone."""
    proposals = candidates(output.scores, config)
    return Candidates(
        borders=np.array([(p.start, p.end) for p in proposals]).reshape(-1, 2),
        label_index=np.array([p.label_index for p in proposals], dtype=np.int64),
        contrast=np.array([p.score for p in proposals]),
    )


def train_instance_stage(
    config: TrainingConfig, data: DataSet, snippet: SnippetModel, report: Report
) -> InstanceModel:
    """Stage 2: instance-level action completeness learning; ``snippet`` stays as it is."""
    stage = config.instance_stage
    model = new_instance_model(config, snippet)
    table = _proposal_table(config, data, snippet)
    if table.negative.all():  # also where there is nothing at all
        raise TrainingError(
            "stage 1 gives no proposal on the training recordings: no score exceeds "
            f"localization.peak_gate {config.localization.peak_gate:g}; "
            "train longer (snippet_stage.steps) or lower the gate"
        )
    averaged = AveragedModel(model, stage.average_decay)
    descent = Descent(model, stage)
    generator = torch.Generator().manual_seed(config.seed)
    positives, negatives = (~table.negative).nonzero()[:, 0], table.negative.nonzero()[:, 0]
    for step in range(1, stage.steps + 1):
        chosen = _draw_proposals(positives, negatives, stage, generator)
        borders = table.borders[chosen]
        regions = model.pooling(
            table.embedding, borders, table.lowest[chosen], table.highest[chosen]
        )
        completeness, refined = model.heads(regions, borders)
        score = score_loss(completeness, table.completeness[chosen], stage.score_loss)
        matched = table.own_iou[chosen] >= stage.regression_floor
        regression = regression_loss(refined, table.reliable[chosen], matched)
        loss = score + stage.regression_weight * regression
        descent.step(loss)
        averaged.update(step)
        with torch.no_grad():
            gain = temporal_iou(refined, table.reliable[chosen]) - table.own_iou[chosen]
            losses = {"loss": loss, "score": score, "regression": regression}
            losses["iou_gain"] = gain[matched].mean() if matched.any() else torch.zeros(())
        report("instance", step, {name: float(value.detach()) for name, value in losses.items()})
    return averaged.result()


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
