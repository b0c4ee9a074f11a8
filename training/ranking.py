"""Reliable, positive and negative proposals from points (paper, "Instance-level Action
Completeness Learning", Reliable Prototype Construction)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.soft_nms import temporal_iou

Floats = NDArray[np.float64]
ReliableRule = Literal["contrast", "between_points", "none"]


@dataclass(frozen=True)
class Candidates:
    """Proposals of a recording: ``borders`` (N, 2) in snippets, ``label_index`` and p_OIC (N,).

    The snippets below ``evidence_stop`` (N,) say all there is to know of a proposal.
    """

    borders: Floats
    label_index: NDArray[np.int64]
    contrast: Floats
    evidence_stop: NDArray[np.int64]


@dataclass(frozen=True)
class RankedProposals:
    """What stage 2 learns from, for one recording.

    ``borders`` (N, 2): candidates first (RP and PP), then negative proposals. ``completeness``
    (N, C): IoU with the best reliable proposal of each class, 0 for negatives. ``reliable``
    (N, 2): the reliable proposal to regress to. ``own_iou`` (N,): IoU with it, 0 where there is
    none of the candidate's class. ``negative`` (N,) bool.
    """

    borders: Floats
    completeness: Floats
    reliable: Floats
    own_iou: Floats
    negative: NDArray[np.bool_]


def reliable_proposals(
    candidates: Candidates,
    point_index: NDArray[np.int64],
    point_label: NDArray[np.int64],
    rule: ReliableRule = "contrast",
) -> NDArray[np.int64]:
    """RP: for each point the candidate of its class that holds it with the highest p_OIC.

    By the rule "between_points" that is chosen among those that hold no other point, if there
    are any (as in the released code); by "none" all that hold the point are taken. Returns
    indices of candidates; points that no candidate holds have none.
    """
    centre = point_index + 0.5
    inside = (candidates.borders[None, :, 0] <= centre[:, None]) & (
        candidates.borders[None, :, 1] > centre[:, None]
    )  # (points, N)
    holds = inside & (candidates.label_index[None] == point_label[:, None])
    if holds.size == 0:
        return np.zeros(0, dtype=np.int64)
    if rule == "none":
        return np.flatnonzero(holds.any(axis=0))
    if rule == "between_points":
        alone = holds & (inside.sum(axis=0) == 1)
        holds = np.where(alone.any(axis=1, keepdims=True), alone, holds)
    best = np.where(holds, candidates.contrast, -np.inf).argmax(axis=1)
    return np.unique(best[holds.any(axis=1)])


def rank_proposals(
    candidates: Candidates,
    point_index: NDArray[np.int64],
    point_label: NDArray[np.int64],
    attention: NDArray[np.float32],
    negative_thresholds: Sequence[float],
    class_count: int,
    rule: ReliableRule = "contrast",
) -> RankedProposals:
    """Targets of a recording's proposals; ``attention`` is A, (T,)."""
    reliable = reliable_proposals(candidates, point_index, point_label, rule)
    negatives = _runs_below(attention, negative_thresholds)
    N, M = len(candidates.borders), len(negatives)
    completeness = np.zeros((N + M, class_count))
    target = np.concatenate([candidates.borders, negatives])
    own_iou = np.zeros(N + M)
    if len(reliable) and N:
        to, to_label = candidates.borders[reliable], candidates.label_index[reliable]
        iou = temporal_iou(
            candidates.borders[:, None, 0],
            candidates.borders[:, None, 1],
            to[None, :, 0],
            to[None, :, 1],
        )  # (N, reliable)
        np.maximum.at(completeness[:N].T, to_label, iou.T)
        own = np.where(to_label[None] == candidates.label_index[:, None], iou, -1.0)
        own_iou[:N] = np.maximum(own.max(axis=1), 0.0)
        target[:N] = to[own.argmax(axis=1)]
    return RankedProposals(
        borders=np.concatenate([candidates.borders, negatives]),
        completeness=completeness,
        reliable=target,
        own_iou=own_iou,
        negative=np.arange(N + M) >= N,
    )


def _runs_below(attention: NDArray[np.float32], thresholds: Sequence[float]) -> Floats:
    """NP: runs of snippets whose attention lies below each threshold, (M, 2)."""
    rows = []
    for threshold in thresholds:
        below = np.concatenate([[False], attention < threshold, [False]])
        edges = np.flatnonzero(below[1:] != below[:-1]).reshape(-1, 2)
        rows.append(edges.astype(np.float64))
    return np.concatenate(rows) if rows else np.zeros((0, 2))
