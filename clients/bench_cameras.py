"""How many live streams an engine keeps up with: cameras at their true pace, over TCP.

The engine is a process of its own, and so is the feeder, which sends one snippet of each stream in
each snippet's time, at a phase of the stream's own. It measures from the sending of the newest
snippet that a score needs to the Ack by which the engine says that this score is final, and what
came of it published. Streams may drop: nobody waits for an engine that cannot keep up.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zmq
from numpy.typing import NDArray

from hrpro.clients.bench_engine import cpu_seconds
from hrpro.clients.bench_engine_process import Calls, bench_engine, read_calls
from hrpro.clients.bench_memory import resident_bytes
from hrpro.clients.bench_process import Work, told_process, work_as_told
from hrpro.clients.connection import Connection
from hrpro.engine import protocol
from hrpro.engine.config import EngineConfig
from hrpro.engine.footprint import stream_bytes
from hrpro.engine.protocol import Ack, Chunk, Error, Hello, NoReplyError, StreamError, Welcome
from hrpro.engine.timebase import SnippetClock
from hrpro.engine.windows import plan_windows
from hrpro.export.bundle import Bundle

# Cameras that share a connection: a feeder for each would need more of the machine than the engine.
_STREAMS_A_CONNECTION = 100
_INDEX = msgpack.packb("first_index")
# So many are sent at most, if it is late, before it looks what was answered.
_SENT_UNREAD = 64
# It looks so often whether something is due or was answered: latencies seem up to as much longer.
_TICK_S = 0.004
# All streams of a round begin at once, as no cameras do, and a system gives the memory of their
# rings when it is first written to. So they have so much more time for a snippet until the rings
# are full, and what comes of the first seconds at the true pace is not counted.
_WARM_UP = 1.3
_SETTLE_S = 15.0
_SILENCE_S = 60.0


@dataclass(frozen=True)
class Live:
    """What a round has measured: of ``streams`` at their pace, from ``began_s`` to ``ended_s``, at
    the last of its ``tries``."""

    streams: int
    tries: int
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
        "tries": live.tries,
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
    tries: int,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Rounds with more and more streams, each with an engine of its own, until one does not keep
    up; the last that did, and ``beyond`` the one that did not.

    ``counts`` are the numbers of streams, in ascending order. What does not keep up is tried again,
    up to so many ``tries``: other programs of the machine may have taken what it needed.
    ``progress`` is told of each round.
    """
    bound_ms = 1000 * bundle.manifest.clock.snippet_s
    ring_snippets = plan_windows(bundle.manifest, config).window + config.backlog_snippets
    best: dict[str, Any] = {"streams": 0}
    beyond: dict[str, Any] | None = None
    for count in counts:
        with tempfile.NamedTemporaryFile() as calls:
            with (
                bench_engine(bundle.folder, config, Path(calls.name)) as engine,
                told_process(
                    "hrpro.clients.bench_cameras",
                    engine.addresses.feed,
                    recording,
                    bundle.manifest.clock,
                ) as feeder,
            ):
                empty_bytes = resident_bytes(engine.pid)
                feeder.begin([count, ring_snippets, seconds, tries, engine.pid])
                live = Live(**feeder.finish())
                rss_bytes = resident_bytes(engine.pid) - empty_bytes
            figures = _figures(live, rss_bytes, read_calls(Path(calls.name)))
        if progress is not None:
            progress(figures)
        if not live.keeps_up(bound_ms):
            beyond = figures
            break
        best = figures
    told = stream_bytes(bundle.manifest, config).all
    return {**best, "told_bytes_per_stream": told, "cores": os.cpu_count(), "beyond": beyond}


# ---- in the process ------------------------------------------------------------------------------


class ChunkHeader:
    """The headers of a stream's chunks of one snippet (1, D): that of the first one, with the
    index of another put in."""

    def __init__(self, stream: str, feature_dim: int) -> None:
        features = np.zeros((1, feature_dim), dtype=np.float32)
        header, _ = protocol.encode(Chunk(stream, 0, features))
        # The key and a 0: a stream may have the name of the key.
        before, _, self._behind = header.partition(_INDEX + b"\0")
        self._before = before + _INDEX

    def of(self, first_index: int) -> bytes:
        """As `protocol.encode` would write it."""
        return b"".join((self._before, msgpack.packb(first_index), self._behind))


class _Camera:
    """A stream; ``sent_s`` has when each snippet was sent, of those that are not answered."""

    def __init__(
        self, header: ChunkHeader, connection: Connection, offset: int, phase: float
    ) -> None:
        self.header = header
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
    """Feeds streams at their pace. What it spends is taken from the engine's machine: it makes
    of messages no more than it needs."""

    def __init__(self, address: str, recording: NDArray[np.float32], clock: SnippetClock) -> None:
        self._address = address
        self._feature_dim = recording.shape[1]
        self._rows = [row.tobytes() for row in recording]
        self._clock = clock
        self._cameras: dict[str, _Camera] = {}
        self._connections: list[Connection] = []
        self._context = zmq.Context()  # of all: a thread for each would take more of the machine
        self._poller = zmq.Poller()
        self._random = np.random.default_rng(0)
        self._latency_s = array("d")

    def run(
        self, streams: int, ring_snippets: int, seconds: float, tries: int, engine: int
    ) -> Live:
        """So many streams, for so long; the engine is told by its process."""
        for n in range(streams):
            self._open(f"cam{n}", n)
        self._wait_open()
        self._send(_WARM_UP * ring_snippets * self._clock.snippet_s, _WARM_UP)
        self._catch_up()
        tried = 0
        while True:
            tried += 1
            self._send(_SETTLE_S)
            live = self._measured(tried, seconds, engine)
            self._catch_up()
            if tried == tries or live.keeps_up(1000 * self._clock.snippet_s):
                return live

    def close(self) -> None:
        """Closes all connections."""
        self._context.destroy(linger=0)

    def _measured(self, tried: int, seconds: float, engine: int) -> Live:
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
            len(self._cameras),
            tried,
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
            connection = Connection(
                zmq.DEALER, self._address, {zmq.SNDHWM: 100_000}, shared=self._context
            )
            self._connections.append(connection)
            self._poller.register(connection.socket, zmq.POLLIN)
        header, offset = ChunkHeader(name, self._feature_dim), n * 389 % len(self._rows)
        camera = _Camera(header, self._connections[-1], offset, float(self._random.random()))
        self._cameras[name] = camera
        frames_per_s, frames = self._clock.frames_per_s, self._clock.snippet_frames
        hello = Hello(name, self._feature_dim, frames_per_s, frames, 0, "drop_oldest")
        camera.connection.socket.send_multipart(protocol.encode(hello))

    def _wait_open(self) -> None:
        until_s = time.monotonic() + _SILENCE_S
        while not all(each.credit for each in self._cameras.values()):
            self._read()
            if time.monotonic() > until_s:
                raise NoReplyError(f"expected all streams to be open within {_SILENCE_S:.0f} s")

    def _send(self, seconds: float, slower: float = 1.0) -> tuple[int, float]:
        """Returns how many snippets were sent, and by how much the last one was late."""
        sent, late_s = 0, 0.0
        for due_s, camera in self._schedule(time.monotonic(), seconds, slower):
            while (left_s := due_s - time.monotonic()) > 0:
                self._read()
            self._send_snippet(camera)
            sent, late_s = sent + 1, -left_s
            if sent % _SENT_UNREAD == 0:
                self._read()
        return sent, late_s

    def _schedule(
        self, began_s: float, seconds: float, slower: float
    ) -> Iterator[tuple[float, _Camera]]:
        """When which camera has a snippet: each has its phase, and all have one pace."""
        in_turn = sorted(self._cameras.values(), key=lambda each: each.phase)
        for n in itertools.count():
            for camera in in_turn:
                after_s = (n + camera.phase) * self._clock.snippet_s * slower
                if after_s >= seconds:
                    return
                yield began_s + after_s, camera

    def _catch_up(self) -> None:
        """Nothing is sent until all is answered: what an engine is behind does not count against it
        in the next try, nor is it left with it at the end."""
        until_s = time.monotonic() + _SILENCE_S
        while time.monotonic() < until_s:
            if all(each.answered == each.sent for each in self._cameras.values()):
                return
            self._read()

    def _listen(self) -> None:
        """What the last snippets were needed for is told in time, or it is too late."""
        until_s = time.monotonic() + 2 * self._clock.snippet_s
        while time.monotonic() < until_s:
            self._read()

    def _send_snippet(self, camera: _Camera) -> None:
        row = self._rows[(camera.offset + camera.sent) % len(self._rows)]
        header = camera.header.of(camera.sent)
        camera.sent_s.append(time.monotonic())
        camera.sent += 1
        camera.connection.socket.send(header, zmq.SNDMORE)
        camera.connection.socket.send(row)

    def _read(self) -> None:
        """After a tick: many snippets and answers are dealt with at once."""
        time.sleep(_TICK_S)
        ready = self._poller.poll(0)
        now_s = time.monotonic()
        for source, _ in ready:
            with contextlib.suppress(zmq.Again):
                while True:
                    self._on_reply(source.recv(zmq.NOBLOCK), now_s)

    def _on_reply(self, frame: bytes, now_s: float) -> None:
        fields = msgpack.unpackb(frame)
        if fields["type"] == Ack.TYPE:  # all but all that come
            self._on_ack(fields, now_s)
            return
        reply = protocol.decode_feed_reply([frame])
        if isinstance(reply, Error):
            raise StreamError(reply.code, reply.message, reply.next_index)
        if isinstance(reply, Welcome):
            camera = self._cameras[reply.stream]
            camera.credit, camera.lookahead = reply.send_until, reply.lookahead_snippets
            camera.answered = reply.lookahead_snippets  # of the first ones comes nothing

    def _on_ack(self, fields: dict[str, Any], now_s: float) -> None:
        camera = self._cameras[fields["stream"]]
        camera.dropped = fields["dropped"]
        # Final are the scores of so many snippets; the newest that they need came last.
        final = fields["send_until"] - camera.credit
        newest = min(final + camera.lookahead, camera.sent) if final else 0
        for n in range(camera.answered, newest):
            self._latency_s.append(now_s - camera.sent_s[n])
        camera.answered = max(camera.answered, newest)


def _cameras(address: str, recording: NDArray[np.float32], clock: SnippetClock) -> Work:
    def work(order: Any) -> Any:
        with contextlib.closing(_Cameras(address, recording, clock)) as cameras:
            return asdict(cameras.run(*order))

    return work


if __name__ == "__main__":
    work_as_told(_cameras)
