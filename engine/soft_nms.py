"""Class-wise Gaussian soft-NMS over time segments, offline and incremental.

Intersection over union is measured on plain time intervals: no +1, so disjoint segments have 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def temporal_iou(start_a: Floats, end_a: Floats, start_b: Floats, end_b: Floats) -> Floats:
    """Temporal intersection over union, broadcast over the arguments; any one time unit.

    Empty against empty is 0, touching segments are 0.
    """
    intersection = np.maximum(np.minimum(end_a, end_b) - np.maximum(start_a, start_b), 0.0)
    union = (end_a - start_a) + (end_b - start_b) - intersection
    return intersection / np.maximum(union, np.finfo(np.float64).tiny)


def soft_nms(start: Floats, end: Floats, score: Floats, sigma: float) -> Floats:
    """Scores of one class after Gaussian soft-NMS, shape (N,), in the order given.

    The proposal with the highest remaining score is picked, and each one not yet picked is
    multiplied by ``exp(-tiou ** 2 / sigma)`` (Bodla et al. 2017, eq. 4), until none is left.
    Ties go to the earlier start, then the earlier end, so that the outcome does not depend on
    the order of the arguments.
    """
    order = np.lexsort((end, start))
    starts, ends, scores = start[order], end[order], score[order].astype(np.float64)
    remaining = np.ones(len(scores), dtype=bool)
    for _ in range(len(scores)):
        best = int(np.argmax(np.where(remaining, scores, -np.inf)))
        remaining[best] = False
        tiou = temporal_iou(starts[best], ends[best], starts, ends)
        scores = np.where(remaining, scores * np.exp(-(tiou**2) / sigma), scores)
    result = np.empty_like(scores)
    result[order] = scores
    return result


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
