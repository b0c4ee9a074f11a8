"""Batches on their way through a backend: done at once, or later in a thread.

    prepare -> ask -> [ in flight ] -> take

At most so many are in flight, beside a few whose streams may wait for stage 2. They are taken in
the order in which they were asked for. A backend on another machine is asked in threads, and so is
one that is to compute beside the engine's loop: it goes on, and is woken when there is an answer.
Where none came, all that is in flight is forgotten and will be asked for again: the streams still
have the snippets.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.asking import Answers, InstanceScorer, at_once
from hrpro.engine.batcher import Job
from hrpro.engine.stitch import stitch
from hrpro.engine.windows import WindowPlan
from hrpro.engine.wire import HrproError

if TYPE_CHECKING:
    from hrpro.engine.stream import Stream

# Of threads that compute, more than that of the loop.
_NICENESS = 5

Rows = NDArray[np.float32]
T = TypeVar("T")
# P (B, T, C), embedding (B, T, W) and attention (B, T) of windows, or of the positions of a step.
Outputs = tuple[Rows, Rows, Rows]
# The same of the n snippets of each job; those of a stream are in order.
Scored = list[tuple[Job, Rows, Rows, Rows]]


class Prepared(NamedTuple):
    """A batch whose snippets are read: ``score`` computes it, in any thread.

    ``over`` is called once it is computed, or once it is sure that it never will be.
    """

    score: Callable[[], Scored]
    over: Callable[[], None]


class BackendError(HrproError):
    """A backend on another machine gave no answer, or none that can be used, for now."""


class Backend(InstanceScorer, Protocol):
    """Where inference runs: both stages of a bundle."""

    def score_snippets(self, features: NDArray[np.float32], valid: NDArray[np.bool_]) -> Outputs:
        """Windows (B, T, D) and validity (B, T) -> P (B, T, C), embedding (B, T, W) and attention
        (B, T).

        One on another machine raises BackendError, in a bounded time, and may be asked by several
        threads.
        """
        ...


class Windows:
    """Windows of streams, put together in memory that is used again, and scored as a batch."""

    def __init__(self, backend: Backend, plan: WindowPlan, feature_dim: int, batch: int) -> None:
        self._backend = backend
        self._window = plan.window
        self._shape = (batch, plan.window, feature_dim)
        self._unused: list[tuple[NDArray[np.float32], NDArray[np.bool_]]] = []

    def prepare(self, jobs: Sequence[Job]) -> Prepared:
        """Read the windows of at most ``batch`` jobs."""
        both = self._unused.pop() if self._unused else self._new()
        features, valid = both[0][: len(jobs)], both[1][: len(jobs)]
        for row, job in enumerate(jobs):
            job.stream.read_snippets(job.stop - self._window, features[row], valid[row])

        def score() -> Scored:
            outputs = self._backend.score_snippets(features, valid)
            return [
                (job, *stitch(job, *of_job)) for job, *of_job in zip(jobs, *outputs, strict=True)
            ]

        return Prepared(score, lambda: self._unused.append(both))

    def _new(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        return np.zeros(self._shape, dtype=np.float32), np.zeros(self._shape[:2], dtype=np.bool_)


class Inference:
    """The batches of one backend; ``in_flight`` at most, 0 for one that answers at once.

    So many ``workers`` compute them, and another one stage 2. ``waits_for`` says why the last
    answer did not come, None if it did.
    """

    def __init__(self, in_flight: int, workers: int) -> None:
        self.waits_for: str | None = None
        self._most = max(1, in_flight)
        self._workers = _threads(workers, "inference") if in_flight else None
        self._refiner = _threads(1, "stage-2") if in_flight else None
        self._asked: deque[tuple[Sequence[Job], Future[Scored]]] = deque()

    @property
    def is_at_once(self) -> bool:
        """Whether batches are answered when they are asked for."""
        return self._workers is None

    @property
    def has_room(self) -> bool:
        """Whether another batch may be asked for; a backend that is away is asked for one."""
        return len(self._asked) < (self._most if self.waits_for is None else 1)

    @property
    def oldest(self) -> Sequence[Job]:
        """The jobs of the batch that is taken next."""
        return self._asked[0][0] if self._asked else ()

    @property
    def has_answer(self) -> bool:
        """Whether `take` has something to take."""
        return bool(self._asked) and self._asked[0][1].done()

    def ask(self, jobs: Sequence[Job], batch: Prepared, wake: Callable[[], None]) -> None:
        """Begin to score the jobs; ``wake`` is called when an answer comes later."""
        answer = _computed(batch.score, self._workers, wake)
        answer.add_done_callback(lambda _: batch.over())
        for job in jobs:
            job.stream.asked = job.until
        self._asked.append((jobs, answer))

    def refine(self, answer: Callable[[], Answers], wake: Callable[[], None]) -> Future[Answers]:
        """Stage 2, which waits for no batch of stage 1."""
        return _computed(answer, self._refiner, wake)

    def take(self) -> Scored:
        """The oldest batch, if it is answered."""
        if not self.has_answer:
            return []
        try:
            scored = self._asked[0][1].result()
        except BackendError as error:
            self.forget()
            self.waits_for = str(error)
            return []
        self._asked.popleft()
        self.waits_for = None
        return scored

    def forget(self) -> set[Stream]:
        """What is in flight will be asked for again, of this backend or of another one; returns
        the streams that it is of."""
        streams = {job.stream for jobs, _ in self._asked for job in jobs}
        for _, answer in self._asked:
            answer.cancel()  # one that has begun runs out
        for stream in streams:
            stream.asked = stream.processed
        self._asked.clear()
        self.waits_for = None
        return streams


def _threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads that compute, and let the loop go first where there is not a core for each of them:
    what it is late with is late for all, while a batch that is late has more streams."""
    return ThreadPoolExecutor(count, name, _give_way)


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.nice(_NICENESS)


def _computed(
    compute: Callable[[], T], workers: ThreadPoolExecutor | None, wake: Callable[[], None]
) -> Future[T]:
    """Here and now, or by the workers."""
    if workers is None:
        return at_once(compute)
    answer = workers.submit(compute)
    answer.add_done_callback(lambda _: wake())
    return answer
