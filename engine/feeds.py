"""Who feeds which stream: the engine's side of the feed protocol, without I/O.

Takes a peer's identity and a decoded message, drives the pipeline, and answers through `send`.
What belongs to a connection is kept here: which connection owns a stream, and which state of the
stream it was told last. The streams themselves belong to the pipeline.

    Hello --> fits? --> the stream lives? --no--> open, Welcome
                              |
                              +--yes, and continues --> the connection owns it now, Welcome
                              +--yes, but is ending, or lacks more snippets than a window has
                                        --> Welcome to a new session, once the old one has Ended

Snippets may come in any order within the credit. What is missing while later ones are there is
waited for, then given up: a gap. A stream that nothing came of for a while is idle. Where no stream
can be opened because there are too many, the one that has been idle for longest gives way; the
Hello waits for its end, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hrpro.engine.access import Peer
from hrpro.engine.messages import (
    MAX_ERROR_CHARACTERS,
    Ack,
    Chunk,
    End,
    Ended,
    Error,
    Gap,
    Hello,
    Message,
    StreamNotice,
    Welcome,
)
from hrpro.engine.metrics import Arrivals
from hrpro.engine.timebase import SnippetClock
from hrpro.engine.wire import MAX_FIRST_INDEX, ProtocolError, StreamError

if TYPE_CHECKING:
    from hrpro.engine.pipeline import Pipeline
    from hrpro.engine.stream import Stream

# Ended streams that are remembered, to repeat an Ended that was lost on its way.
ENDED_REMEMBERED = 1024
# How often it is looked whether streams are silent.
_LOOK_INTERVAL_S = 1.0
# How long the Ack for a chunk waits for the scores that it brings, to tell of both at once.
_ACK_WAIT_S = 0.5


# What a feeder is told of its stream: next_index, send_until, missing_until, dropped, needed_from.
State = tuple[int, int, int | None, int, int | None]

# In the place of the connection that feeds a stream of an earlier run of the engine, or fed a
# session that a gap has ended.
_NOBODY = Peer(b"")


@dataclass
class Counters:
    """What the server has counted since it started; a part of every StatusReply."""

    snippets_in: int = 0
    chunks_in: int = 0
    chunks_duplicate: int = 0
    chunks_refused: int = 0
    messages_refused: int = 0
    proposals: int = 0
    events: int = 0
    ended_streams: int = 0
    gaps: int = 0
    snippets_missing: int = 0
    snippets_duplicate: int = 0
    snippets_dropped_oldest: int = 0
    snippets_dropped_newest: int = 0
    deploys: int = 0
    deploys_refused: int = 0
    connections_refused: int = 0
    subscriptions_refused: int = 0


@dataclass
class Feed:
    """The connection that feeds a live stream."""

    identity: Peer
    heard_s: float  # when its last message for the stream came, or something was processed
    told: State | None = None
    reachable: bool = True


class Feeds:
    """The connections of all live streams.

    `send(identity, message)` returns whether the message could be handed over; a peer that is
    gone is no error, since it says Hello again when it comes back. `now_s` is a clock that never
    goes back. `ended_before` tells how a stream ended of which is nothing known here.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        counters: Counters,
        send: Callable[[Peer, Message], bool],
        now_s: Callable[[], float] = time.monotonic,
        arrivals: Arrivals | None = None,
        ended_before: Callable[[str], Ended | None] | None = None,
    ) -> None:
        # Those that are there already wait for their feeders.
        self.live = {name: Feed(_NOBODY, now_s(), None, False) for name in pipeline.streams}
        self._ended_before = ended_before or (lambda _: None)
        self.draining = False
        self._pipeline = pipeline
        self._counters = counters
        self._send = send
        self._now_s = now_s
        self._arrivals = arrivals or Arrivals(now_s)
        self._gap_wait_s, self._idle_s = pipeline.gap_wait_s, pipeline.idle_s
        self._waiting: dict[str, tuple[Peer, Hello]] = {}  # until another session has ended
        self._ended: dict[str, Ended] = {}
        self._touched: set[str] = set()  # streams whose feeders may have to be told something
        self._untold: dict[str, float] = {}  # streams that a chunk came for, by when, oldest first
        self._holes: dict[str, tuple[int, float]] = {}  # what is missing first, since when
        self._look_at_s = now_s()

    def handle(self, identity: Peer, message: Hello | Chunk | Gap | End) -> None:
        """Does what a peer asks for, or tells it why not."""
        try:
            match message:
                case Hello():
                    self._on_hello(identity, message)
                case Chunk():
                    self._on_chunk(identity, message)
                case Gap():
                    self._on_gap(identity, message)
                case End():
                    self._on_end(identity, message)
        except (ProtocolError, StreamError) as error:
            self._counters.chunks_refused += isinstance(message, Chunk)
            self._send(identity, error_message(error, message.stream))

    def streams_of(self, account: str) -> set[str]:
        """The streams that peers of this account feed, or wait to open; idle ones give way."""
        fed = {
            name
            for name, feed in self.live.items()
            if feed.identity.account == account and not self._is_idle(name)
        }
        return fed | {name for name, (peer, _) in self._waiting.items() if peer.account == account}

    def drain(self) -> None:
        """Ends all streams and refuses everything new from here on."""
        self.draining = True
        for stream in list(self._pipeline.streams.values()):
            if not stream.ended:
                self._end(stream)
        self.admit_waiting()

    def admit_waiting(self) -> None:
        """Answers each Hello that waited for the end of a session, once it has come."""
        for name, (identity, hello) in list(self._waiting.items()):
            before = self._pipeline.streams.get(name)
            over = not self._is_closing(name) and (before is None or not before.ended)
            if self.draining or over:
                del self._waiting[name]
                self.handle(identity, hello)

    def tend(self, now_s: float) -> None:
        """Gives up what has been missing for too long, and lets silent streams rest. What came
        by ``now_s`` has been handled."""
        for name, (first, since_s) in list(self._holes.items()):
            stream = self._pipeline.streams.get(name)
            missing_until = None if stream is None else stream.missing_until
            if stream is None or stream.ended or missing_until is None:
                del self._holes[name]
            elif stream.next_index != first:  # another one, known from now on
                self._holes[name] = stream.next_index, self._now_s()
            elif now_s - since_s >= self._gap_wait_s:
                self._give_up(stream, missing_until)
        if now_s >= self._look_at_s:
            self._look_at_s = now_s + _LOOK_INTERVAL_S
            for name, feed in self.live.items():
                if not feed.reachable:
                    self._touched.add(name)
                if now_s - feed.heard_s >= self._idle_s and not self._is_closing(name):
                    self._pipeline.rest(name)

    def due_in_s(self) -> float | None:
        """When `tend` has something to do; None if something has to come first."""
        if not self.live:
            return None
        due_s = [since_s + self._gap_wait_s for _, since_s in self._holes.values()]
        if self._untold:
            due_s.append(next(iter(self._untold.values())) + _ACK_WAIT_S)
        return max(0.0, min([self._look_at_s, *due_s]) - self._now_s())

    def acknowledge(self) -> None:
        """One Ack at most for each stream, where something has moved since its feeder was told."""
        now_s = self._now_s()
        moved, self._pipeline.moved = self._pipeline.moved, set()
        touched, self._touched = self._touched | moved, set()
        while self._untold:
            name, since_s = next(iter(self._untold.items()))
            if now_s - since_s < _ACK_WAIT_S:
                break
            touched.add(name)
            del self._untold[name]
        for name in touched & self.live.keys() & self._pipeline.streams.keys():
            self._untold.pop(name, None)
            feed, state = self.live[name], _state(self._pipeline.streams[name])
            if name in moved:
                feed.heard_s = now_s  # it may have waited for this
            if state == feed.told:
                continue
            feed.reachable = self._send(feed.identity, Ack.known(name, *state))
            feed.told = state if feed.reachable else None

    def on_ended(self, notice: StreamNotice) -> None:
        """Tells the feeder that its stream is processed and published as a whole."""
        ended = Ended(notice.stream, notice.next_index, notice.proposals, notice.events)
        self._ended[notice.stream] = ended
        if len(self._ended) > ENDED_REMEMBERED:
            del self._ended[next(iter(self._ended))]
        feed = self.live.pop(notice.stream, None)
        self._untold.pop(notice.stream, None)
        if feed is not None and feed.identity is not _NOBODY:
            self._send(feed.identity, ended)

    def _on_hello(self, identity: Peer, hello: Hello) -> None:
        self._refuse_when_draining(hello.stream)
        self._check_fits(hello)
        live = self._pipeline.streams.get(hello.stream)
        is_ending = self._is_closing(hello.stream) or (live is not None and live.ended)
        if live is not None and not is_ending and hello.first_index > live.next_index:
            goes_on = self._give_up(live, hello.first_index)
            if not goes_on and self.live[hello.stream].identity == identity:
                self._leave_alone(hello.stream)
        if is_ending or (live is not None and live.ended):  # it may have been just now
            waiting = self._waiting.get(hello.stream)
            # What is before a gap that ended the session is not processed again.
            if (
                waiting is None
                or waiting[0] != identity
                or waiting[1].first_index < hello.first_index
            ):
                self._waiting[hello.stream] = (identity, hello)
            return
        try:
            stream = self._pipeline.open(hello.stream, hello.first_index, hello.policy)
        except StreamError as error:
            if error.code != "too_many_streams" or not self._room_comes(hello.stream):
                raise
            self._waiting[hello.stream] = (identity, hello)
            return
        stream.policy = hello.policy
        self._ended.pop(hello.stream, None)
        try:
            welcome = self._welcome(stream)
        except ProtocolError:
            if live is None:  # nobody could feed it
                self._end(stream)
            raise
        reachable = self._send(identity, welcome)
        told = _state(stream) if reachable else None
        self.live[hello.stream] = Feed(identity, self._now_s(), told, reachable)

    def _room_comes(self, name: str) -> bool:
        """Whether a place becomes free that no other Hello waits for; an idle stream gives its."""
        streams = self._pipeline.streams
        ending = sum(stream.ended for stream in streams.values())
        if ending > len(self._waiting.keys() - {name}):
            return True
        open_feeds = {
            each: feed
            for each, feed in self.live.items()
            if each in streams and not streams[each].ended
        }
        idle = min(open_feeds, key=lambda each: open_feeds[each].heard_s, default=None)
        if idle is None or self._now_s() - open_feeds[idle].heard_s < self._idle_s:
            return False
        self._end(streams[idle])
        return True

    def _check_fits(self, hello: Hello) -> None:
        clock, dim = self._pipeline.clock, self._pipeline.feature_dim
        if SnippetClock(hello.frames_per_s, hello.snippet_frames) != clock:
            raise StreamError(
                "wrong_clock",
                f"stream {hello.stream!r}: expected {clock.frames_per_s} frames/s and"
                f" {clock.snippet_frames} frames per snippet, came {hello.frames_per_s} and"
                f" {hello.snippet_frames}",
            )
        if hello.feature_dim != dim:
            raise StreamError(
                "wrong_dimension",
                f"stream {hello.stream!r}: expected feature dimension {dim},"
                f" came {hello.feature_dim}",
            )
        if hello.first_index > MAX_FIRST_INDEX:
            raise StreamError(
                "bad_message",
                f"stream {hello.stream!r}: expected a first_index of at most {MAX_FIRST_INDEX},"
                f" came {hello.first_index}",
            )

    def _welcome(self, stream: Stream) -> Welcome:
        pipeline = self._pipeline
        next_index, send_until, *_ = _state(stream)
        return Welcome(
            stream=stream.stream,
            next_index=next_index,
            send_until=send_until,
            max_chunk_snippets=pipeline.max_chunk_snippets,
            feature_dim=pipeline.feature_dim,
            frames_per_s=pipeline.clock.frames_per_s,
            snippet_frames=pipeline.clock.snippet_frames,
            classes=pipeline.classes,
            window_snippets=pipeline.window_snippets,
            hop_snippets=pipeline.hop_snippets,
            context_snippets=pipeline.context_snippets,
            lookahead_snippets=pipeline.lookahead_snippets,
            lookahead_s=pipeline.lookahead_s,
            bundle_id=stream.bundle_id,
            needed_from=stream.needed_from,
        )

    def _on_chunk(self, identity: Peer, chunk: Chunk) -> None:
        self._refuse_when_draining(chunk.stream)
        stream, feed = self._fed_by(identity, chunk)
        if stream.ended:
            raise StreamError(
                "unknown_stream",
                f"stream {chunk.stream!r}: expected nothing after the end at {stream.next_index},"
                f" came snippet {chunk.first_index}",
            )
        if len(chunk.features) > self._pipeline.max_chunk_snippets:
            raise StreamError(
                "too_large",
                f"stream {chunk.stream!r}, snippet {chunk.first_index}: expected at most"
                f" {self._pipeline.max_chunk_snippets} snippets, came {len(chunk.features)}",
                stream.next_index,
            )
        next_index, came = stream.next_index, stream.received
        duplicates, dropped = stream.duplicates, stream.dropped
        self._pipeline.append(chunk.stream, chunk.first_index, chunk.features)
        counters = self._counters
        counters.chunks_in += 1
        counters.snippets_in += stream.received - came
        counters.snippets_duplicate += stream.duplicates - duplicates
        self._count_dropped(stream, stream.dropped - dropped)
        missing_until = stream.missing_until
        if missing_until is None and stream.dropped == dropped and stream.lag:
            self._untold.setdefault(chunk.stream, self._now_s())
        else:
            self._touched.add(chunk.stream)
        if stream.next_index > next_index:
            self._arrivals.came(chunk.stream, stream.next_index, stream.processed)
        if stream.received == came:
            self._counters.chunks_duplicate += 1
            feed.told = None  # whoever sends a chunk again has missed the Ack
            self._touched.add(chunk.stream)
        if missing_until is not None:
            self._holes.setdefault(chunk.stream, (stream.next_index, self._now_s()))

    def _count_dropped(self, stream: Stream, snippets: int) -> None:
        if stream.policy == "drop_oldest":
            self._counters.snippets_dropped_oldest += snippets
        else:
            self._counters.snippets_dropped_newest += snippets

    def _on_gap(self, identity: Peer, gap: Gap) -> None:
        self._refuse_when_draining(gap.stream)
        stream, feed = self._fed_by(identity, gap)
        if gap.first_index > stream.next_index:
            raise StreamError(
                "out_of_order",
                f"stream {gap.stream!r}: expected snippet {stream.next_index} or a gap from there,"
                f" came a gap from {gap.first_index}",
                stream.next_index,
            )
        feed.told = None
        self._touched.add(gap.stream)
        over = stream.ended or gap.next_index <= stream.next_index
        if gap.dropped and not over:
            stream.dropped += gap.next_index - stream.next_index
            self._count_dropped(stream, gap.next_index - stream.next_index)
        if not over and not self._give_up(stream, gap.next_index):
            # The feeder goes on in the next session.
            self._leave_alone(gap.stream)
            clock, dim = self._pipeline.clock, self._pipeline.feature_dim
            frames = clock.frames_per_s, clock.snippet_frames
            hello = Hello(gap.stream, dim, *frames, gap.next_index, stream.policy)
            self._waiting[gap.stream] = (identity, hello)

    def _give_up(self, stream: Stream, until: int) -> bool:
        """What is missing below this index never comes. That is a gap, or, where nothing of a
        window would be left, the end of the session; returns whether the session goes on."""
        self._touched.add(stream.stream)
        if until - stream.came_until > self._pipeline.window_snippets:
            self._pipeline.give_up(stream.stream, stream.came_until)
            self._end(stream)
            return False
        self._pipeline.give_up(stream.stream, until)
        self._arrivals.came(stream.stream, stream.next_index, stream.processed)
        return True

    def _on_end(self, identity: Peer, end: End) -> None:
        if self._is_closing(end.stream):
            return  # it is told then
        ended = self._ended.get(end.stream)
        if ended is None and end.stream not in self._pipeline.streams:
            ended = self._ended_before(end.stream)
        if ended is not None and ended.next_index == end.next_index:
            self._send(identity, ended)
            return
        stream, _ = self._fed_by(identity, end)
        if end.next_index != stream.next_index:
            raise StreamError(
                "out_of_order",
                f"stream {end.stream!r}: expected snippet {stream.next_index} or the end there,"
                f" came the end at {end.next_index}",
                stream.next_index,
            )
        if not stream.ended:
            self._end(stream)

    def _end(self, stream: Stream) -> None:
        stream.give_up_decided()
        self._pipeline.end(stream.stream, stream.next_index)
        self._arrivals.ended(stream.stream, stream.next_index)

    def _fed_by(self, identity: Peer, message: Chunk | Gap | End) -> tuple[Stream, Feed]:
        """The live stream of a message and its connection, which must be the sender's."""
        name = message.stream
        if name not in self.live:
            raise StreamError(
                "unknown_stream", f"stream {name!r}: expected a Hello first, came {message.TYPE}"
            )
        if self._is_closing(name):
            raise StreamError(
                "unknown_stream", f"stream {name!r}: expected nothing more, since it is over"
            )
        feed = self.live[name]
        if feed.identity is _NOBODY:
            raise StreamError(
                "unknown_stream",
                f"stream {name!r}: expected another Hello first, came {message.TYPE}",
            )
        if feed.identity is not identity and feed.identity != identity:  # often the same object
            raise StreamError(
                "not_owner",
                f"stream {name!r}: expected the connection whose Hello came last,"
                f" came {message.TYPE} from another one",
            )
        feed.heard_s = self._now_s()
        return self._pipeline.streams[name], feed

    def _leave_alone(self, name: str) -> None:
        """A gap has ended the session, and not its feeder: that is not told so."""
        self.live[name] = Feed(_NOBODY, self._now_s(), None, False)

    def _is_closing(self, name: str) -> bool:
        """Whether a stream is processed to its end, and that is not published yet: the log cannot
        be written."""
        return name in self.live and name not in self._pipeline.streams

    def _is_idle(self, name: str) -> bool:
        return self._is_closing(name) or self._pipeline.streams[name].idle

    def _refuse_when_draining(self, name: str) -> None:
        if self.draining:
            raise StreamError("draining", f"stream {name!r}: the engine is draining")


def _state(stream: Stream) -> State:
    return (
        stream.next_index,
        stream.send_until,
        stream.missing_until,
        stream.dropped,
        stream.needed_from,
    )


def error_message(error: ProtocolError | StreamError, stream: str | None = None) -> Error:
    """What a peer is told about an error."""
    return Error(
        stream=stream,
        code=error.code,
        message=str(error)[:MAX_ERROR_CHARACTERS],
        next_index=getattr(error, "next_index", None),
    )
