"""A recording once more: into an engine, or through the pipeline in this process; what differs."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace

from hrpro.clients.connection import Key
from hrpro.clients.feeder import FeatureFeeder
from hrpro.clients.feeding import end_all, warn_of_resumption
from hrpro.clients.recording import Fed, Recording, Take
from hrpro.clients.watching import to_json
from hrpro.engine.access import Peer
from hrpro.engine.deployment import Deployment
from hrpro.engine.feeds import Counters, Feeds
from hrpro.engine.messages import Chunk, End, Error, Gap, Hello, Message, Publication, StreamNotice
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.timebase import SnippetClock
from hrpro.engine.wire import StreamError

# Backends round differently, and so do batches of different sizes.
TOLERANCE = 1e-4

_FEEDER = Peer(b"replay")


def feed_recording(
    recording: Recording,
    address: str,
    speed: float | None = 1.0,
    stream: str | None = None,
    timeout_s: float = 60.0,
    key: Key = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Feed an engine what was recorded, all streams or one; returns how many snippets.

    The streams come in the recorded order, at the recorded pace times ``speed``; None feeds as fast
    as the credit allows. A stream whose end was not recorded stays open; when something goes wrong,
    all are ended where they are. One that the engine has already is continued behind what it has,
    with a warning. ``progress`` is told how many snippets were sent. The policy is ``wait``
    whatever was recorded: what was accepted once is to be accepted again. Raises StreamError and
    NoReplyError as a feeder does.
    """
    started_s, snippets = time.monotonic(), 0
    feeders: dict[int, FeatureFeeder] = {}
    with contextlib.ExitStack() as stack:
        try:
            for fed in recording.fed(stream):
                if speed is not None:
                    time.sleep(max(0.0, started_s + fed.at_s / speed - time.monotonic()))
                number = fed.take.number
                if number not in feeders:
                    feeder = _feeder(fed.take, address, timeout_s, key)
                    feeders[number] = stack.enter_context(feeder)
                    _warn_if_open(feeder, fed.take)
                _give(feeders[number], fed)
                if fed.features is not None:
                    snippets += len(fed.features)
                    if progress is not None:
                        progress(len(fed.features))
                if fed.kind == "end":
                    feeders.pop(number).close()
            for feeder in feeders.values():
                feeder.flush()
        except BaseException:
            end_all(feeders.values())
            raise
    return snippets


def _feeder(take: Take, address: str, timeout_s: float, key: Key) -> FeatureFeeder:
    hello = take.hello
    clock = SnippetClock(hello.frames_per_s, hello.snippet_frames)
    return FeatureFeeder(
        address,
        hello.stream,
        hello.feature_dim,
        clock,
        hello.first_index,
        timeout_s=timeout_s,
        key=key,
    )


def _warn_if_open(feeder: FeatureFeeder, take: Take) -> None:
    welcome = feeder.welcome
    if welcome is not None and welcome.next_index > take.hello.first_index:
        warn_of_resumption(feeder, "continuing behind them")


def _give(feeder: FeatureFeeder, fed: Fed) -> None:
    if fed.features is not None:
        feeder.send(fed.features)
    elif fed.kind == "gap":
        feeder.skip(fed.next_index - fed.first_index)
    else:
        feeder.end()


# ---- in this process -----------------------------------------------------------------------------


def run_recording(
    recording: Recording, deployment: Deployment, stream: str | None = None
) -> Iterator[Publication]:
    """What the engine publishes of a recording, without sockets, each thing fed once the one before
    is processed. Raises StreamError where the deployment does not take it."""
    run = _Run(deployment)
    taken: set[int] = set()
    for fed in recording.fed(stream):
        if fed.take.number not in taken:
            taken.add(fed.take.number)
            yield from run.ask(replace(fed.take.hello, policy="wait"))
        yield from run.feed(fed)


class _Run:
    """A pipeline and its feeds, asked by one feeder."""

    def __init__(self, deployment: Deployment) -> None:
        self._pipeline = Pipeline(deployment)
        self._woken = threading.Event()
        self._pipeline.wake = self._woken.set
        self._feeds = Feeds(self._pipeline, Counters(), self._hear)
        self._refused: Error | None = None

    def _hear(self, _: Peer, reply: Message) -> bool:
        if isinstance(reply, Error):
            self._refused = reply
        return True

    def feed(self, fed: Fed) -> Iterator[Publication]:
        name, at = fed.take.hello.stream, fed.first_index
        if fed.kind == "gap":
            yield from self.ask(Gap(name, at, fed.next_index))
        elif fed.kind == "end":
            yield from self.ask(End(name, at))
        else:
            assert fed.features is not None
            while at < fed.next_index:
                # Everything before is processed: there is room for one at least.
                room = self._pipeline.streams[name].send_until - at
                stop = min(fed.next_index, at + min(room, self._pipeline.max_chunk_snippets))
                rows = fed.features[at - fed.first_index : stop - fed.first_index]
                yield from self.ask(Chunk(name, at, rows))
                at = stop

    def ask(self, message: Hello | Chunk | Gap | End) -> Iterator[Publication]:
        """What comes of a message until nothing is left to do."""
        self._feeds.handle(_FEEDER, message)
        if self._refused is not None:
            raise StreamError(self._refused.code, self._refused.message)
        while self._work_is_due():
            for publication in self._pipeline.step():
                if isinstance(publication, StreamNotice) and publication.kind == "ended":
                    self._feeds.on_ended(publication)
                yield publication
            self._feeds.admit_waiting()
        self._feeds.acknowledge()

    def _work_is_due(self) -> bool:
        """Whether a step has something to do, now or when a batch has waited long enough."""
        while True:
            self._woken.clear()
            due_in_s = self._pipeline.due_in_s()
            if due_in_s == 0:
                return True
            streams = self._pipeline.streams.values()
            if due_in_s is None and all(each.asked <= each.processed for each in streams):
                return False
            self._woken.wait(due_in_s)


# ---- what differs --------------------------------------------------------------------------------


def differences(
    recorded: Iterable[Publication], replayed: Iterable[Publication], ended: Iterable[str]
) -> list[str]:
    """A line for each publication that is in one alone (``-`` recorded, ``+`` replayed), two for
    each that is another, as JSON.

    Sessions are counted from 1, numbers are left out, times and scores may differ by TOLERANCE. Of
    a stream that is not ``ended``, the recorder may have missed the last ones: what only the replay
    has behind them is no difference.
    """
    before, after = _by_place(recorded), _by_place(replayed)
    last = {stream: (session, sequence) for stream, session, sequence in sorted(before)}
    closed = set(ended)
    lines = []
    for place in sorted(before.keys() | after.keys()):
        one, other = before.get(place), after.get(place)
        is_later = place[0] not in closed and place[1:] > last.get(place[0], (0, 0))
        if (one is None and is_later) or (one and other and _agree(one, other)):
            continue
        lines += [f"{sign} {to_json(each)}" for sign, each in (("-", one), ("+", other)) if each]
    return lines


def _by_place(published: Iterable[Publication]) -> dict[tuple[str, int, int], Publication]:
    """By stream, session from 1 on, and sequence."""
    sessions: dict[str, list[int]] = {}
    placed = {}
    for each in published:
        known = sessions.setdefault(each.stream, [])
        if each.session not in known:
            known.append(each.session)
        session = known.index(each.session) + 1
        plain = replace(each, session=session, number=None, previous=None)
        placed[each.stream, session, each.sequence] = plain
    return placed


def _agree(one: Publication, other: Publication) -> bool:
    if type(one) is not type(other):
        return False
    fields, others = asdict(one), asdict(other)
    return all(_equal(value, others[name]) for name, value in fields.items())


def _equal(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=0.0, abs_tol=TOLERANCE)
    return one == other
