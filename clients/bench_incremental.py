"""What a snippet costs by steps and by windows, and what bounds a step.

    for each length P of attention's past, a bundle with random weights:
        B streams, hop 1 and 8:  a step with its gather and scatter  |  windows  |  products

All are measured in turn, on one thread, and medians are told. A step multiplies matrices, reads all
weights once, and reads the caches of its streams once: what would take longest by itself, at the
measured speed of a plain product and of memory, is what binds (the roofline).

The plain product multiplies with one matrix again and again, which stays in the cache. Beside it is
a chain of products with as many different matrices as the model's weights fill: no step can do
better, since it reads each weight once, too.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from hrpro.clients.bench_bundle import BenchModel, random_bundle
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.bare import BareSteps, BareWindows
from hrpro.engine.config import EngineConfig
from hrpro.export.bundle import Bundle

HOPS = (1, 8)
# Where the figures beside the table are taken.
_USUAL_PAST, _USUAL_BATCH = 64, 16
_FLATNESS_PASTS = (32, 128)
_LIMIT_PAST, _LIMIT_BATCH = 32, 64
# A window costs the same in any large batch: not more of them than an engine computes together, nor
# than these snippets fill.
_WINDOWS_IN_BATCH, _SNIPPETS_IN_WINDOWS = 16, 2304
_COPIED_BYTES = 256_000_000
# What takes a millisecond is done so often that the clock can tell.
_TIMED_S = 0.1

Works = dict[Any, Callable[[], object]]


@dataclass(frozen=True)
class Machine:
    """What it can do at most, on one thread."""

    gflop_per_s: float  # of a plain product
    gb_per_s: float
    chain_gflop_per_s: float  # of products that read as many bytes as a step


@dataclass(frozen=True)
class StepCost:
    """Of a snippet in a step of B streams: what is multiplied, and what is read for it."""

    gflop: float
    weights_bytes: float
    caches_bytes: float

    def bounds_ms(self, machine: Machine) -> dict[str, float]:
        """How long each would take by itself."""
        return {
            "products": 1e3 * self.gflop / machine.gflop_per_s,
            "weights": self.weights_bytes / machine.gb_per_s / 1e6,
            "caches": self.caches_bytes / machine.gb_per_s / 1e6,
        }


def measure(
    model: BenchModel, pasts: Sequence[int], batches: Sequence[int], rounds: int
) -> dict[str, Any]:
    """The table over pasts, batches and `HOPS`, and the figures of it; see the module.

    A figure whose rows are not in the table is null.
    """
    table: list[dict[str, Any]] = []
    for past in pasts:
        with tempfile.TemporaryDirectory() as made:
            bundle = random_bundle(replace(model, attention_past=past), Path(made) / "bundle")
            table += _rows(bundle, past, batches, rounds)
    return {**figures(table), "rounds": rounds, "table": table}


def figures(table: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """What is asked of the table most."""
    by_point = {(row["past"], row["batch"], row["hop"]): row for row in table}

    def ratio(upper: tuple[Any, ...], lower: tuple[Any, ...]) -> float | None:
        values = [
            by_point[point[:3]][point[3]] for point in (upper, lower) if point[:3] in by_point
        ]
        return values[0] / values[1] if len(values) == 2 else None

    def speedup(hop: int) -> float | None:
        point = (_USUAL_PAST, _USUAL_BATCH, hop)
        return ratio((*point, "window_ms_per_snippet"), (*point, "step_ms_per_snippet"))

    short, long = ((past, _USUAL_BATCH, 1, "step_ms_per_snippet") for past in _FLATNESS_PASTS)
    limit = (_LIMIT_PAST, _LIMIT_BATCH, 1)
    return {
        "speedup_hop1": speedup(1),
        "speedup_hop8": speedup(8),
        "flatness": ratio(long, short),
        "limit_share": ratio((*limit, "gflop_per_s"), (*limit, "plain_gflop_per_s")),
        "chain_share": ratio((*limit, "gflop_per_s"), (*limit, "chain_gflop_per_s")),
    }


def _rows(bundle: Bundle, past: int, batches: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Of one bundle."""
    manifest = bundle.manifest
    assert manifest.step is not None
    reach, width = manifest.context_snippets + manifest.lookahead_snippets, manifest.embedding_width
    # Of the graph of windows: that of steps has some twice, for what is constant.
    weights_bytes = bundle.snippet_graph.stat().st_size
    matrices = max(1, round(weights_bytes / (4 * width * width)))
    spent_s = _in_turn(_works(bundle, batches, reach, matrices), rounds)
    gflop = 2 * _LIMIT_BATCH * width * width / 1e9
    machine = Machine(
        gflop_per_s=gflop / spent_s["product"],
        gb_per_s=2 * _COPIED_BYTES / spent_s["copy"] / 1e9,  # read, and written
        chain_gflop_per_s=matrices * gflop / spent_s["chain"],
    )
    caches_bytes = sum(4 * int(np.prod(shape)) for shape in manifest.step.state.values())
    rows = []
    for batch, hop in itertools.product(batches, HOPS):
        together = _windows_together(batch, reach + hop)
        cost = StepCost(
            gflop=manifest.step.snippet_flops / 1e9,
            weights_bytes=weights_bytes / (batch * hop),
            caches_bytes=caches_bytes / hop,
        )
        step_s = spent_s["step", batch, hop] / (batch * hop)
        window_s = spent_s["window", together, hop] / (together * hop)
        rows.append(
            {"past": past, "batch": batch, "hop": hop, "window_snippets": reach + hop}
            | {"windows_in_batch": together}
            | _row(cost, machine, step_s, window_s)
        )
    return rows


def _row(cost: StepCost, machine: Machine, step_s: float, window_s: float) -> dict[str, Any]:
    """What one snippet takes each way, and what bounds a step."""
    bounds_ms = cost.bounds_ms(machine)
    return {
        "step_ms_per_snippet": 1e3 * step_s,
        "window_ms_per_snippet": 1e3 * window_s,
        "speedup": window_s / step_s,
        "gflop_per_snippet": cost.gflop,
        "gflop_per_s": cost.gflop / step_s,
        "weights_bytes_per_snippet": cost.weights_bytes,
        "caches_bytes_per_snippet": cost.caches_bytes,
        "plain_gflop_per_s": machine.gflop_per_s,
        "chain_gflop_per_s": machine.chain_gflop_per_s,
        "memory_gb_per_s": machine.gb_per_s,
        **{f"{name}_bound_ms": value for name, value in bounds_ms.items()},
        "binds": max(bounds_ms, key=lambda name: bounds_ms[name]),
    }


# ---- what is timed -------------------------------------------------------------------------------


def _windows_together(batch: int, window: int) -> int:
    return max(1, min(batch, _WINDOWS_IN_BATCH, _SNIPPETS_IN_WINDOWS // window))


def _config(inference: str) -> EngineConfig:
    return EngineConfig.model_validate({"threads": 1, "inference": inference})


def _works(bundle: Bundle, batches: Sequence[int], reach: int, matrices: int) -> Works:
    """All that is timed: the next hop of B streams is ("step", B, hop), so many windows in a batch
    ("window", how many, hop); a "chain" has so many matrices."""
    manifest = bundle.manifest
    config, window_config = _config("incremental"), _config("window")
    stepper, window_backend = (OnnxRuntimeBackend(bundle, each) for each in (config, window_config))
    works: Works = {"copy": _copy()}
    for hop in HOPS:
        steps = BareSteps(manifest, stepper, config, hop, max(batches))
        works |= {("step", batch, hop): _of(steps.run, batch) for batch in batches}
        # Beside the largest step of one snippet, which it is held against.
        works.setdefault("product", _products(_LIMIT_BATCH, manifest.embedding_width, 1))
        works.setdefault("chain", _products(_LIMIT_BATCH, manifest.embedding_width, matrices))
    for hop in HOPS:
        together = {_windows_together(batch, reach + hop) for batch in batches}
        windows = BareWindows(manifest, window_backend, reach + hop, max(together))
        works |= {("window", count, hop): _of(windows.run, count) for count in sorted(together)}
    return works


def _of(run: Callable[[int], object], count: int) -> Callable[[], object]:
    return lambda: run(count)


def _products(rows: int, width: int, matrices: int) -> Callable[[], object]:
    """(rows, W) @ (W, W) @ ... by ONNX Runtime, whose matrices are weights as in the model."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    # What comes of a product has the size of what goes into it.
    deviation = np.float32(width**-0.5)
    weights = [
        deviation * random.standard_normal((width, width), dtype=np.float32)
        for _ in range(matrices)
    ]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", [f"x{n}", f"weight{n}"], [f"x{n + 1}"])
            for n in range(matrices)
        ],
        "products",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [rows, width])],
        [helper.make_tensor_value_info(f"x{matrices}", TensorProto.FLOAT, [rows, width])],
        [numpy_helper.from_array(each, f"weight{n}") for n, each in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    x = random.standard_normal((rows, width), dtype=np.float32)
    return lambda: session.run(None, {"x0": x})


def _copy() -> Callable[[], object]:
    source = np.ones(_COPIED_BYTES // 4, dtype=np.float32)
    target = np.zeros_like(source)
    return lambda: np.copyto(target, source)


def _in_turn(works: Works, rounds: int) -> dict[Any, float]:
    """Median seconds of each; every other round goes the other way: what gets busier meets all."""
    times = {name: _repetitions(work) for name, work in works.items()}
    spent_s: dict[Any, list[float]] = {name: [] for name in works}
    for n in range(rounds):
        for name in list(works)[:: 1 if n % 2 else -1]:
            began_s = time.perf_counter()
            for _ in range(times[name]):
                works[name]()
            spent_s[name].append((time.perf_counter() - began_s) / times[name])
    return {name: statistics.median(each) for name, each in spent_s.items()}


def _repetitions(work: Callable[[], object]) -> int:
    """How often it is done in a round; it is warm then."""
    spent_s = 0.0
    for _ in range(2):
        began_s = time.perf_counter()
        work()
        spent_s = time.perf_counter() - began_s
        if spent_s > _TIMED_S:
            break  # the first time is the slowest, and it was long enough
    return max(1, min(1000, round(_TIMED_S / spent_s)))
