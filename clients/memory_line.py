"""A line in memory, for tests: between a client and an engine of the same process, without sockets.

What is sent is handled at once, in the sender's call: a test that uses one thread sees the same
each time. Several threads may be at it; the engine's lock is held while it handles something.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from threading import Condition, RLock
from typing import Protocol

from hrpro.clients.connection import CLOSED
from hrpro.engine.wire import HrproError

MARK_S = 1.0


class Peer(Protocol):
    """The engine's side of a line."""

    lock: RLock
    is_up: bool

    def on_message(self, line: MemoryLine, frames: list[bytes], /) -> None:
        """What a feeder sends."""

    def on_subscription(self, line: MemoryLine, topic: bytes, /) -> None:
        """What a subscriber asks for."""

    def mark(self) -> list[bytes]:
        """A sign of life."""

    def leave(self, line: MemoryLine, /) -> None:
        """The line is closed."""


class MemoryLine:
    """One client's line to an engine in memory; see `connection.Line`."""

    doubt = ""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._came: deque[list[bytes]] = deque()
        self._changed = Condition(peer.lock)
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self._heard_s = time.monotonic()
        self._is_closed = False
        self.topics: list[bytes] = []

    # ---- the client's side -----------------------------------------------------------------------

    def receive(self) -> list[bytes] | None:
        """The frames of the next message that has come, or None."""
        with self._changed:
            if self._is_closed:
                raise HrproError(CLOSED)
            return self._came.popleft() if self._came else None

    def try_send(self, frames: list[bytes], /) -> bool:
        """Hands the frames to the engine; False while it is down."""
        with self._changed:
            if self._peer.is_up:
                self._peer.on_message(self, frames)
            return self._peer.is_up

    def subscribe(self, topic: bytes, /) -> None:
        """Ask for the publications whose topic begins with this."""
        with self._changed:
            self.topics.append(topic)
            if self._peer.is_up:
                self._peer.on_subscription(self, topic)

    def unsubscribe(self, topic: bytes, /) -> None:
        """Take back what `subscribe` has asked for."""
        with self._changed:
            self.topics.remove(topic)

    def wait(self, until_s: float, for_room: bool = False, /) -> None:
        """Returns when a message has come, or can be sent, or at the monotonic time `until_s`."""
        with self._changed:
            if not self._is_ready(for_room):
                left_s = until_s - time.monotonic()
                self._changed.wait(None if left_s == math.inf else max(0.0, left_s))
            self._mark_if_due()

    async def wait_async(self, until_s: float, for_room: bool = False, /) -> None:
        """As `wait`, for one task at a time; returns at `wake`, too."""
        with self._changed:
            left_s = until_s - time.monotonic()
            if self._is_ready(for_room) or left_s <= 0:
                return
            loop = asyncio.get_running_loop()
            waiter = loop.create_future()
            self._waiter = loop, waiter
        timer = None if left_s == math.inf else loop.call_later(left_s, _set, waiter)
        try:
            await waiter
        finally:
            with self._changed:
                self._waiter = None
                self._mark_if_due()
            if timer is not None:
                timer.cancel()

    def wake(self) -> None:
        """Lets the task or thread go on that waits."""
        with self._changed:
            self._changed.notify_all()
            if self._waiter is not None:
                loop, waiter = self._waiter
                loop.call_soon_threadsafe(_set, waiter)

    def close(self, linger_ms: int | None = None) -> None:  # noqa: ARG002 - of a Line
        """Nothing comes any more."""
        with self._changed:
            self._is_closed = True
            self._peer.leave(self)
            self.wake()

    async def close_async(self) -> None:
        """As `close`."""
        self.close()

    def _is_ready(self, for_room: bool) -> bool:
        return self._is_closed or bool(self._came) or (for_room and self._peer.is_up)

    def _mark_if_due(self) -> None:
        """A subscriber hears each second that the engine is there."""
        if self.topics and self._peer.is_up and time.monotonic() >= self._heard_s + MARK_S:
            self.deliver(self._peer.mark())

    # ---- the engine's side -----------------------------------------------------------------------

    def deliver(self, frames: list[bytes]) -> None:
        """A message for the client."""
        self._heard_s = time.monotonic()
        self._came.append(frames)
        self.wake()

    def lose(self) -> None:
        """Whatever is on its way to the client is lost."""
        self._came.clear()


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
