"""A backend whose calls are noted: for metrics, and for benchmarks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.incremental import (
    Floats,
    Pool,
    PoolKeeper,
    Stepped,
    StepScorer,
)
from hrpro.engine.inference import Backend, Outputs

Stage = Literal["snippet", "instance"]
# Of which stage, how many windows, streams or proposals, from when to when (monotonic seconds).
Note = Callable[[Stage, int, float, float], None]


@contextlib.contextmanager
def _noted(note: Note, stage: Stage, rows: int) -> Iterator[None]:
    """A call that fails is not noted."""
    began_s = time.monotonic()
    yield
    note(stage, rows, began_s, time.monotonic())


class NotedBackend:
    """The same backend; ``note`` is called behind each call, in its thread."""

    def __init__(self, inner: Backend, note: Note) -> None:
        self._inner = inner
        self._note = note

    def score_snippets(self, features: Floats, valid: NDArray[np.bool_]) -> Outputs:
        """See `hrpro.engine.inference.Backend`."""
        with _noted(self._note, "snippet", len(features)):
            return self._inner.score_snippets(features, valid)

    def score_step(
        self,
        features: Floats,
        valid: NDArray[np.bool_],
        arrival: NDArray[np.int64],
        state: Sequence[Floats],
    ) -> Stepped:
        """See `hrpro.engine.incremental.StepScorer`; for one that has it."""
        with _noted(self._note, "snippet", len(features)):
            return cast(StepScorer, self._inner).score_step(features, valid, arrival, state)

    def device_pool(self, slots: int) -> Pool | None:
        """See `hrpro.engine.incremental.PoolKeeper`; None for one that is none."""
        inner = self._inner
        pool = inner.device_pool(slots) if isinstance(inner, PoolKeeper) else None
        return None if pool is None else NotedPool(pool, self._note)

    def score_instances(
        self, embedding: Floats, proposals: Floats, stretch: NDArray[np.int64] | None = None
    ) -> tuple[Floats, Floats, Floats]:
        """See `hrpro.engine.asking.InstanceScorer`."""
        with _noted(self._note, "instance", len(proposals)):
            return self._inner.score_instances(embedding, proposals, stretch)


class NotedPool(Pool):
    """The same pool; ``note`` is called behind each step."""

    def __init__(self, inner: Pool, note: Note) -> None:
        self._inner = inner
        self._note = note

    def reset(self, slot: int) -> None:
        """See `hrpro.engine.incremental.Pool`."""
        self._inner.reset(slot)

    def flags(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """See `hrpro.engine.incremental.Pool`."""
        return self._inner.flags(slots)

    def step(
        self,
        features: Floats,
        flags: NDArray[np.bool_],
        slots: NDArray[np.int64],
        arrival: NDArray[np.int64],
    ) -> Outputs:
        """See `hrpro.engine.incremental.Pool`."""
        with _noted(self._note, "snippet", len(features)):
            return self._inner.step(features, flags, slots, arrival)
