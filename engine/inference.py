"""Batches on their way through a backend: done at once, or later in a thread.

    prepare -> ask -> [ in flight ] -> take

At most so many are in flight, and they are taken in the order in which they were asked for. A
backend on another machine is asked in threads, and so is one that is to compute beside the engine's
loop: it goes on, and is woken when there is an answer. Where none came, all that is in flight is
forgotten and will be asked for again: the streams still have the snippets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.batcher import Job
from hrpro.engine.refine import InstanceScorer
from hrpro.engine.stitch import stitch
from hrpro.engine.windows import WindowPlan
from hrpro.engine.wire import HrproError

Rows = NDArray[np.float32]
# P (B, T, C), embedding (B, T, W) and attention (B, T) of windows, or of the positions of a step.
Outputs = tuple[Rows, Rows, Rows]
# The same of the n snippets of each job; those of a stream are in order.
Scored = list[tuple[Job, Rows, Rows, Rows]]


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

    def prepare(self, jobs: Sequence[Job]) -> Callable[[], Scored]:
        """Read the windows of at most ``batch`` jobs; what is returned scores them, in any
        thread."""
        both = self._unused.pop() if self._unused else self._new()
        features, valid = both[0][: len(jobs)], both[1][: len(jobs)]
        for row, job in enumerate(jobs):
            job.stream.read_snippets(job.stop - self._window, features[row], valid[row])

        def score() -> Scored:
            try:
                outputs = self._backend.score_snippets(features, valid)
            finally:
                self._unused.append(both)
            return [
                (job, *stitch(job, *of_job)) for job, *of_job in zip(jobs, *outputs, strict=True)
            ]

        return score

    def _new(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        return np.zeros(self._shape, dtype=np.float32), np.zeros(self._shape[:2], dtype=np.bool_)


class Inference:
    """The batches of one backend; ``in_flight`` at most, 0 for one that answers at once.

    So many ``workers`` compute them. ``waits_for`` says why the last answer did not come, None if
    it did.
    """

    def __init__(self, in_flight: int, workers: int) -> None:
        self.waits_for: str | None = None
        self._most = max(1, in_flight)
        self._workers = ThreadPoolExecutor(workers, "inference") if in_flight else None
        self._asked: deque[tuple[Sequence[Job], Future[Scored]]] = deque()

    @property
    def has_room(self) -> bool:
        """Whether another batch may be asked for; a backend that is away is asked for one."""
        return len(self._asked) < (self._most if self.waits_for is None else 1)

    @property
    def has_answer(self) -> bool:
        """Whether `take` has something to take."""
        return bool(self._asked) and self._asked[0][1].done()

    def ask(
        self, jobs: Sequence[Job], score: Callable[[], Scored], wake: Callable[[], None]
    ) -> None:
        """Begin to score the jobs; ``wake`` is called when an answer comes later."""
        answer: Future[Scored]
        if self._workers is None:
            answer = Future()
            answer.set_result(score())
        else:
            answer = self._workers.submit(score)
            answer.add_done_callback(lambda _: wake())
        for job in jobs:
            job.stream.asked = job.until
        self._asked.append((jobs, answer))

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

    def forget(self) -> None:
        """What is in flight will be asked for again, of this backend or of another one."""
        for jobs, answer in self._asked:
            answer.cancel()  # one that has begun runs out
            for job in jobs:
                job.stream.asked = job.stream.processed
        self._asked.clear()
        self.waits_for = None
