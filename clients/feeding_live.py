"""Features that another program makes, as live streams: from files that grow, and from stdin.

    bytes --> FeatureDecoder --> rows --> AsyncFeatureFeeder

Nothing is read ahead: while the engine gives no credit, a growing file waits, and a pipe fills and
holds its producer.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.connection import FILES_OF_A_CLIENT, Key, make_room
from hrpro.clients.feeder import AsyncFeatureFeeder
from hrpro.clients.feeding import (
    LEAVE_TIMEOUT_S,
    FeatureFileError,
    warn_of_drops,
    warn_of_resumption,
)
from hrpro.engine.protocol import Ended, HrproError, Policy
from hrpro.engine.timebase import SnippetClock

STDIN = Path("-")
POLL_S = 0.1
_BLOCK_BYTES = 1 << 18
_MAGIC = b"\x93NUMPY"
_READERS = {
    1: (2, np.lib.format.read_array_header_1_0),
    2: (4, np.lib.format.read_array_header_2_0),
}


# ---- bytes to features -------------------------------------------------------------------------


class FeatureDecoder:
    """Makes rows of bytes, in whatever pieces these come: a ``.npy`` array of floats (T, D), or raw
    little-endian float32 rows of ``dim`` values.

    Of a ``.npy`` header the number of rows is not looked at: while an array grows it is not known.
    Raises FeatureFileError, which begins with ``name``.
    """

    def __init__(self, name: str, dim: int | None) -> None:
        self._name = name
        self._buffer = bytearray()
        self._dtype: np.dtype[np.floating] | None = None
        self.dim = dim
        """D; None until the header is there."""

    def rows(self, data: bytes) -> NDArray[np.float32]:
        """What the data completes, float32 (n, D)."""
        self._buffer += data
        if self._dtype is None:
            self._read_header()
        if self._dtype is None or self.dim is None:
            return np.empty((0, self.dim or 1), np.float32)
        row_bytes = self._dtype.itemsize * self.dim
        stop = len(self._buffer) // row_bytes * row_bytes
        values = np.frombuffer(bytes(self._buffer[:stop]), self._dtype)
        del self._buffer[:stop]
        with np.errstate(over="ignore"):  # what float32 cannot hold is not finite
            return values.reshape(-1, self.dim).astype(np.float32)

    def finish(self) -> None:
        """No more data comes. Raises FeatureFileError where a row is not complete."""
        if not self._buffer and self.dim is not None:
            return
        if self._dtype is None or self.dim is None:
            raise FeatureFileError(
                f"{self._name}: expected a .npy header, or --dim and rows, came an end after"
                f" {len(self._buffer)} bytes"
            )
        raise FeatureFileError(
            f"{self._name}: expected whole rows of {self._dtype.itemsize * self.dim} bytes, came an"
            f" end with {len(self._buffer)} bytes over"
        )

    def _read_header(self) -> None:
        """Takes the header off the buffer, if it is there as a whole."""
        start = bytes(self._buffer[: len(_MAGIC)])
        if not _MAGIC.startswith(start):
            if self.dim is None:
                raise FeatureFileError(
                    f"{self._name}: expected a .npy header, or --dim for raw float32 rows"
                )
            self._dtype = np.dtype("<f4")
            return
        if len(self._buffer) < len(_MAGIC) + 2:
            return
        version = self._buffer[len(_MAGIC)]
        if version not in _READERS:
            raise FeatureFileError(f"{self._name}: expected .npy format 1 or 2, came {version}")
        count_bytes, read_header = _READERS[version]
        begin = len(_MAGIC) + 2 + count_bytes
        length = int.from_bytes(self._buffer[begin - count_bytes : begin], "little")
        if len(self._buffer) < begin + length:
            return
        try:
            shape, is_fortran, dtype = read_header(
                io.BytesIO(self._buffer[begin - count_bytes : begin + length])
            )
        except ValueError as error:
            raise FeatureFileError(f"{self._name}: not a .npy header: {error}") from None
        if len(shape) != 2 or not shape[1] or dtype.kind != "f" or is_fortran:
            order = " in Fortran order" if is_fortran else ""
            raise FeatureFileError(
                f"{self._name}: expected floats of shape (_, D), row by row, came {dtype} {shape}"
                f"{order}"
            )
        if self.dim not in (None, shape[1]):
            raise FeatureFileError(f"{self._name}: expected D = {self.dim}, came {shape[1]}")
        self.dim, self._dtype = shape[1], dtype
        del self._buffer[: begin + length]


# ---- where the bytes come from -----------------------------------------------------------------


class _Bytes(Protocol):
    """A source of bytes that may take its time."""

    def read(self) -> bytes | None:
        """The next ones; None where there are none yet, and nothing at the end."""

    async def more(self) -> None:
        """Returns when there are more, or the end has come."""

    def close(self) -> None:
        """Nothing more is read."""


class _Pipe:
    """Stdin: a pipe, or a file, until its end."""

    def __init__(self) -> None:
        if sys.stdin is None:  # its number may be that of another file
            raise FeatureFileError("stdin: expected a pipe or a file, it is closed")
        self._file = 0

    def read(self) -> bytes | None:
        is_ready, _, _ = select.select([self._file], [], [], 0)
        return os.read(self._file, _BLOCK_BYTES) if is_ready else None

    async def more(self) -> None:
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._file, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._file)

    def close(self) -> None:
        """It stays open: it is the process's."""


class _GrowingFile:
    """A file to which another program appends. Its size is looked at each POLL_S; one that becomes
    shorter, or is no longer the file of its name, is an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.is_dir():
            raise FeatureFileError(f"{path}: expected a file that grows, came a folder")
        if path.exists() and not path.is_file():
            raise FeatureFileError(
                f"{path}: expected a regular file that grows; a pipe is read from stdin, as in"
                f" hrpro feed features - --stream NAME < {path}"
            )
        self._file = os.open(path, os.O_RDONLY)
        self._position = 0

    def read(self) -> bytes | None:
        data = os.read(self._file, _BLOCK_BYTES)
        self._position += len(data)
        return data or None

    async def more(self) -> None:
        while self._size() == self._position:
            await asyncio.sleep(POLL_S)

    def _size(self) -> int:
        ours = os.fstat(self._file)
        try:
            named = self._path.stat()
        except OSError as error:
            raise FeatureFileError(f"{self._path}: expected it to stay, came {error}") from None
        if (named.st_dev, named.st_ino) != (ours.st_dev, ours.st_ino):
            raise FeatureFileError(f"{self._path}: expected it to grow, it was replaced by another")
        if ours.st_size < self._position:
            raise FeatureFileError(
                f"{self._path}: expected it to grow, it was cut to {ours.st_size} bytes after"
                f" {self._position} were read"
            )
        return ours.st_size

    def close(self) -> None:
        os.close(self._file)


# ---- streams -----------------------------------------------------------------------------------


def feed_live(
    paths: Sequence[Path],
    address: str,
    clock: SnippetClock,
    stream: str | None = None,
    dim: int | None = None,
    end_after_s: float | None = None,
    timeout_s: float = 60.0,
    policy: Policy = "wait",
    progress: Callable[[int], None] = lambda _: None,
    key: Key = None,
) -> dict[str, Ended]:
    """Feed what comes on stdin (``-``), or into files, as it comes, and end the streams.

    A stream is named after its file unless ``stream`` says how. One of stdin ends with it; one of a
    file when nothing was appended for ``end_after_s``; all of them end at the first SIGINT or
    SIGTERM, with what is complete by then. Returns what the engine said of each at its end.

    A file of which the engine has the first snippets already goes on behind them; what comes on
    stdin is new, and follows what the engine has. When something goes wrong, the streams are ended
    where they are. Raises FeatureFileError, and as a feeder does.
    """
    live = _Live(address, clock, dim, end_after_s, timeout_s, policy, progress, key)
    names = [stream or path.stem for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise FeatureFileError(f"two files would be the stream {name!r}; feed one at a time")
    make_room(len(paths), FILES_OF_A_CLIENT + 1)
    try:
        return asyncio.run(live.feed(dict(zip(names, paths, strict=True))))
    except BaseExceptionGroup as errors:  # what has gone wrong first has ended the others
        raise errors.exceptions[0] from None


@dataclass
class _Live:
    """How to feed, as `feed_live` was told."""

    address: str
    clock: SnippetClock
    dim: int | None
    end_after_s: float | None
    timeout_s: float
    policy: Policy
    progress: Callable[[int], None]
    key: Key
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def feed(self, paths: dict[str, Path]) -> dict[str, Ended]:
        """All of them, until they have ended."""
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as opened:
            sources: dict[str, _Bytes] = {}
            for name, path in paths.items():
                sources[name] = _Pipe() if path == STDIN else _GrowingFile(path)
                opened.callback(sources[name].close)
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._interrupt)
            async with asyncio.TaskGroup() as tasks:
                feeding = {
                    name: tasks.create_task(self._feed(name, paths[name], source))
                    for name, source in sources.items()
                }
        return {name: task.result() for name, task in feeding.items()}

    def _interrupt(self) -> None:
        """The streams end; the next signal ends the process."""
        self.stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)

    async def _feed(self, stream: str, path: Path, source: _Bytes) -> Ended:
        name = "stdin" if path == STDIN else str(path)
        decoder = FeatureDecoder(name, self.dim)
        rows = decoder.rows(b"")
        while decoder.dim is None:
            data = await self._next(source, None)
            if data is None:
                decoder.finish()
                raise FeatureFileError(f"{name}: expected features, came none")
            rows = decoder.rows(data)
        async with self._feeder(stream, decoder.dim) as feeder:
            try:
                await _go_on(feeder, is_new=path == STDIN)
                while True:
                    await feeder.send(rows)
                    self.progress(len(rows))
                    data = await self._next(source, feeder)
                    if data is None:
                        break
                    rows = decoder.rows(data)
                if path == STDIN and not self.stop.is_set():
                    decoder.finish()
                ended = await feeder.end()
            except BaseException:
                with contextlib.suppress(HrproError):
                    await feeder.end(timeout_s=LEAVE_TIMEOUT_S)
                raise
        warn_of_drops(feeder)
        return ended

    def _feeder(self, stream: str, dim: int) -> AsyncFeatureFeeder:
        return AsyncFeatureFeeder(
            self.address,
            stream,
            dim,
            self.clock,
            policy=self.policy,
            timeout_s=self.timeout_s,
            key=self.key,
        )

    async def _next(self, source: _Bytes, feeder: AsyncFeatureFeeder | None) -> bytes | None:
        """The next bytes, or None at the end. While it waits, the feeder sees to it that what is
        sent arrives."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + (math.inf if self.end_after_s is None else self.end_after_s)
        while not self.stop.is_set():
            data = source.read()
            if data is not None:
                return data or None
            more = asyncio.ensure_future(source.more())
            ends = [more, asyncio.ensure_future(self.stop.wait())]
            others = [asyncio.ensure_future(feeder.flush())] if feeder else []
            try:
                while not any(each.done() for each in ends):
                    left_s = None if until_s == math.inf else until_s - loop.time()
                    waiting = [each for each in [*ends, *others] if not each.done()]
                    done, _ = await asyncio.wait(
                        waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED
                    )
                    if not done:
                        return None
                    for each in done:
                        each.result()  # or it raises
            finally:
                for each in [*ends, *others]:
                    each.cancel()
                await asyncio.gather(*ends, *others, return_exceptions=True)
        return None


async def _go_on(feeder: AsyncFeatureFeeder, is_new: bool) -> None:
    """Where the engine has the stream already."""
    assert feeder.welcome is not None
    at = feeder.welcome.next_index
    if at:
        what = "what comes follows them" if is_new else "continuing behind them"
        warn_of_resumption(feeder, what)
    if is_new:
        await feeder.skip(at)
