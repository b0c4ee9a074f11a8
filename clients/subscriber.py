"""Actions out of the engine: events while they happen, proposals once they are final.

    connect --> echo --> ask the log for what follows the last number --> live
                ^                    ^                                      |
                |                    +------- a number is missing ----------+
                +---------------- nothing heard for SILENT_S ---------------+

The answers of the log and the live publications come over one line, in order: whatever is live
before the last page is in the pages, and whatever comes after it is not.
"""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Self

import zmq

from hrpro.clients.connection import Connection, Deadline, Key
from hrpro.engine import protocol, wire
from hrpro.engine.protocol import (
    ActionEvent,
    FinalProposal,
    HrproError,
    Mark,
    NoReplyError,
    Page,
    Publication,
    SnippetScores,
    StreamNotice,
    Subscribed,
    topic_prefix,
)

_log = logging.getLogger(__name__)

KINDS = (ActionEvent.TYPE, FinalProposal.TYPE, StreamNotice.TYPE)
HIGH_WATER_MESSAGES = 10_000
# Streams whose last sequence number is remembered; the longest silent one is forgotten first.
STREAMS_REMEMBERED = 10_000
# The engine gives a sign of life each second. After so long without, the line is dead.
SILENT_S = 5.0
LOOK_S = 1.0
RECONNECT_FIRST_MS = 100
RECONNECT_LONGEST_MS = 5_000


class ReplayError(HrproError):
    """The engine cannot send again what was asked for."""


class EventSubscriber:
    """Receives the publications of an engine, all of them or filtered.

        with EventSubscriber("tcp://127.0.0.1:5556", stream="cam1") as subscriber:
            subscriber.wait_connected(timeout_s=5.0)
            for publication in subscriber:
                ...

    `stream` and `label` take one stream and one class; `kinds` is any of "event" (ActionEvent),
    "final" (FinalProposal) and "stream" (StreamNotice, which has no label); `final_only` is short
    for kinds=("final",).

    With an engine that keeps a log, every publication comes once and in order, however often the
    line is cut: `last_number` is the number up to which all were given. Whoever keeps it can go on
    from there with `since`, which is 0 for all that the log has. Without `since`, the subscription
    begins when `wait_connected` returns, and first come the newest events of the actions that are
    open then; `is_snapshot` says whether the last publication that was given is one of them.
    `missed` counts the numbers that were asked for and are no longer in the log, which is logged as
    a warning; of one stream, fewer may be its own. A log of another instance is given from its
    beginning; `instance` says, to begin with, in which one `since` counts.

    With an engine that keeps none, `last_number` stays None, what is published while the line is
    down is missed, and `gaps` and `repeats` count the publications that were missed and those that
    came again or late, by their sequence numbers.

    `key` is the key of a subscriber or operator, or its file, for an engine that has keys; what it
    may not see does not come. Name the stream where it may see but one: otherwise the log is asked
    about each number that was another's.
    """

    def __init__(
        self,
        address: str,
        stream: str | None = None,
        label: str | None = None,
        final_only: bool = False,
        kinds: Collection[str] = KINDS,
        since: int | None = None,
        key: Key = None,
        instance: str | None = None,
    ) -> None:
        self._kinds = {FinalProposal.TYPE} if final_only else set(kinds)
        if not self._kinds or not self._kinds <= set(KINDS):
            raise ValueError(f"kinds: expected some of {KINDS}, came {tuple(kinds)!r}")
        self._stream = wire.checked("stream", wire.optional(wire.stream_id), stream)
        self._label = wire.checked("label", wire.optional(wire.label), label)
        self._since = wire.checked("since", wire.optional(wire.count), since)
        self.gaps = 0
        self.repeats = 0
        self.missed = 0
        self.is_snapshot = False
        self.instance = instance
        self._address = address
        self._key = key
        self._ready = False
        self._number = self._since  # everything up to it has come
        self._snapshot: deque[Publication] = deque()
        self._came: deque[Publication] = deque()  # and is not given yet
        self._asked: bytes | None = None  # the topic on which a page is to come
        self._asked_s = 0.0
        self._is_quiet = True  # since the mark before
        self._last: OrderedDict[str, tuple[int, int]] = OrderedDict()  # (session, sequence)
        self._connection = self._connect()

    def _connect(self) -> Connection:
        """A new line. Whole streams, or a loss could not be told from what is not wanted."""
        first_ms = RECONNECT_FIRST_MS + random.randrange(RECONNECT_FIRST_MS)  # noqa: S311
        connection = Connection(
            zmq.SUB,
            self._address,
            {
                zmq.LINGER: 0,
                zmq.RCVHWM: HIGH_WATER_MESSAGES,
                zmq.MAXMSGSIZE: protocol.MAX_REPLY_HEADER_BYTES,
                # From one attempt to the next, doubling; not the same for all who lost an engine.
                zmq.RECONNECT_IVL: first_ms,
                zmq.RECONNECT_IVL_MAX: RECONNECT_LONGEST_MS,
            },
            self._key,
        )
        for kind in KINDS:
            stream = () if self._stream is None else (self._stream,)
            connection.socket.subscribe(topic_prefix(kind, *stream))
        connection.socket.subscribe(topic_prefix(Mark.TYPE))
        # The engine's echo of this last subscription says that those above are in force.
        connection.socket.subscribe(topic_prefix("welcome", secrets.token_hex(8)))
        self._looked_s, self._silent_s = time.monotonic(), 0.0
        self._asked = None
        return connection

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the subscription."""
        self._connection.close()

    @property
    def last_number(self) -> int | None:
        """All that was asked for up to this number was given; None where nothing is numbered."""
        waiting = self._came[0].number if self._came else None
        return self._number if waiting is None else waiting - 1

    def wait_connected(self, timeout_s: float | None = 5.0) -> None:
        """Returns once the engine has confirmed the subscription: nothing is missed from here on.

        Raises NoReplyError when no confirmation comes in time, and ReplayError where the engine has
        no log, or another one, for `since`.
        """
        deadline = Deadline(timeout_s)
        while not self._ready:
            frames = self._hear(deadline)
            if frames is not None:
                publication = self._take(frames)
                self._came.extend([publication] if publication else [])
            elif deadline.passed():
                raise NoReplyError(
                    f"events at {self._address}: expected the engine's confirmation"
                    f" within {timeout_s} s, none came{self._connection.doubt}"
                )

    def receive(self, timeout_s: float | None = None) -> Publication | None:
        """The next publication, or None when none comes in time (None: waits for ever).

        Raises ProtocolError when the engine sends something else, and ReplayError as
        `wait_connected`.
        """
        deadline = Deadline(timeout_s)
        while True:
            publication = self._next_that_came()
            if publication is None:
                frames = self._hear(deadline)
                if frames is not None:
                    publication = self._take(frames)
                elif deadline.passed():
                    return None
            if publication is not None and self._wants(publication):
                return publication

    def __iter__(self) -> Iterator[Publication]:
        """All publications, without an end."""
        while True:
            publication = self.receive()
            if publication is not None:
                yield publication

    def _next_that_came(self) -> Publication | None:
        self.is_snapshot = bool(self._snapshot)
        if self._snapshot:
            return self._snapshot.popleft()
        return self._came.popleft() if self._came else None

    def _wants(self, message: Publication) -> bool:
        if message.TYPE not in self._kinds:
            return False
        if self._label is None or isinstance(message, StreamNotice):
            return True
        return message.label == self._label

    def _hear(self, deadline: Deadline) -> list[bytes] | None:
        """The next message; None at the deadline, and now and then before. A line that has been
        silent for too long is given up for a new one."""
        frames = self._connection.receive()
        if frames is None:
            self._connection.wait(min(deadline.at_s, time.monotonic() + LOOK_S))
            frames = self._connection.receive()
        # From one look to the next: while the process was stopped, the line was not silent.
        looked_s, self._looked_s = self._looked_s, time.monotonic()
        silent_s = self._silent_s + min(self._looked_s - looked_s, LOOK_S)
        self._silent_s = silent_s if frames is None else 0.0
        if self._silent_s >= SILENT_S:
            self._connection.close()
            self._connection = self._connect()
        return frames

    def _take(self, frames: list[bytes]) -> Publication | None:
        """What a message brings, if it is a live publication that is next."""
        match protocol.decode_publication(frames):
            case Subscribed() as message:
                self._on_subscribed(message)
            case Mark() as message:
                self._on_mark(message)
            case Page() as message:
                self._on_page(message, frames[0])
            case SnippetScores():
                pass  # another subscriber's, see `ScoreSubscriber`
            case message:
                return self._on_publication(message)
        return None

    def _on_publication(self, message: Publication) -> Publication | None:
        """One that is live: given, unless the log is asked, which has it too."""
        if message.number is None:
            self._count(message)
            return message
        if self._number is None or self._asked is not None:
            return None
        if message.number <= self._number:
            self.repeats += 1
            return None
        previous = message.number - 1 if self._stream is None else message.previous
        if previous is None or previous > self._number:
            self._ask()
            return None
        self._number = message.number
        self._is_quiet = False
        return message

    def _on_subscribed(self, message: Subscribed) -> None:
        """Comes after every reconnection, too; in another engine, sessions begin from 1 again."""
        is_other = self.instance not in (None, message.instance)
        self.instance = message.instance
        if message.number is not None:
            if is_other:
                self._number = 0
            self._ask()
            return
        if self._since is not None:
            raise ReplayError(
                f"events at {self._address}: expected an engine that keeps a log, to go on from "
                f"number {self._since}; it was started with --state none"
            )
        if is_other:
            self._last.clear()
        self._number = None
        self._ready = True

    def _on_mark(self, mark: Mark) -> None:
        """Where a number is missing, ask for it.

        Of one stream it cannot be told from the number, but only while nothing comes of it.
        """
        if self._asked is not None:
            # A page that was too much for the line does not come any more.
            if time.monotonic() >= self._asked_s + SILENT_S:
                self._ask()
        elif mark.number is not None and self._number is not None:
            is_missing = mark.instance == self.instance and mark.number > self._number
            if is_missing and (self._stream is None or self._is_quiet):
                self._ask()
        self._is_quiet = True

    def _ask(self) -> None:
        """Ask for what follows the last number; at the beginning, for the actions that are open."""
        self._settle()
        token = secrets.token_hex(8)
        self._asked = (
            protocol.open_topic(token, self._stream)
            if self._number is None
            else protocol.replay_topic(token, self._number, self._stream)
        )
        self._asked_s = time.monotonic()
        self._connection.socket.subscribe(self._asked)

    def _settle(self) -> None:
        if self._asked is not None:
            self._connection.socket.unsubscribe(self._asked)
            self._asked = None

    def _on_page(self, page: Page, topic: bytes) -> None:
        if topic != self._asked:
            return  # it was asked for once more
        self._settle()
        if page.since is None:
            self._snapshot.extend(page.publications)
        elif page.since > page.newest:
            raise ReplayError(
                f"events at {self._address}: expected a log with the number {page.since}, came one "
                f"that ends at {page.newest} (instance {self.instance}): it is another log"
            )
        else:
            gone = page.oldest - 1 - page.since
            if gone > 0:
                self.missed += gone
                _log.warning("%d of the numbers asked for are no longer in the log", gone)
            self._came.extend(page.publications)
        self._number = page.next
        self._ready = True
        if not page.is_last:
            self._ask()

    def _count(self, message: Publication) -> None:
        session, sequence = message.session, message.sequence
        last_session, last_sequence = self._last.get(message.stream, (session, sequence - 1))
        if session > last_session:
            self.gaps += sequence  # of the new session; the tail of the old one is unknown
        elif session < last_session or sequence <= last_sequence:
            self.repeats += 1
        else:
            self.gaps += sequence - last_sequence - 1
        self._last[message.stream] = (session, sequence)
        self._last.move_to_end(message.stream)
        if len(self._last) > STREAMS_REMEMBERED:
            self._last.popitem(last=False)
