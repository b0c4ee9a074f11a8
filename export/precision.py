"""The graphs of stage 1 in fp16 or int8, for speed; the instance graph, small, stays fp32.

fp16 is for GPUs: a CPU casts to and fro. int8 has integer matrix products in place of those with a
constant matrix: weights have a scale for each column, inputs one for each row, taken as it comes:

    s = max |x| of the row      x / s in [-1, 1] -> uint8, 127 steps each way from 128
    y = s * (integer product) * scales

Weights have 64 steps each way, not 127. A processor without VNNI adds up two products in 16 bits,
and keeps what is too large at their limit: 255 * 127 * 2 is, 255 * 64 * 2 is not. So the integers
are the same on all of them.

So a snippet is rounded by itself: what else is in the batch, loud or not, changes nothing of it,
and a step gives what a window gives.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from hrpro.export.bundle import Precision
from hrpro.export.verify import TOLERANCES

# By how much the outputs of golden windows may differ from machine to machine: what is rounded up
# on one may be rounded down on another.
GOLDEN_TOLERANCES: dict[Precision, dict[str, float]] = {
    "fp32": TOLERANCES,
    "fp16": TOLERANCES | {"scores": 1e-2, "embedding": 5e-2},
    "int8": TOLERANCES | {"scores": 5e-2, "embedding": 5e-1},
}

_STEPS = 127  # each way
_WEIGHT_STEPS = 64
_SILENCE = 1e-12  # the smallest scale: a row of zeros stays one
_MICROSOFT = "com.microsoft"


def convert(graph: Path, precision: Precision, out: Path) -> None:
    """Write a graph of stage 1 in another precision; inputs and outputs stay float32."""
    conversions: dict[Precision, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
        "fp32": lambda model: model,
        "fp16": _in_half,
        "int8": _in_integers,
    }
    onnx.save(conversions[precision](onnx.load(graph)), out)


def _in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    half = OnnxModel(convert_float_to_float16(model, keep_io_types=True))
    half.topological_sort()  # the casts stand at the end
    onnx.checker.check_model(half.model, full_check=True)
    return half.model


def _in_integers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Each product with a constant matrix in int8."""
    graph = model.graph
    weights = {each.name: each for each in graph.initializer if len(each.dims) == 2}
    fixed = {"", *(each.name for each in graph.initializer)}
    integers = _Integers()
    nodes = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            is_fixed = node.input[0] in fixed
            nodes += integers.product(node, weights[node.input[1]], is_fixed)
        else:
            nodes.append(node)
        if fixed.issuperset(node.input):
            fixed.update(node.output)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(integers.constants)
    used = {name for node in nodes for name in node.input}
    kept = [each for each in graph.initializer if each.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    model.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))
    onnx.checker.check_model(model)
    return model


class _Integers:
    """Nodes of integer products and their constants; rows and weights that are used more than once
    are rounded once."""

    def __init__(self) -> None:
        self.constants: list[onnx.TensorProto] = []
        self._known: set[str] = set()
        self._constant("int8/axis", np.array([-1]))
        self._constant("int8/silence", np.float32(_SILENCE))
        self._constant("int8/unit", np.float32(1 / _STEPS))
        self._constant("int8/middle", np.uint8(128))

    def product(
        self, node: onnx.NodeProto, weight: onnx.TensorProto, is_fixed: bool
    ) -> list[onnx.NodeProto]:
        """In place of a float product ``node`` with ``weight``.

        What ``is_fixed``, as it derives from the prototypes alone, gets the operators of ONNX: that
        of ONNX Runtime is quicker, but not one that it computes when it loads a graph.
        """
        (x, w), (y,) = node.input, node.output
        if f"{w}/int8" not in self._known:
            rounded, scales = rounded_columns(numpy_helper.to_array(weight))
            self._constant(f"{w}/int8", rounded)
            self._constant(f"{w}/scales", scales)
            self._constant(f"{w}/unit", scales * np.float32(1 / _STEPS))
            self._constant(f"{w}/zero", np.zeros_like(scales, np.int8))
        a, b = f"{x}/uint8", f"{w}/int8"
        if is_fixed:
            made = [
                helper.make_node("MatMulInteger", [a, b, "int8/middle"], [f"{y}/int32"]),
                helper.make_node("Cast", [f"{y}/int32"], [f"{y}/float"], to=onnx.TensorProto.FLOAT),
                helper.make_node("Mul", [f"{y}/float", f"{w}/unit"], [f"{y}/s"]),
            ]
        else:
            inputs = [a, b, "int8/unit", f"{w}/scales", "int8/middle", f"{w}/zero"]
            made = [helper.make_node("MatMulIntegerToFloat", inputs, [f"{y}/s"], domain=_MICROSOFT)]
        return [
            *self._rounded_rows(x),
            *made,
            helper.make_node("Mul", [f"{y}/s", f"{x}/scale"], [y]),
        ]

    def _rounded_rows(self, x: str) -> list[onnx.NodeProto]:
        if f"{x}/uint8" in self._known:
            return []
        self._known.add(f"{x}/uint8")
        return [
            helper.make_node("Abs", [x], [f"{x}/abs"]),
            helper.make_node("ReduceMax", [f"{x}/abs", "int8/axis"], [f"{x}/largest"], keepdims=1),
            helper.make_node("Max", [f"{x}/largest", "int8/silence"], [f"{x}/scale"]),
            helper.make_node("Div", [x, f"{x}/scale"], [f"{x}/unit"]),
            helper.make_node(
                "QuantizeLinear", [f"{x}/unit", "int8/unit", "int8/middle"], [f"{x}/uint8"]
            ),
        ]

    def _constant(self, name: str, value: NDArray[np.generic] | np.generic) -> None:
        self._known.add(name)
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))


def rounded_columns(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A matrix (K, N) as int8 in [-64, 64] and a scale (N,) for each column."""
    largest = np.maximum(np.abs(weight).max(axis=0), _SILENCE)
    scales = (largest / _WEIGHT_STEPS).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales
