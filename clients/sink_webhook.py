"""The HTTP sink of `hrpro watch`."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from hrpro.clients.sinks import LONGEST_PAUSE_S, split_url
from hrpro.engine.protocol import Publication

_log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
ATTEMPT_S = 10.0  # for one POST and its answer
_RETRIED = (408, 429)  # of the 4xx; and all 5xx
_LEFT_IN_TARGETS = "!#$%&'()*+,/:;=?@[]~"  # all else is percent-encoded


@dataclass(frozen=True)
class _Failure:
    """Of one attempt; ``may_pass`` where another one may do."""

    reason: str
    may_pass: bool


class Webhook:
    """POSTs each publication as JSON, again and again for ``retry_s``, then writes it to
    ``dead_letters`` with the reason and goes on.

    Any 2xx takes it. What the receiver refuses (3xx, and 4xx but 408 and 429) is not tried again.
    """

    def __init__(self, url: str, dead_letters: Path, retry_s: float) -> None:
        self._url = split_url(url, "--webhook", ("http", "https"))
        self._dead_letters = dead_letters
        self._retry_s = retry_s
        self._tls = ssl.create_default_context() if self._url.scheme == "https" else None
        query = f"?{self._url.query}" if self._url.query else ""
        self._target = quote((self._url.path or "/") + query, safe=_LEFT_IN_TARGETS)
        self._headers = {"Content-Type": "application/json", "User-Agent": "hrpro-stream"}
        if self._url.username is not None:
            pair = f"{unquote(self._url.username)}:{unquote(self._url.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()

    def deliver(self, _publication: Publication, line: str, /) -> None:
        """Taken, or in the dead letters."""
        until_s, pause_s, attempts = time.monotonic() + self._retry_s, FIRST_PAUSE_S, 1
        while failure := self._post(line):
            if not failure.may_pass or time.monotonic() + pause_s > until_s:
                self._bury(line, failure.reason, attempts)
                return
            if attempts == 1:
                _log.warning("webhook: %s; trying again", failure.reason)
            time.sleep(pause_s)
            pause_s, attempts = min(2 * pause_s, LONGEST_PAUSE_S), attempts + 1

    def _post(self, line: str) -> _Failure | None:
        """One attempt, on a connection of its own; what went wrong, if anything."""
        until_s = time.monotonic() + ATTEMPT_S
        kind = http.client.HTTPConnection if self._tls is None else http.client.HTTPSConnection
        # With a port, or a part of an IPv6 address would be taken for one.
        connection = kind(self._url.hostname or "", self._url.port or kind.default_port)
        try:
            connection.sock = self._connected(connection.host, connection.port, until_s)
            connection.request("POST", self._target, line.encode(), self._headers)
            status = _status(connection.sock, until_s)
        except (OSError, http.client.HTTPException) as error:
            return _Failure(f"no answer: {error!r}", may_pass=True)
        finally:
            connection.close()
        if 200 <= status < 300:
            return None
        return _Failure(f"answered {status}", may_pass=status in _RETRIED or status >= 500)

    def _connected(self, host: str, port: int, until_s: float) -> socket.socket:
        sock = socket.create_connection((host, port), _left_s(until_s))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # head and body are sent apart
        if self._tls is not None:
            sock.settimeout(_left_s(until_s))
            sock = self._tls.wrap_socket(sock, server_hostname=host)
        sock.settimeout(_left_s(until_s))
        return sock

    def _bury(self, line: str, reason: str, attempts: int) -> None:
        letter = {"reason": reason, "attempts": attempts, "publication": json.loads(line)}
        with self._dead_letters.open("a", encoding="utf-8") as file:
            file.write(json.dumps(letter, ensure_ascii=False) + "\n")
        _log.warning("webhook: %s; given up, see %s", reason, self._dead_letters)

    def close(self) -> None:
        """Nothing is kept open."""


def _status(sock: socket.socket, until_s: float) -> int:
    """The status of the answer to a POST."""
    with http.client.HTTPResponse(sock, method="POST") as response:
        response.fp.close()
        response.fp = io.BufferedReader(_Incoming(sock, until_s))
        response.begin()
        return response.status


class _Incoming(io.RawIOBase):
    """What comes until a time, however slowly it drips: a socket's own timeout begins anew with
    each byte."""

    def __init__(self, sock: socket.socket, until_s: float) -> None:
        self._sock, self._until_s = sock, until_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        self._sock.settimeout(_left_s(self._until_s))
        return self._sock.recv_into(buffer)


def _left_s(until_s: float) -> float:
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("timed out")
    return left_s
