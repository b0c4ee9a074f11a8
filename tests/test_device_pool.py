"""Pools in memory of a device: the same code as on a GPU, bound on the CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from driving import Drive, assert_same, engine_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_model import (
    CONTEXT,
    DIM,
    LOOKAHEAD,
    tiny_config,
    tiny_description,
    tiny_model,
    tiny_recording,
)

from hrpro.clients.bench_memory import resident_bytes
from hrpro.engine.backends import device_pool
from hrpro.engine.backends.device_pool import DevicePool, PooledSession
from hrpro.engine.backends.onnxruntime import InstanceStage, OnnxRuntimeBackend
from hrpro.engine.backends.session import CPU_PROVIDER
from hrpro.engine.config import EngineConfig
from hrpro.engine.deployment import Deployment
from hrpro.engine.incremental import Floats, Pool, Stepped, new_pool, runs_by_steps
from hrpro.engine.noted import NotedBackend
from hrpro.engine.settings import SettingsError
from hrpro.export.bundle import Bundle, BundleError
from hrpro.export.export import export_bundle
from hrpro.export.golden import check_golden
from hrpro.export.pooled import pooled_graph

SLOTS = 4
few = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def pooled(bundle: Bundle, **changes: object) -> PooledSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    config = EngineConfig.model_validate(changes)
    return PooledSession(bundle, config, options, [CPU_PROVIDER], "cpu")


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> PooledSession:
    return pooled(bundle)


class DeviceBackend(InstanceStage):
    """As `OnnxRuntimeBackend` on a GPU, but for where that is."""

    def __init__(self, bundle: Bundle, **changes: object) -> None:
        super().__init__(bundle, EngineConfig(threads=1))
        self.pooled = pooled(bundle, **changes)
        self.pools: list[DevicePool] = []
        self.score_snippets = self.pooled.whole

    def score_step(self, *_: object) -> Stepped:
        raise AssertionError("the state is on the device")

    def device_pool(self, slots: int) -> DevicePool:
        self.pools.append(self.pooled.new_pool(slots))
        return self.pools[-1]


@dataclass
class Streams:
    """What a pool is fed: of each slot what comes next, and where that arrives."""

    random: np.random.Generator
    arrival: NDArray[np.int64] = field(default_factory=lambda: np.zeros(SLOTS, np.int64))

    def step(self, pools: list[Pool], slots: list[int], n: int, begin: bool) -> list[Floats]:
        """The next n snippets of these slots, a third of which are missing; all outputs by pool."""
        own = np.array(slots)
        if begin:
            self.arrival[own] = self.random.integers(0, 1000, len(own))
        features = self.random.standard_normal((len(own), n, DIM)).astype(np.float32)
        new = self.random.random((len(own), n)) < 2 / 3
        outputs = []
        for pool in pools:
            if begin:
                for slot in slots:
                    pool.reset(slot)
            flags = np.concatenate([pool.flags(own), new], axis=1)
            scores, embedding, attention = pool.step(features, flags, own, self.arrival[own])
            outputs.append(np.concatenate([scores, embedding, attention[..., None]], axis=-1))
        self.arrival[own] += n
        return outputs


# Which slots, how many snippets (the rings hold 7), whether these streams begin.
some_slots = st.sets(st.integers(0, SLOTS - 1), min_size=1).map(sorted)
step = st.tuples(some_slots, st.integers(1, 17), st.sampled_from([False, False, True]))


@few
@given(steps=st.lists(step, min_size=1, max_size=15), seed=st.integers(0, 2**32 - 1))
def test_a_device_keeps_what_the_host_keeps(
    bundle: Bundle,
    backend: OnnxRuntimeBackend,
    session: PooledSession,
    steps: list[tuple[list[int], int, bool]],
    seed: int,
) -> None:
    layout = bundle.manifest.step
    assert layout is not None
    assert layout.capacity == 7
    device = session.new_pool(SLOTS)
    pools = [new_pool(backend, layout, SLOTS, np.float32), device]
    addresses = {name: part.data_ptr() for name, part in device._parts.items()}
    streams = Streams(np.random.default_rng(seed))
    for slots, n, begin in steps:
        host_scores, device_scores = streams.step(pools, slots, n, begin)
        np.testing.assert_allclose(device_scores, host_scores, atol=1e-5)
    for name, host_part in zip(layout.state, pools[0]._parts, strict=True):  # type: ignore[attr-defined]
        # What is reset and not written yet is forgotten in the next step.
        np.testing.assert_allclose(device._parts[name].numpy(), host_part, atol=1e-5)
    assert {name: part.data_ptr() for name, part in device._parts.items()} == addresses


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_a_step_touches_its_slots_alone(bundle: Bundle, session: PooledSession) -> None:
    """Memory of zeros is not there before it is written to: a copy of the pool would be seen."""
    layout, pid = bundle.manifest.step, os.getpid()
    assert layout is not None
    slots = 200_000
    streams = Streams(np.random.default_rng(0))
    streams.step([session.new_pool(2)], [0, 1], 3, begin=True)
    pool = session.new_pool(slots)
    pool_bytes = sum(4 * slots * int(np.prod(shape)) for shape in layout.state.values())
    assert pool_bytes > 200e6
    before = resident_bytes(pid)
    for _ in range(5):
        streams.step([pool], [0, 3], 3, begin=False)
    assert resident_bytes(pid) - before < pool_bytes / 20


def test_results_are_not_written_over(session: PooledSession) -> None:
    pool = session.new_pool(1)
    streams = Streams(np.random.default_rng(0))
    features = np.ones((1, 3, DIM), np.float32)
    flags, slot = np.ones((1, pool.flags(np.array([0])).shape[1] + 3), np.bool_), np.array([0])
    first, _, _ = pool.step(features, flags, slot, np.array([0]))
    copy = first.copy()
    streams.step([pool], [0], 3, begin=False)
    np.testing.assert_array_equal(first, copy)
    assert features.tolist() == np.ones((1, 3, DIM)).tolist()  # nor is what came in


def test_memory_for_batches_is_bounded(
    session: PooledSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_pool, "_ROWS_BOUND", 12)
    pool = session.new_pool(SLOTS)
    streams = Streams(np.random.default_rng(0))
    for _ in range(3):
        streams.step([pool], [0, 1], 2, begin=False)
        streams.step([pool], [0, 1], 1, begin=False)
    assert list(pool._bound) == [(2, 2), (2, 1)]
    kept = pool._bound[2, 1]
    streams.step([pool], [0], 7, begin=False)  # 13 rows: the one that was used longest ago goes
    assert list(pool._bound) == [(2, 1), (1, 7)]
    streams.step([pool], [0, 1], 1, begin=False)
    assert pool._bound[2, 1] is kept
    streams.step([pool], [0, 1], 17, begin=False)  # more than that, as long as it is the last
    assert list(pool._bound) == [(2, 17)]


@pytest.mark.parametrize(("blocks", "future"), [(0, 0), (1, 0)])
def test_models_without_rings_or_without_a_future(blocks: int, future: int, tmp_path: Path) -> None:
    config = tiny_config()
    model = config.model.model_copy(update={"blocks": blocks, "attention_future": future})
    config = config.model_copy(update={"model": model})
    bundle = export_bundle(tiny_description(config), tiny_model(config), {}, tmp_path / "bundle")
    layout = bundle.manifest.step
    assert layout is not None
    assert layout.state.keys() == {"tail", *(["keys_0", "values_0"] if blocks else [])}
    backend = OnnxRuntimeBackend(bundle, EngineConfig(threads=1))
    pools = [new_pool(backend, layout, SLOTS, np.float32), pooled(bundle).new_pool(SLOTS)]
    streams = Streams(np.random.default_rng(2))
    for turn in range(12):
        host, device = streams.step(pools, [1, 3], 1 + turn % 8, begin=turn in (0, 7))
        np.testing.assert_allclose(device, host, atol=1e-5)


def test_half_precision_keeps_keys_and_values(
    bundle: Bundle, backend: OnnxRuntimeBackend, session: PooledSession
) -> None:
    layout = bundle.manifest.step
    assert layout is not None
    device = pooled(bundle, cache_precision="fp16").new_pool(SLOTS)
    exact = session.new_pool(SLOTS)
    pools = [new_pool(backend, layout, SLOTS, np.float16), device, exact]
    streams = Streams(np.random.default_rng(5))
    differences = []
    for turn in range(30):
        host, got, full = streams.step(pools, [0, 2, 3], 1 + turn % 9, begin=turn == 0)
        np.testing.assert_allclose(got, host, atol=1e-5)
        differences.append(np.abs(got - full).max())
    assert 1e-5 < max(differences) < 1e-1
    kinds = {name: part.numpy().dtype for name, part in device._parts.items()}
    assert kinds["keys_0"] == kinds["values_1"] == np.float16
    assert kinds["tail"] == kinds["waiting_0"] == np.float32


def test_golden_windows_show_a_pool_that_is_wrong(bundle: Bundle) -> None:
    """Here new rows go one place too far."""
    device = DeviceBackend(bundle)

    class Wrong(DevicePool):
        def _places(self, arrival: NDArray[np.int64], n: int) -> NDArray[np.int64]:
            return super()._places(arrival + 1, n)

    session = device.pooled
    layout = session._layout
    session.new_pool = lambda slots: Wrong(  # type: ignore[method-assign]
        session.session, layout, slots, np.float32, "cpu"
    )
    with pytest.raises(BundleError, match="this machine computes otherwise"):
        check_golden(bundle, device)


def test_golden_windows_go_through_the_pool(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    device = DeviceBackend(bundle)
    for each in (device, DeviceBackend(bundle, cache_precision="fp16")):
        assert max(check_golden(bundle, each).values()) < 1e-5
    draw = np.random.default_rng(1)
    for length in (1, 5, CONTEXT + LOOKAHEAD + 20):
        features = draw.standard_normal((3, length, DIM)).astype(np.float32)
        valid = draw.random((3, length)) < 0.8
        pairs = zip(
            device.score_snippets(features, valid),
            backend.score_snippets(features, valid),
            strict=True,
        )
        for got, wanted in pairs:
            np.testing.assert_allclose(got[valid], wanted[valid], atol=1e-5)


def test_an_engine_publishes_the_same(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    """From the first snippet to the end, with streams that come and go; steps are noted."""
    device = DeviceBackend(bundle)
    noted: list[tuple[str, int]] = []
    measured = NotedBackend(device, lambda stage, rows, *_: noted.append((stage, rows)))
    recordings = {name: tiny_recording(40, seed) for seed, name in enumerate("abc")}
    drives = []
    for each in (backend, measured):
        drive = Drive(bundle.manifest, each, engine_config(bundle.manifest), recordings)
        drive.send("a", 5)
        drive.settle()
        drive.pipeline.rest("a")
        drives.append(drive.finish(chunk=3))
    assert_same(drives[1], drives[0])
    assert len(drives[0]) > 10
    assert device.pools
    assert sum(rows for stage, rows in noted if stage == "snippet") > 40


def test_a_deployment_is_warm_in_a_pool_of_all_streams(bundle: Bundle) -> None:
    """What does not fit the device is found before the engine is ready."""
    device = DeviceBackend(bundle)
    config = engine_config(bundle.manifest, max_streams=5, max_batch=8)
    Deployment(bundle.manifest, device, config).warm_up(device)
    (pool,) = device.pools
    assert sorted(pool._bound) == [(1, 1), (2, 1), (4, 1), (8, 1)]
    assert {part.shape()[0] for part in pool._parts.values()} == {8}


def test_the_graph_is_valid(bundle: Bundle) -> None:
    layout, graph = bundle.manifest.step, bundle.step_graph
    assert layout is not None
    assert graph is not None
    for half in (False, True):
        model = onnx.load_from_string(pooled_graph(graph, layout, half))
        onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_is_written_before_it_is_read(
    bundle: Bundle, precision: str, tmp_path: Path
) -> None:
    """In what ONNX Runtime has made of the graph: it looks for what can be left out."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # that the file is for this machine alone
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    config = EngineConfig.model_validate({"cache_precision": precision})
    PooledSession(bundle, config, options, [CPU_PROVIDER], "cpu")
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    made_by = {name: node for node in graph.node for name in node.output}

    def read_before(node: onnx.NodeProto) -> set[str]:
        """Pools that are read so that this node can run."""
        own = {node.input[0]} if node.op_type == "Gather" else set()
        return own.union(*(read_before(made_by[name]) for name in node.input if name in made_by))

    written = {node.input[0]: node for node in graph.node if node.op_type == "ScatterND"}
    assert bundle.manifest.step is not None
    assert written.keys() == {f"pool/{name}" for name in bundle.manifest.step.state}
    for name, node in written.items():
        assert name in read_before(node)


def test_without_onnx_a_gpu_computes_windows(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert not runs_by_steps(bundle.manifest, EngineConfig(provider="cuda"))
    assert runs_by_steps(bundle.manifest, EngineConfig())
    with pytest.raises(SettingsError, match="expected the package onnx for provider cuda"):
        runs_by_steps(bundle.manifest, EngineConfig(provider="cuda", inference="incremental"))
