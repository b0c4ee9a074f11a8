"""The engine's sockets: their options, and sending and receiving that never blocks.

Every limit that ZeroMQ leaves open by default is closed here; docs/PROTOCOL.md, "Connections",
says what a peer sees of it.

ZeroMQ's own heartbeats stay off. In libzmq 4.3.5 a ping that is sent or answered on a connection
which has reached its receive limit, and whose peer has died, is a failed assertion: it aborts the
process. TCP's keepalive finds dead peers instead. And since a peer may still turn on its own
heartbeats, the receive limit is never so low that a feeder reaches it within a usual credit.
"""

from __future__ import annotations

import zmq

# A silent connection is probed after 10 s and dropped after 10 + 3 * 5 s.
KEEPALIVE_IDLE_S = 10
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 3
# Long enough for what is published last to reach subscribers, short enough for a restart.
LINGER_MS = 2_000
# Per peer. A subscriber that is further behind than EVENTS_TO_SEND loses events.
REPLIES_TO_SEND = 1_000
EVENTS_TO_SEND = 10_000
BYTES_TO_READ = 64 * 2**20
FEWEST_TO_READ = 256
# No message has more frames, with its envelope, than 3; one more is kept to see that it has.
MAX_FRAMES = 4
# Joined once: that takes longer than to send a frame.
_NOBLOCK_MORE = zmq.NOBLOCK | zmq.SNDMORE


def messages_to_read(max_frame_bytes: int) -> int:
    """The receive limit of a connection, which ZeroMQ counts in messages.

    Messages of one frame, all of the largest size, come to at most BYTES_TO_READ; where that
    would be too few of them, FEWEST_TO_READ.
    """
    return max(FEWEST_TO_READ, BYTES_TO_READ // max_frame_bytes)


def bind_router(
    context: zmq.Context[zmq.Socket[bytes]], address: str, max_frame_bytes: int
) -> zmq.Socket[bytes]:
    """A bound ROUTER that reports unroutable peers and lets a peer reconnect under its name."""
    router = context.socket(zmq.ROUTER)
    router.set(zmq.ROUTER_MANDATORY, 1)
    router.set(zmq.ROUTER_HANDOVER, 1)
    return _bind(router, address, max_frame_bytes, REPLIES_TO_SEND)


def bind_publisher(
    context: zmq.Context[zmq.Socket[bytes]], address: str, max_frame_bytes: int
) -> zmq.Socket[bytes]:
    """A bound XPUB that reads every subscription and drops for a subscriber that is too slow.

    XPUB_NODROP stays off: one subscriber that does not read must not hold up the engine. It
    finds the gap in the sequence numbers.
    """
    publisher = context.socket(zmq.XPUB)
    publisher.set(zmq.XPUB_VERBOSE, 1)
    return _bind(publisher, address, max_frame_bytes, EVENTS_TO_SEND)


def _bind(
    bound: zmq.Socket[bytes], address: str, max_frame_bytes: int, messages_to_send: int
) -> zmq.Socket[bytes]:
    bound.set(zmq.MAXMSGSIZE, max_frame_bytes)
    bound.set(zmq.SNDHWM, messages_to_send)
    bound.set(zmq.RCVHWM, messages_to_read(max_frame_bytes))
    bound.set(zmq.TCP_KEEPALIVE, 1)
    bound.set(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_IDLE_S)
    bound.set(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_INTERVAL_S)
    bound.set(zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_PROBES)
    bound.set(zmq.LINGER, LINGER_MS)
    try:
        bound.bind(address)
    except zmq.ZMQError:
        bound.close(linger=0)
        raise
    return bound


def receive(source: zmq.Socket[bytes]) -> list[bytes] | None:
    """The frames of the next message, of which there may be many: at most MAX_FRAMES are kept.

    None when no message waits.
    """
    try:
        frame = source.recv(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
    frames = [frame.bytes]
    while frame.more:
        frame = source.recv(zmq.NOBLOCK, copy=False)
        if len(frames) < MAX_FRAMES:
            frames.append(frame.bytes)
    return frames


def try_send(target: zmq.Socket[bytes], frames: list[bytes]) -> bool:
    """Whether the frames were handed over. A peer that is gone or does not read is no error."""
    try:
        for frame in frames[:-1]:
            target.send(frame, _NOBLOCK_MORE)
        target.send(frames[-1], zmq.NOBLOCK)
    except zmq.ZMQError as error:
        if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
            raise
        return False
    return True
