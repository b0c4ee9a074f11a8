"""Between feeders and an engine: hands on what they say to each other, and notes what is accepted.

    feeder --\\                    /-- DEALER --\\
    feeder ----> ROUTER  relay  ----- DEALER ----> the engine's feed
    feeder --/                    \\-- DEALER --/

Each feeder has a line of its own to the engine, under its own routing id, so that the engine sees
the same owners of streams as without a relay. Frames are handed on as they came.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace

import numpy as np
import zmq
from numpy.typing import NDArray

from hrpro.clients.connection import Connection, Key
from hrpro.clients.recording import RecordingWriter
from hrpro.engine import protocol
from hrpro.engine.protocol import (
    Ack,
    Chunk,
    End,
    Ended,
    Error,
    Gap,
    Hello,
    HrproError,
    ProtocolError,
    Welcome,
)
from hrpro.engine.sockets import is_local

# The feeder that was silent for longest loses its line when there are more; it gets another.
FEEDERS = 1024
_MESSAGES_PER_TURN = 64
# No engine is known here, nor what it takes; in memory are at most so many messages of this size.
_MAX_FRAME_BYTES = 64 * 2**20
_UNREAD_MESSAGES = 256


@dataclass
class _Live:
    """A take that goes on. Snippets from `until` on are not known to be accepted."""

    take: int
    owner: bytes
    feature_dim: int
    until: int
    send_until: int
    room: int = 0  # the largest credit so far
    # By index: when the chunk came, and the features (D,).
    came: dict[int, tuple[float, NDArray[np.float32]]] = field(default_factory=dict)

    def note_credit(self, send_until: int) -> None:
        self.send_until = send_until
        self.room = max(self.room, send_until - self.until)


class AcceptanceLog:
    """Writes what an engine says that it has accepted, with what its feeders have sent.

    An Ack, Welcome or Ended accepts all below its `next_index`; what did not come of that is a gap.
    Times are seconds since this was made.
    """

    def __init__(self, writer: RecordingWriter) -> None:
        self._writer = writer
        self._began_s = time.monotonic()
        self._hellos: dict[tuple[bytes, str], Hello] = {}  # not answered yet
        self._live: dict[str, _Live] = {}

    @property
    def now_s(self) -> float:
        """Seconds since this was made."""
        return time.monotonic() - self._began_s

    def on_message(self, feeder: bytes, message: Hello | Chunk | Gap | End) -> None:
        """What a feeder asks of the engine."""
        live = self._live.get(message.stream)
        match message:
            case Hello():
                self._hellos[feeder, message.stream] = message
            case Chunk() if live is not None and live.owner == feeder:
                self._note(live, message)

    def _note(self, live: _Live, chunk: Chunk) -> None:
        """Of a chunk that cannot be accepted nothing is kept."""
        n, dim = chunk.features.shape  # snippets, feature dimension
        # Of cameras, an engine takes more than their credit, but not beyond the credit's length;
        # by then it may have accepted as much that is not known here.
        limit = live.send_until + 2 * live.room
        if dim != live.feature_dim or chunk.first_index + n > limit:
            return
        at_s = self.now_s
        for index, row in enumerate(chunk.features, chunk.first_index):
            if index >= live.until:
                live.came[index] = at_s, row

    def on_reply(self, feeder: bytes, reply: Welcome | Ack | Ended | Error) -> None:
        """What the engine says to a feeder."""
        match reply:
            case Welcome():
                self._on_welcome(feeder, reply)
            case Error(stream=str() as stream):
                self._hellos.pop((feeder, stream), None)
            case Ack() | Ended():
                live = self._live.get(reply.stream)
                if live is None or live.owner != feeder:
                    return
                self._accept(live, reply.next_index)
                if isinstance(reply, Ended):
                    self._writer.add_end(self.now_s, live.take, reply.next_index)
                    del self._live[reply.stream]
                else:
                    live.note_credit(reply.send_until)

    def _on_welcome(self, feeder: bytes, welcome: Welcome) -> None:
        hello = self._hellos.pop((feeder, welcome.stream), None)
        live = self._live.get(welcome.stream)
        if live is None:
            if hello is None:
                return
            began = replace(hello, first_index=welcome.next_index)
            take = self._writer.begin_take(self.now_s, began, welcome)
            live = _Live(take, feeder, hello.feature_dim, welcome.next_index, 0)
            self._live[welcome.stream] = live
        self._accept(live, welcome.next_index)
        if live.owner != feeder:  # what the other one has sent since is refused
            live.owner = feeder
            live.came.clear()
        live.note_credit(welcome.send_until)

    def _accept(self, live: _Live, until: int) -> None:
        while (first := live.until) < until:
            stop, rows = first, []
            at_s = live.came[first][0] if first in live.came else None
            while stop < until and stop in live.came and live.came[stop][0] == at_s:
                rows.append(live.came.pop(stop)[1])
                stop += 1
            if at_s is None:
                stop = min((index for index in live.came if first < index < until), default=until)
                self._writer.add_gap(self.now_s, live.take, first, stop)
            else:
                self._writer.add_snippets(at_s, live.take, first, np.stack(rows))
            live.until = stop


class FeedRelay:
    """Binds `feed` for feeders, and connects each to the engine's feed `target`.

    `key` is that of a producer, for an engine that has keys; feeders need none, so `feed` is an
    address of this machine: HrproError for another one. `address` is where it is bound.
    """

    def __init__(self, feed: str, target: str, log: AcceptanceLog, key: Key = None) -> None:
        if not is_local(feed):
            raise HrproError(f"--feed {feed}: expected an address that only this machine reaches")
        self._target, self._log, self._key = target, log, key
        self._lines: OrderedDict[bytes, Connection] = OrderedDict()
        self._feeders: dict[zmq.Socket[bytes], bytes] = {}
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.set(zmq.LINGER, 1000)
        self._router.set(zmq.ROUTER_HANDOVER, 1)
        self._router.set(zmq.MAXMSGSIZE, _MAX_FRAME_BYTES)
        self._router.set(zmq.RCVHWM, _UNREAD_MESSAGES)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        try:
            self._router.bind(feed)
        except zmq.ZMQError:
            self.close()
            raise
        self.address = self._router.get_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def close(self) -> None:
        """Closes all lines; what is on its way in either direction leaves for a second at most."""
        for line in self._lines.values():
            line.close()
        self._router.close()
        self._context.term()

    def turn(self, wait_ms: int) -> None:
        """Hands on what has come, both ways; waits so long at most where nothing has."""
        for ready, _ in self._poller.poll(wait_ms):
            if ready is not self._router and ready not in self._feeders:
                continue  # a line that had to go
            for _ in range(_MESSAGES_PER_TURN):
                frames = _receive(ready)
                if frames is None:
                    break
                if ready is self._router:
                    self._hand_up(frames[0], frames[1:])
                else:
                    self._hand_down(self._feeders[ready], frames)

    def _hand_up(self, feeder: bytes, frames: list[bytes]) -> None:
        # Before it is sent: the answer may be here at once. What is unreadable the engine refuses.
        with contextlib.suppress(ProtocolError):
            self._log.on_message(feeder, protocol.decode_feed(frames))
        # Where there is no room it is lost, which feeders recover from.
        self._line(feeder).try_send(frames)

    def _hand_down(self, feeder: bytes, frames: list[bytes]) -> None:
        with contextlib.suppress(ProtocolError):
            self._log.on_reply(feeder, protocol.decode_feed_reply(frames))
        with contextlib.suppress(zmq.Again):  # as with an engine, the feeder asks again
            self._router.send_multipart([feeder, *frames], zmq.NOBLOCK)

    def _line(self, feeder: bytes) -> Connection:
        line = self._lines.get(feeder)
        if line is None:
            options: dict[int, int | bytes] = {zmq.MAXMSGSIZE: protocol.MAX_REPLY_HEADER_BYTES}
            if feeder[0] != 0:  # a name of the feeder's own, not one that ZeroMQ made up
                options[zmq.ROUTING_ID] = feeder
            line = Connection(zmq.DEALER, self._target, options, self._key, self._context)
            self._lines[feeder] = line
            self._feeders[line.socket] = feeder
            self._poller.register(line.socket, zmq.POLLIN)
            if len(self._lines) > FEEDERS:
                self._forget(next(iter(self._lines)))
        self._lines.move_to_end(feeder)
        return line

    def _forget(self, feeder: bytes) -> None:
        line = self._lines.pop(feeder)
        del self._feeders[line.socket]
        self._poller.unregister(line.socket)
        line.close()


def _receive(source: zmq.Socket[bytes]) -> list[bytes] | None:
    try:
        return source.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
