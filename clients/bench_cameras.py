"""How many live streams an engine keeps up with: cameras at their true pace, over TCP.

The engine is a process of its own, and so is the feeder, which sends one snippet of each stream in
each snippet's time, at a phase of the stream's own. It measures from the sending of the newest
snippet that a score needs to the Ack by which the engine says that this score is final, and what
came of it published. Streams may drop: nobody waits for an engine that cannot keep up.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from hrpro.clients.bench_engine import cpu_seconds
from hrpro.clients.bench_engine_process import Calls, bench_engine, read_calls
from hrpro.clients.bench_memory import resident_bytes
from hrpro.clients.connection import Connection
from hrpro.engine import protocol
from hrpro.engine.config import EngineConfig
from hrpro.engine.footprint import stream_bytes
from hrpro.engine.protocol import Ack, Chunk, Error, Hello, NoReplyError, StreamError, Welcome
from hrpro.engine.timebase import SnippetClock
from hrpro.export.bundle import Bundle

# Cameras that share a connection: a feeder for each would need more of the machine than the engine.
_STREAMS_A_CONNECTION = 100
# All streams of a round begin at once, as no cameras do: what comes of the first seconds is not
# counted.
_SETTLE_S = 15.0
_SILENCE_S = 60.0


@dataclass(frozen=True)
class Live:
    """What a round has measured: of ``streams`` at their pace, from ``began_s`` to ``ended_s``."""

    streams: int
    began_s: float
    ended_s: float
    latency_ms: list[float]  # p50, p99, the longest
    snippets: int
    unanswered: int  # snippets that were sent and are older than any that was answered in time
    drops: int
    feeder_cpu_s: float
    engine_cpu_s: float

    def keeps_up(self, bound_ms: float) -> bool:
        """Nothing was dropped, and scores were final in time."""
        return not self.drops and not self.unanswered and self.latency_ms[1] <= bound_ms


def _figures(live: Live, rss_bytes: int, calls: Calls) -> dict[str, Any]:
    """Shares are of the time on the clock: 1 is one core. Of ``calls``, those in the round."""
    whole_s = live.ended_s - live.began_s
    p50, p99, longest = live.latency_ms
    figures = {
        "streams": live.streams,
        "p50_ms": p50,
        "p99_ms": p99,
        "longest_ms": longest,
        "drops": live.drops,
        "unanswered": live.unanswered,
        "snippets_per_s": live.snippets / whole_s,
        "cpu_share": live.engine_cpu_s / whole_s,
        "feeder_cpu_share": live.feeder_cpu_s / whole_s,
        "rss_bytes_per_stream": rss_bytes / live.streams,
    }
    for name, of_stage in asdict(calls).items():
        inside = (of_stage[:, 0] >= live.began_s) & (of_stage[:, 1] <= live.ended_s)
        spent_s = np.diff(of_stage[inside], axis=1).sum()
        figures[f"{name}_share"] = float(spent_s / whole_s)
    return figures


def measure_cameras(
    bundle: Bundle,
    config: EngineConfig,
    recording: Path,
    counts: Sequence[int],
    seconds: float,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Rounds with more and more streams, each with an engine of its own, until one does not keep
    up; the last that did.

    ``counts`` are the numbers of streams, in ascending order. ``progress`` is told of each round.
    """
    bound_ms = 1000 * bundle.manifest.clock.snippet_s
    best: dict[str, Any] = {"streams": 0}
    for count in counts:
        with tempfile.NamedTemporaryFile() as calls:
            with (
                bench_engine(bundle.folder, config, Path(calls.name)) as engine,
                _feeder(engine.addresses.feed, recording, bundle.manifest.clock) as ask,
            ):
                empty_bytes = resident_bytes(engine.pid)
                live = ask(count, seconds, engine.pid)
                rss_bytes = resident_bytes(engine.pid) - empty_bytes
            figures = _figures(live, rss_bytes, read_calls(Path(calls.name)))
        if progress is not None:
            progress(figures)
        if not live.keeps_up(bound_ms):
            break
        best = figures
    told = stream_bytes(bundle.manifest, config).all
    return {**best, "told_bytes_per_stream": told, "cores": os.cpu_count()}


@contextlib.contextmanager
def _feeder(
    address: str, recording: Path, clock: SnippetClock
) -> Iterator[Callable[[int, float, int], Live]]:
    """A feeder as a process of its own; it is asked for streams and seconds, see `_Cameras.run`."""
    command = [sys.executable, "-m", "hrpro.clients.bench_cameras", address, str(recording)]
    command += [str(clock.frames_per_s), str(clock.snippet_frames)]
    process = subprocess.Popen(  # noqa: S603 - this very interpreter
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(streams: int, seconds: float, engine: int) -> Live:
        print(json.dumps([streams, seconds, engine]), file=process.stdin, flush=True)
        line = process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise NoReplyError(f"the feeder of the benchmark left: exit {process.wait()}")
        return Live(**json.loads(line))

    try:
        yield ask
    finally:
        process.kill()
        process.communicate()


# ---- in the process ------------------------------------------------------------------------------


class _Camera:
    """A stream; ``sent_s`` has when each snippet was sent, of those that are not answered."""

    def __init__(self, name: str, connection: Connection, offset: int, phase: float) -> None:
        self.name = name
        self.connection = connection
        self.offset = offset
        self.phase = phase  # of its snippets, in [0, 1) of their time
        self.sent = 0
        self.answered = 0
        self.dropped = 0
        self.credit = 0
        self.lookahead = 0
        self.sent_s = array("d")


class _Cameras:
    """Feeds more and more streams at their pace."""

    def __init__(self, address: str, recording: NDArray[np.float32], clock: SnippetClock) -> None:
        self._address = address
        self._recording = recording
        self._clock = clock
        self._cameras: dict[str, _Camera] = {}
        self._connections: list[Connection] = []
        self._poller = zmq.Poller()
        self._random = np.random.default_rng(0)
        self._latency_s = array("d")

    def run(self, streams: int, seconds: float, engine: int) -> Live:
        """So many streams, for so long; the engine is told by its process."""
        for n in range(len(self._cameras), streams):
            self._open(f"cam{n}", n)
        self._wait_open()
        self._send(_SETTLE_S)
        del self._latency_s[:]
        dropped = sum(each.dropped for each in self._cameras.values())
        began_s, cpu_s, engine_cpu_s = time.monotonic(), time.process_time(), cpu_seconds(engine)
        snippets, late_s = self._send(seconds)
        ended_s, cpu_s = time.monotonic(), time.process_time() - cpu_s
        engine_cpu_s = cpu_seconds(engine) - engine_cpu_s
        self._listen()
        over_s = time.monotonic() - self._clock.snippet_s - late_s
        latency_ms = 1000 * np.array(self._latency_s)
        percentiles = (
            np.percentile(latency_ms, [50, 99, 100]) if len(latency_ms) else [math.inf] * 3
        )
        return Live(
            streams,
            began_s,
            ended_s,
            [float(each) for each in percentiles],
            snippets,
            sum(self._unanswered(each, over_s) for each in self._cameras.values()),
            sum(each.dropped for each in self._cameras.values()) - dropped,
            cpu_s,
            engine_cpu_s,
        )

    def _unanswered(self, camera: _Camera, before_s: float) -> int:
        """Snippets that were sent before this time, and whose scores are not told."""
        waiting = camera.sent_s[camera.answered : camera.sent]
        return sum(sent_s < before_s for sent_s in waiting)

    def _open(self, name: str, n: int) -> None:
        if n % _STREAMS_A_CONNECTION == 0:
            connection = Connection(zmq.DEALER, self._address, {zmq.SNDHWM: 100_000})
            self._connections.append(connection)
            self._poller.register(connection.socket, zmq.POLLIN)
        offset = n * 389 % len(self._recording)
        camera = _Camera(name, self._connections[-1], offset, float(self._random.random()))
        self._cameras[name] = camera
        D, frames_per_s, frames = self._recording.shape[1], *self._rate()
        hello = Hello(name, D, frames_per_s, frames, 0, "drop_oldest")
        camera.connection.socket.send_multipart(protocol.encode(hello))

    def _rate(self) -> tuple[float, int]:
        return self._clock.frames_per_s, self._clock.snippet_frames

    def _wait_open(self) -> None:
        until_s = time.monotonic() + _SILENCE_S
        while not all(each.credit for each in self._cameras.values()):
            self._read(1.0)
            if time.monotonic() > until_s:
                raise NoReplyError(f"expected all streams to be open within {_SILENCE_S:.0f} s")

    def _send(self, seconds: float) -> tuple[int, float]:
        """Returns how many snippets were sent, and by how much the last one was late."""
        snippet_s = self._clock.snippet_s
        began_s = time.monotonic()
        due = [(began_s + each.phase * snippet_s, name) for name, each in self._cameras.items()]
        heapq.heapify(due)
        sent, late_s = 0, 0.0
        while due[0][0] < began_s + seconds:
            now_s = time.monotonic()
            while due[0][0] <= now_s:
                due_s, name = due[0]
                self._send_snippet(self._cameras[name])
                heapq.heapreplace(due, (due_s + snippet_s, name))
                sent += 1
                late_s = now_s - due_s
                if sent % 16 == 0:
                    break
            self._read(max(0.0, due[0][0] - time.monotonic()))
        return sent, late_s

    def _listen(self) -> None:
        """What the last snippets were needed for is told in time, or it is too late."""
        until_s = time.monotonic() + 2 * self._clock.snippet_s
        while time.monotonic() < until_s:
            self._read(0.05)

    def _send_snippet(self, camera: _Camera) -> None:
        at = (camera.offset + camera.sent) % len(self._recording)
        chunk = Chunk(camera.name, camera.sent, self._recording[at : at + 1])
        camera.sent_s.append(time.monotonic())
        camera.sent += 1
        camera.connection.socket.send_multipart(protocol.encode(chunk))

    def _read(self, wait_s: float) -> None:
        ready = self._poller.poll(math.ceil(1000 * wait_s))
        now_s = time.monotonic()
        for connection in self._connections if ready else ():
            while (frames := connection.receive()) is not None:
                self._on_reply(protocol.decode_feed_reply(frames), now_s)

    def _on_reply(self, reply: object, now_s: float) -> None:
        match reply:
            case Welcome():
                camera = self._cameras[reply.stream]
                camera.credit, camera.lookahead = reply.send_until, reply.lookahead_snippets
                camera.answered = reply.lookahead_snippets  # of the first ones comes nothing
            case Ack():
                camera = self._cameras[reply.stream]
                camera.dropped = reply.dropped
                # Final are the scores of so many snippets; the newest that they need came last.
                final = reply.send_until - camera.credit
                newest = min(final + camera.lookahead, camera.sent) if final else 0
                for n in range(camera.answered, newest):
                    self._latency_s.append(now_s - camera.sent_s[n])
                camera.answered = max(camera.answered, newest)
            case Error():
                raise StreamError(reply.code, reply.message, reply.next_index)


def main() -> None:
    """Until stdin is closed."""
    address, features, frames_per_s, snippet_frames = sys.argv[1:]
    clock = SnippetClock(float(frames_per_s), int(snippet_frames))
    cameras = _Cameras(address, np.load(features, allow_pickle=False), clock)
    for line in sys.stdin:
        live = cameras.run(*json.loads(line))
        print(json.dumps(asdict(live)), flush=True)  # noqa: T201 - read by the other process


if __name__ == "__main__":
    main()
