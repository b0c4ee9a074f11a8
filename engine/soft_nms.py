"""Class-wise Gaussian soft-NMS over time segments, offline and incremental.

Intersection over union is measured on plain time intervals: no +1, so disjoint segments have 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_FEW = 256
_LEAST = float(np.finfo(np.float64).tiny)


def temporal_iou(start_a: Floats, end_a: Floats, start_b: Floats, end_b: Floats) -> Floats:
    """Temporal intersection over union, broadcast over the arguments; any one time unit.

    Empty against empty is 0, touching segments are 0.
    """
    intersection = np.maximum(np.minimum(end_a, end_b) - np.maximum(start_a, start_b), 0.0)
    union = (end_a - start_a) + (end_b - start_b) - intersection
    return intersection / np.maximum(union, _LEAST)


def soft_nms(start: Floats, end: Floats, score: Floats, sigma: float) -> Floats:
    """Scores of one class after Gaussian soft-NMS, shape (N,), in the order given.

    The proposal with the highest remaining score is picked, and each one not yet picked is
    multiplied by ``exp(-tiou ** 2 / sigma)`` (Bodla et al. 2017, eq. 4), until none is left.
    Ties go to the earlier start, then the earlier end, so that the outcome does not depend on
    the order of the arguments.
    """
    if len(score) == 1:
        return score.astype(np.float64)
    order = np.lexsort((end, start))
    starts, ends, scores = start[order], end[order], score[order].astype(np.float64)
    # For few all the factors are computed at once; those of many would need much memory.
    if len(scores) <= _FEW:
        factors = _kept(starts[:, None], ends[:, None], starts, ends, sigma)
        result = np.empty_like(scores)
        result[order] = _decayed(scores.tolist(), factors.tolist())
        return result
    remaining = np.ones(len(scores), dtype=bool)
    for _ in range(len(scores)):
        best = int(np.where(remaining, scores, -np.inf).argmax())
        remaining[best] = False
        of_best = _kept(starts[best], ends[best], starts, ends, sigma)
        np.multiply(scores, of_best, out=scores, where=remaining)
    result = np.empty_like(scores)
    result[order] = scores
    return result


def _decayed(scores: list[float], factors: list[list[float]]) -> list[float]:
    """What is left of scores (N,), given what each leaves of each other (N, N)."""
    remaining = list(range(len(scores)))
    while remaining:
        best = max(remaining, key=scores.__getitem__)  # the first of equal ones
        remaining.remove(best)
        of_best = factors[best]
        for n in remaining:
            scores[n] *= of_best[n]
    return scores


def _kept(start_a: Floats, end_a: Floats, start_b: Floats, end_b: Floats, sigma: float) -> Floats:
    """The share of a score that soft-NMS leaves, broadcast over the arguments."""
    return np.exp(-(temporal_iou(start_a, end_a, start_b, end_b) ** 2) / sigma)


def subtract_published(
    start: Floats,
    end: Floats,
    score: Floats,
    sigma: float,
    published_start: Floats,
    published_end: Floats,
    published_score: Floats,
) -> Floats:
    """What the scores (N,) of new proposals add to what is published of their class already.

    Live, a proposal may have to go out before a better one of the same action is known. Soft-NMS
    would then leave the later one its full score, and the action would be told twice; decaying it
    would bury it under any weak proposal that went first. So a published proposal keeps its share
    of the evidence: the later one is worth what it has above ``published_score`` times the
    overlap ``1 - exp(-tiou ** 2 / sigma)``. Where nothing is published, nothing changes: with an
    endless look-ahead the outcome is that of offline soft-NMS.
    """
    if not len(published_score) or not len(score):
        return score
    tiou = temporal_iou(start[:, None], end[:, None], published_start, published_end)  # (N, M)
    taken = published_score * (1 - np.exp(-(tiou**2) / sigma))
    return np.maximum(score - taken.max(axis=1), 0.0)


def waits_for_better(
    start: Floats, end: Floats, score: Floats, is_final: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which proposals (N,) of a class overlap a better one that is not final, or that waits itself.

    Published before it, they would take from the better one what soft-NMS takes from them.
    """
    waits = np.zeros(len(score), dtype=np.bool_)
    if is_final.all():
        return waits
    overlaps = np.minimum(end[:, None], end) > np.maximum(start[:, None], start)
    behind = overlaps & (score > score[:, None])  # (N, N): the second is better than the first
    while True:
        more = (behind & (waits | ~is_final)).any(axis=1) & ~waits
        if not more.any():
            return waits
        waits |= more
