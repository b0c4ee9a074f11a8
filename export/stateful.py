"""step.onnx as a graph that takes a whole state and gives a whole one, for servers that keep it.

    features (B, n, D), valid (B, n), and the state: that of step.onnx, and `history`, the flags
    -> the outputs of step.onnx, and `new_` of each part of the state, in the shape it had

Rings become queues: at arrival 0 the rows of a ring stand in the order of time, so the newest
`capacity` rows of old and new ones are the ring of the next step, again at arrival 0. That copies
all of them at each step, which a host that keeps the rings itself does not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hrpro.export.bundle import StepLayout

HISTORY = "history"
_TO_THE_END = np.iinfo(np.int64).max


def write_stateful_graph(step_graph: Path, layout: StepLayout, out: Path) -> None:
    """Write the graph; ``layout`` is that of ``step_graph``."""
    model = onnx.load(step_graph)
    graph = model.graph
    del graph.value_info[:]
    rows = {f"new_{name}": f"rows_of_{name}" for name in layout.rings}
    _rename(graph, {"valid": "flags", **rows})
    before, after = _flags()
    for name in layout.rings:
        after += _newest(name, f"rows_of_{name}", f"new_{name}")
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    _describe(graph, layout)
    graph.initializer.extend(
        numpy_helper.from_array(np.array([value]), name)
        for name, value in {
            "newest/capacity": -layout.capacity,
            "newest/history": -layout.history,
            "newest/end": _TO_THE_END,
            "newest/axis_1": 1,
            "newest/axis_2": 2,
        }.items()
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, out)


def _flags() -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """Nodes before and after the graph: the inputs that it had, of those that it has now."""
    before = [
        helper.make_node("Concat", [HISTORY, "valid"], ["flags"], axis=1),
        helper.make_node("Shape", ["features"], ["streams"], start=0, end=1),
        helper.make_node(
            "ConstantOfShape",
            ["streams"],
            ["arrival"],
            value=numpy_helper.from_array(np.zeros(1, np.int64)),
        ),
    ]
    bounds = ["newest/history", "newest/end", "newest/axis_1"]
    return before, [helper.make_node("Slice", ["flags", *bounds], [f"new_{HISTORY}"])]


def _newest(old: str, rows: str, out: str) -> list[onnx.NodeProto]:
    """The newest rows of a ring and those that came."""
    bounds = ["newest/capacity", "newest/end", "newest/axis_2"]
    return [
        helper.make_node("Concat", [old, rows], [f"{old}/joined"], axis=2),
        helper.make_node("Slice", [f"{old}/joined", *bounds], [out]),
    ]


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        for side in (node.input, node.output):
            for position, name in enumerate(side):
                side[position] = names.get(name, name)


def _describe(graph: onnx.GraphProto, layout: StepLayout) -> None:
    """Inputs and outputs in place of those of a step."""
    inputs = {each.name: each for each in graph.input}
    inputs["valid"] = helper.make_tensor_value_info(
        "valid", onnx.TensorProto.BOOL, ["batch", "length"]
    )
    state = {name: (onnx.TensorProto.FLOAT, shape) for name, shape in layout.state.items()}
    state[HISTORY] = (onnx.TensorProto.BOOL, (layout.history,))
    outputs = [each for each in graph.output if not each.name.startswith("new_")]
    del graph.input[:]
    del graph.output[:]
    graph.input.extend([inputs["features"], inputs["valid"]])
    graph.output.extend(outputs)
    for name, (kind, shape) in state.items():
        for side, prefix in ((graph.input, ""), (graph.output, "new_")):
            side.append(helper.make_tensor_value_info(prefix + name, kind, ["batch", *shape]))
