"""Closed runs -> scored and refined proposals (paper, "Temporal Action Localization Inference")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.proposals import Run, RunDetector
from hrpro.engine.ring import Ring

_PROPOSALS_AT_ONCE = 256


class InstanceScorer(Protocol):
    """Stage 2: an ONNX session in the engine, the torch model in training."""

    def score_instances(
        self, embedding: NDArray[np.float32], proposals: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Embedding (T, W) and proposals (N, 2) in snippets from its first row ->
        completeness (N, C), refined borders (N, 2), their completeness (N, C)."""
        ...


@dataclass(frozen=True, slots=True)
class Proposal:
    """A scored proposal: borders are positions in snippets, ``score`` is in [0, 1].

    ``run_stop`` is the end of the run that it came from.
    """

    label_index: int
    start: float
    end: float
    score: float
    run_stop: int

    @property
    def due_from(self) -> int:
        """The look-ahead counts from here: the end of its run, or its own where that is earlier."""
        return min(self.run_stop, int(self.end))


def refine_runs(
    runs: Sequence[Run],
    detector: RunDetector,
    history: Ring,
    scorer: InstanceScorer | None,
    config: LocalizationConfig,
) -> list[Proposal]:
    """Score closed runs by contrast and completeness, and move their borders.

    ``history`` holds the embedding of the newest snippets. The score is the weighted mean of p_OIC
    and the completeness of the refined borders in the run's class (with equal weights half of the
    paper's sum, which ranks the same). With ``keep_unrefined`` the unrefined borders are given
    too, as in the paper. Without a scorer, stage 1 alone: the run's own borders, scored by p_OIC.
    """
    if not runs:
        return []
    contrast = np.array([max(0.0, detector.outer_inner_contrast(run)) for run in runs])
    weight = config.completeness_weight
    borders = np.array([(run.start_position, run.stop_position) for run in runs])  # (N, 2)
    if scorer is None:
        return _proposals(runs, borders, contrast)
    # A border moves by up to the width of an outer region, and has one of its own from there on.
    first = math.floor(borders[:, 0].min()) - 2 * config.border_limit - 1
    first = max(first, history.oldest)
    stretch = history.read(first, history.next_index)  # (T, W)
    relative = (borders - first).astype(np.float32)  # (N, 2)
    # In blocks: the features of many regions at once would need much memory.
    outputs = [
        scorer.score_instances(stretch, relative[n : n + _PROPOSALS_AT_ONCE])
        for n in range(0, len(relative), _PROPOSALS_AT_ONCE)
    ]
    completeness, refined, refined_completeness = map(np.concatenate, zip(*outputs, strict=True))
    labels = [run.label_index for run in runs]
    rows = np.arange(len(runs))
    refined = np.clip(refined.astype(np.float64) + first, detector.first_index, detector.next_index)
    score = fuse(contrast, refined_completeness[rows, labels], weight)
    proposals = _proposals(runs, refined, score)
    if config.keep_unrefined:
        score = fuse(contrast, completeness[rows, labels], weight)
        proposals += _proposals(runs, borders, score)
    return proposals


def fuse(
    contrast: NDArray[np.float64], completeness: NDArray[np.float32], weight: float
) -> NDArray[np.float64]:
    """The scores of proposals, (N,), from p_OIC and completeness with its ``weight`` in [0, 1]."""
    return (1 - weight) * contrast + weight * completeness.astype(np.float64)


def _proposals(
    runs: Sequence[Run], borders: NDArray[np.float64], scores: NDArray[np.float64]
) -> list[Proposal]:
    return [
        Proposal(run.label_index, float(start), float(end), float(score), run.stop)
        for run, (start, end), score in zip(runs, borders, scores, strict=True)
        if end > start
    ]
