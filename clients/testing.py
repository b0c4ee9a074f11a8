"""An engine in memory, for tests of programs that feed, or that act on what is published.

    engine = MemoryEngine(feature_dim=2)
    with FeatureFeeder(engine.feed, "cam1", feature_dim=2) as feeder:
        feeder.send(features)
    assert engine.indices("cam1") == [0, 1, 2]

    engine.publish(action_event("cam1", "Jump", "start", start_s=2.0))

The clients are the real ones and speak the real protocol, in the same bytes; only the line is
another. Nothing is computed: what is published is what the test says. There are no sockets, ports
or threads, and whatever a client sends is handled at once.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import RLock
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.memory_line import MemoryLine
from hrpro.engine import protocol
from hrpro.engine.messages import EventKind, NoticeKind
from hrpro.engine.protocol import (
    Ack,
    ActionEvent,
    Chunk,
    End,
    Ended,
    Error,
    FinalProposal,
    Gap,
    Hello,
    HrproError,
    Mark,
    Message,
    Page,
    ProtocolError,
    Publication,
    SnippetScores,
    StreamNotice,
    Subscribed,
    Welcome,
)
from hrpro.engine.timebase import SnippetClock

_PAGE = 500
_CHUNK_SNIPPETS = 16
_BUNDLE = "memory"
_engines: WeakValueDictionary[str, MemoryEngine] = WeakValueDictionary()
_numbers = itertools.count(1)


def connect(address: str) -> MemoryLine:
    """A line to the engine of an address. Raises HrproError where there is none."""
    engine = _engines.get(address.rsplit("/", 1)[0])
    if engine is None:
        raise HrproError(
            f"{address}: expected the address of a MemoryEngine of this process that is still used"
        )
    return engine.connect()


# ---- what to publish -----------------------------------------------------------------------------


def action_event(
    stream: str,
    label: str,
    kind: EventKind,
    start_s: float,
    end_s: float | None = None,
    score: float = 0.9,
    id: int = 0,  # noqa: A002 - the field's name
    revision: int | None = None,
) -> ActionEvent:
    """An event of the action `id`, times in seconds of the stream, the score in [0, 1]."""
    revision = int(kind != "start") if revision is None else revision
    at = _published(start_s if end_s is None else end_s)
    return ActionEvent(
        stream, 1, 0, id, kind, revision, label, start_s, end_s, score, *at, bundle_id=_BUNDLE
    )


def final_proposal(
    stream: str,
    label: str,
    start_s: float,
    end_s: float,
    score: float = 0.9,
    action_id: int | None = None,
) -> FinalProposal:
    """A located action, times in seconds of the stream, the score in [0, 1]."""
    at = _published(end_s)
    return FinalProposal(
        stream, 1, 0, 0, label, start_s, end_s, score, *at, action_id, bundle_id=_BUNDLE
    )


def stream_notice(
    stream: str, kind: NoticeKind, first_index: int = 0, next_index: int = 0
) -> StreamNotice:
    """A notice; those of sessions that feeders open and end are published without it."""
    return StreamNotice(stream, 1, 0, kind, first_index, next_index, proposals=0, events=0)


def _published(at_s: float) -> tuple[int, float]:
    clock = SnippetClock()
    index = int(at_s / clock.snippet_s)
    return index, clock.seconds(index + 1)


# ---- the engine ----------------------------------------------------------------------------------


@dataclass
class _Stream:
    """One stream: its session, and what has come of it."""

    owner: MemoryLine | None
    session: int = 0
    first_index: int = 0
    next_index: int = 0
    send_until: int = 0
    is_open: bool = False
    is_ending: bool = False
    ended: Ended | None = None
    rows: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    sequence: int = 0
    proposals: int = 0
    events: int = 0
    previous: int = 0


class MemoryEngine:
    """Accepts snippets, with acknowledgements and credit, and publishes what it is told, to all
    clients of this process that are given `feed` and `events` as addresses.

    It takes streams of any `feature_dim` unless it is given one, and refuses others, as it does
    another clock. `credit_snippets` is how many snippets a feeder may be ahead of what is
    processed. It keeps a log, and streams outlive it (`stop`, `start`), like those of an engine
    with a state folder.
    """

    def __init__(
        self,
        feature_dim: int | None = None,
        classes: Sequence[str] = ("action",),
        clock: SnippetClock | None = None,
        credit_snippets: int = 64,
    ) -> None:
        name = f"memory://{next(_numbers)}"
        self.feed = f"{name}/feed"
        """The address for feeders."""
        self.events = f"{name}/events"
        """The address for subscribers."""
        self.lock = RLock()
        self.is_up = True
        self._feature_dim = feature_dim
        self._classes = tuple(classes)
        self._clock = clock or SnippetClock()
        self._credit_snippets = credit_snippets
        self._instance = secrets.token_hex(8)
        self._is_held = False
        self._streams: dict[str, _Stream] = {}
        self._log: list[Publication] = []
        self._lines: list[MemoryLine] = []
        _engines[name] = self

    # ---- what a test sees ------------------------------------------------------------------------

    def indices(self, stream: str) -> list[int]:
        """The snippet indices that were accepted of a stream, ascending."""
        with self.lock:
            return sorted(self._streams[stream].rows) if stream in self._streams else []

    def features(self, stream: str) -> NDArray[np.float32]:
        """The features that were accepted of a stream, (n, D) in the order of their indices."""
        with self.lock:
            return np.stack([self._streams[stream].rows[index] for index in self.indices(stream)])

    @property
    def published(self) -> list[Publication]:
        """All that was published, as it was sent."""
        with self.lock:
            return list(self._log)

    # ---- what a test tells it --------------------------------------------------------------------

    def publish(self, *publications: Publication) -> list[Publication]:
        """Publishes them in this order; session, sequence and numbers are filled in, of proposals
        the id, too. Returns them as they were sent."""
        with self.lock:
            return [self._publish(each) for each in publications]

    def show(self, scores: SnippetScores) -> None:
        """Sends scores of snippets to who has subscribed to them."""
        with self.lock:
            self._send(scores)

    def hold(self) -> None:
        """Processes nothing from now on: feeders come to the end of their credit."""
        self._is_held = True

    def release(self) -> None:
        """Processes what has come, and goes on."""
        with self.lock:
            self._is_held = False
            for name, stream in self._streams.items():
                if stream.is_open:
                    self._go_on(name, stream)

    def cut(self) -> None:
        """All lines are cut and come back at once; what was on its way to clients is lost."""
        with self.lock:
            for line in list(self._lines):
                line.lose()
                for topic in list(line.topics):
                    self.on_subscription(line, topic)

    def stop(self) -> None:
        """The engine is gone, as by kill -9, until `start`. What it has accepted is in its log."""
        with self.lock:
            self.is_up = False
            for line in self._lines:
                line.lose()

    def start(self) -> None:
        """The engine is there again: feeders and subscribers go on where they were."""
        with self.lock:
            self.is_up = True
            for stream in self._streams.values():
                stream.owner = None
            self.cut()
            for line in self._lines:
                line.wake()

    # ---- feeders ---------------------------------------------------------------------------------

    def connect(self) -> MemoryLine:
        """One more line."""
        with self.lock:
            self._lines.append(MemoryLine(self))
            return self._lines[-1]

    def leave(self, line: MemoryLine, /) -> None:
        """The line is closed."""
        if line in self._lines:
            self._lines.remove(line)

    def on_message(self, line: MemoryLine, frames: list[bytes], /) -> None:
        """What a feeder sends."""
        message = protocol.decode_feed(frames)
        stream = self._streams.setdefault(message.stream, _Stream(None))
        try:
            if isinstance(message, Hello):
                self._on_hello(line, message, stream)
                return
            if isinstance(message, End) and stream.ended and not stream.is_open:
                _say(line, stream.ended)
                return
            if not stream.is_open or stream.owner is None:
                raise ProtocolError("expected a Hello first", "unknown_stream")
            if stream.owner is not line:
                raise ProtocolError("expected the connection whose Hello came last", "not_owner")
            self._take(message, stream)
        except ProtocolError as refusal:
            text = f"stream {message.stream!r}: {refusal}"
            _say(line, Error(message.stream, refusal.code, text, stream.next_index))

    def _on_hello(self, line: MemoryLine, hello: Hello, stream: _Stream) -> None:
        clock = SnippetClock(hello.frames_per_s, hello.snippet_frames)
        if clock != self._clock:
            raise ProtocolError(f"expected {self._clock}, came {clock}", "wrong_clock")
        if self._feature_dim not in (None, hello.feature_dim):
            raise ProtocolError(
                f"expected a feature_dim of {self._feature_dim}, came {hello.feature_dim}",
                "wrong_dimension",
            )
        stream.owner = line
        if not stream.is_open:
            at, session = hello.first_index, stream.session + 1
            stream.session, stream.first_index, stream.next_index = session, at, at
            stream.is_open, stream.is_ending, stream.ended = True, False, None
            stream.sequence = stream.proposals = stream.events = 0
            self._grant(stream)
            self._notice(hello.stream, "opened", at, at)
        elif hello.first_index > stream.next_index:
            self._pass_over(hello.stream, stream, hello.first_index)
        welcome = Welcome(
            hello.stream,
            stream.next_index,
            stream.send_until,
            _CHUNK_SNIPPETS,
            hello.feature_dim,
            hello.frames_per_s,
            hello.snippet_frames,
            self._classes,
            window_snippets=128,
            hop_snippets=1,
            context_snippets=0,
            lookahead_snippets=0,
            lookahead_s=0.0,
            bundle_id=_BUNDLE,
            needed_from=stream.next_index,
        )
        _say(line, welcome)

    def _take(self, message: Chunk | Gap | End, stream: _Stream) -> None:
        name, at = message.stream, stream.next_index
        match message:
            case Chunk(first_index=first, features=features):
                stop = first + len(features)
                if first > at or stop > stream.send_until:
                    code = "out_of_order" if first > at else "no_credit"
                    raise ProtocolError(f"expected snippets {at} to {stream.send_until}", code)
                if not np.isfinite(features).all():
                    raise ProtocolError("expected finite features", "not_finite")
                stream.rows |= {i: features[i - first].copy() for i in range(at, stop)}
                stream.next_index = max(at, stop)
            case Gap(first_index=first, next_index=stop):
                if first > at:
                    raise ProtocolError(f"expected a gap from {at} on", "out_of_order")
                self._pass_over(name, stream, stop)
            case End(next_index=stop):
                if stop != at:
                    raise ProtocolError(f"expected the end at {at}, came {stop}", "out_of_order")
                stream.is_ending = True
        self._go_on(name, stream)

    def _pass_over(self, name: str, stream: _Stream, stop: int) -> None:
        """The snippets up to before `stop` do not exist."""
        if stop > stream.next_index:
            self._notice(name, "gap", stream.next_index, stop)
            stream.next_index = stop

    def _go_on(self, name: str, stream: _Stream) -> None:
        """What has come is processed, unless that is held; the feeder is told."""
        if not self._is_held:
            self._grant(stream)
        if stream.is_ending and not self._is_held:
            self._notice(name, "ended", stream.first_index, stream.next_index)
            stream.ended = Ended(name, stream.next_index, stream.proposals, stream.events)
            stream.is_open = False
            reply: Message = stream.ended
        else:
            at = stream.next_index
            reply = Ack(name, at, stream.send_until, needed_from=at)
        if stream.owner is not None:
            _say(stream.owner, reply)

    def _grant(self, stream: _Stream) -> None:
        stream.send_until = stream.next_index + self._credit_snippets

    # ---- subscribers -----------------------------------------------------------------------------

    def _notice(self, name: str, kind: NoticeKind, first: int, stop: int) -> None:
        self._publish(stream_notice(name, kind, first, stop))

    def _publish(self, given: Publication) -> Publication:
        stream = self._streams.setdefault(given.stream, _Stream(None))
        stream.proposals += isinstance(given, FinalProposal)
        stream.events += isinstance(given, ActionEvent)
        number = len(self._log) + 1
        sent = replace(
            given,
            session=max(1, stream.session),
            sequence=stream.sequence,
            number=number,
            previous=stream.previous,
        )
        if isinstance(sent, FinalProposal):
            sent = replace(sent, id=stream.proposals - 1)
        if isinstance(sent, StreamNotice):
            sent = replace(sent, proposals=stream.proposals, events=stream.events)
        stream.sequence, stream.previous = stream.sequence + 1, number
        self._log.append(sent)
        self._send(sent)
        return sent

    def _send(self, message: Publication | SnippetScores) -> None:
        """To who has subscribed to it."""
        frames = protocol.encode(message)
        for line in self._lines if self.is_up else ():
            if any(frames[0].startswith(topic) for topic in line.topics):
                line.deliver(frames)

    def on_subscription(self, line: MemoryLine, topic: bytes, /) -> None:
        """What a subscriber asks for."""
        match topic.decode().split("/"):
            case ["welcome", token, ""]:
                _say(line, Subscribed(token, self._instance, len(self._log)))
            case ["replay", token, since, stream, ""]:
                _say(line, self._page(token, int(since), None if stream == "*" else stream))
            case ["open", token, stream, ""]:
                only, newest = None if stream == "*" else stream, len(self._log)
                found = tuple(self._open_actions(only))
                _say(line, Page(token, None, only, newest, 1, newest, found))

    def _page(self, token: str, since: int, stream: str | None) -> Page:
        found = [each for each in self._log[since:] if stream in (None, each.stream)]
        newest, last = len(self._log), found[:_PAGE][-1].number if found else None
        following = newest if len(found) <= _PAGE or last is None else last
        return Page(token, since, stream, following, 1, newest, tuple(found[:_PAGE]))

    def _open_actions(self, stream: str | None) -> Iterator[ActionEvent]:
        newest: dict[tuple[str, int, int], ActionEvent] = {}
        for each in self._log:
            if isinstance(each, ActionEvent) and stream in (None, each.stream):
                newest[each.stream, each.session, each.id] = each
        yield from (each for each in newest.values() if not each.is_last)

    def mark(self) -> list[bytes]:
        """A sign of life."""
        return protocol.encode(Mark(self._instance, len(self._log)))


def _say(line: MemoryLine, message: Message) -> None:
    line.deliver(protocol.encode(message))
