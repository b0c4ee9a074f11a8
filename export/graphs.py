"""The ONNX graphs of a bundle, traced from the trained torch modules.

    snippet.onnx    features (B, T, D) float32, valid (B, T) bool
                    -> scores (B, T, C), cas (B, T, C), attention (B, T), embedding (B, T, W)
    step.onnx       features (B, n, D), valid (B, history + n), arrival (B,) int64, and the state
                    -> the same outputs of n positions (B, n, ...), and `new_` of each of the state;
                    see hrpro.export.step
    instance.onnx   features (T, W) float32 (the embedding of stretches, one behind the other),
                    proposals (N, 2) float32, stretch (N, 2) int64: first and last row of each one's
                    -> completeness (N, C), refined (N, 2), refined_completeness (N, C)

B, T, n and N are dynamic, N may be 0. The memory prototypes are the initializer ``prototypes`` of
snippet.onnx and step.onnx; ONNX Runtime computes their keys and values when it loads a graph.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.numpy_helper
import torch
from torch import Tensor
from torch.export import Dim

from hrpro.export.step import StepModel
from hrpro.export.tracing import save, trace
from hrpro.training.instance import InstanceModel
from hrpro.training.model import SnippetModel, SnippetOutput

SNIPPET_OUTPUTS = ("scores", "cas", "attention", "embedding")
INSTANCE_OUTPUTS = ("completeness", "refined", "refined_completeness")
PROTOTYPES = "prototypes"


def export_snippet_graph(model: SnippetModel, path: Path) -> None:
    """Write snippet.onnx."""
    # Example sizes must differ from each other and from 1, or the tracer takes them for constants.
    features = torch.zeros(2, 11, model.feature_dim)
    valid = torch.ones(2, 11, dtype=torch.bool)
    batch, length = Dim("batch"), Dim("length")
    graph = trace(
        _WithPrototypes(model),
        (features, valid, model.prototypes),
        inputs=("features", "valid", PROTOTYPES),
        outputs=SNIPPET_OUTPUTS,
        shapes=({0: batch, 1: length}, {0: batch, 1: length}, {}),
    )
    save(_with_initializer(graph, PROTOTYPES, model.prototypes), path)


def export_step_graph(step: StepModel, path: Path) -> None:
    """Write step.onnx."""
    model = step.model
    state = step.empty_state(2)
    names = step.state_names()
    batch, length = Dim("batch"), Dim("length")
    graph = trace(
        step,
        (
            torch.zeros(2, 3, model.feature_dim),
            torch.ones(2, step.history + 3, dtype=torch.bool),
            torch.zeros(2, dtype=torch.int64),
            state,
            model.prototypes,
        ),
        inputs=("features", "valid", "arrival", *names, PROTOTYPES),
        outputs=(*SNIPPET_OUTPUTS, *(f"new_{name}" for name in names)),
        shapes=(
            {0: batch, 1: length},
            {0: batch, 1: step.history + length},
            {0: batch},
            [{0: batch} for _ in state],
            {},
        ),
    )
    save(_with_initializer(graph, PROTOTYPES, model.prototypes), path)


def export_instance_graph(model: InstanceModel, width: int, path: Path) -> None:
    """Write instance.onnx for embeddings of ``width``."""
    embedding = torch.zeros(13, width)
    proposals = torch.tensor([[1.0, 4.0], [2.5, 9.0], [3.0, 11.5]])
    stretch = torch.tensor([[0, 12], [0, 12], [0, 12]])
    count = Dim("count")
    graph = trace(
        model,
        (embedding, proposals, stretch),
        inputs=("features", "proposals", "stretch"),
        outputs=INSTANCE_OUTPUTS,
        shapes=({0: Dim("length")}, {0: count}, {0: count}),
    )
    save(graph, path)


class _WithPrototypes(torch.nn.Module):
    """Takes the prototypes as an input: a constant would be folded into what derives from it."""

    def __init__(self, model: SnippetModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, valid: Tensor, prototypes: Tensor) -> SnippetOutput:
        return self.model.attend_to(features, valid, prototypes)


def _with_initializer(graph: onnx.ModelProto, name: str, value: Tensor) -> onnx.ModelProto:
    """Turn the graph's input ``name`` into an initializer."""
    inputs = [each for each in graph.graph.input if each.name != name]
    del graph.graph.input[:]
    graph.graph.input.extend(inputs)
    array = value.detach().numpy()
    graph.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return graph
