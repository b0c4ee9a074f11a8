"""Stage 1 a step at a time: what a stream's past has given is kept in its slot of a pool.

    jobs -> what each stream has not fed yet -> gather slots -> step -> scatter -> rows

The pool is in arrays of the host, or in memory of the device that computes. A step takes the
snippets that came since the last one, and gives the scores that have become final by them, see
`hrpro.export.step`. A stream whose slot does not stand where its next job begins is fed again from
its ring, from as far back as scores depend on, with the same outcome: it is new, or another bundle
has worked for it, or it was silent, or snippets were passed over.
"""

from __future__ import annotations

import heapq
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.batcher import Job
from hrpro.engine.config import EngineConfig
from hrpro.engine.inference import Backend, Outputs, Scored
from hrpro.engine.settings import SettingsError
from hrpro.engine.stream import Stream
from hrpro.export.bundle import Manifest, StepLayout

Floats = NDArray[np.float32]
Stepped = tuple[Outputs, list[Floats]]

_NOWHERE = -1
# Slots so many times as far apart as those of a batch need be are still read as they lie.
_SPARSE = 1.5


class StepScorer(Backend, Protocol):
    """A backend that can go on from a state."""

    def score_step(
        self,
        features: Floats,
        valid: NDArray[np.bool_],
        arrival: NDArray[np.int64],
        state: Sequence[Floats],
    ) -> Stepped:
        """The n newest snippets (B, n, D), their flags after those of the past (B, history + n),
        the arrival index (B,) of the first, and the state -> P (B, n, C), embedding (B, n, W) and
        attention (B, n) of the positions that are final by them, and what is new of the state."""
        ...


@runtime_checkable
class PoolKeeper(Protocol):
    """A backend that may have the state of streams in its own memory."""

    def device_pool(self, slots: int) -> Pool | None:
        """A pool there; None where states come from the host, see `StepScorer`."""
        ...


def runs_by_steps(manifest: Manifest, config: EngineConfig) -> bool:
    """Whether stage 1 is computed by steps. Raises SettingsError where it cannot, and should."""
    obstacle = None
    if manifest.step is None:
        obstacle = "a bundle with a step graph (attention within a band, exported by this version)"
    elif config.backend != "onnxruntime":
        obstacle = "backend onnxruntime"
    elif config.provider == "tensorrt":
        obstacle = "provider cpu or cuda (TensorRT would build an engine for each length of a step)"
    elif config.provider == "cuda" and importlib.util.find_spec("onnx") is None:
        obstacle = 'the package onnx for provider cuda (pip install "hrpro-stream[gpu]")'
    if obstacle is not None and config.inference == "incremental":
        raise SettingsError(f"inference incremental: expected {obstacle}")
    return obstacle is None and config.inference != "window"


def most_in_a_call(manifest: Manifest, config: EngineConfig) -> int:
    """Hops of streams in one call of stage 1: steps, or windows."""
    by_steps = runs_by_steps(manifest, config)
    return config.step_batch_limit if by_steps else config.batch_limit


def cache_dtype(config: EngineConfig) -> type[np.floating]:
    """Of the keys and values that are kept."""
    return np.float16 if config.cache_precision == "fp16" else np.float32


class Pool(ABC):
    """The state of streams, a slot each. The flags of their past snippets are on the host."""

    def __init__(self, layout: StepLayout, slots: int) -> None:
        self._layout, self._rings = layout, layout.rings
        self._flags = np.zeros((slots, layout.history), dtype=np.bool_)

    def reset(self, slot: int) -> None:
        """A stream begins: nothing before it is there. What was kept is masked by that, but for
        the convolution's rows and those that wait, which the pool has to forget."""
        self._flags[slot] = False

    def flags(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the past snippets of each slot are there, (B, history)."""
        return self._flags[slots]

    @abstractmethod
    def step(
        self,
        features: Floats,
        flags: NDArray[np.bool_],
        slots: NDArray[np.int64],
        arrival: NDArray[np.int64],
    ) -> Outputs:
        """The n newest snippets (B, n, D) of streams, in ascending order of their slots (B,), the
        flags (B, history + n) and the arrival index (B,) of the first -> P (B, n, C), embedding
        (B, n, W) and attention (B, n) of the positions that are final by them. What is new of the
        state is kept."""

    def _places(self, arrival: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        """Rows of the rings for the snippets from ``arrival`` on, (B, min(n, capacity)): of more
        than a ring holds, the first are the oldest by now."""
        kept = min(n, self._layout.capacity)
        places: NDArray[np.int64] = arrival[:, None] + np.arange(n - kept, n)
        return places % self._layout.capacity


def new_pool(scorer: StepScorer, layout: StepLayout, slots: int, dtype: type[np.floating]) -> Pool:
    """A pool where the scorer computes, or on the host, with keys and values of this type."""
    pool = scorer.device_pool(slots) if isinstance(scorer, PoolKeeper) else None
    return pool or StatePool(scorer, layout, slots, dtype)


class StatePool(Pool):
    """A pool in arrays of the host, made once.

    Keys and values are rings: a new row takes the place of the oldest one, and nothing is shifted.
    Slots side by side are given as they lie, others are copied together.
    """

    def __init__(
        self, scorer: StepScorer, layout: StepLayout, slots: int, dtype: type[np.floating]
    ) -> None:
        super().__init__(layout, slots)
        self._scorer = scorer
        # Not written to, hence not resident, before a slot is in use.
        self._parts = [
            np.zeros((slots, *shape), dtype=dtype if name in layout.rings else np.float32)
            for name, shape in layout.state.items()
        ]
        self._gathered: list[Floats] = []

    def reset(self, slot: int) -> None:
        """See `Pool`."""
        super().reset(slot)
        for name, part in zip(self._layout.state, self._parts, strict=True):
            if name not in self._rings:
                part[slot] = 0

    def step(
        self,
        features: Floats,
        flags: NDArray[np.bool_],
        slots: NDArray[np.int64],
        arrival: NDArray[np.int64],
    ) -> Outputs:
        """See `Pool`."""
        first, span = int(slots[0]), int(slots[-1] - slots[0]) + 1
        if len(slots) < span <= _SPARSE * len(slots):
            return self._step_over_gaps(features, flags, slots, arrival, first, span)
        outputs, new = self._scorer.score_step(features, flags, arrival, self.gather(slots))
        self.scatter(slots, arrival, new, flags)
        return outputs

    def _step_over_gaps(
        self,
        features: Floats,
        flags: NDArray[np.bool_],
        slots: NDArray[np.int64],
        arrival: NDArray[np.int64],
        first: int,
        span: int,
    ) -> Outputs:
        """With the few slots between them, of which nothing is kept: to compute these takes less
        time than to copy the states of all."""
        rows = slots - first

        def spread(values: NDArray[Any]) -> NDArray[Any]:
            wide = np.zeros((span, *values.shape[1:]), dtype=values.dtype)
            wide[rows] = values
            return wide

        outputs, new = self._scorer.score_step(
            spread(features), spread(flags), spread(arrival), self.gather(np.arange(span) + first)
        )
        self.scatter(slots, arrival, [each[rows] for each in new], flags)
        scores, embedding, attention = outputs
        return scores[rows], embedding[rows], attention[rows]

    def gather(self, slots: NDArray[np.int64]) -> list[Floats]:
        """The state (B, ...) of slots in ascending order; to be read only, until the next call."""
        B, first = len(slots), int(slots[0])
        side_by_side = int(slots[-1]) - first == B - 1
        if side_by_side and all(part.dtype == np.float32 for part in self._parts):
            return [part[first : first + B] for part in self._parts]
        if len(self._gathered[0] if self._gathered else ()) < B:
            self._gathered = [
                np.empty((B, *part.shape[1:]), dtype=np.float32) for part in self._parts
            ]
        for part, out in zip(self._parts, self._gathered, strict=True):
            if part.dtype == np.float32:
                np.take(part, slots, axis=0, out=out[:B], mode="clip")  # "raise" would copy twice
            else:
                out[:B] = part[slots]
        return [out[:B] for out in self._gathered]

    def scatter(
        self,
        slots: NDArray[np.int64],
        arrival: NDArray[np.int64],
        new: Sequence[Floats],
        flags: NDArray[np.bool_],
    ) -> None:
        """Take what a step has made of the n snippets from ``arrival`` (B,) on."""
        n = flags.shape[1] - self._layout.history
        at = self._places(arrival, n)
        kept = at.shape[1]
        for name, part, rows in zip(self._layout.state, self._parts, new, strict=True):
            if name not in self._rings:
                part[slots] = rows
            elif kept == 1:
                part[slots, :, at[:, 0]] = rows[:, :, -1]
            else:
                part[slots[:, None], :, at] = rows[:, :, n - kept :].transpose(0, 2, 1, 3)
        self._flags[slots] = flags[:, n:]


class _Feed(NamedTuple):
    """What a stream is fed in a step: so many snippets from ``start`` on, for its ``jobs``.

    A fresh one knows nothing of what is before.
    """

    slot: int
    is_fresh: bool
    start: int
    snippets: int
    jobs: list[Job]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Streams that are fed as many snippets, in the order of their slots: (B, n, D) and (B, n)."""

    feeds: list[_Feed]
    features: Floats
    here: NDArray[np.bool_]


class Steps:
    """The streams of one bundle, computed by steps."""

    def __init__(self, manifest: Manifest, scorer: StepScorer, config: EngineConfig) -> None:
        assert manifest.step is not None
        self._layout = manifest.step
        self._scorer = scorer
        self._context, self._delay = manifest.context_snippets, manifest.lookahead_snippets
        self._feature_dim = manifest.feature_dim
        self._max_streams = config.max_streams
        self._dtype = cache_dtype(config)
        self._pool: Pool | None = None  # while a stream has a slot
        self._slots: dict[Stream, int] = {}
        self._unused = list(range(config.max_streams))  # a heap: the first ones lie side by side
        self._fed = [_NOWHERE] * config.max_streams  # up to this snippet
        self._known = [0] * config.max_streams  # up to this one, at that time

    @property
    def stream_bytes(self) -> int:
        """Of the state of one stream."""
        size = np.dtype(self._dtype).itemsize
        return self._layout.history + sum(
            int(np.prod(shape)) * (size if name in self._layout.rings else 4)
            for name, shape in self._layout.state.items()
        )

    def warm_up(self, scorer: StepScorer, sizes: Sequence[int], hop: int) -> None:
        """Compute a step of each size, in a pool as large as that of the streams."""
        slots = max(self._max_streams, *sizes)
        pool = new_pool(scorer, self._layout, slots, self._dtype)
        for B in reversed(sizes):
            pool.step(
                np.zeros((B, hop, self._feature_dim), np.float32),
                np.zeros((B, self._layout.history + hop), np.bool_),
                np.arange(B),
                np.zeros(B, np.int64),
            )

    def leave(self, stream: Stream) -> None:
        """A stream is over, or another bundle works for it."""
        slot = self._slots.pop(stream, None)
        if slot is None:
            return
        heapq.heappush(self._unused, slot)
        if not self._slots:
            self._pool = None

    def prepare(self, jobs: Sequence[Job]) -> Callable[[], Scored]:
        """Read what the streams have not fed yet; what is returned scores the jobs, in any thread,
        one such call after the other, in the order in which they were prepared.

        Streams that have as many snippets to feed are computed together, in one call.
        """
        by_stream: dict[Stream, list[Job]] = {}
        for job in jobs:
            by_stream.setdefault(job.stream, []).append(job)
        together: dict[int, list[_Feed]] = {}
        for stream, of_stream in by_stream.items():
            feed = self._feed(stream, of_stream)
            together.setdefault(feed.snippets, []).append(feed)
        batches = [self._batch(feeds) for feeds in together.values()]
        pool = self._pool
        assert pool is not None

        def score() -> Scored:
            scored: Scored = []
            for batch in batches:
                outputs = self._step(pool, batch)
                for row, feed in enumerate(batch.feeds):
                    first = feed.start - self._delay  # the position of the first scores
                    for job in feed.jobs:
                        counted = slice(job.first - first, job.until - first)
                        scores, embedding, attention = (each[row, counted] for each in outputs)
                        scored.append((job, scores, embedding, attention))
            return scored

        return score

    def _feed(self, stream: Stream, jobs: list[Job]) -> _Feed:
        """What to feed for jobs that follow one another. From then on it counts as fed: what does
        not come about is noticed, since the next job then begins before."""
        slot, first, stop = self._slot(stream), jobs[0].first, jobs[-1].until + self._delay
        oldest = max(stream.first_index, first - self._context)
        fed, known = self._fed[slot], self._known[slot]
        # What was not known yet was fed as missing, at the end or before a silence.
        is_true = fed <= known or known == stream.known_until
        goes_on = is_true and oldest <= fed <= first + self._delay
        start = fed if goes_on else oldest
        self._fed[slot], self._known[slot] = stop, stream.known_until
        return _Feed(slot, not goes_on, start, stop - start, jobs)

    def _batch(self, feeds: list[_Feed]) -> _Batch:
        feeds.sort(key=lambda feed: feed.slot)
        B, n = len(feeds), feeds[0].snippets
        features = np.empty((B, n, self._feature_dim), dtype=np.float32)
        here = np.empty((B, n), dtype=np.bool_)
        for row, feed in enumerate(feeds):
            feed.jobs[0].stream.read_snippets(feed.start, features[row], here[row])
        return _Batch(feeds, features, here)

    def _step(self, pool: Pool, batch: _Batch) -> Outputs:
        slots = np.array([feed.slot for feed in batch.feeds], dtype=np.int64)
        arrival = np.array([feed.start for feed in batch.feeds], dtype=np.int64)
        for feed in batch.feeds:
            if feed.is_fresh:
                pool.reset(feed.slot)
        flags = np.concatenate([pool.flags(slots), batch.here], axis=1)
        return pool.step(batch.features, flags, slots, arrival)

    def _slot(self, stream: Stream) -> int:
        if stream not in self._slots:
            if self._pool is None:
                self._pool = new_pool(self._scorer, self._layout, self._max_streams, self._dtype)
            self._slots[stream] = slot = heapq.heappop(self._unused)
            self._fed[slot] = _NOWHERE
        return self._slots[stream]
