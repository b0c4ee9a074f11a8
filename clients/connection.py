"""A client's one connection: its ZeroMQ options, and waiting with a deadline.

ZeroMQ's own heartbeats stay off, as in the engine: in libzmq 4.3.5 they can abort a process that
reads too slowly (docs/PROTOCOL.md, "Connections").
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import zmq

from hrpro.engine.client_key import ClientKey, read_client_key

Key = Path | ClientKey | None

KEEPALIVE_IDLE_S = 10
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 3
# What was sent and is not confirmed by the other host for so long has no connection any more.
UNCONFIRMED_MS = 10_000
RECONNECT_FIRST_MS = 50
RECONNECT_LONGEST_MS = 2_000
LINGER_MS = 1_000


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


class Connection:
    """One connected socket with a context of its own, so that closing it leaves nothing behind;
    or with one that is shared with others, and closed by who made it.

    With a key it talks to the engine of that key alone, encrypted. Raises KeyFileError for a file
    that is none. It reconnects by itself for as long as it is open, unless the engine refuses its
    key. Not for use from several threads.
    """

    def __init__(
        self,
        kind: int,
        address: str,
        options: Mapping[int, int | bytes],
        key: Key = None,
        shared: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        if isinstance(key, Path):
            key = read_client_key(key)
        self.address = address
        self.doubt = "" if key is None else "; does it know this key?"
        """What to add where the engine is silent: it does not answer who has no key of its."""
        context = shared or zmq.Context()
        self._own_context = None if shared else context
        self.socket = context.socket(kind)
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
        except zmq.ZMQError:
            self.close()
            raise

    def close(self, linger_ms: int | None = None) -> None:
        """Closes the socket; waits for what was sent to leave, `linger_ms` or LINGER_MS at most."""
        self.socket.close(linger_ms)
        if self._own_context is not None:
            self._own_context.term()

    def receive(self) -> list[bytes] | None:
        """The frames of the next message that has come, or None."""
        try:
            return self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

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
