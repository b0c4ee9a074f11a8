"""From a finished training run to a deployment bundle."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.config import EngineConfig, LocalizationConfig
from hrpro.engine.offline import localize_recording
from hrpro.export.bundle import (
    GOLDEN,
    INSTANCE_GRAPH,
    SNIPPET_GRAPH,
    STEP_GRAPH,
    Bundle,
    Manifest,
    Precision,
    read_bundle,
    write_manifest,
)
from hrpro.export.golden import write_golden
from hrpro.export.graphs import export_instance_graph, export_snippet_graph, export_step_graph
from hrpro.export.precision import GOLDEN_TOLERANCES, convert
from hrpro.export.replaced import replaced_folder
from hrpro.export.step import StepModel
from hrpro.export.tracing import ExportError
from hrpro.export.verify import (
    Exactness,
    compare_graphs,
    golden_features,
    verify_graphs,
)
from hrpro.training.config import ModelConfig, TrainingConfig
from hrpro.training.data import DataSet
from hrpro.training.metrics import GroundTruth, to_segments
from hrpro.training.model import band_reach, window_reach
from hrpro.training.run import RunDescription
from hrpro.training.train import TrainedModel

_TIMED_WINDOWS = 15
_PACKAGES = ("torch", "onnx", "onnxscript", "numpy")


@dataclass(frozen=True)
class Comparison:
    """On what a lower precision is held against fp32, and how much average mAP it may cost."""

    data: DataSet
    truth: GroundTruth
    gate: float
    force: bool = False


def export_bundle(
    description: RunDescription,
    model: TrainedModel,
    figures: Mapping[str, float | str],
    target: Path,
    precision: Precision = "fp32",
    comparison: Comparison | None = None,
) -> Bundle:
    """Export, verify and write a bundle; ``figures`` are what was measured of the model.

    Raises ExportError if ONNX Runtime does not compute what torch computes, or if ``precision``
    costs more than the ``comparison`` allows; FileExistsError if ``target`` is something else than
    a bundle. Nothing is written to ``target`` in either case.
    """
    exactness = exact_positions(description.config.model)
    # First: a window that is too short is refused before the graphs are made.
    content = _content(description, model, exactness) | {"figures": dict(figures)}
    with replaced_folder(target) as folder:
        export_snippet_graph(model.snippet, folder / SNIPPET_GRAPH)
        export_instance_graph(model.instance, model.snippet.width, folder / INSTANCE_GRAPH)
        step_graph = None
        if exactness.exact:
            step, step_graph = StepModel(model.snippet), folder / STEP_GRAPH
            export_step_graph(step, step_graph)
            content["step"] = step.layout().model_dump()
        content["verified"] = verify_graphs(
            model, folder / SNIPPET_GRAPH, folder / INSTANCE_GRAPH, exactness, step_graph
        )
        bundle = Bundle(folder, write_manifest(folder, content))
        windows = golden_features(model, content["window_length"])
        if precision != "fp32":
            compared = _in_precision(bundle, precision, comparison)
            _check_steps(bundle, precision, windows)
            content |= {"precision": precision, "compared": compared}
        content["tolerances"] = GOLDEN_TOLERANCES[precision]
        write_golden(folder / GOLDEN, OnnxRuntimeBackend(bundle), windows)
        write_manifest(folder, content)
    return read_bundle(target)


def _content(
    description: RunDescription, model: TrainedModel, exactness: Exactness
) -> dict[str, Any]:
    """The manifest of an fp32 bundle, as far as it is known of the run."""
    config, clock = description.config, description.config.data.clock
    length = config.window.length(exactness.context, exactness.lookahead)
    return {
        "precision": "fp32",
        "data_set": description.data_set,
        "classes": description.classes,
        "display_names": {},
        "feature_dim": description.feature_dim,
        "embedding_width": model.snippet.width,
        "frames_per_s": clock.frames_per_s,
        "snippet_frames": clock.snippet_frames,
        "snippet_s": clock.snippet_s,
        "exact": exactness.exact,
        "context_snippets": exactness.context,
        "lookahead_snippets": exactness.lookahead,
        "window": config.window.model_dump(),
        "window_length": length,
        "localization": _localization(config, model).model_dump(),
        "training": config.model_dump(mode="json"),
        "figures": {},
        "verified": {},
        "window_flops": _window_flops(model, length),
        "step": None,
        "tolerances": {},
        "compared": {},
        "versions": {
            "hrpro-stream": version("hrpro-stream"),
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
    }


def _window_flops(model: TrainedModel, length: int) -> int:
    """What stage 1 computes for a window, in matrix products and additions of theirs."""
    features = torch.zeros(1, length, model.snippet.feature_dim)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.snippet(features, torch.ones(1, length, dtype=torch.bool))
    return int(counter.get_total_flops())


def _in_precision(
    bundle: Bundle, precision: Precision, comparison: Comparison | None
) -> dict[str, float]:
    """Convert the bundle's graphs of stage 1; returns what that cost and brought, by windows."""
    full = OnnxRuntimeBackend(bundle, EngineConfig(threads=1))
    full_map = _average_map(bundle, full, comparison)
    for graph in (bundle.snippet_graph, bundle.step_graph):
        if graph is not None:
            lower_graph = graph.with_name("lower.onnx")
            convert(graph, precision, lower_graph)
            lower_graph.replace(graph)
    lower = OnnxRuntimeBackend(bundle, EngineConfig(threads=1))
    compared = {"speedup": _speedup(bundle.manifest, full, lower)}
    if comparison is None:
        return compared
    lower_map = _average_map(bundle, lower, comparison)
    if full_map - lower_map > comparison.gate and not comparison.force:
        raise ExportError(
            f"{precision}: average mAP {lower_map:.4f} on {comparison.data.name}, {full_map:.4f} "
            f"in fp32: expected a loss of at most {comparison.gate:g}; --force takes it"
        )
    return compared | {"average_map": lower_map, "average_map_fp32": full_map}


def _check_steps(bundle: Bundle, precision: Precision, windows: NDArray[np.float32]) -> None:
    """Steps say in a lower precision what windows say.

    Not to the digit: what lies between two roundings falls to either side by the last bit of a
    sum, and each product makes more of that.
    """
    for name, difference in compare_graphs(bundle, list(windows)).items():
        tolerance = GOLDEN_TOLERANCES[precision][name]
        if not difference <= tolerance:
            raise ExportError(
                f"{precision}: {name} by steps differ from those by windows by {difference:.3g}, "
                f"expected at most {tolerance:g}"
            )


def _average_map(
    bundle: Bundle, backend: OnnxRuntimeBackend, comparison: Comparison | None
) -> float:
    if comparison is None:
        return 0.0
    manifest, data = bundle.manifest, comparison.data
    predictions = {
        each.name: to_segments(
            localize_recording(backend, manifest, each.features, manifest.localization), data.clock
        )
        for each in data.recordings
    }
    return comparison.truth.compare(predictions).average


def _speedup(manifest: Manifest, full: OnnxRuntimeBackend, lower: OnnxRuntimeBackend) -> float:
    """How many windows the lower precision computes while fp32 computes one; on one core."""
    shape = (1, manifest.window_length, manifest.feature_dim)
    features = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    valid = np.ones(shape[:2], dtype=np.bool_)
    times_s: tuple[list[float], list[float]] = ([], [])
    for _ in range(_TIMED_WINDOWS):  # in turn: other load meets both
        for backend, spent_s in zip((full, lower), times_s, strict=True):
            started_s = time.perf_counter()
            backend.score_snippets(features, valid)
            spent_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s[0]) / statistics.median(times_s[1])


def _localization(config: TrainingConfig, model: TrainedModel) -> LocalizationConfig:
    """The settings of the run, with the weight that stage 2 has earned."""
    weight = config.localization.completeness_weight * float(model.instance.trust)
    return config.localization.model_copy(update={"completeness_weight": weight})


def exact_positions(config: ModelConfig) -> Exactness:
    """Which positions of a window see all that they would see in the whole recording."""
    return Exactness(band_reach(config) is not None, *window_reach(config))
