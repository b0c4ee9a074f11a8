"""`hrpro serve --check`: all that is wrong at once, and what follows from what is right."""

from __future__ import annotations

import json
import shutil
import socket
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from commands import ANYWHERE, hrpro, hrpro_json
from driving import engine_config
from tiny_model import CLASSES, CONTEXT, DIM, FUTURE, LOOKAHEAD, PAST

from hrpro.clients.serve_check import address_problems
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.deployment import Deployment
from hrpro.engine.event_log import EventLog
from hrpro.engine.footprint import stream_bytes
from hrpro.engine.serve import streams_and_events
from hrpro.engine.stream import Stream
from hrpro.export.bundle import MANIFEST, Bundle, content_id


def problems(*arguments: object) -> list[str]:
    said = hrpro("serve", *arguments, "--check", "--json", status=1)
    assert said.stderr == ""
    answer = json.loads(said.stdout)
    assert list(answer) == ["ok", "problems"]
    assert answer["ok"] is False
    return list(answer["problems"])


# ---- what follows --------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", ["window", "incremental"])
def test_derived_values(bundle: Bundle, inference: str) -> None:
    manifest, layout = bundle.manifest, bundle.manifest.step
    assert layout is not None
    said = hrpro_json(
        "serve", bundle.folder, "--check", "--set", "window.hop_snippets=4", "--set", "threads=1",
        "--set", "window.window_snippets=40", "--set", "max_streams=10", "--set", "max_batch=2",
        "--set", "backlog_snippets=24", "--set", "localization.history_snippets=100",
        "--set", "lookahead_s=5.12", "--set", f"inference={inference}",
        "--set", "cache_precision=fp16",
    )  # fmt: skip
    W, C = manifest.embedding_width, len(CLASSES)
    buffer_bytes = (40 + 24) * (4 * DIM + 1) + 4 * 100 * (W + C)
    if inference == "window":
        gflop = manifest.window_flops / 1e9 * 40 / manifest.window_length
        state_bytes, row_bytes = 0, 40 * (4 * DIM + 1)
    else:
        gflop = layout.snippet_flops / 1e9 * 4
        # Two blocks: keys and values, what waits for its future; the convolution's two rows.
        cache, rest = 2 * 2 * (PAST + FUTURE) * W, (2 * FUTURE + 2) * W
        state_bytes = 2 * cache + 4 * rest + layout.history
        row_bytes = 4 * (4 * DIM + cache + rest) + layout.history + 4
    assert said.pop("hop_ms") > 0
    batch_ms = said.pop("batch_ms")
    assert said.pop("streams_in_real_time") == int(1000 * 2.56 * 2 / batch_ms)
    assert said.pop("hop_gflop") == pytest.approx(gflop)
    assert said.pop("stream_gflop_per_s") == pytest.approx(gflop / 2.56)
    assert said == {
        "ok": True,
        "problems": [],
        "bundle_id": manifest.bundle_id,
        "classes": C,
        "feature_dim": DIM,
        "snippet_s": 0.64,
        "inference": inference,
        "window_snippets": 40,
        "window_s": 25.6,
        "hop_snippets": 4,
        "hop_s": 2.56,
        "context_snippets": 40 - 4 - LOOKAHEAD,
        "model_lookahead_snippets": LOOKAHEAD,
        "model_lookahead_s": pytest.approx(LOOKAHEAD * 0.64),
        "lookahead_s": 5.12,
        "buffer_bytes": buffer_bytes,
        "state_bytes": state_bytes,
        "stream_bytes": buffer_bytes + state_bytes,
        "max_streams": 10,
        "max_streams_bytes": 10 * (buffer_bytes + state_bytes),
        "batch_hops": 2,
        "batch_bytes": 2 * row_bytes,
    }


def test_a_stream_allocates_what_is_told(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    config = engine_config(bundle.manifest, hop=2, window=300, backlog=100)
    deployment = Deployment(bundle.manifest, backend, config)
    Stream("first", 1, 0, deployment)  # what all streams share
    tracemalloc.start()
    try:
        streams = [Stream(f"cam{n}", 1, 0, deployment) for n in range(50)]
        for stream in streams:
            stream.append(0, np.zeros((100, DIM), dtype=np.float32))
        allocated, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    told = stream_bytes(bundle.manifest, config)
    assert deployment.steps is not None
    own = streams[0].buffer_bytes
    assert (told.buffers, told.state) == (own, deployment.steps.stream_bytes)
    # Beside its rings a stream has some small objects: less than 10 KB.
    assert own <= allocated / len(streams) < own + 10_000


def test_people_are_told_too(bundle: Bundle) -> None:
    said = hrpro("serve", bundle.folder, "--check", "--set", "threads=1").stdout
    length = CONTEXT + 1 + LOOKAHEAD
    assert f"window      {length} snippets ({length * 0.64:.2f} s), hop 1 (0.64 s)\n" in said
    assert "compute     incremental, " in said
    assert " ms a step here, " in said
    assert said.endswith("OK\n")


def test_a_bundle_that_does_not_know_what_a_step_computes(bundle: Bundle, tmp_path: Path) -> None:
    older = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    content = json.loads((older / MANIFEST).read_text())
    del content["step"]["snippet_flops"]
    content["bundle_id"] = content_id(content)
    (older / MANIFEST).write_text(json.dumps(content))
    said = hrpro_json("serve", older, "--check", "--set", "threads=1")
    assert said["inference"] == "incremental"
    assert said["hop_gflop"] is None
    assert said["stream_gflop_per_s"] is None


def test_nothing_is_bound(bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = hrpro_json(
            "serve", bundle.folder, "--check", "--feed", f"tcp://127.0.0.1:{port}", "--events",
            "ipc:///tmp/no-such-folder/events", "--metrics", f"127.0.0.1:{port}",
        )  # fmt: skip
    assert said["ok"]


# ---- what is wrong -------------------------------------------------------------------------------


def test_all_that_is_wrong_is_listed(bundle: Bundle, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    (broken / "snippet.onnx").write_bytes(b"no graph")
    file = tmp_path / "engine.yaml"
    file.write_text("max_streams: 0\nlook_ahead_s: 3\n")
    said = problems(
        broken, "--config", file, "--set", "max_batch=many", "--set", "threads",
        "--feed", "tcp://localhost", "--events", "tcp://*:7771", "--control", "tcp://*:7771",
        "--metrics", "9100",
    )  # fmt: skip
    expected = [
        "--feed: expected tcp://HOST:PORT, ",
        "--control: expected its own address, got that of --events",
        "--events tcp://*:7771, --control tcp://*:7771: others than this machine can reach it",
        "--metrics: expected HOST:PORT",
        f"{broken / 'snippet.onnx'}: expected SHA-256 ",
        "--set threads: expected path=value",
        "max_streams: expected integer >= 1, came 0 ",
        "max_batch: expected integer >= 1 or null, came ",
        "look_ahead_s: no such setting, did you mean lookahead_s?",
    ]
    assert len(said) == len(expected)
    for start in expected:
        assert sum(line.startswith(start) for line in said) == 1, start


def test_settings_that_do_not_fit_the_bundle_are_listed(bundle: Bundle) -> None:
    said = problems(
        bundle.folder, "--set", "localization.border_limit=2", "--set", "lookahead_s=0.1",
        "--set", "localization.border_ratio=0.5", "--set", "window.window_snippets=3",
    )  # fmt: skip
    assert [line.split(":")[0] for line in said] == [
        "localization.border_ratio",
        "localization.border_limit",
        "window.window_snippets",
        "lookahead_s",
    ]


def test_a_state_folder_of_another_kind_of_engine(bundle: Bundle, tmp_path: Path) -> None:
    state = tmp_path / "state"
    hrpro("serve", bundle.folder, "--check", "--state", state)
    assert not state.exists()
    with EventLog(state) as log:
        log.belong(streams_and_events(bundle.manifest) | {"feature_dim": 9})
        (said,) = problems(bundle.folder, "--state", state)
    assert said.startswith(f"{state / 'events.db'}: belongs to an engine with ")
    assert hrpro_json("serve", bundle.folder, "--check", "--state", "none")["ok"]


def test_a_provider_that_is_not_here(bundle: Bundle) -> None:
    said = hrpro("serve", bundle.folder, "--check", "--set", "provider=cuda", status=1)
    assert said.stdout == ""
    assert "hrpro: provider cuda: expected ONNX Runtime to compute by CUDA" in said.stderr


def test_an_engine_needs_its_addresses(bundle: Bundle) -> None:
    said = hrpro("serve", bundle.folder, "--feed", "tcp://127.0.0.1:*", status=2)
    assert "--events: expected an address, came none" in said.stderr


def test_an_engine_is_told_whether_it_keeps_a_log(bundle: Bundle) -> None:
    sides = [part for side, at in vars(ANYWHERE).items() for part in (f"--{side}", at)]
    said = hrpro("serve", bundle.folder, *sides, status=2)
    assert "--state: expected a folder, or none" in said.stderr


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:5555", "tcp://*:*", "tcp://[::1]:0", "tcp://eth0:65535",
        "tcp://engine-1.local:1", "ipc:///run/hrpro/feed",
    ],
)  # fmt: skip
def test_an_address(address: str) -> None:
    assert address_problems({"feed": address}) == []


@pytest.mark.parametrize(
    "address",
    [
        "", "5555", "127.0.0.1:5555", "tcp://127.0.0.1", "tcp://:5555", "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:-1", "udp://127.0.0.1:5555", "inproc://feed", "ipc://",
    ],
)  # fmt: skip
def test_no_address(address: str) -> None:
    (problem,) = address_problems({"feed": address})
    assert problem.startswith("--feed: expected ") and problem.endswith(f"got {address}")


def test_free_ports_may_be_asked_for_more_than_once() -> None:
    assert address_problems(dict.fromkeys(("feed", "events", "control"), "tcp://*:*")) == []
