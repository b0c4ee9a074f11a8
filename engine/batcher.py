"""Which windows go into the next inference call: micro-batches across streams."""

from __future__ import annotations

import bisect
import itertools
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hrpro.engine.stream import Stream
from hrpro.engine.windows import WindowPlan


class Job(NamedTuple):
    """One window: it gives the scores of the snippets ``first <= t < until`` of a stream."""

    stream: Stream
    first: int
    until: int
    stop: int


def batch_sizes(max_batch: int) -> list[int]:
    """The sizes that batches have, from small to large: powers of two, and the largest."""
    return sorted({*(2**n for n in range(max_batch.bit_length())), max_batch})


class Batcher:
    """Takes ready windows from the streams in turn, so that no stream waits for a fast one.

    A batch is taken when it is full, or when a stream has waited for ``max_wait_s``. It has one of
    a few sizes: a backend that prepares itself for each shape then knows them all. What is left is
    first in the next batch.

    Where more streams wait than fit, and they have places, a batch goes on from the place where the
    one before has ended, and around: all get their turn, and what lies together comes together.
    """

    def __init__(
        self,
        plan: WindowPlan,
        max_batch: int,
        max_wait_s: float = 0.0,
        now_s: Callable[[], float] = time.monotonic,
        place_of: Callable[[Stream], int] | None = None,
    ) -> None:
        self._plan = plan
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._now_s = now_s
        self.sizes = batch_sizes(max_batch)
        # In the order of their turn, with the time since when each waits for it, and its windows.
        self._waiting: dict[str, tuple[Stream, float, int]] = {}
        self._windows = 0  # of all that wait
        self._place_of = place_of
        self._from_place = 0

    def offer(self, stream: Stream) -> None:
        """Something of a stream has changed: it may have a window that can be computed, or not."""
        windows = stream.windows_from(stream.asked)
        if not windows:
            self.withdraw(stream)
            return
        before = self._waiting.get(stream.stream)
        since_s, counted = (self._now_s(), 0) if before is None else before[1:]
        self._waiting[stream.stream] = stream, since_s, windows
        self._windows += windows - counted

    def withdraw(self, stream: Stream) -> None:
        """There is nothing to compute of it, or another bundle does."""
        before = self._waiting.pop(stream.stream, None)
        if before is not None:
            self._windows -= before[2]

    def due_in_s(self) -> float | None:
        """When there is a batch to take; None if no stream waits."""
        if not self._waiting:
            return None
        if self._windows >= self._max_batch:
            return 0.0
        _, since_s, _ = next(iter(self._waiting.values()))
        return max(0.0, since_s + self._max_wait_s - self._now_s())

    def take(self) -> list[Job]:
        """The windows of a batch that is due: one a stream, then further ones of those that have
        more. Windows of one stream stand in the order of time."""
        if self.due_in_s() != 0:
            return []
        jobs = self._jobs()
        jobs = jobs[: self.sizes[bisect.bisect(self.sizes, len(jobs)) - 1]]
        for name, taken in Counter([job.stream.stream for job in jobs]).items():
            stream, _, windows = self._waiting.pop(name)
            if windows > taken:
                self._waiting[name] = stream, self._now_s(), windows - taken
        self._windows -= len(jobs)
        return jobs

    def _jobs(self) -> list[Job]:
        """Up to ``max_batch`` windows, in turn."""
        in_turn = [(stream, stream.asked, windows) for stream, _, windows in self._first_ones()]
        jobs: list[Job] = []
        while in_turn and len(jobs) < self._max_batch:
            room = self._max_batch - len(jobs)
            chosen, in_turn = in_turn[:room], in_turn[room:]
            for stream, first, windows in chosen:
                until = min(self._plan.counts_until(first), stream.ready_until())
                jobs.append(Job(stream, first, until, self._plan.stop(first)))
                if windows > 1:
                    in_turn.append((stream, until, windows - 1))
        return jobs

    def _first_ones(self) -> list[tuple[Stream, float, int]]:
        """Those of the waiting streams, at most ``max_batch``, whose turn it is."""
        if self._place_of is None or len(self._waiting) <= self._max_batch:
            return list(itertools.islice(self._waiting.values(), self._max_batch))
        waiting = list(self._waiting.values())
        places = np.array([self._place_of(stream) for stream, _, _ in waiting])
        around = np.lexsort((places, places < self._from_place))[: self._max_batch]
        self._from_place = int(places[around[-1]]) + 1
        return [waiting[k] for k in around.tolist()]
