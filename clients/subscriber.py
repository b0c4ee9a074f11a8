"""Actions out of the engine: events while they happen, proposals once they are final."""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Self

import zmq

from hrpro.clients.connection import Connection, Deadline
from hrpro.engine import protocol
from hrpro.engine.protocol import (
    ActionEvent,
    FinalProposal,
    NoReplyError,
    Publication,
    StreamNotice,
    Subscribed,
    subscription_topic,
    topic_prefix,
)

KINDS = (ActionEvent.TYPE, FinalProposal.TYPE, StreamNotice.TYPE)
HIGH_WATER_MESSAGES = 10_000
# Streams whose last sequence number is remembered; the longest silent one is forgotten first.
STREAMS_REMEMBERED = 10_000


class EventSubscriber:
    """Receives the publications of an engine, all of them or filtered.

        with EventSubscriber("tcp://127.0.0.1:5556", stream="cam1") as subscriber:
            subscriber.wait_connected(timeout_s=5.0)
            for publication in subscriber:
                ...

    `stream` and `label` take one stream and one class; `kinds` is any of "event" (ActionEvent),
    "final" (FinalProposal) and "stream" (StreamNotice, which has no label); `final_only` is short
    for kinds=("final",). What is published before `wait_connected` returns may be missed, and so
    may be what is published while the connection is down: publications are not sent again.

    `gaps` and `repeats` count the publications that were missed and those that came again or late,
    by their sequence numbers. Both stay 0 unless `counts_gaps`, which needs whole streams: all
    kinds, and not one label of one stream.
    """

    def __init__(
        self,
        address: str,
        stream: str | None = None,
        label: str | None = None,
        final_only: bool = False,
        kinds: Collection[str] = KINDS,
    ) -> None:
        kinds = (FinalProposal.TYPE,) if final_only else tuple(kinds)
        if not kinds or not set(kinds) <= set(KINDS):
            raise ValueError(f"kinds: expected some of {KINDS}, came {kinds!r}")
        topics = [subscription_topic(kind, stream, label) for kind in kinds]
        self.gaps = 0
        self.repeats = 0
        self.instance: str | None = None
        self.counts_gaps = set(kinds) == set(KINDS) and (stream is None or label is None)
        self._label = label
        self._token = secrets.token_hex(8)
        self._came_early: deque[Publication] = deque()
        self._last: OrderedDict[str, tuple[int, int]] = OrderedDict()  # (session, sequence)
        self._connection = Connection(
            zmq.SUB,
            address,
            {
                zmq.LINGER: 0,
                zmq.RCVHWM: HIGH_WATER_MESSAGES,
                zmq.MAXMSGSIZE: protocol.MAX_REPLY_HEADER_BYTES,
            },
        )
        for topic in topics:
            self._connection.socket.subscribe(topic)
        # The engine's echo of this last subscription says that those above are in force.
        self._connection.socket.subscribe(topic_prefix("welcome", self._token))

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

    def wait_connected(self, timeout_s: float | None = 5.0) -> None:
        """Returns once the engine has confirmed the subscription: nothing is missed from here on.

        Raises NoReplyError when no confirmation comes in time.
        """
        deadline = Deadline(timeout_s)
        while self.instance is None:
            publication = self._next(deadline)
            if publication is not None:
                self._came_early.append(publication)
            elif self.instance is None and deadline.passed():
                raise NoReplyError(
                    f"events at {self._connection.address}: expected the engine's confirmation"
                    f" within {timeout_s} s, none came"
                )

    def receive(self, timeout_s: float | None = None) -> Publication | None:
        """The next publication, or None when none comes in time (None: waits for ever).

        Raises ProtocolError when the engine sends something else.
        """
        if self._came_early:
            return self._came_early.popleft()
        deadline = Deadline(timeout_s)
        while True:
            publication = self._next(deadline)
            if publication is not None or deadline.passed():
                return publication

    def __iter__(self) -> Iterator[Publication]:
        """All publications, without an end."""
        while True:
            publication = self.receive()
            if publication is not None:
                yield publication

    def _next(self, deadline: Deadline) -> Publication | None:
        """What the next message brings: None at the deadline, and for messages without interest."""
        frames = self._connection.receive()
        if frames is None:
            self._connection.wait(deadline.at_s)
            frames = self._connection.receive()
        if frames is None:
            return None
        message = protocol.decode_publication(frames)
        if isinstance(message, Subscribed):
            self._on_subscribed(message)
            return None
        self._count(message)
        return message if self._wants(message) else None

    def _wants(self, message: Publication) -> bool:
        if self._label is None or isinstance(message, StreamNotice):
            return True
        return message.label == self._label

    def _on_subscribed(self, message: Subscribed) -> None:
        """Comes after every reconnection, too; another engine's sessions begin from 1 again."""
        if self.instance is not None and message.instance != self.instance:
            self._last.clear()
        self.instance = message.instance

    def _count(self, message: Publication) -> None:
        if not self.counts_gaps:
            return
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
