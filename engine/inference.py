"""Batches on their way through a backend: done at once on this machine, later on another one.

    ask -> [ in flight ] -> take

At most so many are in flight, and they are taken in the order in which they were asked for. A
backend on another machine is asked in threads: the engine's loop goes on, and is woken when there
is an answer. Where none came, all that is in flight is forgotten and will be asked for again: the
streams still have the snippets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.batcher import Job
from hrpro.engine.refine import InstanceScorer
from hrpro.engine.wire import HrproError

Rows = NDArray[np.float32]
Windows = tuple[NDArray[np.float32], NDArray[np.bool_]]


class BackendError(HrproError):
    """A backend on another machine gave no answer, or none that can be used, for now."""


class Backend(InstanceScorer, Protocol):
    """Where inference runs: both stages of a bundle."""

    def score_snippets(
        self, features: NDArray[np.float32], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Windows (B, T, D) and validity (B, T) -> P (B, T, C) and embedding (B, T, W).

        One on another machine raises BackendError, in a bounded time, and may be asked by several
        threads.
        """
        ...


class Inference:
    """The batches of one backend; ``in_flight`` at most, 0 for one that answers at once.

    ``waits_for`` says why the last answer did not come, None if it did.
    """

    def __init__(self, backend: Backend, in_flight: int) -> None:
        self.waits_for: str | None = None
        self._backend = backend
        self._most = max(1, in_flight)
        self._workers = ThreadPoolExecutor(in_flight, "inference") if in_flight else None
        self._asked: deque[tuple[list[Job], Future[tuple[Rows, Rows]]]] = deque()
        # Windows of batches that are answered: to write over them is faster than new memory.
        self._unused: list[Windows] = []

    @property
    def has_room(self) -> bool:
        """Whether another batch may be asked for; a backend that is away is asked for one."""
        return len(self._asked) < (self._most if self.waits_for is None else 1)

    @property
    def has_answer(self) -> bool:
        """Whether `take` has something to take."""
        return bool(self._asked) and self._asked[0][1].done()

    def ask(
        self,
        jobs: list[Job],
        features: NDArray[np.float32],
        valid: NDArray[np.bool_],
        wake: Callable[[], None],
    ) -> None:
        """Begin with windows (B, T, D) of jobs; ``wake`` is called when an answer comes later."""
        answer: Future[tuple[Rows, Rows]]
        if self._workers is None:
            answer = Future()
            answer.set_result(self._backend.score_snippets(features, valid))
        else:
            windows = self._copy(features, valid)
            B = len(jobs)
            answer = self._workers.submit(
                self._backend.score_snippets, windows[0][:B], windows[1][:B]
            )
            answer.add_done_callback(lambda _: self._unused.append(windows))
            answer.add_done_callback(lambda _: wake())
        for job in jobs:
            job.stream.asked = job.until
        self._asked.append((jobs, answer))

    def _copy(self, features: NDArray[np.float32], valid: NDArray[np.bool_]) -> Windows:
        """The next batch is put together in the same place. There may be room for more windows."""
        windows = self._unused.pop() if self._unused else (features[:0], valid[:0])
        if len(windows[0]) < len(features):
            windows = np.empty_like(features), np.empty_like(valid)
        for copy, each in zip(windows, (features, valid), strict=True):
            copy[: len(each)] = each
        return windows

    def take(self) -> list[tuple[Job, Rows, Rows]]:
        """The oldest batch, if it is answered: its jobs with P (T, C) and embedding (T, W)."""
        if not self.has_answer:
            return []
        jobs, answer = self._asked[0]
        try:
            scores, embedding = answer.result()
        except BackendError as error:
            self.forget()
            self.waits_for = str(error)
            return []
        self._asked.popleft()
        self.waits_for = None
        return list(zip(jobs, scores, embedding, strict=True))

    def forget(self) -> None:
        """What is in flight will be asked for again, of this backend or of another one."""
        for jobs, answer in self._asked:
            answer.cancel()  # one that has begun runs out
            for job in jobs:
                job.stream.asked = job.stream.processed
        self._asked.clear()
        self.waits_for = None
