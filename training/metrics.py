"""Mean average precision of temporal action localization, by the ActivityNet protocol.

Predictions of one class over all recordings are visited by falling score; each takes the free
ground-truth instance of its recording with the highest tIoU if that reaches the threshold, and is
a false positive otherwise. Average precision is the area under the interpolated precision-recall
curve; the mean runs over the classes that have at least one instance.

THUMOS14 has ambiguous stretches besides, where nobody could say: a prediction that overlaps one
is no false positive. It counts if it is a hit, and is left out if it is none (TH14eventdetpr.m of
the benchmark's evaluation; its matching by instances and its 11-point precision are not used, as
nobody does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.refine import Proposal
from hrpro.engine.soft_nms import temporal_iou
from hrpro.engine.timebase import SnippetClock

THUMOS_TIOU_THRESHOLDS = tuple(round(0.1 * step, 1) for step in range(1, 8))


_NO_STRETCHES = np.zeros((0, 2))


@dataclass(frozen=True)
class Segments:
    """Labelled stretches of one recording, as parallel arrays of length N.

    ``start_s`` and ``end_s`` are float64 seconds, ``label_index`` int64, ``score`` float64
    (ground truth has score 1).
    """

    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    label_index: NDArray[np.int64]
    score: NDArray[np.float64]

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[float, float, int, float]]) -> Segments:
        """Build from ``(start_s, end_s, label_index, score)`` rows; no rows give length 0."""
        table = np.asarray(rows, dtype=np.float64).reshape(-1, 4)
        return cls(table[:, 0], table[:, 1], table[:, 2].astype(np.int64), table[:, 3])

    def of_class(self, label_index: int) -> Segments:
        """The segments with this label, in the order they stand."""
        return self.rows(self.label_index == label_index)

    def rows(self, chosen: NDArray[np.bool_] | NDArray[np.intp]) -> Segments:
        """The segments of a mask, or at these indices."""
        return Segments(
            self.start_s[chosen],
            self.end_s[chosen],
            self.label_index[chosen],
            self.score[chosen],
        )

    def __len__(self) -> int:
        return len(self.score)


def to_segments(proposals: Sequence[Proposal], clock: SnippetClock) -> Segments:
    """Proposals in snippets -> segments in seconds."""
    return Segments.from_rows(
        [(clock.seconds(p.start), clock.seconds(p.end), p.label_index, p.score) for p in proposals]
    )


@dataclass(frozen=True)
class MeanAveragePrecision:
    """``by_tiou[threshold]`` is the mAP at a threshold, ``average`` their mean; in [0, 1]."""

    average: float
    by_tiou: dict[float, float]
    instances: int


@dataclass(frozen=True)
class GroundTruth:
    """What predictions are held against: ``segments`` and ``ambiguous`` stretches by recording,
    and the thresholds of the data set's benchmark."""

    segments: Mapping[str, Segments]
    class_count: int
    tiou_thresholds: Sequence[float] = THUMOS_TIOU_THRESHOLDS
    ambiguous: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def compare(self, predictions: Mapping[str, Segments]) -> MeanAveragePrecision:
        """See `mean_average_precision`."""
        return mean_average_precision(
            self.segments, predictions, self.class_count, self.tiou_thresholds, self.ambiguous
        )


def mean_average_precision(
    truth: Mapping[str, Segments],
    predictions: Mapping[str, Segments],
    class_count: int,
    tiou_thresholds: Sequence[float] = THUMOS_TIOU_THRESHOLDS,
    ambiguous: Mapping[str, NDArray[np.float64]] | None = None,
) -> MeanAveragePrecision:
    """mAP of ``predictions`` against ``truth``, both by recording name.

    ``ambiguous`` are the stretches (K, 2) in seconds that are left out of account, of all classes.

    Recordings without an entry in ``predictions`` have none. Raises ``ValueError`` for
    predictions of a recording that has no truth entry: they would otherwise vanish silently.
    """
    unknown = sorted(set(predictions) - set(truth))
    if unknown:
        raise ValueError(f"predictions for recordings without ground truth: {', '.join(unknown)}")
    thresholds = np.asarray(tiou_thresholds, dtype=np.float64)
    per_class = [
        _average_precision(truth, predictions, label_index, thresholds, ambiguous or {})
        for label_index in range(class_count)
        if any((segments.label_index == label_index).any() for segments in truth.values())
    ]
    table = np.stack(per_class) if per_class else np.zeros((1, len(thresholds)))
    means = table.mean(axis=0)
    return MeanAveragePrecision(
        average=float(means.mean()),
        by_tiou={float(t): float(m) for t, m in zip(thresholds, means, strict=True)},
        instances=sum(len(segments) for segments in truth.values()),
    )


def _average_precision(
    truth: Mapping[str, Segments],
    predictions: Mapping[str, Segments],
    label_index: int,
    thresholds: NDArray[np.float64],
    ambiguous: Mapping[str, NDArray[np.float64]],
) -> NDArray[np.float64]:
    """Average precision of one class at each tIoU threshold, shape (K,)."""
    instance_count = 0
    left_out: list[NDArray[np.bool_]] = []
    scores: list[NDArray[np.float64]] = []
    hits: list[NDArray[np.bool_]] = []
    for name, segments in truth.items():
        instances = segments.of_class(label_index)
        instance_count += len(instances)
        if name not in predictions:
            continue
        proposals = predictions[name].of_class(label_index)
        order = np.argsort(-proposals.score, kind="stable")
        tiou = temporal_iou(
            proposals.start_s[order, None],
            proposals.end_s[order, None],
            instances.start_s[None, :],
            instances.end_s[None, :],
        )
        scores.append(proposals.score[order])
        hits.append(_match(tiou, thresholds))
        stretches = ambiguous.get(name, _NO_STRETCHES)
        left_out.append(_overlaps(proposals.start_s[order], proposals.end_s[order], stretches))
    if not scores:
        return np.zeros(len(thresholds))
    # Matching needs the order inside a recording only; precision needs the order over all.
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hit = np.concatenate(hits)[order]  # (N, K)
    miss = ~hit & ~np.concatenate(left_out)[order, None]
    true_positive = hit.cumsum(axis=0)
    precision = true_positive / np.maximum(true_positive + miss.cumsum(axis=0), 1)
    recall = true_positive / instance_count
    return np.array(
        [_interpolated_area(precision[:, k], recall[:, k]) for k in range(len(thresholds))]
    )


def _overlaps(
    start_s: NDArray[np.float64], end_s: NDArray[np.float64], stretches: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Which of N segments share more than a moment with any of K stretches (K, 2); (N,)."""
    shared = np.minimum(end_s[:, None], stretches[:, 1]) - np.maximum(
        start_s[:, None], stretches[:, 0]
    )
    return np.asarray((shared > 0).any(axis=1))


def _match(tiou: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Greedy matching, (N, M) tIoU with rows by falling score -> (N, K) true positives."""
    N, M = tiou.shape  # proposals, instances
    K = len(thresholds)
    hits = np.zeros((N, K), dtype=bool)
    if M == 0:
        return hits
    free = np.ones((K, M), dtype=bool)
    rows = np.arange(K)
    # Most proposals reach no instance at all.
    for n in np.flatnonzero(tiou.max(axis=1) >= thresholds.min()):
        candidates = np.where(free, tiou[n], -1.0)  # (K, M)
        best = candidates.argmax(axis=1)
        hits[n] = candidates[rows, best] >= thresholds
        free[rows[hits[n]], best[hits[n]]] = False
    return hits


def _interpolated_area(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> float:
    """Area under the curve whose precision at a recall is the best at that recall or beyond."""
    precision = np.concatenate([[0.0], precision, [0.0]])
    recall = np.concatenate([[0.0], recall, [1.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(np.diff(recall)) + 1
    return float(np.sum((recall[steps] - recall[steps - 1]) * envelope[steps]))
