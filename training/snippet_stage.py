"""Stage 1: snippet-level action discrimination learning, on crops of recordings with points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hrpro.engine.windows import in_pieces
from hrpro.training.batches import CropSampler
from hrpro.training.config import SnippetStageConfig, TrainingConfig
from hrpro.training.data import DataSet
from hrpro.training.losses import base_loss, contrastive_loss
from hrpro.training.memory import initial_prototypes, update_prototypes
from hrpro.training.model import SnippetModel, SnippetOutput, band_reach
from hrpro.training.optimisation import AveragedModel, Descent, Report
from hrpro.training.pseudo_snippets import PseudoSnippets, mine_pseudo_snippets

_SCALE_FLOOR = 1e-3  # a feature that hardly varies is not blown up


def new_snippet_model(config: TrainingConfig, feature_dim: int, class_count: int) -> SnippetModel:
    """An untrained stage 1."""
    return SnippetModel(feature_dim, class_count, config.model)


def train_snippet_stage(config: TrainingConfig, data: DataSet, report: Report) -> SnippetModel:
    """Stage 1: snippet-level action discrimination learning."""
    stage = config.snippet_stage
    generator = torch.Generator().manual_seed(config.seed)
    sampler = CropSampler(data, stage.crop_snippets, generator)
    model = new_snippet_model(config, data.feature_dim, len(data.classes))
    with torch.no_grad():
        model.feature_mean.copy_(sampler.features.mean(dim=0))
        model.feature_scale.copy_(1 / sampler.features.std(dim=0).clamp(min=_SCALE_FLOOR))
        model.prototypes.copy_(initial_prototypes(sampler.features, sampler.points))
    embedded = _embedded_points(model, data)
    averaged = AveragedModel(model, stage.average_decay)
    descent = Descent(model, stage)
    for step in range(1, stage.steps + 1):
        crops = sampler.draw(stage.batch_size)
        output = model(crops.features, crops.valid)
        pseudo = _mine(output, crops.points, crops.valid, stage)
        loss, parts = _losses(output, pseudo, embedded, stage)
        descent.step(loss)
        with torch.no_grad():
            action = pseudo.action.flatten(0, 1)
            rows = crops.features.flatten(0, 1)
            model.prototypes.copy_(
                update_prototypes(model.prototypes, rows, action, stage.prototype_momentum)
            )
            rows = output.embedding.detach().flatten(0, 1)
            embedded = update_prototypes(embedded, rows, action, stage.embedding_momentum)
            averaged.update(step)
        report("snippet", step, {name: float(each.detach()) for name, each in parts.items()})
    return averaged.result()


def _losses(
    output: SnippetOutput, pseudo: PseudoSnippets, embedded: Tensor, stage: SnippetStageConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_snippet (eq. 8), and its parts by name; ``embedded`` are the embedded prototypes (C, W)."""
    base = base_loss(
        output.scores, output.attention, pseudo, stage.focal_gamma, stage.lowest_weight
    )
    contrast = contrastive_loss(output.embedding, embedded, pseudo, stage.temperature)
    loss = (
        stage.action_weight * base.action
        + stage.background_weight * base.background
        + stage.background_class_weight * base.background_class
        + stage.contrastive_weight * contrast
    )
    return loss, {
        "loss": loss,
        "action": base.action,
        "background": base.background,
        "background_class": base.background_class,
        "contrastive": contrast,
        "pseudo_action": pseudo.action.sum(),
        "pseudo_background": pseudo.background.sum(),
    }


def _mine(
    output: SnippetOutput, points: Tensor, valid: Tensor, stage: SnippetStageConfig
) -> PseudoSnippets:
    attention, scores = output.attention.detach(), output.scores.detach()
    evidence = {
        "attention": attention[..., None],
        "class": scores,
        "points": torch.zeros_like(scores),
    }[stage.mining]
    return mine_pseudo_snippets(
        evidence, attention, points, valid, stage.action_threshold, stage.background_threshold
    )


def _embedded_points(model: SnippetModel, data: DataSet) -> Tensor:
    """Eq. 2 on the embedding: the class means at the points, (C, W)."""
    rows, action = [], []
    for recording in data.recordings:
        embedding = torch.from_numpy(snippet_scores(model, recording.features).embedding)
        rows.append(embedding[recording.point_index])
        labels = torch.from_numpy(recording.point_label)
        action.append(nn.functional.one_hot(labels, len(data.classes)).bool())
    return initial_prototypes(torch.cat(rows), torch.cat(action))


@dataclass(frozen=True)
class SnippetScores:
    """Stage 1's outputs for one recording as float32 arrays: P and S (T, C), A (T,), X^e (T, W)."""

    scores: NDArray[np.float32]
    cas: NDArray[np.float32]
    attention: NDArray[np.float32]
    embedding: NDArray[np.float32]


def snippet_scores(model: SnippetModel, features: NDArray[np.float32]) -> SnippetScores:
    """Run stage 1 over a whole recording, features (T, D)."""

    def score(piece: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
        with torch.no_grad():
            output = model(torch.from_numpy(piece)[None], torch.ones(1, len(piece)).bool())
        return tuple(each[0].numpy() for each in output)

    was_training = model.training
    model.eval()
    reach = band_reach(model.config)
    outputs = score(features) if reach is None else in_pieces(score, features, *reach)
    model.train(was_training)
    return SnippetScores(*outputs)
