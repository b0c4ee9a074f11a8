"""How long a well-behaved stream waits beside peers that are fast, greedy or broken.

    python benchmarks/neighbours.py BUNDLE [--seconds 10]

An engine as a process; a feeder that sends one snippet after another, each once the one before is
acknowledged, so that what is measured is the time from a snippet to its Ack: alone, and beside each
kind of neighbour. The engine reads at most `MESSAGES_PER_TURN` messages a socket in a turn and
computes one micro-batch, and then acknowledges: a neighbour can cost a turn that does both in full.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import zmq
from rich.console import Console
from rich.table import Table

from hrpro.clients import FeatureFeeder
from hrpro.clients.connection import Deadline
from hrpro.clients.engine_process import running_engine
from hrpro.engine import protocol
from hrpro.engine.protocol import Chunk, Hello
from hrpro.engine.serve import load_engine_config
from hrpro.engine.timebase import SnippetClock
from hrpro.export.bundle import read_bundle

Neighbour = Callable[[str, int, SnippetClock], None]
_PAUSE_S = 0.01  # of the good feeder, between an Ack and its next snippet


def fast(address: str, dim: int, clock: SnippetClock) -> None:
    """Eight streams, as fast as their credit lets them."""
    features = np.random.default_rng(0).normal(size=(64, dim)).astype(np.float32)
    with contextlib.ExitStack() as stack:
        feeders = [
            stack.enter_context(FeatureFeeder(address, f"fast{n}", dim, clock)) for n in range(8)
        ]
        while True:
            for feeder in feeders:
                feeder.send(features)


def greedy(address: str, dim: int, clock: SnippetClock) -> None:
    """Whole chunks without regard to credit, so that most are refused."""
    chunk = np.zeros((64, dim), dtype=np.float32)
    with _peer(address) as peer:
        hello = Hello("greedy", dim, clock.frames_per_s, clock.snippet_frames, 0)
        peer.send_multipart(protocol.encode(hello))
        for n in range(10**9):
            peer.send_multipart(protocol.encode(Chunk("greedy", n % 100 * 64, chunk)))
            _read_all(peer)


def nonsense(address: str, *_: object) -> None:
    """Bytes that are no message."""
    with _peer(address) as peer:
        while True:
            peer.send_multipart([b"\xc1" * 64, b"\x00" * 64])
            _read_all(peer)


def holes(address: str, dim: int, clock: SnippetClock) -> None:
    """Every second snippet, again and again."""
    row = np.zeros((1, dim), dtype=np.float32)
    with _peer(address) as peer:
        hello = Hello("holes", dim, clock.frames_per_s, clock.snippet_frames, 0)
        peer.send_multipart(protocol.encode(hello))
        for n in range(10**9):
            peer.send_multipart(protocol.encode(Chunk("holes", 2 * (n % 30) + 1, row)))
            _read_all(peer)


NEIGHBOURS: tuple[Neighbour, ...] = (fast, greedy, nonsense, holes)


@contextlib.contextmanager
def _peer(address: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.connect(address)
        yield peer


def _read_all(peer: zmq.Socket[bytes]) -> None:
    with contextlib.suppress(zmq.Again):
        while True:
            peer.recv_multipart(zmq.NOBLOCK)


def waits_ms(feeder: FeatureFeeder, dim: int, over: Callable[[], bool]) -> np.ndarray:
    """From a snippet to its Ack, each."""
    rows = np.random.default_rng(1).normal(size=(4096, dim)).astype(np.float32)
    waits = []
    while not over():
        began_s = time.monotonic()
        feeder.send(rows[feeder.next_index % len(rows)])
        feeder.flush()
        waits.append(time.monotonic() - began_s)
        time.sleep(_PAUSE_S)
    return np.array(waits) * 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each neighbour")
    options = parser.parse_args()
    bundle = read_bundle(options.bundle)
    manifest = bundle.manifest
    config = load_engine_config(bundle).model_copy(update={"threads": 1})
    table = Table("neighbour", "snippets", "p50, ms", "p99, ms", "longest, ms")
    with running_engine(options.bundle, config) as addresses:
        for neighbour in (None, *NEIGHBOURS):
            name = neighbour.__name__ if neighbour else "none"
            process = None
            if neighbour is not None:
                process = multiprocessing.get_context("spawn").Process(
                    target=neighbour, args=(addresses.feed, manifest.feature_dim, manifest.clock)
                )
                process.start()
                time.sleep(2.0)  # until it is at its worst
            with FeatureFeeder(
                addresses.feed, f"good-{name}", manifest.feature_dim, manifest.clock
            ) as feeder:
                deadline = Deadline(options.seconds)
                waits = waits_ms(feeder, manifest.feature_dim, deadline.passed)
                feeder.end()
            if process is not None:
                process.kill()
                process.join()
            figures = (*np.percentile(waits, [50, 99]), waits.max())
            table.add_row(name, str(len(waits)), *(f"{each:.1f}" for each in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
