"""A client's one connection: its ZeroMQ options, and waiting, in a thread or in an event loop.

ZeroMQ's own heartbeats stay off, as in the engine: in libzmq 4.3.5 they can abort a process that
reads too slowly (docs/PROTOCOL.md, "Connections").
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import zmq

from hrpro.engine.client_key import ClientKey, read_client_key
from hrpro.engine.wire import HrproError

if TYPE_CHECKING:
    import asyncio

Context = zmq.Context[zmq.Socket[bytes]]
Key = str | Path | ClientKey | None
"""A key or its file."""

KEEPALIVE_IDLE_S = 10
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 3
# What was sent and is not confirmed by the other host for so long has no connection any more.
UNCONFIRMED_MS = 10_000
RECONNECT_FIRST_MS = 50
RECONNECT_LONGEST_MS = 2_000
LINGER_MS = 1_000
# Of a connection with a shared context: the socket, and what tells of its messages.
FILES_OF_A_CLIENT = 2
# Of the rest of a process: its context, libraries, a second line where one is silent.
_OTHER_FILES = 64
CLOSED = "expected a client that is open, came one that was closed"


class Deadline:
    """A point in time, `timeout_s` seconds after it is made; None is never.

    Raises ValueError when `timeout_s` is negative or NaN.
    """

    def __init__(self, timeout_s: float | None) -> None:
        if timeout_s is not None and not timeout_s >= 0:
            raise ValueError(f"timeout_s: expected None or at least 0, came {timeout_s!r}")
        self.timeout_s = timeout_s
        self.at_s = math.inf if timeout_s is None else time.monotonic() + timeout_s

    def passed(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self.at_s


class Line(Protocol):
    """What carries a client's messages: a `Connection`, or one in memory (memory_line.py)."""

    doubt: str
    """What to add where the engine is silent."""

    def receive(self) -> list[bytes] | None:
        """The frames of the next message that has come, or None. Raises HrproError once closed."""

    def try_send(self, frames: list[bytes], /) -> bool:
        """Whether the frames were handed over; False while there is no connection or no room."""

    def subscribe(self, topic: bytes, /) -> None:
        """Ask for the publications whose topic begins with this."""

    def unsubscribe(self, topic: bytes, /) -> None:
        """Take back what `subscribe` has asked for."""

    def wait(self, until_s: float, for_room: bool = False, /) -> None:
        """Returns when a message has come or at the monotonic time `until_s`.

        With `for_room`, returns as well when something can be sent.
        """

    async def wait_async(self, until_s: float, for_room: bool = False, /) -> None:
        """As `wait`, for one task at a time; returns at `wake`, too."""

    def wake(self) -> None:
        """Lets the task go on that is in `wait_async`."""

    def close(self, linger_ms: int | None = None) -> None:
        """Closes it; waits for what was sent to leave, `linger_ms` or LINGER_MS at most."""

    async def close_async(self) -> None:
        """As `close`; the loop goes on."""


class Connection:
    """One connected socket with a context of its own, so that closing it leaves nothing behind;
    or with one that is shared with others, and closed by who made it.

    With a key it talks to the engine of that key alone, encrypted. Raises KeyFileError for a file
    that is none, and HrproError for an address that is none. It reconnects by itself for as long as
    it is open, unless the engine refuses its key. Not for use from several threads.
    """

    def __init__(
        self,
        kind: int,
        address: str,
        options: Mapping[int, int | bytes],
        key: Key = None,
        shared: Context | None = None,
    ) -> None:
        key = read_key(key)
        self.address = address
        self.doubt = "" if key is None else "; does it know this key?"
        """What to add where the engine is silent: it does not answer who has no key of its."""
        context = shared or zmq.Context()
        self._own_context = None if shared else context
        self._watch: _Watch | None = None  # of the task that waits
        try:
            self.socket = context.socket(kind)
        except zmq.ZMQError as error:
            self._end_context()
            raise _unusable(address, error) from None
        common: dict[int, int | bytes] = {
            zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_IDLE: KEEPALIVE_IDLE_S,
            zmq.TCP_KEEPALIVE_INTVL: KEEPALIVE_INTERVAL_S,
            zmq.TCP_KEEPALIVE_CNT: KEEPALIVE_PROBES,
            zmq.TCP_MAXRT: UNCONFIRMED_MS,
            zmq.RECONNECT_IVL: RECONNECT_FIRST_MS,
            zmq.RECONNECT_IVL_MAX: RECONNECT_LONGEST_MS,
            zmq.LINGER: LINGER_MS,
        }
        if key is not None:
            common |= {
                zmq.CURVE_PUBLICKEY: key.public,
                zmq.CURVE_SECRETKEY: key.secret,
                zmq.CURVE_SERVERKEY: key.engine,
            }
        try:
            for option, value in {**common, **options}.items():
                self.socket.set(option, value)
            self.socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise _unusable(address, error) from None

    def close(self, linger_ms: int | None = None) -> None:
        """Closes the socket; waits for what was sent to leave, `linger_ms` or LINGER_MS at most.
        Where others share the context, the last of them waits for all."""
        self.wake()
        self.socket.close(linger_ms)
        self._end_context()

    async def close_async(self) -> None:
        """As `close`; the loop goes on."""
        import asyncio

        self.wake()
        self.socket.close()
        context = self._leave_context()
        if context is not None:
            await asyncio.to_thread(context.term)

    def _end_context(self) -> None:
        context = self._leave_context()
        if context is not None:
            context.term()

    def _leave_context(self) -> Context | None:
        """The context, if it is for this connection to end it."""
        return self._own_context

    def subscribe(self, topic: bytes) -> None:
        """Ask for the publications whose topic begins with this."""
        self.socket.subscribe(topic)

    def unsubscribe(self, topic: bytes) -> None:
        """Take back what `subscribe` has asked for."""
        self.socket.unsubscribe(topic)

    def receive(self) -> list[bytes] | None:
        """The frames of the next message that has come, or None."""
        try:
            return self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        except zmq.ZMQError:
            if self.socket.closed:
                raise HrproError(f"{self.address}: {CLOSED}") from None
            raise

    def try_send(self, frames: list[bytes]) -> bool:
        """Whether the frames were handed over; False while there is no connection or no room."""
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def wait(self, until_s: float, for_room: bool = False) -> None:
        """Returns when a message has come or at the monotonic time `until_s`.

        With `for_room`, returns as well when something can be sent.
        """
        events = zmq.POLLIN | (zmq.POLLOUT if for_room else 0)
        left_s = until_s - time.monotonic()
        self.socket.poll(None if left_s == math.inf else max(0, math.ceil(left_s * 1000)), events)

    async def wait_async(self, until_s: float, for_room: bool = False) -> None:
        """As `wait`, for one task at a time; returns at `wake`, too.

        Needs a loop that can watch files, which Windows' default one cannot.
        """
        import asyncio

        wanted = zmq.POLLIN | (zmq.POLLOUT if for_room else 0)
        loop = asyncio.get_running_loop()
        # The file says that something has changed, and EVENTS what; asking makes it silent again.
        while not self.socket.closed and not int(self.socket.get(zmq.EVENTS)) & wanted:
            if until_s <= time.monotonic():
                return
            watch = self._watch = _Watch(loop, int(self.socket.get(zmq.FD)), until_s)
            try:
                await watch.changed
            finally:
                watch.end()
            if watch is not self._watch:
                return
            self._watch = None

    def wake(self) -> None:
        """Lets the task go on that is in `wait_async`."""
        if self._watch is not None:
            self._watch.end()
            self._watch = None


class _Watch:
    """A task's eye on a socket's file, until it changes or the monotonic time `until_s`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, file: int, until_s: float) -> None:
        self._loop, self._file = loop, file
        self.changed: asyncio.Future[None] = loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        if until_s != math.inf:
            self._timer = loop.call_later(until_s - time.monotonic(), self.end)
        loop.add_reader(file, self.end)
        self._is_over = False

    def end(self) -> None:
        """The task goes on. At once, for a file that is closed may be another's the next moment."""
        if self._is_over:
            return
        self._is_over = True
        self._loop.remove_reader(self._file)
        if self._timer is not None:
            self._timer.cancel()
        if not self.changed.done():
            self.changed.set_result(None)


class _SharedContext:
    """One ZeroMQ context for many connections, which goes with the last of them."""

    def __init__(self) -> None:
        self._begin()
        if hasattr(os, "register_at_fork"):  # not on every platform
            os.register_at_fork(after_in_child=self._begin)  # a context is of no use to a fork

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._context: Context | None = None
        self._users = 0

    def enter(self) -> Context:
        """The context, for one more connection."""
        with self._lock:
            if self._context is None:
                self._context = zmq.Context()
                self._context.set(zmq.MAX_SOCKETS, self._context.get(zmq.SOCKET_LIMIT))
            self._users += 1
            return self._context

    def leave(self, context: Context) -> Context | None:
        """One connection less; the context, if that was the last one and it is to be ended."""
        with self._lock:
            if context is not self._context:  # it is of the process that has forked
                return None
            self._users -= 1
            if self._users:
                return None
            self._context = None
            return context


_shared_context = _SharedContext()


class SharedConnection(Connection):
    """A connection of which a process may have many: they share a context and with it one I/O
    thread, where each context would take two threads and six files."""

    def __init__(
        self, kind: int, address: str, options: Mapping[int, int | bytes], key: Key = None
    ) -> None:
        key = read_key(key)  # or it raises
        self._shared: Context | None = _shared_context.enter()
        super().__init__(kind, address, options, key, self._shared)

    def _leave_context(self) -> Context | None:
        shared, self._shared = self._shared, None  # once, however often it is closed
        return None if shared is None else _shared_context.leave(shared)


def read_key(key: Key) -> ClientKey | None:
    """The key, which may be in a file. Raises KeyFileError."""
    return read_client_key(Path(key)) if isinstance(key, str | Path) else key


def _unusable(address: str, error: zmq.ZMQError) -> HrproError:
    """ZeroMQ says little of an address that it cannot use."""
    reason = error if error.errno is None else zmq.strerror(error.errno)
    return HrproError(f"cannot use {address}: {reason}")


def make_room(clients: int, files_each: int = FILES_OF_A_CLIENT) -> None:
    """Lets the process have so many clients, with so many open files each: raises its soft limit of
    open files where that is needed, as far as the hard one allows.

    Raises HrproError where that is not far enough: without files, a client would be silent, and
    ZeroMQ may end the process.
    """
    try:
        import resource  # not on every platform
    except ImportError:
        return
    needed = _OTHER_FILES + clients * files_each
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise HrproError(
            f"{clients} streams: expected room for {needed} open files, this process may have"
            f" {hard}; raise the limit (ulimit -Hn), or feed fewer streams in one process"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def open_line(
    connection: type[Connection],
    kind: int,
    address: str,
    options: Mapping[int, int | bytes],
    key: Key = None,
) -> Line:
    """A line to an address: a connection, or one to an engine in memory (testing.py).

    Raises KeyFileError, and HrproError for an address that is none.
    """
    if address.startswith("memory:"):
        from hrpro.clients import testing

        return testing.connect(address)
    return connection(kind, address, options, key)
