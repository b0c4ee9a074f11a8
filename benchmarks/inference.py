"""How close the exported snippet model comes to what the library can do, and what int8 brings.

    python benchmarks/inference.py [--dim 2048] [--classes 20] [--snippets 128] [--size full]

One window on one thread, in ONNX Runtime: GFLOP/s of the model beside those of a plain matrix
product of its largest layer, and the time in fp32, fp16 and int8. All in turn in one run: the
ratios count, absolute figures of a shared machine mean little.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils.flop_counter import FlopCounterMode

from hrpro.export.bundle import PRECISIONS
from hrpro.export.graphs import export_snippet_graph
from hrpro.export.precision import convert
from hrpro.training.config import ModelConfig
from hrpro.training.model import SnippetModel


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--snippets", type=int, default=128)
    parser.add_argument("--size", choices=("full", "lean"), default="full")
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    T, D = arguments.snippets, arguments.dim
    torch.manual_seed(0)
    model = SnippetModel(D, arguments.classes, ModelConfig(size=arguments.size)).eval()
    features = np.random.default_rng(0).standard_normal((1, T, D)).astype(np.float32)
    valid = np.ones((1, T), dtype=np.bool_)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.from_numpy(features), torch.from_numpy(valid))
    runs: dict[str, Callable[[], object]] = {}
    sizes_mb: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "fp32.onnx"
        export_snippet_graph(model, graph)
        for precision in PRECISIONS:
            path = Path(folder) / f"{precision}_.onnx"
            convert(graph, precision, path)
            sizes_mb[precision] = path.stat().st_size / 1e6
            session = _session(str(path))
            runs[precision] = lambda s=session: s.run(None, {"features": features, "valid": valid})
        W = model.width
        product = _session(_product(W, 3 * W).SerializeToString())
        x = np.random.default_rng(1).standard_normal((T, W)).astype(np.float32)
        runs["product"] = lambda: product.run(None, {"x": x})
        times_s = _in_turn(runs, arguments.repeats)
    flops = counter.get_total_flops()
    rate = {"product": 2 * T * W * 3 * W / times_s["product"] / 1e9}
    print(f"D = {D}, W = {W}, T = {T}, {flops / 1e9:.1f} GFLOP a window, one thread\n")
    print("| | MB | ms a window | GFLOP/s | of a plain product | times fp32 |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| plain product, {T} x {W} x {3 * W} | | | {rate['product']:.0f} | 1 | |")
    for precision in PRECISIONS:
        spent_s = times_s[precision]
        share = flops / spent_s / 1e9 / rate["product"]
        print(
            f"| {precision} | {sizes_mb[precision]:.0f} | {1000 * spent_s:.1f} | "
            f"{flops / spent_s / 1e9:.0f} | {share:.2f} | {times_s['fp32'] / spent_s:.2f} |"
        )


def _product(rows: int, columns: int) -> onnx.ModelProto:
    """x (T, rows) times a constant matrix."""
    weight = np.random.default_rng(2).standard_normal((rows, columns)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, columns])],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _session(model: str | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])


def _in_turn(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, one after the other so that other load meets all; the first round
    does not count."""
    times_s: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            started_s = time.perf_counter()
            run()
            if turn:
                times_s[name].append(time.perf_counter() - started_s)
    return {name: statistics.median(spent_s) for name, spent_s in times_s.items()}


if __name__ == "__main__":
    main()
