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
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.ring import Ring

Floats = NDArray[np.float64]

DETECTION_SETTINGS = ("thresholds", "peak_gate", "border_ratio", "border_limit")


class Run(NamedTuple):
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


@dataclass(slots=True)
class _OpenRun:
    """A run that goes on, of one class above one threshold.

    ``left_sums`` add up P over the last 0, 1, ... snippets before it, ``start_total`` over all of
    them. Its peak is the highest of its own ``peak`` and those of the runs that it holds.
    """

    start: int
    start_position: float
    start_total: float
    left_sums: list[float]
    peak: float = 0.0


class RunDetector:
    """The open runs of one stream: those of a class lie in one another, as thresholds do.

    Almost every snippet is above the same thresholds as the one before: then nothing is opened or
    closed, and only peaks and totals go on.
    """

    def __init__(self, class_count: int, config: LocalizationConfig, first_index: int = 0) -> None:
        self._config = config
        self._thresholds = np.asarray(config.thresholds, dtype=np.float64)  # (K,)
        self._none = [0] * class_count
        self._levels = self._none  # how many runs of each class are open
        self._open: dict[int, list[_OpenRun]] = {}  # by class, that of the lowest threshold first
        # Sums of P are differences of running totals. What lies left of an open run is summed up
        # when it opens, so that a run may outlast every buffer.
        self._totals = Ring(2 * config.border_limit + 4, (class_count,), first_index, np.float64)
        self._total = np.zeros(class_count)
        self._totals.push(self._total)  # row i: the total over the snippets below i
        self._previous = np.zeros(class_count)
        self.first_index = first_index
        self.next_index = first_index

    @property
    def is_idle(self) -> bool:
        """Whether no run is open."""
        return not self._open

    def push(self, scores: NDArray[np.floating]) -> list[Run]:
        """Take P of snippet ``next_index``, shape (C,), and return the runs that it closes."""
        current = scores.astype(np.float64, copy=False)
        levels = self._none
        if current.item(current.argmax()) > self._config.thresholds[0]:
            levels = self._thresholds.searchsorted(current).tolist()  # so many are exceeded
        runs = [] if levels == self._levels else self._change(levels, current)
        for label_index, nested in self._open.items():
            score, innermost = current.item(label_index), nested[-1]
            if score > innermost.peak:
                innermost.peak = score
        self.pass_over(current)
        return runs

    def pass_over(self, current: Floats) -> None:
        """Go on by a snippet's P (C,): by itself for one that neither opens nor closes a run."""
        self._total = self._total + current
        self._totals.push(self._total)
        self._previous = current
        self.next_index += 1

    def flush(self) -> list[Run]:
        """The stream is over: close what is open at its end."""
        return self._change(self._none, None)

    def state(self, needed_from: int) -> dict[str, Any]:
        """All that the detector goes on from, as numbers and bytes; of the running totals, those
        from snippet ``needed_from`` on, beside the outer region of a run that opens now."""
        open_runs = []
        for label_index, nested in self._open.items():
            peak = 0.0
            for k, run in reversed([*enumerate(nested)]):
                peak = max(peak, run.peak)
                place = (k, label_index, run.start, run.start_position, peak, run.start_total)
                open_runs.append((place, run.left_sums))
        open_runs.sort()
        first = min(needed_from, self.next_index - self._config.border_limit)
        first = max(first, self._totals.oldest)
        return {
            "first_index": self.first_index,
            "next_index": self.next_index,
            "previous": self._previous.tobytes(),
            "open": [place for place, _ in open_runs],
            "left_sums": np.array([sums for _, sums in open_runs], dtype=np.float64).tobytes(),
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
        detector._total = totals[-1]
        width = config.border_limit + 1
        left_sums = np.frombuffer(state["left_sums"]).reshape(-1, width).tolist()
        detector._levels = [0] * class_count
        # The lowest thresholds come first.
        for values, left in zip(state["open"], left_sums, strict=True):
            _, c, start, position, peak, total = values
            run = _OpenRun(start, position, total, left, peak)
            detector._open.setdefault(c, []).append(run)
            detector._levels[c] += 1
        return detector

    def earliest_start(self) -> int:
        """Where the earliest open run of any class starts; ``next_index`` if none is open."""
        return min([nested[0].start for nested in self._open.values()], default=self.next_index)

    def earliest_open_start(self, label_index: int) -> int:
        """Where the earliest open run of a class starts; ``next_index`` if none is open."""
        nested = self._open.get(label_index)
        return nested[0].start if nested else self.next_index

    def outer_inner_contrast(self, run: Run) -> float:
        """p_OIC in [-1, 1]: mean of P inside minus mean of P in both outer regions.

        Exact from ``run.evidence_stop`` on; before, the right region is what has come of it.
        """
        stop, label = min(run.stop + run.border, self.next_index), run.label_index
        right_sum = self._totals.row(stop).item(label) - self._totals.row(run.stop).item(label)
        count = run.left_count + stop - run.stop
        outer_mean = (run.left_sum + right_sum) / count if count else 0.0
        return run.inner_mean - outer_mean

    def _change(self, levels: list[int], current: Floats | None) -> list[Run]:
        """Open and close runs, so that of each class (C,) so many are open; returns the closed
        ones, the lowest threshold's first. Without ``current`` the stream is over."""
        closed: list[tuple[int, Run]] = []
        before, self._levels = self._levels, levels
        for label_index, level in enumerate(levels):
            if level < before[label_index]:
                closed += self._close_runs(label_index, level, current)
            elif level > before[label_index]:
                self._open_runs(label_index, level, current)
        closed.sort(key=lambda each: each[0])  # of one threshold, those of the first class
        return [run for _, run in closed]

    def _open_runs(self, label_index: int, level: int, current: Floats | None) -> None:
        assert current is not None
        t, width = self.next_index, self._config.border_limit
        before, after = self._previous.item(label_index), current.item(label_index)
        totals = self._totals.read(max(t - width, self.first_index), t + 1)[::-1, label_index]
        total = totals.item(0)
        left_sums = (total - totals).tolist()
        left_sums += left_sums[-1:] * (width + 1 - len(left_sums))
        nested = self._open.setdefault(label_index, [])
        for threshold in self._config.thresholds[len(nested) : level]:
            position = float(t)
            if t > self.first_index:
                position = t - 0.5 + (threshold - before) / (after - before)
            nested.append(_OpenRun(t, position, total, left_sums))

    def _close_runs(
        self, label_index: int, level: int, current: Floats | None
    ) -> list[tuple[int, Run]]:
        """The closed ones, with their thresholds' numbers."""
        t, nested, closed, peak = self.next_index, self._open[label_index], [], 0.0
        before, total = self._previous.item(label_index), self._total.item(label_index)
        while len(nested) > level:
            run, k = nested.pop(), len(nested)
            peak = max(peak, run.peak)
            if peak <= self._config.peak_gate:
                continue
            position = float(t)
            if current is not None:
                step = current.item(label_index) - before
                position = t - 0.5 + (self._config.thresholds[k] - before) / step
            closed.append((k, self._closed(label_index, run, position, total)))
        if nested:
            nested[-1].peak = max(nested[-1].peak, peak)
        else:
            del self._open[label_index]
        return closed

    def _closed(self, label_index: int, run: _OpenRun, position: float, total: float) -> Run:
        start, stop = run.start, self.next_index
        width = math.ceil(self._config.border_ratio * (stop - start))
        border = min(width, self._config.border_limit)
        return Run(
            label_index=label_index,
            start=start,
            stop=stop,
            start_position=run.start_position,
            stop_position=position,
            border=border,
            inner_mean=(total - run.start_total) / (stop - start),
            left_sum=run.left_sums[border],
            left_count=min(border, start - self.first_index),
        )
