"""Snippets into the engine: acknowledged, within its credit, resumed after any interruption.

KeptSnippets   the snippets that are held            kept_snippets.py
FeedTalk       what is said, without I/O             feed_talk.py
_Feeder        reads, sends, and when to wait        here, for both:
FeatureFeeder, AsyncFeatureFeeder                    how to wait (waiting.py)
"""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np
import zmq
from numpy.typing import NDArray

from hrpro.clients.connection import Deadline, Key, Line, SharedConnection, open_line
from hrpro.clients.feed_talk import FeedTalk
from hrpro.clients.kept_snippets import KeptSnippets
from hrpro.clients.waiting import BlockingClient, Client, LoopClient, Pause, Waiting
from hrpro.engine import protocol
from hrpro.engine.protocol import Ended, Hello, NoReplyError, Policy, Welcome
from hrpro.engine.timebase import SnippetClock

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

_OWN_HIGH_WATER_MESSAGES = 64
# A line that says nothing for so many times `retry_s`, though it is asked, is given up for another.
_SILENCES_OF_A_LINE = 3


class _Feeder(Client):
    """What the two kinds of feeder share: all but how they wait."""

    def __init__(
        self,
        address: str,
        stream: str,
        feature_dim: int,
        clock: SnippetClock | None = None,
        first_index: int = 0,
        policy: Policy = "wait",
        buffer_snippets: int = 64,
        history_snippets: int | None = None,
        timeout_s: float | None = 30.0,
        retry_s: float = 2.0,
        key: Key = None,
    ) -> None:
        self._clock = clock or SnippetClock()
        frames_per_s, frames = self._clock.frames_per_s, self._clock.snippet_frames
        hello = Hello(stream, feature_dim, frames_per_s, frames, first_index, policy)
        self.stream = stream
        kept = KeptSnippets(first_index, policy, buffer_snippets, history_snippets)
        self._talk = self._new_talk(hello, kept)
        self._waits = policy == "wait"
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._address = address
        self._key = key
        self._heard_s = time.monotonic()
        # The same name after a reconnection: the stream stays ours without a new Hello.
        self._routing_id = f"feeder:{secrets.token_hex(16)}".encode()
        self._silences = 0  # that were broken, and no answer came
        self._line = self._new_line()

    def _new_talk(self, hello: Hello, kept: KeptSnippets) -> FeedTalk:
        return FeedTalk(hello, kept)

    def _new_line(self) -> Line:
        options: dict[int, int | bytes] = {
            zmq.ROUTING_ID: self._routing_id,
            zmq.SNDHWM: _OWN_HIGH_WATER_MESSAGES,
            zmq.MAXMSGSIZE: protocol.MAX_REPLY_HEADER_BYTES,
        }
        return open_line(SharedConnection, zmq.DEALER, self._address, options, self._key)

    # ---- how far it is ---------------------------------------------------------------------------

    @property
    def next_index(self) -> int:
        """The snippet index of the next snippet to be given to `send`."""
        return self._talk.kept.next_index

    @property
    def lag(self) -> int:
        """How many snippets were given and are not known to be accepted by the engine yet.

        Those that are on their way, and those that have to wait (`unsent`). It rises while the
        engine is away or slower than the source, and again when an engine comes back that has less
        than the one before. What was skipped or dropped counts until the engine knows of it.
        """
        return self._talk.lag

    @property
    def lag_s(self) -> float:
        """`lag` in seconds of the stream: how far what the engine has is behind the source."""
        return self._clock.seconds(self._talk.lag)

    @property
    def unsent(self) -> int:
        """How many snippets of `lag` have not been sent: the engine gives no credit for them, or
        is away. More than 0 is back-pressure."""
        return self._talk.unsent

    @property
    def dropped(self) -> int:
        """How many snippets there was no room for, with a policy that drops."""
        return self._talk.kept.dropped

    @property
    def welcome(self) -> Welcome | None:
        """What the engine has said last of itself: model, classes, clock, credit."""
        return self._talk.welcome

    @property
    def needed_from(self) -> int | None:
        """Snippets below are never needed again, whatever happens to the engine; None where it
        keeps nothing itself, or is not known yet."""
        return self._talk.needed_from

    # ---- what it does ----------------------------------------------------------------------------

    def _connecting(self, timeout_s: float | None) -> Waiting[Welcome]:
        yield from self._until(lambda: self.welcome is not None, timeout_s, "a Welcome")
        assert self.welcome is not None
        return self.welcome

    def _sending(self, features: NDArray[np.float32], timeout_s: float | None) -> Waiting[None]:
        rows = self._talk.check(features)
        if not self._waits:
            self._talk.give(rows)
            self._exchange()
            return
        welcome = yield from self._connecting(timeout_s)
        chunk_snippets = welcome.max_chunk_snippets
        for first in range(0, len(rows), chunk_snippets):
            if first:
                yield Pause(0.0)  # others in the loop may have their turn
            yield from self._until(self._all_sent, timeout_s, "credit")
            self._talk.give(rows[first : first + chunk_snippets])
        yield from self._until(self._all_sent, timeout_s, "credit")

    def _skipping(self, snippets: int) -> Waiting[None]:
        self._talk.kept.skip(snippets)
        self._exchange()
        yield from ()

    def _flushing(self, timeout_s: float | None) -> Waiting[None]:
        yield from self._connecting(timeout_s)
        yield from self._until(lambda: self.lag == 0, timeout_s, "an Ack")

    def _ending(self, timeout_s: float | None) -> Waiting[Ended]:
        self._talk.ending = True
        yield from self._until(lambda: self._talk.ended is not None, timeout_s, "Ended")
        assert self._talk.ended is not None
        return self._talk.ended

    def _all_sent(self) -> bool:
        return self._talk.all_sent

    # ---- the line --------------------------------------------------------------------------------

    def _until(self, done: Callable[[], bool], timeout_s: float | None, what: str) -> Waiting[None]:
        """Reads and sends what there is until `done`; says Hello again in silence."""
        talk = self._talk
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline, retry = Deadline(timeout_s), Deadline(self._retry_s)
        while True:
            before = (talk.acked, talk.send_until)
            if self._read():
                retry = Deadline(self._retry_s)
            # An answer alone is none: an engine that stands still answers each Hello, too.
            if (talk.acked, talk.send_until) != before:
                deadline = Deadline(timeout_s)
            needs_room = self._send_due()
            if done():
                return
            if deadline.passed():
                raise NoReplyError(
                    f"stream {self.stream!r} at {self._address}: expected {what} within"
                    f" {timeout_s} s of the last progress, none came; snippets {talk.acked} to"
                    f" {self.next_index} are not acknowledged{self._line.doubt}"
                )
            if retry.passed():
                self._break_silence()
                retry = Deadline(self._retry_s)
            else:
                yield Pause(min(deadline.at_s, retry.at_s), needs_room)

    def _exchange(self) -> None:
        """Reads and sends what can be at once; says Hello again in silence."""
        if self._read() or not self.lag:
            self._heard_s = time.monotonic()
        elif time.monotonic() - self._heard_s > self._retry_s:
            self._heard_s = time.monotonic()
            self._break_silence()
        self._send_due()

    def _read(self) -> bool:
        """Takes in what has come from the engine; False when nothing has."""
        self._talk.raise_refusal()
        heard = False
        while (frames := self._line.receive()) is not None:
            heard, self._silences = True, 0
            self._talk.hear(frames)
        return heard

    def _send_due(self) -> bool:
        """Sends all that is due; True when there is no room (or no connection) for more."""
        while (message := self._talk.due()) is not None:
            if not self._line.try_send(protocol.encode(message)):
                return True
            self._talk.note_sent(message)
        return False

    def _break_silence(self) -> None:
        self._talk.say_again()
        self._silences += 1
        if self._silences % _SILENCES_OF_A_LINE == 0:  # nothing comes over it any more
            lost, self._line = self._line, self._new_line()
            self._talk.note_new_line()
            lost.close(linger_ms=0)


class FeatureFeeder(_Feeder, BlockingClient):
    """Feeds one stream; synchronous, without a thread, for use from one thread.

        with FeatureFeeder("tcp://127.0.0.1:5555", "cam1", feature_dim=2048) as feeder:
            for features in source:      # (n, 2048) or (2048,) float32
                feeder.send(features)
            feeder.end()

    `first_index` is the snippet index of the first snippet that will be given. To continue a
    stream, give a later feeder the index where it continues; snippets that the engine has already
    are not sent again. What the engine has accepted is kept until it says that it will never be
    needed again, see `needed_from`. Of an engine without a log, which says nothing of that,
    `history_snippets` are kept: by default as many as it may not have processed yet, and its
    window, context and lookahead. When the engine is silent for `retry_s` while the feeder
    waits for it, the feeder says Hello again, each third time over a new line.

    `timeout_s` is the longest time without progress, not the longest wait: it begins anew whenever
    the engine has accepted or processed snippets, so that a busy engine may take its time. None
    waits for ever. The methods take one of their own, too.

    `policy` says what becomes of snippets that there is no room for: `wait` lets `send` wait, as a
    recording may; with `drop_newest` and `drop_oldest`, for cameras, `send` never waits. What the
    engine has no room for then waits here, and of more than `buffer_snippets` the newest or the
    oldest are dropped, counted in `dropped`, and the engine is told. Such a feeder reads and sends
    while one of its methods runs, so call `send` as snippets come.

    `key` is the key of a producer, or its file, for an engine that has keys. Raises HrproError for
    an address that is none.

    All feeders of a process share one I/O thread, and each costs two open files.

    An Error of the engine is raised as StreamError; after that the feeder can only be closed.
    Leaving without `end` leaves the stream open in the engine.
    """

    def __enter__(self) -> Self:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Closes the connection. The stream stays open in the engine unless it was ended.

        What was sent and has not left yet has a second for that; the last feeder of a process that
        is closed waits for all of them.
        """
        self._line.close()

    def connect(self, timeout_s: float | None = None) -> Welcome:
        """Waits for the engine's Welcome; `send` and `end` do so, too, where it is still due.

        `timeout_s` here and below is the feeder's own unless given. Raises NoReplyError when no
        Welcome comes in time, StreamError when the engine refuses the stream.
        """
        return self._run(self._connecting(timeout_s))

    def send(self, features: NDArray[np.float32], timeout_s: float | None = None) -> None:
        """Hands (n, D) or (D,) float32 features of the next snippets to the engine.

        Returns when all are sent; `flush` waits until they are accepted, too. With the policy
        `wait` it blocks while the engine gives no credit or is away. Raises StreamError when the
        engine refuses them, or before any of them is taken when no engine would take them. Raises
        NoReplyError when nothing moves for `timeout_s`: snippets below `next_index` are then kept
        and will be sent, those from there on were not taken and should be given again.
        """
        self._run(self._sending(features, timeout_s))

    def skip(self, snippets: int) -> None:
        """The next snippets do not exist: the source has left them out, and `next_index` moves on.

        The engine goes on behind such a gap. Raises ValueError for less than 0.
        """
        self._run(self._skipping(snippets))

    def flush(self, timeout_s: float | None = None) -> None:
        """Waits until the engine has accepted every snippet. Raises as `send` does."""
        self._run(self._flushing(timeout_s))

    def end(self, timeout_s: float | None = None) -> Ended:
        """Ends the stream; returns when all that comes of it is published.

        While the engine processes the rest, its Acks are progress. May be called again after a
        NoReplyError. Raises as `send` does.
        """
        return self._run(self._ending(timeout_s))


class AsyncFeatureFeeder(_Feeder, LoopClient):
    """Feeds one stream from an event loop; what `FeatureFeeder` says of itself is true here, too.

        async with AsyncFeatureFeeder("tcp://127.0.0.1:5555", "cam1", feature_dim=2048) as feeder:
            async for features in source:      # (n, 2048) or (2048,) float32
                await feeder.send(features)
            await feeder.end()

    Many feeders may live in one loop. There is no task in the background: a feeder reads and sends
    while one of its methods is awaited. Several tasks may use one feeder: the methods take turns,
    in the order of the calls, and what one `send` gives stays together.

    Whatever is cancelled, by `asyncio.timeout` or otherwise, loses nothing: as after a
    NoReplyError, snippets below `next_index` are kept and will be sent, and those from there on
    were not taken. After a cancelled `flush` or `end`, call it again.
    """

    @functools.cached_property
    def _turn(self) -> asyncio.Lock:
        import asyncio  # it takes time to load, which is for those who have a loop

        return asyncio.Lock()

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """Closes the connection. The stream stays open in the engine unless it was ended."""
        await self._line.close_async()

    async def connect(self, timeout_s: float | None = None) -> Welcome:
        """Waits for the engine's Welcome; see `FeatureFeeder.connect`."""
        return await self._in_turn(self._connecting(timeout_s))

    async def send(self, features: NDArray[np.float32], timeout_s: float | None = None) -> None:
        """Hands (n, D) or (D,) float32 features of the next snippets to the engine; see
        `FeatureFeeder.send`. They may be changed again when it returns."""
        await self._in_turn(self._sending(features, timeout_s), may_wait=self._waits)

    async def skip(self, snippets: int) -> None:
        """The next snippets do not exist; see `FeatureFeeder.skip`."""
        await self._in_turn(self._skipping(snippets), may_wait=self._waits)

    async def flush(self, timeout_s: float | None = None) -> None:
        """Waits until the engine has accepted every snippet. Raises as `send` does."""
        await self._in_turn(self._flushing(timeout_s))

    async def end(self, timeout_s: float | None = None) -> Ended:
        """Ends the stream; returns when all that comes of it is published; see
        `FeatureFeeder.end`."""
        return await self._in_turn(self._ending(timeout_s))

    async def _in_turn(self, operation: Waiting[T], may_wait: bool = True) -> T:
        """One after the other; but what never waits for the engine does not wait for others."""
        if may_wait:
            async with self._turn:
                return await self._run_async(operation)
        try:
            return await self._run_async(operation)
        finally:
            self._line.wake()  # whoever waits for what this has read may go on
