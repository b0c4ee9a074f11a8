"""Whether an engine stands a flood of malformed messages, and what the streams beside it notice.

    python benchmarks/hostile.py [--messages 1000000] [--bundle BUNDLE] [--json]

An engine as a process, over TCP. Well-behaved streams send one snippet after another, each once the
one before is acknowledged, and a subscriber hears all of them: first alone, then beside a process
that sends what benchmarks/malformed.py makes, as fast as it is read, on all three sockets; and now
and then a frame larger than the engine reads, bytes that are not ZeroMQ, or another connection
under a name that is taken. That process has the lowest priority: its work would be that of other
machines.

Exits with 1 unless each message on feed and control was refused, nothing of the good streams was
lost, and the median and 99th percentile of their latency stayed below `--limit` times what they
were alone. An engine that dies is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import malformed
import numpy as np
import zmq
from malformed import Frames, Target
from neighbours import waits_ms
from numpy.typing import NDArray

from hrpro.clients import EventSubscriber, FeatureFeeder, StreamNotice, request_status
from hrpro.clients.bench_bundle import BenchModel, random_bundle
from hrpro.clients.bench_engine_process import bench_engine
from hrpro.clients.bench_memory import median_slope, resident_bytes
from hrpro.clients.connection import Deadline
from hrpro.clients.engine_process import RunningEngine
from hrpro.engine import protocol
from hrpro.engine.serve import Addresses, load_engine_config
from hrpro.export.bundle import Bundle, read_bundle

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

GOOD_STREAMS = ("good0", "good1", "good2")
_HOSTILE_FEEDERS = 4
# Of the messages so many go to control and to events, one in so many each.
_CONTROL_EVERY, _EVENTS_EVERY = 10, 20
# One in so many is followed by something that costs a connection.
_DISTURBED_EVERY = 1000
_READ_EVERY = 50
# Frames may be larger than headers, so that there are headers that are too long for both reasons.
SETTINGS = (
    "threads=1",
    "window.hop_snippets=1",
    "max_chunk_snippets=256",
    "backlog_snippets=256",
    # All on loopback share one limit: who watches would be refused with the flood, and counted.
    "limits.control_requests_per_s=1000000",
)
_SAMPLE_S = 0.5
_PATIENCE_S = 60.0

# ---- the hostile process -------------------------------------------------------------------------


class Peer:
    """A connection that sends what it is given, and reads what comes back."""

    def __init__(self, context: zmq.Context[Any], kind: int, address: str, name: bytes) -> None:
        self.socket = context.socket(kind)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.RECONNECT_IVL, 10)
        if kind == zmq.DEALER:
            self.socket.set(zmq.ROUTING_ID, name)
        self.socket.connect(address)

    def send(self, frames: Frames) -> None:
        """Waits while the engine does not read."""
        while True:
            try:
                self.socket.send_multipart(frames, zmq.NOBLOCK)
            except zmq.Again:
                self.read()
                self.socket.poll(100, zmq.POLLOUT | zmq.POLLIN)
            else:
                return

    def read(self) -> None:
        """All that has come."""
        with contextlib.suppress(zmq.Again):
            while True:
                self.socket.recv_multipart(zmq.NOBLOCK)


def flood(addresses: Addresses, target: Target, messages: int, over: Event) -> None:
    """Send so many messages, and read what comes back until it is over."""
    os.nice(19)
    r = random.Random(0)  # noqa: S311 - the same flood each time
    with zmq.Context() as context, contextlib.ExitStack() as stack:

        def peer(kind: int, address: str, name: bytes = b"") -> Peer:
            made = Peer(context, kind, address, name)
            stack.callback(made.socket.close)
            return made

        feeders = [
            (
                peer(zmq.DEALER, addresses.feed, b"hostile%d" % n),
                replace(target, own_stream=f"h{n}"),
            )
            for n in range(_HOSTILE_FEEDERS)
        ]
        control = peer(zmq.DEALER, addresses.control, b"hostile")
        events = peer(zmq.XSUB, addresses.events)
        twins = [peer(zmq.DEALER, addresses.feed, b"twin") for _ in range(2)]
        peers = [control, events, *twins, *(feeder for feeder, _ in feeders)]
        for feeder, own in feeders:
            feeder.send(protocol.encode(own.hello))
        for n in range(messages):
            if n % _EVENTS_EVERY == 0:
                events.send(malformed.on_events(r))
            elif n % _CONTROL_EVERY == 1:
                control.send(malformed.on_control(r, target))
            else:
                feeder, own = feeders[n % len(feeders)]
                feeder.send(malformed.on_feed(r, own))
            if n % _DISTURBED_EVERY == 0:
                # Larger than the engine reads; and of two under one name, the later one has it.
                r.choice(twins).send([b"", bytes(target.max_frame_bytes + 1)])
                not_zeromq(addresses)
            if n % _READ_EVERY == 0:
                read_all(peers)
        while not over.wait(0.01):
            read_all(peers)


def read_all(peers: Sequence[Peer]) -> None:
    """What has come to them."""
    for peer in peers:
        peer.read()


def not_zeromq(addresses: Addresses) -> None:
    """Bytes of another protocol, on all sockets."""
    for address in (addresses.feed, addresses.events, addresses.control):
        port = int(address.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)


# ---- the good streams ----------------------------------------------------------------------------


class GoodStreams:
    """Some streams, each with a feeder in a thread, and a subscriber to all."""

    def __init__(self, addresses: Addresses, bundle: Bundle, stack: contextlib.ExitStack) -> None:
        manifest = bundle.manifest
        self._dim = manifest.feature_dim
        self._heard: Counter[str] = Counter()  # proposals and events, by stream
        self._ended: dict[str, int] = {}  # how many were published
        self._subscriber = stack.enter_context(EventSubscriber(addresses.events))
        self._subscriber.wait_connected()
        self._listener = threading.Thread(target=self._listen)
        self._feeders = [
            stack.enter_context(
                FeatureFeeder(addresses.feed, name, manifest.feature_dim, manifest.clock)
            )
            for name in GOOD_STREAMS
        ]
        self._listener.start()

    @property
    def identities(self) -> tuple[bytes, ...]:
        """The names of the feeders' connections, which nobody else can know."""
        sockets = [each._line.socket for each in self._feeders]  # noqa: SLF001 - a spy's view
        return tuple(each.get(zmq.ROUTING_ID) for each in sockets)

    def run(self, over: Callable[[], bool]) -> NDArray[np.float64]:
        """From a snippet to its Ack, of all streams, in ms."""
        with ThreadPoolExecutor(len(self._feeders)) as pool:
            waits = pool.map(lambda feeder: waits_ms(feeder, self._dim, over), self._feeders)
            return np.concatenate(list(waits))

    def end(self) -> dict[str, int]:
        """What was sent and published, and what of it was lost."""
        accepted = [feeder.end().next_index for feeder in self._feeders]
        self._listener.join(_PATIENCE_S)
        sent, published = sum(each.next_index for each in self._feeders), sum(self._ended.values())
        return {
            "snippets": sent,
            "snippets_lost": sent - sum(accepted),
            "publications": published,
            "publications_lost": published - sum(self._heard.values()) + self._subscriber.gaps,
        }

    def _listen(self) -> None:
        """Until all streams have ended, or nothing comes any more."""
        while len(self._ended) < len(GOOD_STREAMS):
            publication = self._subscriber.receive(_PATIENCE_S)
            if publication is None:
                return
            if publication.stream not in GOOD_STREAMS:
                continue
            if not isinstance(publication, StreamNotice):
                self._heard[publication.stream] += 1
            elif publication.kind == "ended":
                self._ended[publication.stream] = publication.proposals + publication.events


# ---- what is measured ----------------------------------------------------------------------------


def refused(address: str) -> Counter[str]:
    """Messages that were answered with an Error, by its code."""
    counters = request_status(address, _PATIENCE_S)["counters"]
    prefix = "refused_"
    return Counter(
        {n.removeprefix(prefix): count for n, count in counters.items() if n.startswith(prefix)}
    )


@contextlib.contextmanager
def hostile_process(addresses: Addresses, target: Target, messages: int) -> Iterator[None]:
    """Beside the block."""
    context = multiprocessing.get_context("spawn")
    over = context.Event()
    process = context.Process(target=flood, args=(addresses, target, messages, over))
    process.start()
    try:
        yield
    finally:
        over.set()
        process.join(_PATIENCE_S)
        process.kill()
        process.join()


def watch(engine: RunningEngine, expected: int) -> list[tuple[int, int]]:
    """Until so many messages were refused: how many, and the engine's memory, again and again."""
    samples = [(0, resident_bytes(engine.pid))]
    stalled = Deadline(_PATIENCE_S)
    while samples[-1][0] < expected and not stalled.passed():
        time.sleep(_SAMPLE_S)
        count = refused(engine.addresses.control).total()
        if count > samples[-1][0]:
            stalled = Deadline(_PATIENCE_S)
        samples.append((count, resident_bytes(engine.pid)))
    return samples


def measure(bundle: Bundle, messages: int, seconds: float) -> dict[str, Any]:
    """All figures. Raises EngineFailedError where the engine did not live to the end."""
    config = load_engine_config(bundle, None, SETTINGS)
    expected = messages - len(range(0, messages, _EVENTS_EVERY))
    with (
        tempfile.NamedTemporaryFile() as calls,
        bench_engine(bundle.folder, config, Path(calls.name)) as engine,
        contextlib.ExitStack() as stack,
    ):
        good = GoodStreams(engine.addresses, bundle, stack)
        good.run(Deadline(1.0).passed)
        alone = good.run(Deadline(seconds).passed)
        target = Target(
            bundle.manifest.feature_dim,
            bundle.manifest.clock,
            protocol.max_frame_bytes(config.max_chunk_snippets, bundle.manifest.feature_dim),
            "",
            GOOD_STREAMS,
            good.identities,
        )
        began_s = time.monotonic()
        with (
            hostile_process(engine.addresses, target, messages),
            ThreadPoolExecutor(1) as pool,
        ):
            watching = pool.submit(watch, engine, expected)
            beside = good.run(watching.done)
            samples = watching.result()
        took_s = time.monotonic() - began_s
        figures = good.end()
        status = request_status(engine.addresses.control)
        codes = refused(engine.addresses.control)
        rss_after = resident_bytes(engine.pid)
    counts, rss = np.array(samples, dtype=np.float64).T
    half = len(rss) // 2
    return {
        "messages": messages,
        "messages_per_s": messages / took_s,
        "refused": dict(codes),
        "not_refused": expected - codes.total(),
        "rss_bytes_before": int(rss[0]),
        "rss_bytes_most": int(rss.max()),
        "rss_bytes_after": rss_after,
        "rss_bytes_per_message": median_slope(counts[half:], rss[half:]) if half > 1 else None,
        **figures,
        "snippets_missing": status["counters"]["snippets_missing"],
        **latencies(alone, beside),
    }


def latencies(alone: NDArray[np.float64], beside: NDArray[np.float64]) -> dict[str, Any]:
    """Of the good streams, in ms, and by how much it has grown."""
    said: dict[str, Any] = {}
    for name, waits in (("alone_ms", alone), ("beside_ms", beside)):
        p50, p99, longest = np.percentile(waits, [50, 99, 100]).tolist()
        said[name] = {"p50": p50, "p99": p99, "longest": longest, "snippets": len(waits)}
    for name in ("p50", "p99"):
        said[f"times_{name}"] = said["beside_ms"][name] / said["alone_ms"][name]
    return said


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--bundle", type=Path, help="in place of one with random weights")
    parser.add_argument("--seconds", type=float, default=10.0, help="that the streams are alone")
    parser.add_argument("--limit", type=float, default=2.0, help="of what latency may grow by")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if options.bundle is None:
            bundle = random_bundle(BenchModel(8, 3, attention_past=6), Path(made) / "bundle")
        else:
            bundle = read_bundle(options.bundle)
        figures = measure(bundle, options.messages, options.seconds)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<24}{value}")
    lost = ("not_refused", "snippets_lost", "publications_lost", "snippets_missing")
    grown = max(figures["times_p50"], figures["times_p99"])
    sys.exit(1 if any(figures[name] for name in lost) or grown >= options.limit else 0)


if __name__ == "__main__":
    main()
