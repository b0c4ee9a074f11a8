"""Snippet scores -> candidate proposals: runs above thresholds, scored by outer-inner contrast.

For each class and each threshold, a run is a maximal stretch of snippets whose score P lies above
the threshold (paper, section "Instance-level Action Completeness Learning"). `RunDetector` takes
one snippet's scores at a time, live or offline, and gives each run once, when it closes.

Borders are placed where the straight line from one snippet's score (at its centre) to the next
crosses the threshold, so they have a fraction:

    P            0.1     0.9     0.8     0.0          threshold 0.5
    snippet    |   6   |   7   |   8   |   9   |      run: 7 <= t < 9
    position   6       7       8       9       10     borders: 7.0 and 8.875
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.ring import Ring

Floats = NDArray[np.float64]

DETECTION_SETTINGS = ("thresholds", "peak_gate", "border_ratio", "border_limit")


@dataclass(frozen=True, slots=True)
class Run:
    """A closed run of one class: snippets ``start <= t < stop``.

    ``start_position`` and ``stop_position`` are its borders in snippets, with their fraction;
    ``border`` is the width in snippets of the outer regions. ``inner_mean`` is the mean of P
    inside, ``left_sum`` adds up P over the ``left_count`` snippets of the left outer region.
    """

    label_index: int
    start: int
    stop: int
    start_position: float
    stop_position: float
    border: int
    inner_mean: float
    left_sum: float
    left_count: int

    @property
    def evidence_stop(self) -> int:
        """The snippets below this index say all there is to know about the run."""
        return self.stop + self.border + 1


# The fields in their order.
run_values = attrgetter(*(each.name for each in fields(Run)))


class RunDetector:
    """The open runs of one stream: K thresholds times C classes."""

    def __init__(self, class_count: int, config: LocalizationConfig, first_index: int = 0) -> None:
        self._config = config
        self._thresholds = np.asarray(config.thresholds, dtype=np.float64)[:, None]  # (K, 1)
        K, C = len(config.thresholds), class_count
        self._open = np.zeros((K, C), dtype=bool)
        self._start = np.zeros((K, C), dtype=np.int64)
        self._start_position = np.zeros((K, C))
        self._peak = np.zeros((K, C))
        # Sums of P are differences of running totals. What lies left of an open run is summed up
        # when it opens, so that a run may outlast every buffer.
        self._start_total = np.zeros((K, C))
        self._left_sums = np.zeros((K, C, config.border_limit + 1))  # of the last 0, 1, ...
        self._totals = Ring(2 * config.border_limit + 4, (C,), first_index, dtype=np.float64)
        self._totals.append(np.zeros((1, C)))  # row i: the total over the snippets below i
        self._previous = np.zeros(C)
        self.is_idle = True  # no run is open
        self.first_index = first_index
        self.next_index = first_index

    def push(self, scores: NDArray[np.floating]) -> list[Run]:
        """Take P of snippet ``next_index``, shape (C,), and return the runs that it closes."""
        current = scores.astype(np.float64, copy=False)
        if self.is_idle and current.max() <= self._config.thresholds[0]:
            self._go_on(current)
            return []
        above = current > self._thresholds  # (K, C)
        runs: list[Run] = []
        changed = above ^ self._open
        if changed.any():
            opened, closed = changed & above, changed & self._open
            if opened.any():
                self._open_runs(opened, current)
            if closed.any():
                runs = self._close_runs(closed, current)
            self._open = above
            self.is_idle = not above.any()
        if not self.is_idle:
            np.maximum(self._peak, current, out=self._peak, where=above)
        self._go_on(current)
        return runs

    def _go_on(self, current: Floats) -> None:
        self._totals.push(self._totals.row(self.next_index) + current)
        self._previous = current
        self.next_index += 1

    def skip(self, scores: NDArray[np.float32]) -> None:
        """Take P of snippets (n, C) that open no run, while none is open: as n times `push`."""
        totals = np.empty((len(scores) + 1, scores.shape[1]))
        totals[0] = self._totals.row(self.next_index)
        totals[1:] = scores
        totals = np.add.accumulate(totals, axis=0)[1:]  # in the order in which `push` adds them
        for first in range(0, len(totals), self._totals.capacity):
            self._totals.append(totals[first : first + self._totals.capacity])
        self._previous = scores[-1].astype(np.float64)
        self.next_index += len(scores)

    def flush(self) -> list[Run]:
        """The stream is over: close what is open at its end."""
        runs = self._close_runs(self._open, None)
        self._open = np.zeros_like(self._open)
        self.is_idle = True
        return runs

    def state(self, needed_from: int) -> dict[str, Any]:
        """All that the detector goes on from, as numbers and bytes; of the running totals, those
        from snippet ``needed_from`` on, beside the outer region of a run that opens now."""
        k, c = np.nonzero(self._open)
        columns = self._start, self._start_position, self._peak, self._start_total
        values = [k.tolist(), c.tolist(), *(each[k, c].tolist() for each in columns)]
        first = min(needed_from, self.next_index - self._config.border_limit)
        first = max(first, self._totals.oldest)
        return {
            "first_index": self.first_index,
            "next_index": self.next_index,
            "previous": self._previous.tobytes(),
            "open": list(zip(*values, strict=True)),
            "left_sums": self._left_sums[k, c].tobytes(),
            "totals_from": first,
            "totals": self._totals.read(first, self._totals.next_index).tobytes(),
        }

    @classmethod
    def restored(
        cls, class_count: int, config: LocalizationConfig, state: Mapping[str, Any]
    ) -> Self:
        """A detector that goes on from the `state` of another with the same thresholds."""
        detector = cls(class_count, config, state["first_index"])
        detector.next_index = state["next_index"]
        detector._previous = np.frombuffer(state["previous"])
        totals = np.frombuffer(state["totals"]).reshape(-1, class_count)
        capacity = detector._totals.capacity
        detector._totals = Ring(capacity, (class_count,), state["totals_from"], np.float64)
        detector._totals.append(totals)
        width = config.border_limit + 1
        left_sums = np.frombuffer(state["left_sums"]).reshape(-1, width)
        for (k, c, start, position, peak, total), left in zip(
            state["open"], left_sums, strict=True
        ):
            detector._open[k, c] = True
            detector._start[k, c] = start
            detector._start_position[k, c] = position
            detector._peak[k, c] = peak
            detector._start_total[k, c] = total
            detector._left_sums[k, c] = left
        detector.is_idle = not state["open"]
        return detector

    def earliest_start(self) -> int:
        """Where the earliest open run of any class starts; ``next_index`` if none is open."""
        starts = self._start[self._open]
        return int(starts.min()) if len(starts) else self.next_index

    def earliest_open_start(self, label_index: int) -> int:
        """Where the earliest open run of a class starts; ``next_index`` if none is open."""
        open_runs = self._open[:, label_index]
        starts = self._start[open_runs, label_index]
        return int(starts.min()) if len(starts) else self.next_index

    def outer_inner_contrast(self, run: Run) -> float:
        """p_OIC in [-1, 1]: mean of P inside minus mean of P in both outer regions.

        Exact from ``run.evidence_stop`` on; before, the right region is what has come of it.
        """
        stop = min(run.stop + run.border, self.next_index)
        right_sum = (self._totals.row(stop) - self._totals.row(run.stop))[run.label_index]
        count = run.left_count + stop - run.stop
        outer_mean = (run.left_sum + right_sum) / count if count else 0.0
        return float(run.inner_mean - outer_mean)

    def _open_runs(self, opened: NDArray[np.bool_], current: Floats) -> None:
        t = self.next_index
        k, c = np.nonzero(opened)
        self._start[k, c] = t
        self._peak[k, c] = 0.0
        total = self._totals.row(t)
        self._start_total[k, c] = total[c]
        for width in range(1, self._config.border_limit + 1):
            before = self._totals.row(max(t - width, self.first_index))
            self._left_sums[k, c, width] = (total - before)[c]
        if t == self.first_index:
            self._start_position[k, c] = t
        else:
            self._start_position[k, c] = t - 0.5 + self._crossing(k, c, self._previous, current)

    def _close_runs(self, closed: NDArray[np.bool_], current: Floats | None) -> list[Run]:
        t = self.next_index
        k, c = np.nonzero(closed & (self._peak > self._config.peak_gate))
        if current is None:
            stop_position = np.full(len(k), float(t))
        else:
            stop_position = t - 0.5 + self._crossing(k, c, self._previous, current)
        inner_sum = self._totals.row(t)[c] - self._start_total[k, c]
        return [
            self._run(k[i], c[i], float(stop_position[i]), float(inner_sum[i]))
            for i in range(len(k))
        ]

    def _run(self, k: int, c: int, stop_position: float, inner_sum: float) -> Run:
        start, stop = int(self._start[k, c]), self.next_index
        width = math.ceil(self._config.border_ratio * (stop - start))
        border = min(width, self._config.border_limit)
        return Run(
            label_index=int(c),
            start=start,
            stop=stop,
            start_position=float(self._start_position[k, c]),
            stop_position=stop_position,
            border=border,
            inner_mean=inner_sum / (stop - start),
            left_sum=float(self._left_sums[k, c, border]),
            left_count=min(border, start - self.first_index),
        )

    def _crossing(
        self, k: NDArray[np.intp], c: NDArray[np.intp], before: Floats, after: Floats
    ) -> Floats:
        """Where between two centres, in (0, 1), the score crosses threshold k; shape (N,)."""
        step = after[c] - before[c]
        return (self._thresholds[k, 0] - before[c]) / step
