"""Closed runs -> scored and refined proposals (paper, "Temporal Action Localization Inference")."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.asking import Asking, InstanceScorer, Question
from hrpro.engine.config import LocalizationConfig
from hrpro.engine.proposals import Run, RunDetector
from hrpro.engine.ring import Ring

Score = TypeVar("Score", float, NDArray[np.float64])


class Proposal(NamedTuple):
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
) -> Asking[list[Proposal]]:
    """Score closed runs by contrast and completeness, and move their borders.

    ``history`` holds the embedding of the newest snippets. The score is the weighted mean of p_OIC
    and the completeness of the refined borders in the run's class (with equal weights half of the
    paper's sum, which ranks the same). With ``keep_unrefined`` the unrefined borders are given
    too, as in the paper. Without a scorer, stage 1 alone: the run's own borders, scored by p_OIC.
    """
    if not runs:
        return []
    # Few close at a time: they are dealt with one by one, quicker than in arrays.
    contrasts = [max(0.0, detector.outer_inner_contrast(run)) for run in runs]
    if scorer is None:
        return _lasting(_unrefined(*each) for each in zip(runs, contrasts, strict=True))
    # A border moves by up to the width of an outer region, and has one of its own from there on.
    first = math.floor(min(run.start_position for run in runs)) - 2 * config.border_limit - 1
    first = max(first, history.oldest)
    stretch = history.read(first, history.next_index)  # (T, W)
    borders = [(run.start_position - first, run.stop_position - first) for run in runs]
    relative = np.array(borders, dtype=np.float32)  # (N, 2)
    completeness, refined, refined_completeness = yield Question(scorer, stretch, relative)
    weight = config.completeness_weight
    earliest, latest = float(detector.first_index), float(detector.next_index)
    proposals, unrefined = [], []
    for n, (run, contrast) in enumerate(zip(runs, contrasts, strict=True)):
        label = run.label_index
        start, end = (min(max(each + first, earliest), latest) for each in refined[n].tolist())
        score = fuse(contrast, refined_completeness.item(n, label), weight)
        proposals.append(Proposal(label, start, end, score, run.stop))
        if config.keep_unrefined:
            score = fuse(contrast, completeness.item(n, label), weight)
            unrefined.append(_unrefined(run, score))
    return _lasting(proposals + unrefined)


def fuse(contrast: Score, completeness: Score, weight: float) -> Score:
    """The scores of proposals from p_OIC and completeness with its ``weight`` in [0, 1]."""
    return (1 - weight) * contrast + weight * completeness


def _lasting(proposals: Iterable[Proposal]) -> list[Proposal]:
    """Those that are not empty."""
    return [each for each in proposals if each.end > each.start]


def _unrefined(run: Run, score: float) -> Proposal:
    return Proposal(run.label_index, run.start_position, run.stop_position, score, run.stop)
