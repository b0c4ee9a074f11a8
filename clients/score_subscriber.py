"""Curves out of the engine: the scores of each snippet as they become final, to look at."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Collection
from typing import ClassVar, Self

import zmq

from hrpro.clients.connection import Connection, Deadline, Key, Line, SharedConnection, open_line
from hrpro.clients.subscriber import LOOK_S
from hrpro.clients.subscription import SILENT_S
from hrpro.clients.waiting import BlockingClient, Client, LoopClient, Pause, Waiting
from hrpro.engine import protocol, wire
from hrpro.engine.protocol import (
    Mark,
    Message,
    NoReplyError,
    SnippetScores,
    Subscribed,
    topic_prefix,
)

# Seconds of many streams; who reads more slowly misses some.
HIGH_WATER_MESSAGES = 2_000


class _ScoreSubscriber(Client):
    """What the two kinds of subscriber share: all but how they wait."""

    _connection: ClassVar[type[Connection]] = Connection

    def __init__(
        self, address: str, streams: str | Collection[str] | None = None, key: Key = None
    ) -> None:
        streams = (streams,) if isinstance(streams, str) else streams
        names = [wire.checked("stream", wire.stream_id, each) for each in streams or ()]
        self._topics = [topic_prefix(SnippetScores.TYPE, each) for each in names]
        if streams is None:
            self._topics.append(topic_prefix(SnippetScores.TYPE))
        self._address, self._key = address, key
        self._came: deque[SnippetScores] = deque()  # while it was waited for the confirmation
        self._is_confirmed = False
        self._line = self._new_line()

    def _new_line(self) -> Line:
        options: dict[int, int | bytes] = {
            zmq.LINGER: 0,
            zmq.RCVHWM: HIGH_WATER_MESSAGES,
            zmq.MAXMSGSIZE: protocol.MAX_REPLY_HEADER_BYTES,
        }
        line = open_line(self._connection, zmq.SUB, self._address, options, self._key)
        token = secrets.token_hex(8)
        for topic in (*self._topics, topic_prefix(Mark.TYPE), topic_prefix("welcome", token)):
            line.subscribe(topic)
        self._heard_s = time.monotonic()
        return line

    def _connecting(self, timeout_s: float | None) -> Waiting[None]:
        deadline = Deadline(timeout_s)
        while not self._is_confirmed:
            message = yield from self._hearing(deadline)
            if message is None:
                raise NoReplyError(
                    f"scores at {self._address}: expected the engine's confirmation within "
                    f"{timeout_s} s, none came{self._line.doubt}"
                )
            if isinstance(message, SnippetScores):
                self._came.append(message)

    def _receiving(self, timeout_s: float | None) -> Waiting[SnippetScores | None]:
        if self._came:
            return self._came.popleft()
        deadline = Deadline(timeout_s)
        while True:
            message = yield from self._hearing(deadline)
            if message is None or isinstance(message, SnippetScores):
                return message

    def _hearing(self, deadline: Deadline) -> Waiting[Message | None]:
        """The next message, None at the deadline. A line that has been silent for too long is
        given up for a new one, for the engine gives a sign of life each second."""
        while (frames := self._line.receive()) is None:
            if deadline.passed():
                return None
            if time.monotonic() - self._heard_s >= SILENT_S:
                lost, self._line = self._line, self._new_line()
                lost.close()
            yield Pause(min(deadline.at_s, time.monotonic() + LOOK_S))
        self._heard_s = time.monotonic()
        message = protocol.decode_publication(frames)
        self._is_confirmed |= isinstance(message, Subscribed)
        return message


class ScoreSubscriber(_ScoreSubscriber, BlockingClient):
    """Receives the scores of snippets, of the streams that are named (or one) or of all.

        with ScoreSubscriber("tcp://127.0.0.1:5556", streams=["cam1"]) as subscriber:
            while True:
                scores = subscriber.receive()
                scores.attention, scores.scores      # (n,) and (n, C) float32, from first_index on

    The engine sends them only while somebody has subscribed, and keeps none: what is sent while the
    line is down, or while the subscriber is slow, is missed. Nothing tells but `first_index`.
    `key` is the key of a subscriber or operator, or its file.
    """

    def wait_connected(self, timeout_s: float | None = 5.0) -> None:
        """Returns once the engine has confirmed the subscription: it sends scores from here on.

        Raises NoReplyError when no confirmation comes in time.
        """
        self._run(self._connecting(timeout_s))

    def receive(self, timeout_s: float | None = None) -> SnippetScores | None:
        """The next scores, or None when none come in time (None: waits for ever).

        Raises ProtocolError when the engine sends something else.
        """
        return self._run(self._receiving(timeout_s))


class AsyncScoreSubscriber(_ScoreSubscriber, LoopClient):
    """Receives the scores of snippets in an event loop, for one task; see `ScoreSubscriber`.

        async with AsyncScoreSubscriber("tcp://127.0.0.1:5556", streams=["cam1"]) as subscriber:
            async for scores in subscriber:
                ...

    A receive that is cancelled loses nothing.
    """

    _connection = SharedConnection

    async def wait_connected(self, timeout_s: float | None = 5.0) -> None:
        """Returns once the engine has confirmed the subscription; see
        `ScoreSubscriber.wait_connected`."""
        await self._run_async(self._connecting(timeout_s))

    async def receive(self, timeout_s: float | None = None) -> SnippetScores | None:
        """The next scores, or None when none come in time (None: waits for ever)."""
        return await self._run_async(self._receiving(timeout_s))

    def __aiter__(self) -> Self:
        """All scores, without an end."""
        return self

    async def __anext__(self) -> SnippetScores:
        scores = await self.receive()
        assert scores is not None  # it waits for ever
        return scores
