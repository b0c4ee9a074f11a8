"""Lets connections in: the engine's side of ZAP, ZeroMQ's authentication protocol (RFC 27).

libzmq asks for every connection that has proved to own a CURVE key, over a socket inside the
process. NULL and PLAIN never come so far: a socket that is a CURVE server refuses them itself.
"""

from __future__ import annotations

import zmq
from zmq.utils import z85

from hrpro.engine.access import user_id
from hrpro.engine.keys import Keyring

ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"hrpro"
_VERSION = b"1.0"


class Doorkeeper:
    """Answers ZAP requests from the keys of a keyring.

    Must be there before the sockets that it guards, and until after them.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keyring: Keyring) -> None:
        self._keyring = keyring
        self._connections = 0
        self.socket = context.socket(zmq.REP)
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind(ENDPOINT)

    def guard(self, bound: zmq.Socket[bytes]) -> None:
        """Makes a socket that is not bound yet a CURVE server that asks here."""
        bound.set(zmq.CURVE_SERVER, 1)
        bound.set(zmq.CURVE_SECRETKEY, self._keyring.secret)
        bound.set(zmq.ZAP_DOMAIN, DOMAIN)
        # Without it, libzmq lets every key in where nobody answers.
        bound.set(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def answer(self, most: int) -> list[str]:
        """Answers the requests that wait, so many at most; which connections are refused."""
        refused = []
        for _ in range(most):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            reason = self._answer(frames)
            if reason is not None:
                refused.append(reason)
        return refused

    def _answer(self, frames: list[bytes]) -> str | None:
        request_id = frames[1] if len(frames) > 1 else b""
        public = self._public(frames)
        if public in self._keyring.clients:
            self._connections += 1
            name = user_id(self._connections, public).encode()
            self.socket.send_multipart([_VERSION, request_id, b"200", b"OK", name, b""])
            return None
        self.socket.send_multipart([_VERSION, request_id, b"400", b"unknown key", b"", b""])
        address = frames[3].decode(errors="replace") if len(frames) > 3 else "?"
        return f"a connection from {address} with the unknown key {public or '(none)'}"

    @staticmethod
    def _public(frames: list[bytes]) -> str:
        """The key that the connection has proved to own; empty where the request is another."""
        # version, request id, domain, address, routing id, mechanism, public key
        expected = len(frames) == 7 and (frames[0], frames[2], frames[5]) == (
            _VERSION,
            DOMAIN,
            b"CURVE",
        )
        return z85.encode(frames[6]).decode() if expected and len(frames[6]) == 32 else ""
