"""An engine under a flood of malformed messages, and under peers that come, go and stall.

Both are benchmarks, run here in short; over what times a figure is good is theirs to say.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from commands import PATIENCE_S, environment
from serving import CLOCK, DIM, RawPeer, TinyPipeline, rows, serving

from hrpro.clients import FeatureFeeder
from hrpro.engine.protocol import ERROR_CODES, Error
from hrpro.export.bundle import Bundle

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")


def figures(script: str, *arguments: object, status: int = 0) -> dict[str, Any]:
    """What a benchmark says with --json."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(str, arguments), "--json"],
        check=False, capture_output=True, text=True, timeout=4 * PATIENCE_S, env=environment(),
    )  # fmt: skip
    assert done.returncode == status, (done.stdout, done.stderr)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@on_linux
def test_a_flood_of_malformed_messages(bundle: Bundle) -> None:
    said = figures(
        "hostile.py", "--messages", 4000, "--bundle", bundle.folder, "--seconds", 1,
        "--limit", 200,
    )  # fmt: skip
    assert said["messages"] == 4000
    assert sum(said["refused"].values()) == 3800  # the others went to the events
    assert said["not_refused"] == 0
    # Those that a feeder can bring about in an engine that has room and goes on.
    assert said["refused"].keys() - {"too_fast"} == ERROR_CODES.keys() - {
        "not_permitted", "too_fast",
        "wrong_dimension", "wrong_clock", "too_many_streams", "draining", "deploy_refused",
    }  # fmt: skip
    assert min(said["refused"].values()) > 10
    assert said["snippets"] > 10 and said["publications"] > 10
    assert said["snippets_lost"] == said["snippets_missing"] == said["publications_lost"] == 0
    # What waits of each connection is bounded; a message that was kept would be seen.
    assert said["rss_bytes_after"] - said["rss_bytes_before"] < 64e6


@on_linux
@pytest.mark.parametrize(("leak_bytes", "status"), [(0, 0), (64_000, 1)])
def test_peers_come_go_and_stall(bundle: Bundle, leak_bytes: int, status: int) -> None:
    said = figures(
        "soak.py", "--minutes", 0.1, "--streams", 8, "--bundle", bundle.folder,
        "--leak-bytes", leak_bytes, "--limit", 400e6, status=status,
    )  # fmt: skip
    # A hop is 16 snippets, a step up to the 4 hops of a chunk: the leak is 1 to 4 GB in a million.
    # So short after its start an engine still grows by what it keeps, some 50 MB in a million.
    assert (said["slope_bytes_per_million_snippets"] > 400e6) == (leak_bytes > 0)
    assert said["publications"] > 100
    assert said["publications_missed"] == 0
    before, most, after = said["files"]
    assert before == after < most
    assert len(set(said["threads"])) == 1
    assert said["connections"] > 4


@contextlib.contextmanager
def thief(address: str, name: bytes) -> Iterator[None]:
    """A peer that has come under another one's name."""
    with RawPeer(address, name) as peer:
        peer.say([b"\xc1"])
        while not isinstance(peer.hear(), Error):
            pass  # an Ack of the other one
        yield


def test_a_peer_under_the_name_of_another_takes_nothing_from_it() -> None:
    """Not even one that knows the name, which is random: its connection is taken for a moment."""
    pipeline = TinyPipeline()
    with (
        serving(pipeline) as server,
        FeatureFeeder(server.feed_address, "good", DIM, CLOCK, retry_s=0.2) as feeder,
    ):
        name = feeder._line.socket.get(zmq.ROUTING_ID)
        for first in range(0, 12, 4):
            feeder.send(rows(first, first + 2))
            with thief(server.feed_address, name):
                feeder.send(rows(first + 2, first + 4))
                feeder.flush()
        with thief(server.feed_address, name):
            assert feeder.end().next_index == 12
    assert pipeline.received["good"] == [(index, index + 1.0) for index in range(12)]
