"""int8: each row is rounded by itself, and what is constant is computed once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tiny_model import LOOKAHEAD, tiny_config, tiny_model, tiny_recording, tiny_run

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.export.bundle import Bundle, Precision, read_bundle, write_manifest
from hrpro.export.golden import check_golden
from hrpro.export.graphs import export_step_graph
from hrpro.export.memory import replace_prototypes
from hrpro.export.precision import convert, rounded_columns
from hrpro.export.step import StepModel
from hrpro.export.steps import onnx_step, run_steps
from hrpro.training.config import ModelConfig
from hrpro.training.model import SnippetModel

Floats = NDArray[np.float32]


def session(graph: Path, optimised: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it says that the optimised graph is for this machine
    options.intra_op_num_threads = 1
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])


def product(folder: Path, weight: Floats) -> Path:
    """x (B, T, K) times a matrix, in int8."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", len(weight)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "t", weight.shape[1]])],
        [numpy_helper.from_array(weight, "weight")],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), folder / "fp32.onnx")
    convert(folder / "fp32.onnx", "int8", folder / "int8.onnx")
    return folder / "int8.onnx"


def test_a_product_by_hand(tmp_path: Path) -> None:
    weight = np.array([[64, 0.5, 0], [1, -0.25, 0]], np.float32)
    rounded, scales = rounded_columns(weight)
    # Scales 1, 0.5 / 64 and as good as none.
    assert rounded.tolist() == [[64, 64, 0], [1, -32, 0]]
    assert scales.tolist() == pytest.approx([1, 0.5 / 64, 1e-12 / 64])
    graph = session(product(tmp_path, weight))
    x = np.array([[[127, -1], [0, 0], [-0.0127, 0.0051]]], np.float32)
    (y,) = graph.run(None, {"x": x})
    # Row 0: (127, -1) of 127 steps of 1; row 2: -127 and 51 steps of 0.0001.
    assert y[0].tolist() == [
        pytest.approx([127 * 64 - 1, (127 * 64 + 32) * 0.5 / 64, 0]),
        [0, 0, 0],
        pytest.approx([(-127 * 64 + 51) * 1e-4, (-127 * 64 - 51 * 32) * 0.5 / 64 * 1e-4, 0]),
    ]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_integers_fit_into_the_sums_of_any_processor(tmp_path: Path, sign: int) -> None:
    K, N = 256, 32
    graph = session(product(tmp_path, np.full((K, N), sign, np.float32)))
    for length in (1, 2, 16):  # the kernels of one row and of many
        (y,) = graph.run(None, {"x": np.ones((1, length, K), np.float32)})
        np.testing.assert_allclose(y, np.full((1, length, N), sign * K), rtol=1e-6)


def test_a_loud_row_costs_the_others_nothing(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 32)).astype(np.float32)
    graph = session(product(tmp_path, weight))
    x = random.standard_normal((3, 5, 64)).astype(np.float32)
    loud = x.copy()
    loud[1] *= 1e4
    (alone,) = graph.run(None, {"x": x[:1]})
    (beside,) = graph.run(None, {"x": loud})
    np.testing.assert_array_equal(alone[0], beside[0])
    # Each row has a relative error of its own.
    expected = loud.astype(np.float64) @ weight
    error = np.abs(beside - expected).max(axis=-1) / expected.std(axis=-1)
    assert error.max() < 0.06  # weights have 64 steps each way, their largest is 3 or 4 deviations


@pytest.fixture(scope="module")
def lower(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """snippet.onnx and step.onnx in int8."""
    folder = tmp_path_factory.mktemp("int8")
    for name in ("snippet.onnx", "step.onnx"):
        convert(bundle.folder / name, "int8", folder / name)
    return folder


def test_a_window_is_the_same_in_any_batch(lower: Path) -> None:
    graph = session(lower / "snippet.onnx")
    one = tiny_recording(20)
    valid = np.ones((3, 20), np.bool_)
    valid[2, 5:] = False
    alone = graph.run(None, {"features": one[None], "valid": valid[:1]})
    others = np.stack([one, one * np.float32(1e4), one[::-1]])
    beside = graph.run(None, {"features": others, "valid": valid})
    for left, right in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(left[0], right[0])


def test_a_stream_is_the_same_beside_any_other(bundle: Bundle, lower: Path) -> None:
    layout = bundle.manifest.step
    assert layout is not None
    step = onnx_step(session(lower / "step.onnx"), layout)
    random = np.random.default_rng(0)
    features = tiny_recording(2)[None]
    state = [
        random.standard_normal((1, *shape)).astype(np.float32) for shape in layout.state.values()
    ]
    valid, arrival = np.ones((1, layout.history + 2), np.bool_), np.array([5])
    alone = step(features, valid, arrival, state)
    loud = np.float32(1e4)
    beside = step(
        np.concatenate([features, features * loud]),
        np.repeat(valid, 2, axis=0),
        np.array([5, 3]),
        [np.concatenate([each, each * loud]) for each in state],
    )
    for left, right in zip([*alone[0], *alone[1]], [*beside[0], *beside[1]], strict=True):
        np.testing.assert_array_equal(left[0], right[0])


def test_steps_say_what_windows_say(bundle: Bundle, lower: Path) -> None:
    layout = bundle.manifest.step
    assert layout is not None
    features, valid = tiny_recording(60), np.ones(60, np.bool_)
    step = onnx_step(session(lower / "step.onnx"), layout)
    random = np.random.default_rng(0)
    (by_steps,) = run_steps(step, layout, LOOKAHEAD, [(features, valid)], random)
    feed = {"features": features[None], "valid": valid[None]}
    by_window = session(lower / "snippet.onnx").run(None, feed)
    in_fp32 = session(bundle.snippet_graph).run(None, feed)
    rounding = np.abs(by_window[0] - in_fp32[0])
    # Where a sum's last bit decides a rounding they differ, which is not often.
    difference = np.abs(by_steps[0] - by_window[0][0])
    assert difference.max() < 2 * rounding.max()
    assert difference.mean() < rounding.mean() / 5


@pytest.mark.parametrize("name", ["snippet.onnx", "step.onnx"])
def test_all_matrices_are_int8_and_the_memory_is_computed_once(
    bundle: Bundle, lower: Path, tmp_path: Path, name: str
) -> None:
    graph = onnx.load(lower / name).graph
    floats = {
        each.name: tuple(each.dims)
        for each in graph.initializer
        if each.data_type == TensorProto.FLOAT and len(each.dims) == 2
    }
    prototypes = tiny_model(tiny_config()).snippet.prototypes.numpy()
    assert floats == {"prototypes": prototypes.shape}
    full = onnx.load(bundle.folder / name).graph
    matrices = {each.name for each in full.initializer if len(each.dims) == 2}
    constant = [node for node in full.node if set(node.input) & matrices and len(node.input) == 2]
    products = sum(node.op_type == "MatMul" for node in constant)
    # One for each of the two blocks is of the memory.
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulInteger") == 2
    assert kinds.count("MatMulIntegerToFloat") == products - 2 > 0
    session(lower / name, tmp_path / "loaded.onnx")
    loaded = [node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node]
    assert loaded.count("MatMulInteger") == 0
    assert loaded.count("MatMulIntegerToFloat") == products - 2


def test_a_narrower_model_without_a_future_has_each_matrix_once(tmp_path: Path) -> None:
    config = ModelConfig(size="lean", blocks=1, attention_past=3)
    export_step_graph(StepModel(SnippetModel(32, 3, config).eval()), tmp_path / "fp32.onnx")
    convert(tmp_path / "fp32.onnx", "int8", tmp_path / "int8.onnx")
    W = 8
    matrices = [(32, W), (W, 3 * W), (W, W), (W, 2 * W), (2 * W, W), (3 * W, W), (W, 3), (W, 1)]
    for name, kind, more in (
        ("fp32", TensorProto.FLOAT, [(3, 32)]),  # the prototypes
        ("int8", TensorProto.INT8, []),
    ):
        graph = onnx.load(tmp_path / f"{name}.onnx").graph
        found = [tuple(each.dims) for each in graph.initializer if each.data_type == kind]
        assert sorted(each for each in found if len(each) == 2) == sorted(matrices + more)


def test_another_memory_is_that_of_the_same_graphs(
    bundle: Bundle, lower: Path, tmp_path: Path
) -> None:
    """To refresh and then to round is to round and then to refresh."""
    run = tiny_run(tmp_path / "run", seed=1)
    folders = tmp_path / "fp32", tmp_path / "int8"
    for folder in folders:
        shutil.copytree(bundle.folder, folder)
    content = json.loads((bundle.folder / "bundle.json").read_text())
    for name in ("snippet.onnx", "step.onnx"):
        shutil.copyfile(lower / name, folders[1] / name)
    write_manifest(folders[1], content | {"precision": "int8"})
    moved = [replace_prototypes(folder, run)[1] for folder in folders]
    assert moved[0] == moved[1] > 0.1
    before, after = (read_bundle(each) for each in folders)
    for name in ("snippet.onnx", "step.onnx"):
        convert(before.folder / name, "int8", tmp_path / name)
        assert onnx.load(tmp_path / name) == onnx.load(after.folder / name)
    check_golden(after, OnnxRuntimeBackend(after))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.0), ("fp16", 0.01), ("int8", 0.1)])
def test_steps_in_another_precision(
    bundle: Bundle, tmp_path: Path, precision: Precision, tolerance: float
) -> None:
    layout = bundle.manifest.step
    assert layout is not None
    convert(bundle.folder / "step.onnx", precision, tmp_path / "step.onnx")
    found = [
        run_steps(
            onnx_step(session(graph), layout),
            layout,
            LOOKAHEAD,
            [(tiny_recording(30), np.ones(30, np.bool_))],
            np.random.default_rng(0),
        )[0]
        for graph in (bundle.folder / "step.onnx", tmp_path / "step.onnx")
    ]
    difference = np.abs(found[0][0] - found[1][0]).max()
    assert difference == 0 if precision == "fp32" else 0 < difference < tolerance
