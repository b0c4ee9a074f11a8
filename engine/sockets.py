"""The engine's sockets: their options, and sending and receiving that never blocks.

Every limit that ZeroMQ leaves open by default is closed here; docs/PROTOCOL.md, "Connections",
says what a peer sees of it.

ZeroMQ's own heartbeats stay off. In libzmq 4.3.5 a ping that is sent or answered on a connection
which has reached its receive limit, and whose peer has died, is a failed assertion: it aborts the
process. TCP's keepalive finds dead peers instead. And since a peer may still turn on its own
heartbeats, the receive limit is never so low that a feeder reaches it within a usual credit.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

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
# What a closed socket leaves may keep its address for a moment.
REBIND_S = 5.0

Guard: TypeAlias = Callable[[zmq.Socket[bytes]], None]  # makes a socket ask for keys

_TCP_HOST = re.compile(r"tcp://(?:[^;/]*;)?(\[[^\]]*\]|[^:;/]*):[^:;/]*")


def new_context() -> zmq.Context[zmq.Socket[bytes]]:
    """A context whose own thread interrupts none when it is woken.

    Each Ack wakes it, on the core of the loop that has sent it. Under Linux's usual policy it would
    run there at once, in the loop's place, and the loop wait, though another core is free.
    """
    context = zmq.Context()
    with _threads_in_batch():
        context.socket(zmq.PAIR).close()  # its thread begins with the first socket
    return context


@contextlib.contextmanager
def _threads_in_batch() -> Iterator[None]:
    """Threads that begin meanwhile get SCHED_BATCH, as this one has, where that can be had and
    nobody has chosen another policy."""
    is_changed = False
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
                is_changed = True
    try:
        yield
    finally:
        if is_changed:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def is_local(address: str) -> bool:
    """Whether nobody but programs of this machine can reach what is bound there.

    A name other than `localhost` may be any interface's, and an abstract ipc address (`ipc://@`)
    has no file whose permissions could keep other users out.
    """
    if address.startswith("ipc://"):
        return not address.startswith("ipc://@")
    if address.startswith("inproc://"):
        return True
    found = _TCP_HOST.fullmatch(address)
    if found is None or ";" in address:
        return False
    host = found[1].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def messages_to_read(max_frame_bytes: int) -> int:
    """The receive limit of a connection, which ZeroMQ counts in messages.

    Messages of one frame, all of the largest size, come to at most BYTES_TO_READ; where that
    would be too few of them, FEWEST_TO_READ.
    """
    return max(FEWEST_TO_READ, BYTES_TO_READ // max_frame_bytes)


def bind_router(
    context: zmq.Context[zmq.Socket[bytes]],
    address: str,
    max_frame_bytes: int,
    guard: Guard | None = None,
) -> zmq.Socket[bytes]:
    """A bound ROUTER that reports unroutable peers and lets a peer reconnect under its name."""
    router = context.socket(zmq.ROUTER)
    router.set(zmq.ROUTER_MANDATORY, 1)
    router.set(zmq.ROUTER_HANDOVER, 1)
    return _bind(router, address, max_frame_bytes, REPLIES_TO_SEND, guard)


def bind_publisher(
    context: zmq.Context[zmq.Socket[bytes]],
    address: str,
    max_frame_bytes: int,
    guard: Guard | None = None,
) -> zmq.Socket[bytes]:
    """A bound XPUB that reads every subscription, and the end of each, and drops for a subscriber
    that is too slow.

    XPUB_NODROP stays off: one subscriber that does not read must not hold up the engine. It
    finds the gap in the sequence numbers. With a guard a subscription has no effect but what is
    set with SUBSCRIBE and UNSUBSCRIBE, which belong to the connection whose message was read last.
    """
    publisher = context.socket(zmq.XPUB)
    publisher.set(zmq.XPUB_VERBOSER, 1)
    if guard is not None:
        publisher.set(zmq.XPUB_MANUAL, 1)
    return _bind(publisher, address, max_frame_bytes, EVENTS_TO_SEND, guard)


def bind_again(
    old: zmq.Socket[bytes], new: Callable[[str], zmq.Socket[bytes]]
) -> zmq.Socket[bytes]:
    """Closes a bound socket, with all its connections, and gives what `new` binds in its place."""
    address = old.get_string(zmq.LAST_ENDPOINT)
    with contextlib.suppress(zmq.ZMQError):
        old.unbind(address)
    old.close(linger=0)
    until_s = time.monotonic() + REBIND_S
    while True:
        try:
            return new(address)
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE or time.monotonic() > until_s:
                raise
        time.sleep(0.01)


def _bind(
    bound: zmq.Socket[bytes],
    address: str,
    max_frame_bytes: int,
    messages_to_send: int,
    guard: Guard | None,
) -> zmq.Socket[bytes]:
    bound.set(zmq.MAXMSGSIZE, max_frame_bytes)
    bound.set(zmq.SNDHWM, messages_to_send)
    bound.set(zmq.RCVHWM, messages_to_read(max_frame_bytes))
    bound.set(zmq.TCP_KEEPALIVE, 1)
    bound.set(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_IDLE_S)
    bound.set(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_INTERVAL_S)
    bound.set(zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_PROBES)
    bound.set(zmq.LINGER, LINGER_MS)
    if guard is not None:
        guard(bound)
    try:
        with _own_files_alone(address):
            bound.bind(address)
    except zmq.ZMQError:
        bound.close(linger=0)
        raise
    return bound


@contextlib.contextmanager
def _own_files_alone(address: str) -> Iterator[None]:
    """The file of an ipc socket gets the mode 0600, without a moment in which it has another."""
    if not address.startswith("ipc://"):
        yield
        return
    # For ipc://* it also makes a folder of its own, which it has to enter.
    before = os.umask(0o077 if address == "ipc://*" else 0o177)
    try:
        yield
    finally:
        os.umask(before)


def receive(source: zmq.Socket[bytes]) -> tuple[zmq.Frame, list[bytes]] | None:
    """The frames of the next message, of which there may be many: at most MAX_FRAMES are kept.

    The first stands before them once more, with what ZeroMQ knows of its sender. None when no
    message waits.
    """
    try:
        first = source.recv(zmq.NOBLOCK, copy=False, track=False)
    except zmq.Again:
        return None
    frame, frames = first, [first.bytes]
    while frame.more:
        frame = source.recv(zmq.NOBLOCK, copy=False, track=False)
        if len(frames) < MAX_FRAMES:
            frames.append(frame.bytes)
    return first, frames


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
