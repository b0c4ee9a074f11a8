"""Stage 1: snippet-level action discrimination learning, on crops of recordings with points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrpro.engine.windows import in_pieces
from hrpro.training.batches import (
    CropSampler,
    classes_at_points,
    feature_statistics,
    features_at_points,
)
from hrpro.training.config import SnippetStageConfig, TrainingConfig
from hrpro.training.data import DataSet
from hrpro.training.losses import base_loss, contrastive_loss, snippet_loss
from hrpro.training.memory import initial_prototypes, update_prototypes
from hrpro.training.model import SnippetModel, SnippetOutput, band_reach
from hrpro.training.optimisation import Stage, as_run, over_processes, precision
from hrpro.training.parallel import total
from hrpro.training.pseudo_snippets import PseudoSnippets, mine_pseudo_snippets

_SCALE_FLOOR = 1e-3  # a feature that hardly varies is not blown up


def new_snippet_model(config: TrainingConfig, feature_dim: int, class_count: int) -> SnippetModel:
    """An untrained stage 1."""
    return SnippetModel(feature_dim, class_count, config.model)


class SnippetStage(Stage[SnippetModel]):
    """Stage 1 while it is trained; its state is that of the weights, the memory and the draws."""

    name = "snippet"

    def __init__(self, config: TrainingConfig, data: DataSet, device: torch.device) -> None:
        stage = config.snippet_stage
        model = _initial_model(config, data).to(device)
        super().__init__(model, stage, stage.average_decay, config.seed)
        self._config = config
        self._stage = stage
        self._device = device
        self._sampler = CropSampler(data, stage.crop_snippets, self._generator)
        self._embedded = _embedded_points(model, data)  # prototypes of the embedding (C, W)
        self._run = as_run(model, config)

    def step(self, number: int) -> dict[str, Tensor]:
        """Crops -> scores -> pseudo snippets -> losses -> weights, memory, averaged weights."""
        crops = self._sampler.draw(self._stage.batch_size)
        features, points, valid = (each.to(self._device, non_blocking=True) for each in crops)
        with precision(self._config, self._device):
            output = SnippetOutput(*self._run(features, valid))
        pseudo = _mine(output, points, valid, self._stage)
        losses = _losses(output, pseudo, self._embedded, self._stage)
        self._descent.step(losses["loss"])
        with torch.no_grad():
            self._update_memory(features, output.embedding.detach(), pseudo.action)
            self._averaged.update(number)
        counts = {
            "pseudo_action": total(pseudo.action.sum()),
            "pseudo_background": total(pseudo.background.sum()),
        }
        return {**over_processes(losses), **counts}

    def _update_memory(self, features: Tensor, embedding: Tensor, action: Tensor) -> None:
        """Eq. 3, for the prototypes that snippets attend to and for those they are compared to."""
        action = action.flatten(0, 1)
        model, stage = self._model, self._stage
        rows = features.flatten(0, 1)
        model.prototypes.copy_(
            update_prototypes(model.prototypes, rows, action, stage.prototype_momentum)
        )
        rows = embedding.flatten(0, 1)
        self._embedded = update_prototypes(self._embedded, rows, action, stage.embedding_momentum)

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step."""
        return {**super().state_dict(), "embedded": self._embedded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""
        super().load_state_dict(state)
        self._embedded = state["embedded"].to(self._device)


def _initial_model(config: TrainingConfig, data: DataSet) -> SnippetModel:
    """Random weights, the statistics of the features, and the prototypes of eq. 2."""
    model = new_snippet_model(config, data.feature_dim, len(data.classes))
    mean, deviation = feature_statistics(data)
    with torch.no_grad():
        model.feature_mean.copy_(mean)
        model.feature_scale.copy_(1 / deviation.clamp(min=_SCALE_FLOOR))
        model.prototypes.copy_(initial_prototypes(*features_at_points(data)))
    return model


def _losses(
    output: SnippetOutput, pseudo: PseudoSnippets, embedded: Tensor, stage: SnippetStageConfig
) -> dict[str, Tensor]:
    """L_snippet and its parts by name; ``embedded`` are the embedded prototypes (C, W)."""
    base = base_loss(
        output.scores, output.attention, pseudo, stage.focal_gamma, stage.lowest_weight
    )
    contrast = contrastive_loss(output.embedding, embedded, pseudo, stage.temperature)
    return {
        "loss": snippet_loss(base, contrast, stage),
        "action": base.action,
        "background": base.background,
        "background_class": base.background_class,
        "contrastive": contrast,
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
    device = model.prototypes.device
    rows = [
        snippet_scores(model, each.features).embedding[each.point_index] for each in data.recordings
    ]
    embedded = torch.from_numpy(np.concatenate(rows))
    return initial_prototypes(embedded.to(device), classes_at_points(data).to(device))


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
            batch = torch.from_numpy(np.array(piece))[None].to(device)  # a map cannot be written
            output = model(batch, torch.ones(1, len(piece), dtype=torch.bool, device=device))
        return tuple(each[0].cpu().numpy() for each in output)

    device = model.prototypes.device
    was_training = model.training
    model.eval()
    reach = band_reach(model.config)
    outputs = score(features) if reach is None else in_pieces(score, features, *reach)
    model.train(was_training)
    return SnippetScores(*outputs)
