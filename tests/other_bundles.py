"""Bundles made of another one: to export a model takes long."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from tiny_model import tiny_recording

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.config import EngineConfig
from hrpro.export.bundle import (
    GOLDEN,
    INSTANCE_GRAPH,
    MANIFEST,
    SNIPPET_GRAPH,
    STEP_GRAPH,
    Bundle,
    change_settings,
    read_bundle,
    write_manifest,
)
from hrpro.export.golden import write_golden


def renamed_bundle(source: Path, target: Path, name: str = "Jump") -> Bundle:
    """Another name for people, and so another id; else the same."""
    shutil.copytree(source, target)
    change_settings(target, [], {"jump": name})
    return read_bundle(target)


def changed_bundle(source: Path, target: Path, *assignments: str) -> Bundle:
    """Other settings."""
    shutil.copytree(source, target)
    change_settings(target, assignments, {})
    return read_bundle(target)


def reweighted_bundle(source: Path, target: Path, seed: int) -> Bundle:
    """Other weights in both stages."""
    shutil.copytree(source, target)
    for name in (SNIPPET_GRAPH, STEP_GRAPH, INSTANCE_GRAPH):
        model = onnx.load(target / name)
        for each in model.graph.initializer:
            array = numpy_helper.to_array(each)
            if array.dtype == np.float32 and array.ndim == 2:
                # By value: step.onnx has parts of the weights of snippet.onnx.
                noise = 0.7 * array * np.sin(1e4 * array.astype(np.float64) + seed)
                changed = (array + noise).astype(np.float32)
                each.CopyFrom(numpy_helper.from_array(changed, each.name))
        onnx.save(model, target / name)
    return _described(target, {})


def rewritten_bundle(source: Path, target: Path, changes: dict[str, object]) -> Bundle:
    """The same graphs under a manifest that says something else."""
    shutil.copytree(source, target)
    return _described(target, changes)


def widened_bundle(source: Path, target: Path) -> Bundle:
    """The same model with each feature of its embedding twice, of which stage 2 reads one."""
    shutil.copytree(source, target)
    width = 2 * read_bundle(source).manifest.embedding_width
    for name in (SNIPPET_GRAPH, STEP_GRAPH):
        model = onnx.load(target / name)
        _rename(model.graph, "embedding", "once")
        twice = helper.make_node("Concat", ["once", "once"], ["embedding"], axis=-1)
        model.graph.node.append(twice)
        _set_width(model.graph.output, "embedding", width)
        onnx.save(model, target / name)
    instance = onnx.load(target / INSTANCE_GRAPH)
    _rename(instance.graph, "features", "once")
    bounds = {"first": 0, "stop": width // 2, "axis": 1}
    instance.graph.initializer.extend(
        numpy_helper.from_array(np.array([value]), name) for name, value in bounds.items()
    )
    instance.graph.node.insert(0, helper.make_node("Slice", ["features", *bounds], ["once"]))
    _set_width(instance.graph.input, "features", width)
    onnx.save(instance, target / INSTANCE_GRAPH)
    return _described(target, {"embedding_width": width})


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                if name == old:
                    names[position] = new


def _set_width(values: list[onnx.ValueInfoProto], name: str, width: int) -> None:
    (value,) = (each for each in values if each.name == name)
    value.type.tensor_type.shape.dim[-1].dim_value = width


def _described(folder: Path, changes: dict[str, object]) -> Bundle:
    """Golden windows and a manifest for files that were changed."""
    content = read_manifest(folder) | changes
    manifest = write_manifest(folder, content)
    backend = OnnxRuntimeBackend(Bundle(folder, manifest), EngineConfig(threads=1))
    length = manifest.window_length
    windows = np.stack([tiny_recording(length, seed) for seed in (1, 2)])
    write_golden(folder / GOLDEN, backend, windows)
    write_manifest(folder, content)
    return read_bundle(folder)


def read_manifest(folder: Path) -> dict[str, object]:
    """bundle.json as it is."""
    return json.loads((folder / MANIFEST).read_text())
