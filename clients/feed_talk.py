"""What a feeder and an engine say to each other, without I/O and without a clock.

Whatever goes wrong - a lost connection, a restarted engine - is met in one way: Hello, Welcome,
and on from `Welcome.next_index`. Where a message was lost alone, an Ack says what is missing.
"""

from __future__ import annotations

import enum
from dataclasses import replace
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.kept_snippets import KeptSnippets
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
    StreamError,
    Welcome,
)

# The engine reads a message of each line in turn: after so many answers over the new one, nothing
# is left of the old one.
_STRAYS_FORGOTTEN_ACKS = 256


class _Stage(enum.Enum):
    """Where the conversation with the engine stands."""

    HELLO_DUE = enum.auto()
    HELLO_SENT = enum.auto()
    WELCOMED = enum.auto()
    END_SENT = enum.auto()
    ENDED = enum.auto()


class FeedTalk:
    """One stream's conversation: `due` says what to send, and is told by `note_sent` that it left;
    `hear` takes what has come.

    Of indices, `acked` is where the engine has accepted up to, `sent` where was sent up to, and
    `send_until` the credit. Raises StreamError where the engine refuses, from then on each time.
    """

    def __init__(self, hello: Hello, kept: KeptSnippets) -> None:
        self._hello = hello
        self.kept = kept
        self.welcome: Welcome | None = None
        self.ended: Ended | None = None
        self.ending = False
        """Whether an End is to follow the last snippet."""
        self.needed_from: int | None = None
        self.acked = self.sent = self.send_until = hello.first_index
        self._session_from = hello.first_index  # an Ack of less is of a session a gap has ended
        self._sent_again_from: int | None = None
        self._stage = _Stage.HELLO_DUE
        self._hellos = 0  # over this line, and not answered
        self._stray_hellos = 0  # over lines that were given up: they may still come to the engine
        self._acks = 0  # since then
        self._refused: StreamError | None = None

    @property
    def lag(self) -> int:
        """Snippets that were given and are not known to be accepted."""
        return max(0, self.kept.next_index - self.acked)

    @property
    def unsent(self) -> int:
        """Those of them that were not sent."""
        return max(0, self.kept.next_index - self.sent)

    @property
    def all_sent(self) -> bool:
        """Whether nothing that was given has to be sent."""
        return self._stage is _Stage.WELCOMED and self.sent >= self.kept.next_index

    # ---- what the source gives -------------------------------------------------------------------

    def check(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """The features as (n, D); raises StreamError as an engine would, before it is asked."""
        stream, next_index, dim = self._hello.stream, self.kept.next_index, self._hello.feature_dim
        where = f"stream {stream!r}, snippet {next_index}"
        if self.ending:
            raise StreamError("unknown_stream", f"{where}: expected no snippets after end()")
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
            bad_index = next_index + int(np.argmin(finite))
            raise StreamError(
                "not_finite",
                f"stream {stream!r}, snippet {bad_index}: expected finite features,"
                " came NaN or infinity",
            )
        return rows

    def give(self, rows: NDArray[np.float32]) -> None:
        """The next snippets, (n, D), that `check` has passed."""
        for row in rows:
            self.kept.add(row, self.sent)
            self._forget()

    # ---- what is due -----------------------------------------------------------------------------

    def due(self) -> Hello | Chunk | Gap | End | None:
        """What is to be sent next, or None."""
        if self._stage is _Stage.HELLO_DUE:
            return replace(self._hello, first_index=self.kept.oldest)
        if self._stage is not _Stage.WELCOMED or self.welcome is None:
            return None
        if self.acked < self._session_from:
            return None  # the next session is not there yet
        stream, first, next_index = self._hello.stream, self.sent, self.kept.next_index
        if first < next_index and first not in self.kept:
            stop, dropped = self.kept.gap(first)
            return Gap(stream, first, stop, dropped)
        until = min(next_index, self.send_until, first + self.welcome.max_chunk_snippets)
        if rows := self.kept.run(first, until):
            return Chunk(stream, first, np.stack(rows))
        if self.ending and self.lag == 0:
            return End(stream, self.acked)
        return None

    def note_sent(self, message: Hello | Chunk | Gap | End) -> None:
        """What was due has left."""
        match message:
            case Hello():
                self._stage = _Stage.HELLO_SENT
                self._hellos += 1
            case Chunk():
                self.sent += len(message.features)
            case Gap():
                self.sent = message.next_index
                if self._ends_session(message):
                    # The next session has its own credit.
                    self.send_until = self._session_from = self.sent
            case End():
                self._stage = _Stage.END_SENT

    def say_again(self) -> None:
        """The engine is silent though it should not be: ask it where it is."""
        # An End is asked for again as such: after a Hello it would end another, empty session.
        is_end = self._stage is _Stage.END_SENT
        self._stage = _Stage.WELCOMED if is_end else _Stage.HELLO_DUE

    def note_new_line(self) -> None:
        """The line was given up for another."""
        self._stray_hellos += self._hellos
        self._hellos = self._acks = 0

    def _ends_session(self, gap: Gap) -> bool:
        """Whether the engine goes on in another session: more is missing than a window has."""
        assert self.welcome is not None
        before = self.kept.before(gap.first_index)
        came_until = gap.first_index if before is None else before + 1
        return gap.next_index - came_until > self.welcome.window_snippets

    # ---- what comes ------------------------------------------------------------------------------

    def raise_refusal(self) -> None:
        """Raises what the engine has refused the stream with, if it has."""
        if self._refused is not None:
            raise self._refused

    def hear(self, frames: list[bytes]) -> None:
        """Takes in a message of the engine. Raises ProtocolError for what is none."""
        match protocol.decode_feed_reply(frames):
            case Welcome() as welcome:
                self._on_welcome(welcome)
            case Ack() as ack:
                self._on_ack(ack)
            case Ended() as ended:
                self._on_ended(ended)
            case Error() as error:
                self._on_error(error)

    def _on_welcome(self, welcome: Welcome) -> None:
        self._hellos = max(0, self._hellos - 1)
        if self._stage is not _Stage.HELLO_SENT:
            # The answer to a repeated Hello: what was sent since is on its way.
            next_index, send_until = welcome.next_index, welcome.send_until
            needed_from = welcome.needed_from
            self._on_ack(Ack(welcome.stream, next_index, send_until, needed_from=needed_from))
            return
        # What was skipped since the Hello is a gap, and so is what a camera has dropped.
        gone_until = self.kept.gone_until
        if welcome.next_index < gone_until and self._hello.policy == "wait":
            self._refuse(
                "out_of_order",
                f"stream {self._hello.stream!r}: expected a Welcome to snippet {gone_until}, the "
                f"oldest one that is kept, or later, came snippet {welcome.next_index}",
            )
        self.welcome = welcome
        self.kept.keep_at_least(_history_snippets(welcome))
        self._stage = _Stage.WELCOMED
        self.acked = self.sent = self._session_from = welcome.next_index
        self.send_until = welcome.send_until
        self._sent_again_from = None
        self.needed_from = welcome.needed_from
        self._forget()

    def _on_ack(self, ack: Ack) -> None:
        self._acks += 1
        if self._acks > _STRAYS_FORGOTTEN_ACKS:
            self._stray_hellos = 0
        if self._stage not in (_Stage.WELCOMED, _Stage.END_SENT):
            return  # from before the Welcome that is to come
        self.acked = max(self.acked, ack.next_index)
        self.sent = max(self.sent, self.acked)
        if ack.missing_until is not None and ack.next_index != self._sent_again_from:
            # Lost on the way, or still on it. What comes twice does no harm.
            self.sent = self._sent_again_from = ack.next_index
        if ack.next_index >= self._session_from:
            self.send_until = max(self.send_until, ack.send_until)
            self.needed_from = ack.needed_from
        self._forget()

    def _on_ended(self, ended: Ended) -> None:
        next_index = self.kept.next_index
        if not self.ending or ended.next_index < next_index:
            self._refuse(
                "draining",
                f"stream {self._hello.stream!r}: expected Ended after the last snippet {next_index}"
                f", came Ended at {ended.next_index}: the engine ended the stream",
            )
        self.ended = ended
        self._stage = _Stage.ENDED

    def _on_error(self, error: Error) -> None:
        if error.code in LATER_CODES:
            return  # the Hello is repeated after a silence
        if error.code == "not_owner" and self._is_own_fault():
            return
        if error.code not in RECOVERABLE_CODES:
            self._refuse(error.code, error.message, error.next_index)
        if self._stage is not _Stage.HELLO_SENT:  # else it speaks of what came before the Hello
            self._stage = _Stage.HELLO_DUE

    def _is_own_fault(self) -> bool:
        """Whether it was this feeder, and no other, that has taken the stream over: an engine that
        stood still reads a Hello of the old line after that of the new one, and then takes the old
        one for the owner. Each such Hello is answered by another."""
        if self._stage in (_Stage.HELLO_DUE, _Stage.HELLO_SENT):
            return True  # it speaks of what came before the Hello, which takes the stream over
        if not self._stray_hellos:
            return False
        self._stray_hellos -= 1
        self._stage = _Stage.HELLO_DUE
        return True

    def _refuse(self, code: str, message: str, next_index: int | None = None) -> NoReturn:
        self._refused = StreamError(code, message, next_index)
        raise self._refused

    def _forget(self) -> None:
        """Lets go of what will not be needed again."""
        self.kept.forget(self.acked, self.needed_from)


def _history_snippets(welcome: Welcome) -> int:
    """What an engine may have accepted and not processed, and what that is decided from."""
    unprocessed = welcome.send_until - welcome.next_index
    return (
        unprocessed
        + welcome.window_snippets
        + welcome.context_snippets
        + welcome.lookahead_snippets
    )
