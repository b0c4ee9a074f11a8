"""Torch against ONNX Runtime: what is exported computes what was trained.

On random feature sequences with the statistics of the training data, compared are whole
recordings, at each optimisation level of ONNX Runtime; chains of windows, batched and stitched as
the engine does, against the whole recording in torch (against the same windows, where attention
has no band); and proposals of several counts, none among them.

    ExportError    a difference above its tolerance
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from hrpro.export.bundle import Bundle, StepLayout
from hrpro.export.graphs import SNIPPET_OUTPUTS
from hrpro.export.step import StepModel
from hrpro.export.steps import Floats, Step, onnx_step, run_steps
from hrpro.export.tracing import ExportError
from hrpro.training.train import TrainedModel

# Largest absolute difference. P, S, A and completeness are in [0, 1], borders in snippets.
TOLERANCES = {"scores": 1e-4, "embedding": 1e-3, "completeness": 1e-4, "borders": 1e-3}

_LENGTHS = (1, 2, 97, 160)
_WINDOWS = ((1, 1), (7, 3), (32, 8))  # (hop, batch size)
_PROPOSAL_COUNTS = (0, 1, 50)
_LEVELS = (
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
)
_LEVEL_LENGTH = 40

_OF_SNIPPETS = ("scores", "embedding")

# Windows (B, T, D), validity (B, T) -> the outputs, one window after the other: (B * T, ...).
Scorer = Callable[[Floats, NDArray[np.bool_]], list[Floats]]


@dataclass(frozen=True)
class Exactness:
    """Which positions of a window are exact; see `hrpro.export.bundle.Manifest`."""

    exact: bool
    context: int
    lookahead: int


def verify_graphs(
    model: TrainedModel,
    snippet_graph: Path,
    instance_graph: Path,
    exactness: Exactness,
    step_graph: Path | None = None,
) -> dict[str, float]:
    """Largest difference by name. Raises ExportError if one exceeds its tolerance."""
    in_onnx = _onnx_scorer(_session(snippet_graph))
    in_torch = _torch_scorer(model)
    instance = _session(instance_graph)
    random = np.random.default_rng(0)
    worst = dict.fromkeys(TOLERANCES, 0.0)
    _compare_levels(worst, model, snippet_graph, instance_graph, random)
    for length in _LENGTHS:
        features = _random_features(model, length, random)
        valid = np.ones((1, length), dtype=np.bool_)
        expected = in_torch(features[None], valid)
        _note_snippets(worst, in_onnx(features[None], valid), expected)
        for hop, batch in _WINDOWS:
            got = _run_windows(in_onnx, features, exactness, hop, batch)
            same = expected  # exact windows give what the whole recording gives
            if not exactness.exact:
                same = _run_windows(in_torch, features, exactness, hop, batch)
            _note_snippets(worst, got, same)
        _refuse_differences(worst)  # stage 2 has no answer to NaN
        _compare_instances(worst, model, instance, expected[-1], random)
    _refuse_differences(worst)
    if step_graph is not None:
        _verify_steps(worst, model, step_graph, exactness.lookahead, random)
    return worst


def _verify_steps(
    worst: dict[str, float],
    model: TrainedModel,
    graph: Path,
    delay: int,
    random: np.random.Generator,
) -> None:
    layout = StepModel(model.snippet).layout()
    for level in _LEVELS:
        lengths = _LENGTHS if level == _LEVELS[-1] else (_LEVEL_LENGTH,)
        features = [_random_features(model, length, random) for length in lengths]
        step = onnx_step(_session(graph, level), layout)
        by_steps = compare_steps(step, layout, delay, features, _torch_scorer(model))
        _refuse_differences(by_steps, "step.onnx: ")
        for name, difference in by_steps.items():
            worst[name] = max(worst[name], difference)


def compare_graphs(bundle: Bundle, recordings: Sequence[Floats]) -> dict[str, float]:
    """Largest difference by name between a bundle's step graph, if any, and its snippet graph."""
    layout, graph = bundle.manifest.step, bundle.step_graph
    if layout is None or graph is None:
        return {}
    step, whole = onnx_step(_session(graph), layout), _onnx_scorer(_session(bundle.snippet_graph))
    return compare_steps(step, layout, bundle.manifest.lookahead_snippets, recordings, whole)


def compare_steps(
    step: Step, layout: StepLayout, delay: int, recordings: Sequence[Floats], whole: Scorer
) -> dict[str, float]:
    """Largest difference by name between recordings (T, D), with gaps, by steps and as a whole."""
    random = np.random.default_rng(0)
    parts = [(each, _gaps(len(each), random)) for each in recordings]
    worst = dict.fromkeys(_OF_SNIPPETS, 0.0)
    found = run_steps(step, layout, delay, parts, random)
    for got, (features, valid) in zip(found, parts, strict=True):
        _note_snippets(worst, got, whole(features[None], valid[None]))
    return worst


def _gaps(length: int, random: np.random.Generator) -> NDArray[np.bool_]:
    """Validity (T,) of a recording of which a fifth is lost, three snippets or more at a time."""
    there: NDArray[np.bool_] = np.repeat(random.random(-(-length // 3)) < 0.8, 3)[:length]
    return there


def _session(graph: Path, level: Any = None) -> onnxruntime.InferenceSession:
    """On the CPU, at an optimisation level of ONNX Runtime (default: all)."""
    options = onnxruntime.SessionOptions()
    if level is not None:
        options.graph_optimization_level = level
    return onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])


def _compare_levels(
    worst: dict[str, float],
    model: TrainedModel,
    snippet_graph: Path,
    instance_graph: Path,
    random: np.random.Generator,
) -> None:
    """Each optimisation level rewrites the graphs in its own way."""
    features = _random_features(model, _LEVEL_LENGTH, random)[None]
    valid = np.ones(features.shape[:2], dtype=np.bool_)
    expected = _torch_scorer(model)(features, valid)
    for level in _LEVELS:
        _note_snippets(
            worst, _onnx_scorer(_session(snippet_graph, level))(features, valid), expected
        )
        _refuse_differences(worst)
        _compare_instances(worst, model, _session(instance_graph, level), expected[-1], random)


def _refuse_differences(worst: dict[str, float], where: str = "") -> None:
    for name, difference in worst.items():
        tolerance = TOLERANCES[name]
        # A comparison with NaN is false, and NaN must not pass.
        if not difference <= tolerance:
            raise ExportError(
                f"{where}{name}: ONNX Runtime differs from torch by {difference:.3g}, "
                f"expected at most {tolerance:g}"
            )


def _random_features(model: TrainedModel, length: int, random: np.random.Generator) -> Floats:
    mean, scale = model.snippet.feature_mean.numpy(), model.snippet.feature_scale.numpy()
    noise = random.standard_normal((length, len(mean)))
    # Snippets that follow each other resemble each other, as in recordings.
    noise = np.cumsum(noise, axis=0) / np.sqrt(np.arange(1, length + 1))[:, None]
    return (mean + noise / scale).astype(np.float32)


def golden_features(model: TrainedModel, length: int) -> Floats:
    """Two windows like those of the training data, (2, T, D)."""
    random = np.random.default_rng(0)
    return np.stack([_random_features(model, length, random) for _ in range(2)])


def _onnx_scorer(session: onnxruntime.InferenceSession) -> Scorer:
    def score(features: Floats, valid: NDArray[np.bool_]) -> list[Floats]:
        outputs = session.run(list(SNIPPET_OUTPUTS), {"features": features, "valid": valid})
        return [np.concatenate(list(each)) for each in outputs]

    return score


def _torch_scorer(model: TrainedModel) -> Scorer:
    def score(features: Floats, valid: NDArray[np.bool_]) -> list[Floats]:
        with torch.no_grad():
            outputs = model.snippet(torch.from_numpy(features), torch.from_numpy(valid))
        return [np.concatenate(list(each.numpy())) for each in outputs]

    return score


def torch_instances(
    model: TrainedModel, embedding: Floats, proposals: Floats
) -> tuple[Floats, ...]:
    """What stage 2 says in torch of proposals (N, 2) in a stretch of embedding (T, W)."""
    with torch.no_grad():
        outputs = model.instance(torch.from_numpy(embedding), torch.from_numpy(proposals))
    return tuple(each.numpy() for each in outputs)


def _run_windows(
    score: Scorer,
    features: Floats,
    exactness: Exactness,
    hop: int,
    batch: int,
) -> list[Floats]:
    """The exact positions of a chain of windows, stitched; rows as a `Scorer` gives for a whole."""
    length, before, after = len(features), exactness.context, exactness.lookahead
    chain = -(-length // hop)
    padding = ((before, chain * hop - length + after), (0, 0))
    padded = np.pad(features, padding)
    valid = np.pad(np.ones(length, dtype=np.bool_), padding[0])
    window = before + hop + after
    rows = hop * np.arange(chain)[:, None] + np.arange(window)  # (chain, T)
    parts = []
    for first in range(0, chain, batch):
        chosen = rows[first : first + batch]
        outputs = score(padded[chosen], valid[chosen])
        shaped = [each.reshape(*chosen.shape, *each.shape[1:]) for each in outputs]
        parts.append([np.concatenate(list(each[:, before : before + hop])) for each in shaped])
    return [np.concatenate(each)[:length] for each in zip(*parts, strict=True)]


def _compare_instances(
    worst: dict[str, float],
    model: TrainedModel,
    session: onnxruntime.InferenceSession,
    embedding: Floats,
    random: np.random.Generator,
) -> None:
    for count in _PROPOSAL_COUNTS:
        start = random.uniform(0, len(embedding), count)
        length = random.uniform(0.5, 40, count)
        proposals = np.stack([start, start + length], axis=1).astype(np.float32)
        expected = torch_instances(model, embedding, proposals)
        # Behind another stretch, of which they must see nothing.
        rows = [len(embedding), 2 * len(embedding) - 1]
        got = session.run(
            ["completeness", "refined", "refined_completeness"],
            {
                "features": np.concatenate([-embedding, embedding]),
                "proposals": proposals,
                "stretch": np.tile(np.array(rows), (count, 1)),
            },
        )
        names = ("completeness", "borders", "completeness")
        for name, left, right in zip(names, got, expected, strict=True):
            _note(worst, name, left, right)


def _note_snippets(worst: dict[str, float], got: list[Floats], expected: list[Floats]) -> None:
    for name, left, right in zip(SNIPPET_OUTPUTS, got, expected, strict=True):
        _note(worst, "embedding" if name == "embedding" else "scores", left, right)


def _note(worst: dict[str, float], name: str, got: Floats, expected: Floats) -> None:
    if got.shape != expected.shape:
        raise ExportError(f"{name}: expected shape {expected.shape}, ONNX Runtime gave {got.shape}")
    if got.size:
        worst[name] = float(np.maximum(worst[name], np.abs(got - expected).max()))
