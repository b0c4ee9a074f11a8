"""What is left of an engine after hours: memory, files and threads, and whether anything was lost.

    python benchmarks/soak.py [--minutes 60] [--bundle BUNDLE] [--leak-bytes N] [--json]

An engine as a process, fed as fast as it takes, by streams that go on and by some that begin and
end. Beside them peers come and go: feeders that end their stream, or vanish, subscribers, and
connections that are reset while ZeroMQ still greets; the process that has them is killed now and
then. Some subscribers and a feeder are stopped (SIGSTOP) from the beginning to the end. One
subscriber reads everything, and must miss nothing.

Exits with 1 where the engine's memory grows by `--limit` bytes a million snippets or more, where it
has other files or threads at the end than at the beginning, or where that subscriber has missed
something. `--leak-bytes` lets the engine lose so many bytes a stream and step, as a control.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq

from hrpro.clients import (
    EventSubscriber,
    FeatureFeeder,
    NoReplyError,
    SnippetClock,
    StreamNotice,
)
from hrpro.clients.bench_bundle import BenchModel, material, random_bundle
from hrpro.clients.bench_engine_process import bench_engine
from hrpro.clients.bench_feeder import feeder_process
from hrpro.clients.bench_memory import Growth, feed_once, resident_bytes
from hrpro.clients.connection import Deadline
from hrpro.engine import protocol
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.protocol import Chunk, End, Ended, Hello
from hrpro.engine.serve import Addresses, load_engine_config
from hrpro.export.bundle import Bundle, read_bundle

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess
    from multiprocessing.sharedctypes import Synchronized

SETTINGS = ("threads=1", "window.hop_snippets=16", "lookahead_s=20", "max_streams=4096")
_GUESTS = 8
_ROUND_SNIPPETS = 256
_STORM_STREAMS = 16
_STORM_S = 20.0  # after which it is killed, and another begins
_STALLED_SUBSCRIBERS = 3
_PATIENCE_S = 60.0
# Of more samples, not all are needed for a slope.
_MOST_SAMPLES = 400

_spawn = multiprocessing.get_context("spawn")


@contextlib.contextmanager
def beside(target: Callable[..., None], *arguments: object) -> Iterator[SpawnProcess]:
    """A process that is killed with the block."""
    process = _spawn.Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


# ---- peers that come and go ----------------------------------------------------------------------


@dataclass(frozen=True)
class Storm:
    """What they need to know of an engine."""

    addresses: Addresses
    feature_dim: int
    clock: SnippetClock
    count: Synchronized[int]  # of connections that came

    def run(self, seed: int) -> None:
        """Until it is killed."""
        os.nice(10)
        r = random.Random(seed)  # noqa: S311 - the same each time
        kinds = (
            self.ends,
            self.vanishes,
            self.subscribes,
            self.resets,
            self.half_greets,
            self.many,
        )
        while True:
            kind = r.choice(kinds)
            kind(r)
            self.count.value += 20 if kind == self.many else 1
            time.sleep(0.002)

    def wait(self) -> None:
        """Until it has begun."""
        before, deadline = self.count.value, Deadline(_PATIENCE_S)
        while self.count.value == before and not deadline.passed():
            time.sleep(0.01)

    def ends(self, r: random.Random) -> None:
        """A stream of a few snippets, from its beginning to its end."""
        name = f"storm{r.randrange(_STORM_STREAMS)}"
        with self._socket(zmq.DEALER, self.addresses.feed) as peer:
            next_index = self._some_snippets(peer, name)
            peer.send_multipart(protocol.encode(End(name, next_index)))
            self._hear(peer, Ended)

    def vanishes(self, r: random.Random) -> None:
        """With Acks unread, which resets the connection; the stream stays open."""
        with self._socket(zmq.DEALER, self.addresses.feed) as peer:
            self._some_snippets(peer, f"storm{r.randrange(_STORM_STREAMS)}")

    def subscribes(self, _: random.Random) -> None:
        """To everything, for a moment."""
        with EventSubscriber(self.addresses.events) as subscriber:
            subscriber.wait_connected(_PATIENCE_S)

    def resets(self, r: random.Random, greeting: bytes = b"") -> None:
        """A connection that is gone as soon as it is there."""
        address = r.choice(list(vars(self.addresses).values()))
        port = int(address.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(greeting)
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def half_greets(self, r: random.Random) -> None:
        """ZMTP's signature and version, and no more."""
        self.resets(r, b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03"[: r.randrange(12)])

    def many(self, r: random.Random) -> None:
        """Connections at the same time."""
        with contextlib.ExitStack() as stack:
            for _ in range(10):
                stack.enter_context(self._socket(zmq.DEALER, self.addresses.feed))
                subscriber = stack.enter_context(self._socket(zmq.SUB, self.addresses.events))
                subscriber.subscribe(b"")
            time.sleep(r.random() / 20)

    @contextlib.contextmanager
    def _socket(self, kind: int, address: str) -> Iterator[zmq.Socket[bytes]]:
        with zmq.Context() as context, context.socket(kind) as peer:
            peer.set(zmq.LINGER, 0)
            peer.connect(address)
            yield peer

    def _some_snippets(self, peer: zmq.Socket[bytes], name: str) -> int:
        """One past the last one."""
        frames_per_s, frames = self.clock.frames_per_s, self.clock.snippet_frames
        peer.send_multipart(protocol.encode(Hello(name, self.feature_dim, frames_per_s, frames, 0)))
        first = self._hear(peer, protocol.Welcome).next_index
        features = np.zeros((8, self.feature_dim), dtype=np.float32)
        peer.send_multipart(protocol.encode(Chunk(name, first, features)))
        return first + len(features)

    def _hear(self, peer: zmq.Socket[bytes], kind: type[Any]) -> Any:
        """What comes of this kind."""
        deadline = Deadline(_PATIENCE_S)
        while not deadline.passed():
            if peer.poll(1000):
                reply = protocol.decode_feed_reply(peer.recv_multipart())
                if isinstance(reply, kind):
                    return reply
        raise TimeoutError(kind)


# ---- peers that stay -----------------------------------------------------------------------------


def stall(addresses: Addresses, feature_dim: int, clock: SnippetClock, ready: Connection) -> None:
    """Subscribe, and open a stream; then do nothing more."""
    with contextlib.ExitStack() as stack:
        for _ in range(_STALLED_SUBSCRIBERS):
            subscriber = stack.enter_context(EventSubscriber(addresses.events))
            subscriber.wait_connected(_PATIENCE_S)
        stack.enter_context(FeatureFeeder(addresses.feed, "stalled", feature_dim, clock))
        ready.send(None)
        os.kill(os.getpid(), signal.SIGSTOP)


def listen(address: str, told: Connection) -> None:
    """Read everything until the stream "last" has ended; tell how much it was, and what was missed.

    What is published of a session agrees with what its end says, and no sequence number is missing.
    """
    heard: Counter[tuple[str, int]] = Counter()  # of live sessions, but for notices
    publications = missed = 0
    with EventSubscriber(address) as subscriber:
        subscriber.wait_connected(_PATIENCE_S)
        told.send(None)
        for publication in subscriber:
            session = publication.stream, publication.session
            if not isinstance(publication, StreamNotice):
                heard[session] += 1
                publications += 1
            elif publication.kind == "ended":
                missed += publication.proposals + publication.events - heard.pop(session, 0)
                if publication.stream == "last":
                    break
        told.send((publications, missed + subscriber.gaps))


# ---- what is measured ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """What a process has at a time."""

    rss_bytes: int
    files: int
    threads: int

    @classmethod
    def by(cls, pid: int) -> Held:
        """Of a process of this machine."""
        process = Path(f"/proc/{pid}")
        files, threads = (len(list((process / each).iterdir())) for each in ("fd", "task"))
        return cls(resident_bytes(pid), files, threads)

    @classmethod
    def once_closed(cls, pid: int, files: int) -> Held:
        """As soon as it has no more than so many files; or later, if it has."""
        deadline = Deadline(_PATIENCE_S)
        while (held := cls.by(pid)).files > files and not deadline.passed():
            time.sleep(0.1)
        return held


def measure(
    bundle: Bundle, recording: Path, minutes: float, streams: int, leak_bytes: int
) -> dict[str, Any]:
    """All figures. Raises EngineFailedError where the engine did not live to the end."""
    config = load_engine_config(bundle, None, SETTINGS)
    dim, clock = bundle.manifest.feature_dim, bundle.manifest.clock
    told, teller = _spawn.Pipe(duplex=False)
    connections = _spawn.Value("q", 0)
    points: list[tuple[int, Held]] = []
    with (
        tempfile.NamedTemporaryFile() as calls,
        bench_engine(bundle.folder, config, Path(calls.name), leak_bytes=leak_bytes) as engine,
        feeder_process(engine.addresses.feed, recording, clock) as feeder,
        beside(listen, engine.addresses.events, teller),
    ):
        _hear(told)
        feed_once(feeder, streams, _GUESTS, _ROUND_SNIPPETS)
        before = Held.by(engine.pid)
        storm = Storm(engine.addresses, dim, clock, connections)
        with beside(stall, engine.addresses, dim, clock, teller):
            _hear(told)
            began_s, over = time.monotonic(), Deadline(60 * minutes)
            for seed in itertools.count():
                with beside(storm.run, seed):
                    storm.wait()
                    calm = Deadline(_STORM_S)
                    while not (calm.passed() or over.passed()):
                        feed_once(feeder, streams, _GUESTS, _ROUND_SNIPPETS)
                        fed = (len(points) + 1) * (streams + _GUESTS) * _ROUND_SNIPPETS
                        points.append((fed, Held.by(engine.pid)))
                if over.passed():
                    break
        took_s = time.monotonic() - began_s
        after = Held.once_closed(engine.pid, before.files)
        with FeatureFeeder(engine.addresses.feed, "last", dim, clock) as last:
            last.end()
        publications, missed = _hear(told)
    snippets, held = zip(*points, strict=True)
    return {
        "minutes": took_s / 60,
        "snippets": snippets[-1],
        "snippets_per_s": snippets[-1] / took_s,
        "slope_bytes_per_million_snippets": slope(snippets, [each.rss_bytes for each in held]),
        "rss_bytes": [before.rss_bytes, max(each.rss_bytes for each in held), after.rss_bytes],
        "files": [before.files, max(each.files for each in held), after.files],
        "threads": [before.threads, max(each.threads for each in held), after.threads],
        "connections": connections.value,
        "publications": publications,
        "publications_missed": missed,
    }


def slope(snippets: Sequence[int], rss_bytes: Sequence[int]) -> float:
    """Bytes a million snippets, after the warm-up."""
    every = -(-len(snippets) // _MOST_SAMPLES)
    x, y = (np.array(each[::every], dtype=np.float64) for each in (snippets, rss_bytes))
    return Growth(x, y).slope_bytes_per_million


def _hear(told: Connection) -> Any:
    """What the other process has to tell."""
    if not told.poll(_PATIENCE_S):
        raise NoReplyError("a process of the benchmark does not answer")
    return told.recv()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--streams", type=int, default=64, help="that go on")
    parser.add_argument("--bundle", type=Path, help="in place of one with random weights")
    parser.add_argument("--leak-bytes", type=int, default=0, help="lost a stream and step")
    parser.add_argument("--limit", type=float, default=200_000, help="bytes a million snippets")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if options.bundle is None:
            bundle = random_bundle(BenchModel(8, 3, attention_past=6), Path(made) / "bundle")
        else:
            bundle = read_bundle(options.bundle)
        recording = Path(made) / "recording.npy"
        backend = OnnxRuntimeBackend(bundle, load_engine_config(bundle, None, SETTINGS))
        np.save(recording, material(bundle, backend, quiet_share=0.8))
        figures = measure(bundle, recording, options.minutes, options.streams, options.leak_bytes)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<34}{value}")
    (files_before, _, files_after), threads = figures["files"], figures["threads"]
    sys.exit(
        figures["slope_bytes_per_million_snippets"] >= options.limit
        or figures["publications_missed"] > 0
        or files_after != files_before
        or len(set(threads)) > 1
    )


if __name__ == "__main__":
    main()
