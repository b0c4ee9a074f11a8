"""A feeder of many streams in one process, for benchmarks: commands on stdin, answers on stdout.

    python -m hrpro.clients.bench_feeder ADDRESS FEATURES.npy FRAMES_PER_S SNIPPET_FRAMES

One connection feeds all streams, by the protocol of docs/PROTOCOL.md: Hello, chunks within the
credit, End, and back come Welcome, Ack and Ended. It has no answer to a lost connection:
`hrpro.clients.feeder` is the one for use.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from hrpro.clients.connection import Connection
from hrpro.engine import protocol
from hrpro.engine.protocol import (
    Ack,
    Chunk,
    End,
    Ended,
    Error,
    Hello,
    NoReplyError,
    StreamError,
    Welcome,
)
from hrpro.engine.timebase import SnippetClock

# The engine may compute a batch of a wide model for some seconds before it answers.
_SILENCE_S = 120.0
_MESSAGES_TO_SEND = 100_000


@dataclass(frozen=True)
class Feed:
    """What a feeder is to do: streams ``NAME0``, ``NAME1``, ... of so many further snippets each.

    ``snippets_per_s`` is the pace of all of them together, evenly spread, so that their windows are
    ready one after the other; None is as fast as the credit allows. ``end`` says whether the
    streams are over then.
    """

    name: str
    streams: int
    snippets: int
    chunk_snippets: int = 1
    snippets_per_s: float | None = None
    end: bool = True


@dataclass(frozen=True)
class Fed:
    """What came of it. Times are monotonic, the same clock in all processes of a machine.

    From ``began_s``, before the first chunk, to ``ended_s``, when all that could be decided was
    published. ``sent_s`` has the time of each snippet of each stream where there was a pace.
    """

    began_s: float
    ended_s: float
    sent_s: dict[str, list[float]]


class FeederProcess:
    """The other end: tells a feeder's process what to do."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def begin(self, feed: Feed) -> None:
        """Returns at once."""
        assert self._process.stdin is not None
        print(json.dumps(asdict(feed)), file=self._process.stdin, flush=True)

    def finish(self) -> Fed:
        """Waits until what was begun is done. Raises NoReplyError where the feeder has failed."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise NoReplyError(f"the feeder of the benchmark left: exit {self._process.wait()}")
        return Fed(**json.loads(line))

    def feed(self, feed: Feed) -> Fed:
        """Both."""
        self.begin(feed)
        return self.finish()


@contextlib.contextmanager
def feeder_process(address: str, features: Path, clock: SnippetClock) -> Iterator[FeederProcess]:
    """A feeder as a process of its own, which ends with the block."""
    command = [sys.executable, "-m", "hrpro.clients.bench_feeder", address, str(features)]
    command += [str(clock.frames_per_s), str(clock.snippet_frames)]
    process = subprocess.Popen(  # noqa: S603 - this very interpreter
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield FeederProcess(process)
    finally:
        process.kill()
        process.communicate()


# ---- in the process ------------------------------------------------------------------------------


@dataclass
class _Stream:
    """What the feeder knows of a stream; snippets below ``until`` are to be sent."""

    name: str
    offset: int  # of its snippet 0 in the recording
    sent: int = 0
    until: int = 0
    send_until: int = 0
    credit: int = 0  # how far it may be ahead
    hop: int = 0
    lookahead: int = 0
    ended: bool = False
    sent_s: list[float] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        """Whether the engine has said Welcome."""
        return self.hop > 0

    @property
    def is_settled(self) -> bool:
        """Whether the engine has published what can be decided of all that was to be sent."""
        # Credit is given for what is processed, after it was published.
        ready = max(0, self.until - self.lookahead) // self.hop * self.hop
        return self.sent == self.until and self.send_until - self.credit >= ready


class _Feeder:
    """Feeds streams from one recording, in which each begins somewhere else."""

    def __init__(self, address: str, recording: NDArray[np.float32], clock: SnippetClock) -> None:
        self._recording = recording
        self._clock = clock
        self._streams: dict[str, _Stream] = {}
        self._connection = Connection(zmq.DEALER, address, {zmq.SNDHWM: _MESSAGES_TO_SEND})

    def run(self, feed: Feed) -> Fed:
        """Does what is asked for."""
        names = [f"{feed.name}{n}" for n in range(feed.streams)]
        streams = self._opened(names)
        for stream in streams:
            stream.until += feed.snippets
            stream.sent_s.clear()
        began_s = time.monotonic()
        if feed.snippets_per_s is None:
            self._send_all(streams, feed.chunk_snippets)
        else:
            self._send_paced(streams, feed.snippets, feed.snippets_per_s, began_s)
        if feed.end:
            for stream in streams:
                self._send(End(stream.name, stream.until))
            self._read_until(lambda: all(stream.ended for stream in streams))
            for stream in streams:
                del self._streams[stream.name]
        else:
            self._read_until(lambda: all(stream.is_settled for stream in streams))
        return Fed(began_s, time.monotonic(), {each.name: each.sent_s for each in streams})

    def _opened(self, names: Sequence[str]) -> list[_Stream]:
        for name in names:
            if name not in self._streams:
                # Spread, so that their actions do not begin at the same time.
                offset = len(self._streams) * 389 % len(self._recording)
                self._streams[name] = _Stream(name, offset)
                frames_per_s, frames = self._clock.frames_per_s, self._clock.snippet_frames
                self._send(Hello(name, self._recording.shape[1], frames_per_s, frames, 0))
        streams = [self._streams[name] for name in names]
        self._read_until(lambda: all(stream.is_open for stream in streams))
        return streams

    def _send_all(self, streams: Sequence[_Stream], chunk_snippets: int) -> None:
        """As fast as credit comes, the streams in turn."""
        left = list(streams)
        while left:
            sent = False
            for stream in left:
                count = min(chunk_snippets, stream.until - stream.sent)
                if stream.sent + count <= stream.send_until:
                    self._send_snippets(stream, count)
                    sent = True
            left = [stream for stream in left if stream.sent < stream.until]
            if left:
                self._read(0.0 if sent else _SILENCE_S)

    def _send_paced(
        self, streams: Sequence[_Stream], snippets: int, snippets_per_s: float, began_s: float
    ) -> None:
        """One snippet at a time."""
        apart_s = len(streams) / snippets_per_s  # from a snippet of a stream to its next
        due = sorted(
            (began_s + apart_s * (n + k / len(streams) + k % stream.hop), k)
            for k, stream in enumerate(streams)
            for n in range(snippets)
        )
        for due_s, k in due:
            stream = streams[k]
            while (left_s := due_s - time.monotonic()) > 0 or stream.sent >= stream.send_until:
                self._read(left_s if stream.sent < stream.send_until else _SILENCE_S)
            self._send_snippets(stream, 1)
            stream.sent_s.append(time.monotonic())

    def _send_snippets(self, stream: _Stream, count: int) -> None:
        first = (stream.offset + stream.sent) % len(self._recording)
        rows = self._recording[first : first + count]
        if len(rows) < count:
            rows = np.concatenate([rows, self._recording[: count - len(rows)]])
        self._send(Chunk(stream.name, stream.sent, rows))
        stream.sent += count

    def _send(self, message: Hello | Chunk | End) -> None:
        # No connection yet, or more waiting than the engine reads: it waits.
        self._connection.socket.send_multipart(protocol.encode(message))

    def _read_until(self, done: Any) -> None:
        while not done():
            self._read(_SILENCE_S)

    def _read(self, wait_s: float) -> None:
        """Takes in what has come; waits for something if nothing has."""
        if wait_s > 0:
            self._connection.socket.poll(math.ceil(wait_s * 1000))
        heard = False
        while (frames := self._connection.receive()) is not None:
            heard = True
            self._on_reply(protocol.decode_feed_reply(frames))
        if not heard and wait_s >= _SILENCE_S:
            raise NoReplyError(f"expected the engine to go on within {_SILENCE_S:.0f} s")

    def _on_reply(self, reply: Welcome | Ack | Ended | Error) -> None:
        if isinstance(reply, Error):
            raise StreamError(reply.code, reply.message, reply.next_index)
        stream = self._streams.get(reply.stream)
        if stream is None:  # an Ack that was on its way when the stream ended
            return
        match reply:
            case Ended():
                stream.ended = True
            case Ack():
                stream.send_until = max(stream.send_until, reply.send_until)
            case Welcome():
                stream.send_until = stream.credit = reply.send_until
                stream.hop, stream.lookahead = reply.hop_snippets, reply.lookahead_snippets


def main() -> None:
    """Until stdin is closed."""
    address, features, frames_per_s, snippet_frames = sys.argv[1:]
    clock = SnippetClock(float(frames_per_s), int(snippet_frames))
    feeder = _Feeder(address, np.load(features, allow_pickle=False), clock)
    for line in sys.stdin:
        fed = feeder.run(Feed(**json.loads(line)))
        print(json.dumps(asdict(fed)), flush=True)  # noqa: T201 - read by the other process


if __name__ == "__main__":
    main()
