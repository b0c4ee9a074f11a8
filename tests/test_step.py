"""The step graph: whatever comes in which portions, a step says what the whole recording says."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper
from other_bundles import reweighted_bundle, widened_bundle
from tiny_model import CONTEXT, LOOKAHEAD, tiny_config, tiny_model, tiny_recording

from hrpro.export.bundle import Bundle, StepLayout
from hrpro.export.step import StepModel
from hrpro.export.steps import Flags, Floats, Step, onnx_step, run_steps
from hrpro.export.tracing import ExportError
from hrpro.export.verify import Exactness, compare_graphs, verify_graphs
from hrpro.training.config import ModelConfig
from hrpro.training.model import SnippetModel

DIM = 8


def snippet_model(**settings: object) -> SnippetModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SnippetModel(DIM, 3, ModelConfig.model_validate(settings)).eval()
        model.prototypes.normal_()
    return model


def torch_step(model: StepModel) -> Step:
    def step(
        features: Floats, valid: Flags, arrival: NDArray[np.int64], state: list[Floats]
    ) -> tuple[list[Floats], list[Floats]]:
        arrays = [torch.from_numpy(each) for each in (features, valid, arrival)]
        with torch.no_grad():
            outputs, new = model(
                *arrays, [torch.from_numpy(each) for each in state], model.model.prototypes
            )
        return [each.numpy() for each in outputs], [each.numpy() for each in new]

    return step


def whole(model: SnippetModel, features: Floats, valid: Flags) -> list[Floats]:
    with torch.no_grad():
        outputs = model(torch.from_numpy(features)[None], torch.from_numpy(valid)[None])
    return [each[0].numpy() for each in outputs]


@settings(deadline=None, max_examples=60)
@given(
    past=st.integers(0, 6),
    future=st.integers(0, 6),
    blocks=st.integers(0, 3),
    heads=st.sampled_from([1, 2, 4]),
    size=st.sampled_from(["full", "lean"]),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    lost=st.sampled_from([0.0, 0.2, 0.9]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_steps_give_the_whole_recording(
    past: int,
    future: int,
    blocks: int,
    heads: int,
    size: str,
    lengths: list[int],
    lost: float,
    seed: int,
) -> None:
    model = snippet_model(
        attention_past=past,
        attention_future=future,
        blocks=blocks,
        attention_heads=heads,
        size=size,
    )
    step = StepModel(model)
    random = np.random.default_rng(seed)
    recordings = [
        (
            random.standard_normal((length, DIM)).astype(np.float32),
            random.random(length) >= lost,
        )
        for length in lengths
    ]
    found = run_steps(torch_step(step), step.layout(), step.delay, recordings, random)
    for got, (features, valid) in zip(found, recordings, strict=True):
        for one, other in zip(got, whole(model, features, valid), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_model_that_attends_to_everything_has_no_step() -> None:
    with pytest.raises(ValueError, match="full attention has no step: expected attention_past"):
        StepModel(snippet_model(attention_past=None))


def test_the_layout_is_that_of_the_state() -> None:
    step = StepModel(
        snippet_model(attention_past=5, attention_future=2, blocks=1, attention_heads=4)
    )
    W, C = 8, step.model.class_count
    # query, keys, values and output, feed-forward, convolution; heads; old, own and constant keys
    products = (4 + 4 + 3) * W * W + W * (C + 1) + 2 * W * (7 + 1 + C)
    # 7 rows of 4 heads; one block ahead by 2, of the oldest of which the flag is needed, too
    assert step.layout() == StepLayout(
        history=9,
        capacity=7,
        state={"keys_0": (4, 7, 2), "values_0": (4, 7, 2), "waiting_0": (2, 8), "tail": (2, 8)},
        snippet_flops=2 * products,
    )
    assert step.delay == 3
    assert [tuple(each.shape) for each in step.empty_state(6)] == [
        (6, *shape) for shape in step.layout().state.values()
    ]


def test_nothing_depends_on_rows_behind_it() -> None:
    """Of a stream that has ended, and of another stream."""
    step = StepModel(snippet_model(attention_past=4, attention_future=1))
    random = np.random.default_rng(0)
    features = random.standard_normal((2, 7, DIM)).astype(np.float32)
    valid = np.ones((2, step.history + 7), np.bool_)
    state = [random.standard_normal(each.shape).astype(np.float32) for each in step.empty_state(2)]
    arrival = np.array([3, 11])
    outputs, new = torch_step(step)(features, valid, arrival, state)
    features[0, 4:], valid[0, step.history + 4 :] = 1e3, False
    features[1], valid[1] = -1e3, False
    others, other_new = torch_step(step)(features, valid, arrival, state)
    for one, other in zip(outputs, others, strict=True):
        np.testing.assert_array_equal(one[0, :4], other[0, :4])
        assert np.abs(one[0, 4:] - other[0, 4:]).max() > 1e-3
    for name, one, other in zip(step.state_names(), new, other_new, strict=True):
        if name.startswith(("keys", "values")):
            np.testing.assert_array_equal(one[0, :, :4], other[0, :, :4])


def test_the_oldest_row_of_a_ring_is_overwritten_in_place() -> None:
    """One block that averages all values that it sees, by hand."""
    model = snippet_model(attention_past=2, blocks=1, attention_heads=1)
    block = model.blocks[0]
    block.attention_norm = block.feed_forward_norm = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        # Queries and keys 0: all seen weigh the same. Values are the features.
        block.query_key_value.weight[2 * DIM :] = block.output.weight[:] = torch.eye(DIM)
        model.prototypes.zero_()
        # The embedding is the middle one of three.
        model.embed.weight.zero_()
        model.embed.bias.zero_()
        model.embed.weight[..., 1] = torch.eye(DIM)
    step = StepModel(model)
    assert (step.capacity, step.history, step.delay) == (2, 2, 1)
    ring = np.zeros((1, 1, 2, DIM), np.float32)
    tail = np.zeros((1, 2, DIM), np.float32)
    flags = [False, False]
    embeddings = []
    for arrival, feature in enumerate([6.0, 12.0, 30.0, 60.0, 0.0]):
        features = np.full((1, 1, DIM), feature, np.float32)
        flags.append(True)
        outputs, (_, value, tail) = torch_step(step)(
            features, np.array([flags[-3:]]), np.array([arrival]), [ring, ring, tail]
        )
        ring[:, :, arrival % 2] = value[:, :, 0]
        embeddings.append(float(outputs[3][0, 0, 0]))
    # Row 0 held 6, then 30, then 0; row 1 held 12, then 60.
    assert ring[0, 0, :, 0].tolist() == [0, 60]
    # What is final is one back: x plus the mean of itself, up to two before, and three prototypes.
    assert embeddings == pytest.approx(
        [0, 6 + 6 / 4, 12 + 18 / 5, 30 + 48 / 6, 60 + 102 / 6], rel=1e-6
    )


# --- the graph -----------------------------------------------------------------------------------


def test_the_graph_of_a_bundle_is_the_step(bundle: Bundle) -> None:
    model = tiny_model(tiny_config()).snippet
    layout = bundle.manifest.step
    assert layout is not None and bundle.step_graph is not None
    assert layout == StepModel(model).layout()
    session = onnxruntime.InferenceSession(bundle.step_graph)
    assert [each.name for each in session.get_inputs()] == [
        "features", "valid", "arrival", *layout.state,
    ]  # fmt: skip
    random = np.random.default_rng(1)
    recordings = [(tiny_recording(n, n), random.random(n) > 0.2) for n in (1, 9, 40)]
    found = run_steps(onnx_step(session, layout), layout, LOOKAHEAD, recordings, random)
    for got, (features, valid) in zip(found, recordings, strict=True):
        for one, other in zip(got, whole(model, features, valid), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("factor", [1.1, float("nan")])
@pytest.mark.parametrize("part", ["prototypes", "weight"])
def test_a_step_graph_that_is_not_the_model_is_refused(
    bundle: Bundle, tmp_path: Path, part: str, factor: float
) -> None:
    graph = onnx.load(bundle.folder / "step.onnx")
    initializer = next(
        each
        for each in graph.graph.initializer
        if (each.name == "prototypes" if part == "prototypes" else list(each.dims) == [DIM, DIM])
    )
    array = numpy_helper.to_array(initializer) * np.float32(factor)
    initializer.CopyFrom(numpy_helper.from_array(array, initializer.name))
    onnx.save(graph, tmp_path / "step.onnx")
    exactness = Exactness(True, CONTEXT, LOOKAHEAD)
    with pytest.raises(
        ExportError, match=r"step\.onnx: (scores|embedding): ONNX Runtime differs from torch by"
    ):
        verify_graphs(
            tiny_model(tiny_config()),
            bundle.snippet_graph,
            bundle.instance_graph,
            exactness,
            tmp_path / "step.onnx",
        )


def test_bundles_for_tests_have_both_graphs_of_one_model(bundle: Bundle, tmp_path: Path) -> None:
    recordings = [tiny_recording(40)]
    reweighted = reweighted_bundle(bundle.folder, tmp_path / "reweighted", seed=1)
    for each in (reweighted, widened_bundle(bundle.folder, tmp_path / "wide")):
        assert max(compare_graphs(each, recordings).values()) < 1e-5
    shutil.copyfile(bundle.folder / "step.onnx", reweighted.folder / "step.onnx")
    assert compare_graphs(reweighted, recordings)["scores"] > 0.01
