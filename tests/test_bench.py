"""`hrpro bench`: what it computes from what it measures, and that it measures what it says."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import PATIENCE_S, environment, hrpro, hrpro_json

from hrpro.clients import bench_cameras
from hrpro.clients.bench_bundle import BenchError, material
from hrpro.clients.bench_cameras import ChunkHeader
from hrpro.clients.bench_engine import Published, added_latency_ms, cpu_seconds
from hrpro.clients.bench_engine_process import Calls, bench_engine
from hrpro.clients.bench_feeder import Fed
from hrpro.clients.bench_incremental import Machine, StepCost
from hrpro.clients.bench_incremental import figures as incremental_figures
from hrpro.clients.bench_memory import Growth, median_slope, resident_bytes
from hrpro.engine import protocol
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.config import EngineConfig
from hrpro.engine.messages import FinalProposal, StreamNotice
from hrpro.export.bundle import Bundle

on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")


# ---- the figures ---------------------------------------------------------------------------------


def final(published_index: int) -> FinalProposal:
    return FinalProposal(
        stream="cam0", session=1, sequence=0, id=0, label="a", start_s=0.0, end_s=1.0, score=0.5,
        published_index=published_index, published_s=4.0, action_id=None, bundle_id="b",
    )  # fmt: skip


def test_added_latency_is_without_the_time_of_inference() -> None:
    # Snippets at 10, 20 and 30 s; the last one is known to be the last by the end alone.
    fed = Fed(0.0, 40.0, {"cam0": [10.0, 20.0, 30.0]})
    calls = Calls(
        snippet_stage=np.array([[9.5, 10.25], [10.5, 11.0], [20.0, 20.5]]),
        instance_stage=np.array([[11.25, 11.5]]),
    )
    published = [
        Published(final(0), 12.0),  # 2 s, of them 0.25, 0.5 and 0.25 of inference
        Published(final(1), 20.75),  # 0.75 s, of them 0.5
        Published(final(1), 20.25),  # inference had begun, and went on for others
        Published(final(2), 31.0),
        Published(replace(final(1), stream="other"), 20.25),
        Published(StreamNotice("cam0", 1, 0, "ended", 0, 3, 0, 0), 31.0),
    ]
    added, whole = added_latency_ms(fed, published, calls)
    assert added.tolist() == [1000.0, 250.0, 0.0]
    assert whole.tolist() == [2000.0, 750.0, 250.0]


@pytest.mark.parametrize("first_index", [0, 127, 128, 255, 256, 65536, 2**32, 2**53 - 1])
def test_the_header_of_a_cameras_chunk_is_the_protocols(first_index: int) -> None:
    # A stream named like the field, whose name is what the index is found by.
    for stream in ("cam0", "first_index"):
        chunk = protocol.Chunk(stream, first_index, np.ones((1, 2048), dtype=np.float32))
        header, _ = protocol.encode(chunk)
        assert ChunkHeader(stream, 2048).of(first_index) == header


@pytest.mark.parametrize(
    ("y", "slope"),
    [
        ([0, 2, 4, 6, 8, 10, 12], 2.0),
        ([5, 5, 5, 5, 5, 5, 5], 0.0),
        ([0, 0, 0, 900, 0, 0, 0], 0.0),  # one sample is off
        ([0, 1, 2, 3, 4, 5, 500], 1.0),
    ],
)
def test_a_slope_that_single_samples_do_not_bend(y: list[float], slope: float) -> None:
    assert median_slope(np.arange(7.0), np.array(y, dtype=float)) == slope


def test_the_time_of_a_process_is_told_finer_than_in_ticks() -> None:
    before_s = time.process_time()
    told_s = cpu_seconds(os.getpid())
    assert before_s < told_s < time.process_time()


def test_the_time_of_a_process_that_is_over() -> None:
    over = subprocess.Popen([sys.executable, "-c", ""])
    over.wait()
    with pytest.raises(BenchError, match=f"process {over.pid}: expected its clock"):
        cpu_seconds(over.pid)


def test_growth_is_told_without_the_warm_up() -> None:
    snippets = np.arange(1, 11) * 1000.0
    rss = np.where(snippets <= 2000, snippets * 500, 1e6 + 3 * snippets)
    assert Growth(snippets, rss).slope_bytes_per_million == pytest.approx(3e6)


def test_figures_of_the_table_of_steps_and_windows() -> None:
    def row(past: int, batch: int, hop: int, step_ms: float, window_ms: float) -> dict[str, float]:
        return {
            "past": past, "batch": batch, "hop": hop, "step_ms_per_snippet": step_ms,
            "window_ms_per_snippet": window_ms, "gflop_per_s": 60.0, "plain_gflop_per_s": 80.0,
            "chain_gflop_per_s": 75.0,
        }  # fmt: skip

    table = [row(32, 16, 1, 2, 70), row(64, 16, 1, 2.5, 150), row(64, 16, 8, 2, 20)]
    table += [row(32, 64, 1, 1, 70), row(64, 64, 1, 1, 7), row(128, 16, 1, 3, 300)]
    assert incremental_figures(table) == {
        "speedup_hop1": 60.0,
        "speedup_hop8": 10.0,
        "flatness": 1.5,
        "limit_share": 0.75,
        "chain_share": 0.8,
    }
    assert incremental_figures(table[:2]) == {
        "speedup_hop1": 60.0,
        "speedup_hop8": None,
        "flatness": None,
        "limit_share": None,
        "chain_share": None,
    }


def test_what_a_step_would_take_for_products_and_for_what_it_reads() -> None:
    cost = StepCost(gflop=0.1, weights_bytes=300e6, caches_bytes=4e6)
    bounds_ms = cost.bounds_ms(Machine(gflop_per_s=50, gb_per_s=10, chain_gflop_per_s=40))
    assert bounds_ms == pytest.approx({"products": 2.0, "weights": 30.0, "caches": 0.4})


@on_linux
def test_resident_memory() -> None:
    program = "import sys; x = b'x' * 50_000_000; print(1, flush=True); sys.stdin.read()"
    sizes = []
    for size in (50, 100):
        with subprocess.Popen(
            [sys.executable, "-c", program.replace("50", str(size))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            sizes.append(resident_bytes(process.pid))
            process.kill()
    assert 49e6 < sizes[1] - sizes[0] < 52e6


def test_material_has_quiet_and_loud_stretches(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    shares = []
    for quiet_share in (0.8, 0.2):
        recording = material(bundle, backend, quiet_share, 600)
        assert recording.shape == (600, bundle.manifest.feature_dim)
        assert recording.dtype == np.float32
        scores, _, _ = backend.score_snippets(recording[None], np.ones((1, 600), dtype=np.bool_))
        highest = scores[0].max(axis=1)
        shares.append(float(np.mean(highest > 0.5 * highest.max())))
    assert shares[0] < 0.35 < 0.65 < shares[1]


# ---- the commands --------------------------------------------------------------------------------


@on_linux
@pytest.mark.parametrize("stands_still", [False, True])
def test_cameras_at_their_pace(
    bundle: Bundle,
    backend: OnnxRuntimeBackend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stands_still: bool,
) -> None:
    monkeypatch.setattr(bench_cameras, "_SETTLE_S", 1.5)
    monkeypatch.setattr(bench_cameras, "_SILENCE_S", 2.0 if stands_still else PATIENCE_S)
    clock = bundle.manifest.clock
    recording = material(bundle, backend, 0.5, 100)
    streams, seconds = 5, 3.0
    phases = np.random.default_rng(0).random(streams).tolist()
    sent = sum(math.ceil(seconds / clock.snippet_s - phase) for phase in phases)
    with (
        bench_engine(bundle.folder, EngineConfig(threads=1), tmp_path / "calls") as engine,
        contextlib.ExitStack() as stack,
    ):
        feed = bench_cameras._cameras(engine.addresses.feed, recording, clock)
        if stands_still:
            # While it settles, or before or after that: in any case for most of what is measured.
            stop = threading.Timer(4.0, os.kill, (engine.pid, signal.SIGSTOP))
            stack.callback(os.kill, engine.pid, signal.SIGCONT)
            stack.callback(stop.join)
            stop.start()
        live = bench_cameras.Live(**feed([streams, 4, seconds, 1, engine.pid]))
    assert (live.streams, live.tries, live.snippets, live.drops) == (streams, 1, sent, 0)
    p50, p99, longest = live.latency_ms
    assert 0 < p50 <= p99 <= longest
    assert live.ended_s - live.began_s >= seconds - clock.snippet_s
    assert live.keeps_up(math.inf) != stands_still
    assert (live.unanswered > streams) == stands_still
    if not stands_still:
        assert min(live.engine_cpu_s, live.feeder_cpu_s) > 0


@on_linux
@pytest.mark.parametrize("inference", ["window", "incremental"])
def test_the_engine_beside_bare_inference(bundle: Bundle, inference: str) -> None:
    said = hrpro_json(
        "bench", "engine", "--bundle", bundle.folder, "--window", 32, "--hop", 2, "--streams", 3,
        "--batch", 4, "--rounds", 2, "--hops", 6, "--paced", 30, "--idle", 30, "--no-small",
        "--set", "backlog_snippets=4000", "--set", "localization.history_snippets=4000",
        "--set", f"inference={inference}",
    )  # fmt: skip
    assert said["ratio"] == pytest.approx(
        said["engine_snippets_per_s"] / said["bare_snippets_per_s"]
    )
    assert len(said["ratio_of_rounds"]) == 2
    assert min(said["ratio_of_rounds"]) <= said["ratio"] <= max(said["ratio_of_rounds"])
    assert said["snippets"] == 2 * 3 * 6 * 2
    assert said["messages_at_half_load"] > 0
    for kind in ("added_latency_ms", "whole_latency_ms"):
        assert list(said[kind]) == ["p50", "p99"]
    assert 0 < said["added_latency_ms"]["p50"] < said["whole_latency_ms"]["p50"]
    W, C, D = bundle.manifest.embedding_width, len(bundle.manifest.classes), 8
    rings = (32 + 4000) * (4 * D + 1) + 4 * 4000 * (W + C)
    if inference == "incremental":
        assert bundle.manifest.step is not None
        state = bundle.manifest.step.state.values()
        rings += 4 * sum(int(np.prod(shape)) for shape in state) + bundle.manifest.step.history
    assert said["model"]["inference"] == inference
    assert said["told_bytes_per_stream"] == rings
    assert said["idle_streams"] == 30
    # All pages of the rings are there. They are so small that what sockets keep shows beside them.
    assert 0.9 < said["rss_bytes_per_stream"] / rings == pytest.approx(said["rss_ratio"])
    assert said["rss_ratio"] < 4


def test_steps_beside_windows() -> None:
    said = hrpro_json(
        "bench", "incremental", "--dim", 16, "--classes", 3, "--past", 64, "--batch", 2,
        "--batch", 16, "--rounds", 1,
    )  # fmt: skip
    table = said.pop("table")
    rows = {(row["past"], row["batch"], row["hop"]): row for row in table}
    assert list(rows) == [(64, 2, 1), (64, 2, 8), (64, 16, 1), (64, 16, 8)]
    assert said == {
        "speedup_hop1": pytest.approx(rows[64, 16, 1]["speedup"]),
        "speedup_hop8": pytest.approx(rows[64, 16, 8]["speedup"]),
        "flatness": None,
        "limit_share": None,
        "chain_share": None,
        "rounds": 1,
    }
    # Two blocks: query, keys, values, output, feed-forward; and heads, the old keys and its own.
    W, C, P = 16, 3, 64
    products = (2 * 8 + 3) * W * W + W * (C + 1) + 2 * 2 * W * (P + 1 + C)
    for (_, batch, hop), row in rows.items():
        # Two blocks reach 2 P back, the convolution one both ways.
        assert row["window_snippets"] == 2 * P + 2 + hop
        assert row["windows_in_batch"] == batch
        assert row["speedup"] == pytest.approx(
            row["window_ms_per_snippet"] / row["step_ms_per_snippet"]
        )
        assert row["gflop_per_snippet"] == pytest.approx(2e-9 * products)
        assert row["gflop_per_s"] == pytest.approx(2e-6 * products / row["step_ms_per_snippet"])
        # Keys and values of both blocks, and the two rows of the convolution.
        assert row["caches_bytes_per_snippet"] == 4 * (4 * P * W + 2 * W) / hop
        assert row["weights_bytes_per_snippet"] * batch * hop == pytest.approx(
            rows[64, 16, 8]["weights_bytes_per_snippet"] * 16 * 8
        )
        bounds = {name: row[f"{name}_bound_ms"] for name in ("products", "weights", "caches")}
        assert bounds[row["binds"]] == max(bounds.values())
    # A window of 131 snippets for each one, beside one new row each.
    assert said["speedup_hop1"] > said["speedup_hop8"] > 1


@on_linux
@pytest.mark.parametrize(("leak_bytes", "flat"), [(0, True), (16_000, False)])
def test_memory_is_flat_and_a_leak_is_seen(bundle: Bundle, leak_bytes: int, flat: bool) -> None:
    # A hop is 16 snippets, a step up to the 4 hops of a chunk: the leak is 250 to 1000 MB in a
    # million. So short after its start an engine still grows by what it keeps, at a rate of some
    # 20 MB in a million.
    said = hrpro(
        "bench", "memory", "--bundle", bundle.folder, "--snippets", 40_000, "--streams", 8,
        "--leak-bytes", leak_bytes, "--limit", 100_000_000, "--json", status=0 if flat else 1,
    )  # fmt: skip
    figures = json.loads(said.stdout)
    assert figures["flat"] is flat
    assert figures["snippets"] >= 40_000
    if not flat:
        assert 200e6 < figures["slope_bytes_per_million_snippets"] < 1200e6


def test_without_torch_it_says_what_is_missing() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "sys.argv = ['hrpro', 'bench', 'engine', '--json']\n"
        "from hrpro.clients.cli import main; main()"
    )
    said = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=environment(),
    )
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.startswith("hrpro: hrpro bench: expected the package torch, ")
    assert "pip install hrpro-stream[train]" in said.stderr
