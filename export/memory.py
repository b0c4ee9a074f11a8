"""The memory of a bundle: its prototypes, replaced without a new graph."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
from numpy.typing import NDArray

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.export.bundle import (
    GOLDEN,
    INSTANCE_GRAPH,
    Bundle,
    BundleError,
    Manifest,
    read_bundle,
    write_manifest,
)
from hrpro.export.golden import read_golden, write_golden
from hrpro.export.graphs import PROTOTYPES
from hrpro.export.replaced import replaced_folder
from hrpro.training.run import read_run


def replace_prototypes(folder: Path, run: Path) -> tuple[Manifest, float]:
    """Give a bundle the memory of another run with the same classes and features.

    Prototypes are means of features, whatever model they were used by. The golden windows get the
    outputs of the new memory; what was measured of the old one goes. Returns the manifest and the
    largest change of a value. Raises BundleError.
    """
    bundle = read_bundle(folder)
    description, model = read_run(run)
    manifest = bundle.manifest
    expected = (manifest.classes, manifest.feature_dim)
    if (description.classes, description.feature_dim) != expected:
        raise BundleError(
            f"{run}: expected a run with the {len(manifest.classes)} classes and D = "
            f"{manifest.feature_dim} of the bundle, got {len(description.classes)} classes and "
            f"D = {description.feature_dim}"
        )
    prototypes = model.snippet.prototypes.numpy()
    with replaced_folder(folder) as temporary:
        change = 0.0
        for graph in (bundle.snippet_graph, bundle.step_graph):
            if graph is not None:
                change = _with_prototypes(graph, prototypes, temporary / graph.name)
        shutil.copyfile(bundle.instance_graph, temporary / INSTANCE_GRAPH)
        written = Bundle(temporary, manifest)
        if bundle.golden is not None:
            features = read_golden(bundle)["features"]
            write_golden(temporary / GOLDEN, OnnxRuntimeBackend(written), features)
        content = manifest.model_dump(mode="json") | {"figures": {}, "compared": {}}
        written = Bundle(temporary, write_manifest(temporary, content))
    return written.manifest, change


def _with_prototypes(graph: Path, prototypes: NDArray[np.float32], out: Path) -> float:
    """Write a graph with another memory; returns the largest change of a value."""
    model = onnx.load(graph)
    (initializer,) = (each for each in model.graph.initializer if each.name == PROTOTYPES)
    old = onnx.numpy_helper.to_array(initializer)
    new = prototypes.astype(old.dtype)
    initializer.CopyFrom(onnx.numpy_helper.from_array(new, PROTOTYPES))
    onnx.save(model, out)
    return float(np.abs(new.astype(np.float64) - old).max())
