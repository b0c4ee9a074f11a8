"""Snippets into the engine: acknowledged, within its credit, resumed after any interruption.

The feeder keeps every snippet until the engine has accepted it, and a few more, so that an
engine that was killed can be given its context again:

      kept for a restarted engine      sent, not        given, not
      (see `needed_from`)              acknowledged     sent yet
    |--------------------------------|----------------|-----------|
    oldest                           acked            sent        next_index
                                                            send_until ^ (credit)

Whatever goes wrong - a lost connection, a restarted engine - is met in one way: Hello, Welcome,
and on from `Welcome.next_index`. Where a message was lost alone, an Ack says what is missing.
"""

from __future__ import annotations

import enum
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import NoReturn, Self

import numpy as np
import zmq
from numpy.typing import NDArray

from hrpro.clients.connection import Connection, Deadline, Key
from hrpro.engine import protocol
from hrpro.engine.protocol import (
    LATER_CODES,
    RECOVERABLE_CODES,
    Ack,
    Chunk,
    End,
    Ended,
    Error,
    Gap,
    Hello,
    NoReplyError,
    Policy,
    StreamError,
    Welcome,
)
from hrpro.engine.timebase import SnippetClock

_OWN_HIGH_WATER_MESSAGES = 64
# A line that says nothing for so many times `retry_s`, though it is asked, is given up for another.
_SILENCES_OF_A_LINE = 3


class _Talk(enum.Enum):
    """Where the conversation with the engine stands."""

    HELLO_DUE = enum.auto()
    HELLO_SENT = enum.auto()
    WELCOMED = enum.auto()
    END_SENT = enum.auto()
    ENDED = enum.auto()


class FeatureFeeder:
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

    `key` is the key of a producer, or its file, for an engine that has keys.

    An Error of the engine is raised as StreamError; after that the feeder can only be closed.
    Leaving without `end` leaves the stream open in the engine.
    """

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
        clock = clock or SnippetClock()
        self._hello = Hello(
            stream, feature_dim, clock.frames_per_s, clock.snippet_frames, first_index, policy
        )
        if buffer_snippets < 1:
            raise ValueError(f"buffer_snippets: expected at least 1, came {buffer_snippets}")
        self.stream = stream
        self.welcome: Welcome | None = None
        self._history_given = history_snippets is not None
        self._history_snippets = history_snippets or 0
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        # By index, ascending, each (D,); what is not here below `next_index` does not exist.
        self._kept: dict[int, NDArray[np.float32]] = {}
        self._buffer_snippets = buffer_snippets
        self._dropped: list[tuple[int, int]] = []  # [start, stop), ascending, not yet accepted
        self.dropped = 0
        """How many snippets there was no room for."""
        self._heard_s = time.monotonic()
        self._sent_again_from: int | None = None
        self.needed_from: int | None = None
        """Snippets below are never needed again, whatever happens to the engine; None where it
        keeps nothing itself, or is not known yet."""
        self.next_index = first_index
        """The snippet index of the next snippet to be given to `send`."""
        self._acked = first_index
        self._sent = first_index
        self._send_until = first_index
        self._session_from = first_index  # an Ack of less is of a session that a gap has ended
        self._talk = _Talk.HELLO_DUE
        self._ending = False
        self._ended: Ended | None = None
        self._refused: StreamError | None = None
        # The same name after a reconnection: the stream stays ours without a new Hello.
        self._routing_id = f"feeder:{secrets.token_hex(16)}".encode()
        self._key = key
        self._silences = 0  # that were broken, and no answer came
        self._connection = self._new_connection(address)

    def _new_connection(self, address: str) -> Connection:
        return Connection(
            zmq.DEALER,
            address,
            {
                zmq.ROUTING_ID: self._routing_id,
                zmq.SNDHWM: _OWN_HIGH_WATER_MESSAGES,
                zmq.MAXMSGSIZE: protocol.MAX_REPLY_HEADER_BYTES,
            },
            self._key,
        )

    def __enter__(self) -> Self:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection. The stream stays open in the engine unless it was ended."""
        self._connection.close()

    # ---- what a caller does --------------------------------------------------------------------

    @property
    def lag(self) -> int:
        """How many snippets were given to `send` and are not known to be accepted yet."""
        return max(0, self.next_index - self._acked)

    def connect(self, timeout_s: float | None = None) -> Welcome:
        """Waits for the engine's Welcome; `send` and `end` do so, too, where it is still due.

        `timeout_s` here and below is the feeder's own unless given. Raises NoReplyError when no
        Welcome comes in time, StreamError when the engine refuses the stream.
        """
        return self._connected(timeout_s)

    def send(self, features: NDArray[np.float32], timeout_s: float | None = None) -> None:
        """Hands (n, D) or (D,) float32 features of the next snippets to the engine.

        Returns when all are sent; `flush` waits until they are accepted, too. With the policy
        `wait` it blocks while the engine gives no credit or is away. Raises StreamError when the
        engine refuses them, or before any of them is taken when no engine would take them. Raises
        NoReplyError when nothing moves for `timeout_s`: snippets below `next_index` are then kept
        and will be sent, those from there on were not taken and should be given again.
        """
        rows = self._checked(features)
        if self._hello.policy != "wait":
            for row in rows:
                self._keep(row)
            self._exchange()
            return
        chunk_snippets = self._connected(timeout_s).max_chunk_snippets
        for first in range(0, len(rows), chunk_snippets):
            self._wait(self._all_sent, timeout_s, "credit")
            for row in rows[first : first + chunk_snippets]:
                self._keep(row)
        self._wait(self._all_sent, timeout_s, "credit")

    def skip(self, snippets: int) -> None:
        """The next snippets do not exist: the source has left them out, and `next_index` moves on.

        The engine goes on behind such a gap. Raises ValueError for less than 0.
        """
        if snippets < 0:
            raise ValueError(f"snippets: expected at least 0, came {snippets}")
        self.next_index += snippets
        self._exchange()

    def flush(self, timeout_s: float | None = None) -> None:
        """Waits until the engine has accepted every snippet. Raises as `send` does."""
        self._connected(timeout_s)
        self._wait(lambda: self.lag == 0, timeout_s, "an Ack")

    def end(self, timeout_s: float | None = None) -> Ended:
        """Ends the stream; returns when all that comes of it is published.

        While the engine processes the rest, its Acks are progress. May be called again after a
        NoReplyError. Raises as `send` does.
        """
        self._ending = True
        self._wait(lambda: self._ended is not None, timeout_s, "Ended")
        assert self._ended is not None
        return self._ended

    def _checked(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """The features as (n, D); raises StreamError as an engine would, before it is asked."""
        where = f"stream {self.stream!r}, snippet {self.next_index}"
        if self._ending:
            raise StreamError("unknown_stream", f"{where}: expected no snippets after end()")
        dim = self._hello.feature_dim
        rows = np.atleast_2d(features)
        if rows.dtype != np.float32:
            raise StreamError("wrong_dtype", f"{where}: expected float32, came {rows.dtype}")
        if rows.ndim != 2 or rows.shape[1] != dim:
            raise StreamError(
                "wrong_dimension",
                f"{where}: expected shape (_, {dim}), came {np.shape(features)}",
            )
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            bad_index = self.next_index + int(np.argmin(finite))
            raise StreamError(
                "not_finite",
                f"stream {self.stream!r}, snippet {bad_index}: expected finite features,"
                " came NaN or infinity",
            )
        return rows

    def _keep(self, row: NDArray[np.float32]) -> None:
        """Take a snippet, or drop one, where too many wait that may be dropped."""
        index, self.next_index = self.next_index, self.next_index + 1
        if self._hello.policy != "wait" and index - self._sent >= self._buffer_snippets:
            waiting = [each for each in self._kept if each >= self._sent]
            if len(waiting) >= self._buffer_snippets:
                self.dropped += 1
                dropped = index if self._hello.policy == "drop_newest" else waiting[0]
                self._note_dropped(dropped)
                if dropped == index:
                    return
                del self._kept[dropped]
        # Copied: the caller may change its array, and a view would keep all of it alive.
        self._kept[index] = row.copy()
        self._forget_history()

    def _note_dropped(self, index: int) -> None:
        start, stop = self._dropped.pop() if self._dropped else (index, index)
        self._dropped += (
            [(start, index + 1)] if stop == index else [(start, stop), (index, index + 1)]
        )

    @property
    def _oldest(self) -> int:
        """The oldest snippet that can still be sent."""
        return next(iter(self._kept), self.next_index)

    # ---- the conversation ----------------------------------------------------------------------

    def _connected(self, timeout_s: float | None) -> Welcome:
        self._wait(lambda: self.welcome is not None, timeout_s, "a Welcome")
        assert self.welcome is not None
        return self.welcome

    def _all_sent(self) -> bool:
        return self._talk is _Talk.WELCOMED and self._sent >= self.next_index

    def _wait(self, done: Callable[[], bool], timeout_s: float | None, what: str) -> None:
        """Reads and sends what there is until `done`; says Hello again in silence."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline, retry = Deadline(timeout_s), Deadline(self._retry_s)
        while True:
            before = (self._acked, self._send_until)
            if self._read():
                retry = Deadline(self._retry_s)
            # An answer alone is none: an engine that stands still answers each Hello, too.
            if (self._acked, self._send_until) != before:
                deadline = Deadline(timeout_s)
            needs_room = self._send_due()
            if done():
                return
            if deadline.passed():
                raise NoReplyError(
                    f"stream {self.stream!r} at {self._connection.address}: expected {what} within"
                    f" {timeout_s} s of the last progress, none came; snippets {self._acked} to"
                    f" {self.next_index} are not acknowledged{self._connection.doubt}"
                )
            if retry.passed():
                self._break_silence()
                retry = Deadline(self._retry_s)
            else:
                self._connection.wait(min(deadline.at_s, retry.at_s), for_room=needs_room)

    def _exchange(self) -> None:
        """Reads and sends what can be at once; says Hello again in silence."""
        if self._read() or not self.lag:
            self._heard_s = time.monotonic()
        elif time.monotonic() - self._heard_s > self._retry_s:
            self._heard_s = time.monotonic()
            self._break_silence()
        self._send_due()

    def _break_silence(self) -> None:
        # An End is asked for again as such: after a Hello it would end another, empty session.
        self._talk = _Talk.WELCOMED if self._talk is _Talk.END_SENT else _Talk.HELLO_DUE
        self._silences += 1
        if self._silences % _SILENCES_OF_A_LINE == 0:  # nothing comes over it any more
            self._connection.close(linger_ms=0)
            self._connection = self._new_connection(self._connection.address)

    def _send_due(self) -> bool:
        """Sends all that is due; True when there is no room (or no connection) for more."""
        while (message := self._due()) is not None:
            if not self._connection.try_send(protocol.encode(message)):
                return True
            match message:
                case Hello():
                    self._talk = _Talk.HELLO_SENT
                case Chunk():
                    self._sent += len(message.features)
                case Gap():
                    self._sent = message.next_index
                    if self._ends_session(message):
                        # The next session has its own credit.
                        self._send_until = self._session_from = self._sent
                case End():
                    self._talk = _Talk.END_SENT
        return False

    def _due(self) -> Hello | Chunk | Gap | End | None:
        if self._talk is _Talk.HELLO_DUE:
            return replace(self._hello, first_index=self._oldest)
        if self._talk is not _Talk.WELCOMED or self.welcome is None:
            return None
        if self._acked < self._session_from:
            return None  # the next session is not there yet
        first = self._sent
        if first < self.next_index and first not in self._kept:
            return self._gap(first)
        until = min(self.next_index, self._send_until, first + self.welcome.max_chunk_snippets)
        rows: list[NDArray[np.float32]] = []
        while first + len(rows) < until and (row := self._kept.get(first + len(rows))) is not None:
            rows.append(row)
        if rows:
            return Chunk(self.stream, first, np.stack(rows))
        if self._ending and self.lag == 0:
            return End(self.stream, self._acked)
        return None

    def _gap(self, first: int) -> Gap:
        """What does not exist from here on, or what was dropped."""
        stop = next((index for index in self._kept if index > first), self.next_index)
        for start, end in self._dropped:
            if start <= first < end:
                return Gap(self.stream, first, min(end, stop), dropped=True)
            if first < start < stop:
                stop = start
        return Gap(self.stream, first, stop)

    def _ends_session(self, gap: Gap) -> bool:
        """Whether the engine goes on in another session: more is missing than a window has."""
        assert self.welcome is not None
        before = (index for index in reversed(self._kept) if index < gap.first_index)
        came_until = next(before, gap.first_index - 1) + 1
        return gap.next_index - came_until > self.welcome.window_snippets

    def _read(self) -> bool:
        """Takes in what has come from the engine; False when nothing has."""
        if self._refused is not None:
            raise self._refused
        heard = False
        while (frames := self._connection.receive()) is not None:
            heard, self._silences = True, 0
            match protocol.decode_feed_reply(frames):
                case Welcome() as welcome:
                    self._on_welcome(welcome)
                case Ack() as ack:
                    self._on_ack(ack)
                case Ended() as ended:
                    self._on_ended(ended)
                case Error() as error:
                    self._on_error(error)
        return heard

    def _on_welcome(self, welcome: Welcome) -> None:
        if self._talk is not _Talk.HELLO_SENT:
            # The answer to a repeated Hello: what was sent since is on its way.
            next_index, send_until = welcome.next_index, welcome.send_until
            needed_from = welcome.needed_from
            self._on_ack(Ack(welcome.stream, next_index, send_until, needed_from=needed_from))
            return
        # What a camera has dropped since its Hello is a gap.
        if welcome.next_index < self._oldest and self._hello.policy == "wait":
            self._refuse(
                "out_of_order",
                f"stream {self.stream!r}: expected a Welcome to snippet {self._oldest}, the oldest"
                f" one that is kept, or later, came snippet {welcome.next_index}",
            )
        self.welcome = welcome
        if not self._history_given:
            self._history_snippets = max(self._history_snippets, _history_snippets(welcome))
        self._talk = _Talk.WELCOMED
        self._acked = self._sent = welcome.next_index
        self._send_until = welcome.send_until
        self._session_from = welcome.next_index
        self._sent_again_from = None
        self.needed_from = welcome.needed_from
        self._forget_history()

    def _on_ack(self, ack: Ack) -> None:
        if self._talk not in (_Talk.WELCOMED, _Talk.END_SENT):
            return  # from before the Welcome that is to come
        self._acked = max(self._acked, ack.next_index)
        self._sent = max(self._sent, self._acked)
        if ack.next_index >= self._session_from:
            self._send_until = max(self._send_until, ack.send_until)
        if ack.missing_until is not None and ack.next_index != self._sent_again_from:
            # Lost on the way, or still on it. What comes twice does no harm.
            self._sent = self._sent_again_from = ack.next_index
        if ack.next_index >= self._session_from:
            self.needed_from = ack.needed_from
        self._forget_history()

    def _on_ended(self, ended: Ended) -> None:
        if not self._ending or ended.next_index < self.next_index:
            self._refuse(
                "draining",
                f"stream {self.stream!r}: expected Ended after the last snippet {self.next_index},"
                f" came Ended at {ended.next_index}: the engine ended the stream",
            )
        self._ended = ended
        self._talk = _Talk.ENDED

    def _on_error(self, error: Error) -> None:
        if error.code in LATER_CODES:
            return  # the Hello is repeated after `retry_s` of silence
        if error.code not in RECOVERABLE_CODES:
            self._refuse(error.code, error.message, error.next_index)
        if self._talk is not _Talk.HELLO_SENT:  # else it speaks of what came before the Hello
            self._talk = _Talk.HELLO_DUE

    def _refuse(self, code: str, message: str, next_index: int | None = None) -> NoReturn:
        self._refused = StreamError(code, message, next_index)
        raise self._refused

    def _forget_history(self) -> None:
        """Lets go of accepted snippets that will not be needed again."""
        needed_from = self._acked - self._history_snippets
        if self.needed_from is not None:
            needed_from = min(self._acked, self.needed_from)
            if self._history_given:
                needed_from = min(needed_from, self._acked - self._history_snippets)
        while self._oldest < min(needed_from, self.next_index):
            del self._kept[self._oldest]
        oldest = min(self._oldest, self._acked)
        self._dropped = [span for span in self._dropped if span[1] > oldest]


def _history_snippets(welcome: Welcome) -> int:
    """What an engine may have accepted and not processed, and what that is decided from."""
    unprocessed = welcome.send_until - welcome.next_index
    return (
        unprocessed
        + welcome.window_snippets
        + welcome.context_snippets
        + welcome.lookahead_snippets
    )
