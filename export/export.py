"""From a finished training run to a deployment bundle."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.windows import window_length
from hrpro.export.bundle import (
    INSTANCE_GRAPH,
    SNIPPET_GRAPH,
    Bundle,
    read_bundle,
    replaced_folder,
    write_manifest,
)
from hrpro.export.graphs import export_instance_graph, export_snippet_graph
from hrpro.export.verify import Exactness, verify_graphs
from hrpro.training.config import ModelConfig, TrainingConfig
from hrpro.training.model import band_reach
from hrpro.training.run import RunDescription
from hrpro.training.train import TrainedModel

# A model that attends to everything is exact nowhere; this much is given to it.
_FULL_ATTENTION = Exactness(exact=False, context=64, lookahead=4)
_PACKAGES = ("torch", "onnx", "onnxscript", "numpy")


def export_bundle(
    description: RunDescription,
    model: TrainedModel,
    figures: Mapping[str, float | str],
    target: Path,
) -> Bundle:
    """Export, verify and write a bundle; ``figures`` are what was measured of the model.

    Raises ExportError if ONNX Runtime does not compute what torch computes, FileExistsError if
    ``target`` is something else than a bundle. Nothing is written to ``target`` in either case.
    """
    config = description.config
    exactness = exact_positions(config.model)
    clock = config.data.clock
    with replaced_folder(target) as folder:
        export_snippet_graph(model.snippet, folder / SNIPPET_GRAPH)
        export_instance_graph(model.instance, model.snippet.width, folder / INSTANCE_GRAPH)
        verified = verify_graphs(model, folder / SNIPPET_GRAPH, folder / INSTANCE_GRAPH, exactness)
        write_manifest(
            folder,
            {
                "data_set": description.data_set,
                "classes": description.classes,
                "feature_dim": description.feature_dim,
                "embedding_width": model.snippet.width,
                "frames_per_s": clock.frames_per_s,
                "snippet_frames": clock.snippet_frames,
                "snippet_s": clock.snippet_s,
                "exact": exactness.exact,
                "context_snippets": exactness.context,
                "lookahead_snippets": exactness.lookahead,
                "window": config.window.model_dump(),
                "window_length": window_length(
                    config.window, exactness.context, exactness.lookahead
                ),
                "localization": _localization(config, model).model_dump(),
                "training": config.model_dump(mode="json"),
                "figures": dict(figures),
                "verified": verified,
                "versions": {
                    "hrpro-stream": version("hrpro-stream"),
                    "python": platform.python_version(),
                    **{name: version(name) for name in _PACKAGES},
                },
            },
        )
    return read_bundle(target)


def _localization(config: TrainingConfig, model: TrainedModel) -> LocalizationConfig:
    """The settings of the run, with the weight that stage 2 has earned."""
    weight = config.localization.completeness_weight * float(model.instance.trust)
    return config.localization.model_copy(update={"completeness_weight": weight})


def exact_positions(config: ModelConfig) -> Exactness:
    """Which positions of a window see all that they would see in the whole recording."""
    reach = band_reach(config)
    return _FULL_ATTENTION if reach is None else Exactness(True, *reach)
