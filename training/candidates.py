"""The proposals of a whole recording before any soft-NMS, for stage 2 to learn from.

The same runs, borders and contrast as `hrpro.engine.proposals` finds snippet by snippet, computed
for all classes and thresholds at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.config import LocalizationConfig
from hrpro.training.ranking import Candidates, Floats


def find_candidates(scores: NDArray[np.float32], config: LocalizationConfig) -> Candidates:
    """Runs of P (T, C) above each threshold, scored by contrast (p_OIC, not below 0).

    Ordered by class, threshold and time.
    """
    T, C = scores.shape  # snippets, classes
    P = scores.T.astype(np.float64)  # (C, T)
    threshold = np.asarray(config.thresholds)  # (K,)
    above = np.zeros((C, len(threshold), T + 2), dtype=np.int8)  # low before and behind
    above[:, :, 1:-1] = P[:, None] > threshold[None, :, None]
    change = np.diff(above)
    label, level, start = np.nonzero(change == 1)
    stop = np.nonzero(change == -1)[2]  # in the same order: runs do not overlap
    kept = _peaks(P, label, start, stop) > config.peak_gate
    label, level, start, stop = (each[kept] for each in (label, level, start, stop))
    first = np.where(start > 0, _crossing(P, label, start, threshold[level]), 0.0)
    last = np.where(stop < T, _crossing(P, label, stop, threshold[level]), float(T))
    border = np.ceil(config.border_ratio * (stop - start)).astype(np.intp)
    border = np.minimum(border, config.border_limit)
    return Candidates(
        borders=np.stack([first, last], axis=1),
        label_index=label.astype(np.int64),
        contrast=np.maximum(_contrast(P, label, start, stop, border), 0.0),
        evidence_stop=np.minimum(stop + border + 1, T).astype(np.int64),
    )


Indices = NDArray[np.intp]


def _peaks(scores: Floats, label: Indices, start: Indices, stop: Indices) -> Floats:
    """The highest score of each run, (N,)."""
    if len(label) == 0:
        return np.zeros(0)
    # Of each pair of neighbours in this list reduceat takes the stretch between; every other one
    # is a run. A last zero, since a run may end where its row does.
    T = scores.shape[1]
    ends = np.stack([label * T + start, label * T + stop], axis=1).ravel()
    return np.maximum.reduceat(np.append(scores.ravel(), 0.0), ends)[::2]


def _crossing(scores: Floats, label: Indices, t: Indices, threshold: Floats) -> Floats:
    """Where between the centres of t - 1 and t the score crosses the threshold; any t, (N,)."""
    T = scores.shape[1]
    before, after = scores[label, np.maximum(t - 1, 0)], scores[label, np.minimum(t, T - 1)]
    step = after - before
    step[step == 0] = 1.0  # at the ends of the recording, where there is nothing to cross
    return t - 0.5 + (threshold - before) / step


def _contrast(
    scores: Floats, label: Indices, start: Indices, stop: Indices, border: Indices
) -> Floats:
    """p_OIC: mean of P inside minus mean of P in both outer regions, (N,)."""
    C, T = scores.shape
    total = np.concatenate([np.zeros((C, 1)), scores.cumsum(axis=1)], axis=1)  # below t, (C, T + 1)
    left, right = np.maximum(start - border, 0), np.minimum(stop + border, T)
    inner = (total[label, stop] - total[label, start]) / (stop - start)
    outer = total[label, start] - total[label, left] + total[label, right] - total[label, stop]
    count = start - left + right - stop
    mean: Floats = inner - outer / np.maximum(count, 1)
    return mean
