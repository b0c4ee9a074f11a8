"""A TCP line that can be cut, slowed and stopped: what stands between a peer and its engine."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from types import TracebackType
from typing import Self

_READ_BYTES = 16_384
_SLOW_S = 0.02  # that each read is late by, on a slow line


class Link:
    """Listens on a free port of loopback, and hands on to another one what comes, both ways.

    `address` is where peers connect to, `target` where a new line leads; one to an engine that is
    not there is closed at once.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.accepted = 0  # lines that were made
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._random = random.Random(0)  # noqa: S311 - of faults, not of secrets
        self._lines: set[socket.socket] = set()
        self._lost: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._slow_until_s = self._held_until_s = 0.0  # monotonic
        self._cuts = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def cut(self) -> None:
        """Close all lines, wherever their messages are."""
        with self._lock:
            lines, self._lines = self._lines, set()
        for line in lines:
            _close(line)

    def cut_within(self) -> None:
        """Close the line that carries the next bytes, when a part of them is handed on."""
        self._cuts = True

    def slow(self, seconds: float) -> None:
        """Hand on slowly for so long."""
        self._slow_until_s = time.monotonic() + seconds

    def hold(self, seconds: float) -> None:
        """Hand on nothing for so long; nobody is told."""
        self._held_until_s = time.monotonic() + seconds

    def lose(self) -> None:
        """Nothing more comes over the lines that are there, and nobody is told."""
        with self._lock:
            self._lost |= self._lines

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            self.accepted += 1
            with self._lock:  # a cut that comes meanwhile is of this line, too
                host, port = self.target.removeprefix("tcp://").rsplit(":", 1)
                try:
                    far = socket.create_connection((host, int(port)))
                except OSError:
                    _close(near)
                    continue
                self._lines |= {near, far}
            for ends in ((near, far), (far, near)):
                self._threads.append(threading.Thread(target=self._hand_on, args=ends, daemon=True))
                self._threads[-1].start()

    def _hand_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_READ_BYTES):
                while (now_s := time.monotonic()) < self._held_until_s:
                    time.sleep(self._held_until_s - now_s)
                if now_s < self._slow_until_s:
                    time.sleep(_SLOW_S)
                if source in self._lost:
                    continue
                if self._cuts:
                    self._cuts = False
                    sink.sendall(data[: self._random.randrange(len(data))])
                    break
                sink.sendall(data)
        with self._lock:
            self._lines -= {source, sink}
            self._lost -= {source, sink}
        _close(source)
        _close(sink)


def _close(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
    line.close()
