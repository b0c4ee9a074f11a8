"""Stage 1 a step at a time: what a stream's past has given is kept in its slot of a pool.

    jobs -> what each stream has not fed yet -> gather slots -> step -> scatter -> rows

The pool is in arrays of the host, or in memory of the device that computes. A step takes the
snippets that came since the last one, and gives the scores that have become final by them, see
`hrpro.export.step`. A stream whose slot does not stand where its next job begins is fed again from
its ring, from as far back as scores depend on, with the same outcome: it is new, or another bundle
has worked for it, or it was silent, or snippets were passed over.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.batcher import Job
from hrpro.engine.config import EngineConfig
from hrpro.engine.inference import Backend, Outputs, Prepared, Scored
from hrpro.engine.settings import SettingsError
from hrpro.engine.stream import Stream
from hrpro.export.bundle import Manifest, StepLayout

Floats = NDArray[np.float32]
Stepped = tuple[Outputs, list[Floats]]

_NOWHERE = -1
# Slots that lie so far apart are computed in calls of their own; what one costs is as much as to
# compute about so many states in vain.
_NEAR = 8
# So many in vain, for each that is wanted, take as long as to copy the wanted ones together.
_IN_VAIN = 0.5
# Slots are put into the order in which their streams come once so many states for each of them were
# copied together, with each batch as many as this share of its streams.
_UNTIDY = 16
_TIDIED = 0.25


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
    """The state of streams, a slot each. The flags of their past snippets are on the host.

    ``copied`` counts the states that steps had to copy together, since their slots lie apart.
    """

    copied = 0

    def __init__(self, layout: StepLayout, slots: int) -> None:
        self._layout, self._rings = layout, layout.rings
        self._flags = np.zeros((slots, layout.history), dtype=np.bool_)

    def swap(self, one: int, other: int) -> None:
        """Two slots change places; to be asked of a pool that copies."""
        raise NotImplementedError

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
    Slots near each other are given as they lie; where a batch has too many that are not, or where
    keys and values are float16, the states are copied together.
    """

    def __init__(
        self, scorer: StepScorer, layout: StepLayout, slots: int, dtype: type[np.floating]
    ) -> None:
        super().__init__(layout, slots)
        self._scorer = scorer
        self._is_half = dtype == np.float16
        # Not written to, hence not resident, before a slot is in use.
        self._parts = [
            np.zeros((slots, *shape), dtype=dtype if name in layout.rings else np.float32)
            for name, shape in layout.state.items()
        ]
        self._unused: list[list[Floats]] = []  # room for copies, of any number of states

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
        runs = None if self._is_half else _runs(slots)
        if runs is None:
            self.copied += 0 if self._is_half else len(slots)
            room = self._unused.pop() if self._unused else []
            state = self.gather(slots, room)
            outputs, new = self._scorer.score_step(features, flags, arrival, state)
            self._unused.append(room)
            self.scatter(slots, arrival, new, flags)
            return outputs
        parts = [self._step_run(features[r], flags[r], slots[r], arrival[r]) for r in runs]
        if len(parts) == 1:
            return parts[0]
        scores, embedding, attention = (np.concatenate(each) for each in zip(*parts, strict=True))
        return scores, embedding, attention

    def _step_run(
        self,
        features: Floats,
        flags: NDArray[np.bool_],
        slots: NDArray[np.int64],
        arrival: NDArray[np.int64],
    ) -> Outputs:
        """Of slots near each other, with the few between them, of which nothing is kept."""
        first, span = int(slots[0]), int(slots[-1] - slots[0]) + 1
        state = [part[first : first + span] for part in self._parts]
        if span == len(slots):
            outputs, new = self._scorer.score_step(features, flags, arrival, state)
            self.scatter(slots, arrival, new, flags)
            return outputs
        rows = slots - first

        def spread(values: NDArray[Any]) -> NDArray[Any]:
            wide = np.zeros((span, *values.shape[1:]), dtype=values.dtype)
            wide[rows] = values
            return wide

        outputs, new = self._scorer.score_step(
            spread(features), spread(flags), spread(arrival), state
        )
        self.scatter(slots, arrival, [each[rows] for each in new], flags)
        scores, embedding, attention = outputs
        return scores[rows], embedding[rows], attention[rows]

    def swap(self, one: int, other: int) -> None:
        """See `Pool`."""
        for part in (self._flags, *self._parts):
            part[one], part[other] = part[other].copy(), part[one].copy()

    def gather(self, slots: NDArray[np.int64], room: list[Floats]) -> list[Floats]:
        """The state (B, ...) of slots, copied together into ``room``, which grows where it is
        too small."""
        B = len(slots)
        if len(room[0] if room else ()) < B:
            size = 1 << (B - 1).bit_length()  # made anew for few batches, not for each larger one
            room[:] = [np.empty((size, *part.shape[1:]), dtype=np.float32) for part in self._parts]
        for part, out in zip(self._parts, room, strict=True):
            if part.dtype == np.float32:
                np.take(part, slots, axis=0, out=out[:B], mode="clip")  # "raise" would copy twice
            else:
                out[:B] = part[slots]
        return [out[:B] for out in room]

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


def _runs(slots: NDArray[np.int64]) -> list[slice] | None:
    """Ascending slots in runs of such as are near each other; None where that would be to compute
    too much in vain."""
    apart = np.diff(slots)
    far = apart > _NEAR
    in_vain = int((apart[~far] - 1).sum()) + _NEAR * int(far.sum())
    if in_vain > _IN_VAIN * len(slots):
        return None
    bounds = [0, *(np.flatnonzero(far) + 1).tolist(), len(slots)]
    return [slice(*bound) for bound in itertools.pairwise(bounds)]


@dataclass(slots=True, eq=False)
class _Place:
    """The slot of a stream that was fed up to some snippet; what was ``known`` of it then."""

    slot: int
    fed: int = _NOWHERE
    known: int = 0


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


@dataclass(frozen=True, eq=False)
class _UnderWay:
    """A batch that may not be computed yet."""

    slots: set[int]
    moves_slots: bool
    over: threading.Event = field(default_factory=threading.Event)

    def follows(self, earlier: _UnderWay) -> bool:
        """Whether it has to wait for that."""
        moves = self.moves_slots or earlier.moves_slots
        return moves or not self.slots.isdisjoint(earlier.slots)


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
        self._pool: Pool | None = None  # while a stream has a place
        self._places: dict[Stream, _Place] = {}  # in the order in which streams came last
        self._unused = set(range(config.max_streams))  # slots
        self._batches = 0
        self._copied = 0  # by the pool, when places were put in order last
        self._disorder: deque[tuple[_Place, _Place]] = deque()  # whose slots are to be swapped
        self._swaps: deque[tuple[int, list[tuple[int, int]]]] = deque()  # of slots, by batch
        self._under_way: list[_UnderWay] = []

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

    def place_of(self, stream: Stream) -> int:
        """The slot of a stream; behind all of them for one that has none yet."""
        place = self._places.get(stream)
        return self._max_streams if place is None else place.slot

    def leave(self, stream: Stream) -> None:
        """A stream is over, or another bundle works for it."""
        place = self._places.pop(stream, None)
        if place is None:
            return
        self._unused.add(place.slot)
        self._disorder.clear()
        if not self._places:
            self._pool, self._swaps = None, deque()

    def forget(self, streams: Iterable[Stream]) -> None:
        """What these were fed last may never be computed: they begin anew."""
        for stream in streams:
            if stream in self._places:
                self._places[stream].fed = _NOWHERE

    def prepare(self, jobs: Sequence[Job]) -> Prepared:
        """Read what the streams have not fed yet. Batches are to be begun in the order in which
        they were prepared, and may be computed at the same time: one that goes on where another one
        ends waits for it.

        Streams that have as many snippets to feed are computed together, in one call.
        """
        by_stream: dict[Stream, list[Job]] = {}
        for job in jobs:
            by_stream.setdefault(job.stream, []).append(job)
        self._batches = number = self._batches + 1
        places = [self._place(stream) for stream in by_stream]
        pool, due = self._pool, self._swaps
        assert pool is not None
        self._tidy(pool, math.ceil(_TIDIED * len(places)))
        together: dict[int, list[_Feed]] = {}
        for place, (stream, of_stream) in zip(places, by_stream.items(), strict=True):
            feed = self._feed(place, stream, of_stream)
            together.setdefault(feed.snippets, []).append(feed)
        batches = [self._batch(feeds) for feeds in together.values()]
        own = _UnderWay({place.slot for place in places}, moves_slots=bool(due))
        self._under_way = [each for each in self._under_way if not each.over.is_set()]
        before = [each.over for each in self._under_way if own.follows(each)]
        self._under_way.append(own)

        def score() -> Scored:
            for over in before:
                over.wait()
            # Those of a batch that was given up are due with the next one.
            while due and due[0][0] <= number:
                for swap in due.popleft()[1]:
                    pool.swap(*swap)
            scored: Scored = []
            for batch in batches:
                scores, embedding, attention = self._step(pool, batch)
                for row, feed in enumerate(batch.feeds):
                    first = feed.start - self._delay  # the position of the first scores
                    for job in feed.jobs:
                        of_job = row, slice(job.first - first, job.until - first)
                        scored.append((job, scores[of_job], embedding[of_job], attention[of_job]))
            return scored

        return Prepared(score, own.over.set)

    def _tidy(self, pool: Pool, at_most: int) -> None:
        """Swap some slots before this batch, where many states have been copied together.

        Streams keep their pace, so those that come one after the other will do so again: where
        their slots lie in that order, a batch reads its states as they lie.
        """
        if not self._disorder and pool.copied - self._copied >= _UNTIDY * len(self._places):
            self._copied = pool.copied
            self._disorder.extend(self._out_of_order())
        swaps = []
        for _ in range(min(at_most, len(self._disorder))):
            one, other = self._disorder.popleft()
            swaps.append((one.slot, other.slot))
            if other.slot in self._unused:
                self._unused.remove(other.slot)
                self._unused.add(one.slot)
            one.slot, other.slot = other.slot, one.slot
        if swaps:
            self._swaps.append((self._batches, swaps))

    def _out_of_order(self) -> Iterator[tuple[_Place, _Place]]:
        """The swaps, one after the other, by which streams have the first slots in the order in
        which they came."""
        at = {place.slot: place for place in self._places.values()}
        slots = {place: slot for slot, place in at.items()}
        for target, place in enumerate(self._places.values()):
            slot, other = slots[place], at.get(target) or _Place(target)
            if slot != target:
                yield place, other
                at[slot], slots[other] = other, slot

    def _feed(self, place: _Place, stream: Stream, jobs: list[Job]) -> _Feed:
        """What to feed for jobs that follow one another. From then on it counts as fed, unless it
        is forgotten."""
        first, stop = jobs[0].first, jobs[-1].until + self._delay
        oldest = max(stream.first_index, first - self._context)
        fed, known = place.fed, place.known
        # What was not known yet was fed as missing, at the end or before a silence.
        is_true = fed <= known or known == stream.known_until
        goes_on = is_true and oldest <= fed <= first + self._delay
        start = fed if goes_on else oldest
        place.fed, place.known = stop, stream.known_until
        return _Feed(place.slot, not goes_on, start, stop - start, jobs)

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

    def _place(self, stream: Stream) -> _Place:
        """It comes now."""
        place = self._places.pop(stream, None)
        if place is None:
            if self._pool is None:
                self._pool = new_pool(self._scorer, self._layout, self._max_streams, self._dtype)
                self._copied = 0
            self._disorder.clear()
            place = _Place(min(self._unused))  # the first ones lie side by side
            self._unused.remove(place.slot)
        self._places[stream] = place
        return place
