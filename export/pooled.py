"""step.onnx as a graph that keeps the state of all streams in pools, for a device that holds them.

    features (B, n, D), valid (B, history + n), arrival (B,), as for step.onnx,
    slots (B,) of these streams, fresh (B,) where one begins, places (B, min(n, capacity)) of the
    newest rows in the rings, and for each part of the state pool/NAME (slots, ...)
    -> scores (B, n, C), embedding (B, n, W), attention (B, n), and for each part pool/new_NAME

A pool is bound to its input and to its output. ONNX Runtime's ScatterND does not copy where these
are the same memory, on the CPU as on CUDA (core/providers/*/tensor/scatter_nd.cc): then a step
writes the new rows, and touches nothing else.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from hrpro.export.bundle import StepLayout

# Outputs for the host.
_KEPT = ("scores", "embedding", "attention")
_TO_THE_END = np.iinfo(np.int64).max


def pooled_graph(step_graph: Path, layout: StepLayout, half: bool) -> bytes:
    """The graph; ``layout`` is that of ``step_graph``, ``half`` keeps keys and values as float16.

    An input that nothing reads is left out: `arrival` and `places`, if there are no rings.
    """
    model = onnx.load(step_graph)
    graph = model.graph
    del graph.value_info[:]
    before, after = _indices(layout), list[NodeProto]()
    for name in layout.state:
        before += _gather(name, name in layout.rings, half)
        after += _scatter(name, name in layout.rings, half)
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(_constants(layout))
    _describe(graph, layout, half)
    return model.SerializeToString()


def _indices(layout: StepLayout) -> list[NodeProto]:
    """What the parts share: where streams begin (B, 1, 1), and of a row to be written what is not
    the head, (B, 1, min(n, capacity), 3), or not the row, (B, 1, 2)."""
    nodes = [
        helper.make_node("Unsqueeze", ["fresh", "pool/1_2"], ["pool/begins"]),
        helper.make_node("Unsqueeze", ["slots", "pool/1_2"], ["pool/slot"]),
        helper.make_node("Mul", ["pool/slot", "pool/first_of_2"], ["pool/to_rows"]),
    ]
    if layout.rings:
        nodes += [
            helper.make_node("Unsqueeze", ["slots", "pool/1_2_3"], ["pool/ring_slot"]),
            helper.make_node("Mul", ["pool/ring_slot", "pool/first_of_3"], ["pool/in_slot"]),
            helper.make_node("Unsqueeze", ["places", "pool/1_3"], ["pool/place"]),
            helper.make_node("Mul", ["pool/place", "pool/last_of_3"], ["pool/at_place"]),
            helper.make_node("Add", ["pool/in_slot", "pool/at_place"], ["pool/to_ring"]),
            helper.make_node("Shape", ["places"], ["pool/kept"], start=1, end=2),
            helper.make_node("Neg", ["pool/kept"], ["pool/newest"]),
        ]
    return nodes


def _gather(name: str, is_ring: bool, half: bool) -> list[NodeProto]:
    """The part of the state that the step reads, of the slots. Flags mask what a ring held before
    a stream began; in the other parts that is zero."""
    out = f"pool/gathered_{name}" if half or not is_ring else name
    nodes = [helper.make_node("Gather", [f"pool/{name}", "slots"], [out], axis=0)]
    if not is_ring:
        nodes.append(helper.make_node("Where", ["pool/begins", "pool/zero", out], [name]))
    elif half:
        nodes.append(helper.make_node("Cast", [out], [name], to=TensorProto.FLOAT))
    return nodes


def _scatter(name: str, is_ring: bool, half: bool) -> list[NodeProto]:
    """Write what is new of a part. The index of each row is (slot, head, place) in a ring, and
    (slot, row) elsewhere: a device writes rows in parallel.

    A pool must not be written to before it is read, and new keys do not depend on old ones. So one
    old row goes before them, and is cut off: how many stay is known to the graph as it runs alone.
    """
    own, rows = f"pool/{name}/", f"new_{name}"
    nodes = []
    if is_ring:
        old, joined, newest = f"{own}old", f"{own}joined", f"{own}newest"
        first, end, axis = "pool/0", "pool/end", "pool/2"
        nodes += [
            helper.make_node("Slice", [name, first, "pool/1", axis], [old]),
            helper.make_node("Concat", [old, rows], [joined], axis=2),
            helper.make_node("Slice", [joined, "pool/newest", end, axis], [newest]),
        ]
        rows = newest
    if is_ring and half:
        nodes.append(helper.make_node("Cast", [rows], [f"{own}half"], to=TensorProto.FLOAT16))
        rows = f"{own}half"
    to = "pool/to_ring" if is_ring else "pool/to_rows"
    nodes += [
        helper.make_node("Add", [to, f"{own}grid"], [f"{own}index"]),
        helper.make_node("ScatterND", [f"pool/{name}", f"{own}index", rows], [f"pool/new_{name}"]),
    ]
    return nodes


def _constants(layout: StepLayout) -> list[TensorProto]:
    values: dict[str, object] = {
        "pool/zero": np.float32(0),
        "pool/1_2": [1, 2],
        "pool/1_3": [1, 3],
        "pool/1_2_3": [1, 2, 3],
        "pool/0": [0],
        "pool/1": [1],
        "pool/2": [2],
        "pool/end": [_TO_THE_END],
        "pool/first_of_2": [1, 0],
        "pool/first_of_3": [1, 0, 0],
        "pool/last_of_3": [0, 0, 1],
    }
    for name, shape in layout.state.items():
        # The heads of a ring, or the rows: (H, 1, 3) or (rows, 2), to be added to the others.
        grid = np.zeros((shape[0], 2), dtype=np.int64)
        grid[:, 1] = np.arange(shape[0])
        values[f"pool/{name}/grid"] = (
            np.pad(grid, ((0, 0), (0, 1)))[:, None] if name in layout.rings else grid
        )
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


def _describe(graph: onnx.GraphProto, layout: StepLayout, half: bool) -> None:
    """Inputs and outputs in place of those of a step."""
    inputs = [each for each in graph.input if each.name not in layout.state]
    outputs = [each for each in graph.output if each.name in _KEPT]
    describe = helper.make_tensor_value_info
    inputs.append(describe("slots", TensorProto.INT64, ["batch"]))
    inputs.append(describe("fresh", TensorProto.BOOL, ["batch"]))
    if layout.rings:
        inputs.append(describe("places", TensorProto.INT64, ["batch", "newest"]))
    for name, shape in layout.state.items():
        is_half = half and name in layout.rings
        kind = TensorProto.FLOAT16 if is_half else TensorProto.FLOAT
        inputs.append(describe(f"pool/{name}", kind, ["slots", *shape]))
        outputs.append(describe(f"pool/new_{name}", kind, ["slots", *shape]))
    del graph.input[:]
    del graph.output[:]
    graph.input.extend(inputs)
    graph.output.extend(outputs)
