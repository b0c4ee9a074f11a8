"""A bundle as models in the model repository of an NVIDIA Triton Inference Server.

    REPOSITORY/
      NAME-snippet/        stage 1: requests are windows, which the server puts into batches
        config.pbtxt       one for all versions
        VERSION/
          model.onnx       the bundle's graph
          model.py         only with the Python backend, see hrpro.export.triton_model
          bundle.json      the bundle's manifest
      NAME-instance/       stage 2, likewise: a request is a stretch with its proposals
      NAME-stream/         if asked for, stage 1 by steps: the server keeps the state of each stream

    NAME-snippet     features (B, T, D) FP32, valid (B, T) BOOL
                     -> scores (B, T, C), cas (B, T, C), attention (B, T), embedding (B, T, W)
    NAME-instance    features (T, W), proposals (N, 2), both FP32, stretch (N, 2) INT64
                     -> completeness (N, C), refined (N, 2), refined_completeness (N, C)
    NAME-stream      features (B, n, D) FP32, valid (B, n) BOOL, a sequence for each stream
                     -> the outputs of NAME-snippet, n of them, `lookahead_snippets` behind

All versions are served side by side: a client names the one it wants, or gets the highest. The
parameter ``bundle_id.VERSION`` of a model's configuration says which bundle a version is.

The server pads nothing: a batch is of windows of one length, and a request for another length that
waits between them ends it. Clients that send one length, as an engine does, share batches best.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import onnxruntime

from hrpro.engine.backends.onnxruntime import loading
from hrpro.engine.backends.session import CPU_PROVIDER
from hrpro.export.bundle import MANIFEST, Bundle, BundleError, Manifest
from hrpro.export.replaced import replaced_folder

Backend = Literal["onnxruntime", "python"]
Device = Literal["cpu", "gpu"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
DEVICES: tuple[Device, ...] = get_args(Device)

MAX_BATCH_SIZE = 16
STREAMS = 256  # that an instance keeps at once; others wait for one to end
IDLE_S = 60  # after which a stream that sends nothing has ended
CONFIG = "config.pbtxt"
GRAPH = "model.onnx"
CODE = "model.py"
# As the server takes them in a URL, and as they can stand in the text below as they are.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

_HEAD = """\
name: "{name}"
backend: "{backend}"
max_batch_size: {max_batch_size}
version_policy {{ all {{ }} }}
"""
# Requests that wait while a batch is computed are the next batch. A delay would make every window
# wait for others; max_queue_delay_microseconds sets one, where measurements say that it pays.
_BATCHING = "dynamic_batching { }\n"
_TENSOR = '{side} {{ name: "{name}" data_type: {kind} dims: {dims} }}\n'
# A sequence begins with zeros. Streams may be slow: the server's default is one second.
_SEQUENCES = """\
sequence_batching {{
  max_sequence_idle_microseconds: {idle_us}
  oldest {{ max_candidate_sequences: {streams} }}
{states}}}
"""
_STATE = """\
  state {{
    input_name: "{name}" output_name: "new_{name}" data_type: {kind} dims: {dims}
    initial_state {{ name: "zeros" data_type: {kind} dims: {dims} zero_data: true }}
  }}
"""
_INSTANCES = "instance_group [ {{ count: {count} kind: {kind} }} ]\n"
_PARAMETER = 'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
# The first run of a shape allocates, and on a GPU chooses its kernels: not in a request's time.
_WARMUP = """\
model_warmup {{
  name: "batch of {batch}"
  batch_size: {batch}
  inputs {{ key: "features" value {{ data_type: TYPE_FP32 dims: {features} zero_data: true }} }}
  inputs {{ key: "valid" value {{ data_type: TYPE_BOOL dims: {valid} zero_data: true }} }}
}}
"""
_GPU_NOTE = """\
# The CUDA provider runs with its defaults; cuDNN's is an exhaustive search for each new shape
# (cudnn_conv_algo_search 0). TensorRT would be an optimization.execution_accelerators block: it
# builds an engine for each shape, and rounds otherwise than the bundle was verified with.
"""


@dataclass(frozen=True)
class _Tensor:
    """An input or output of a model, without the batch's axis."""

    name: str
    dims: tuple[int, ...]
    kind: str = "TYPE_FP32"


@dataclass(frozen=True)
class _Version:
    """A version that is in the repository."""

    folder: Path
    bundle_id: str
    manifest: dict[str, Any]

    @property
    def number(self) -> int:
        return int(self.folder.name)


@dataclass(frozen=True)
class _Model:
    """One of the models of a bundle."""

    folder: Path
    graph: Path
    max_batch_size: int
    inputs: tuple[_Tensor, ...]
    outputs: tuple[_Tensor, ...]
    state: tuple[_Tensor, ...] = ()


def write_repository(
    bundle: Bundle,
    out: Path,
    name: str,
    backend: Backend,
    version: int,
    device: Device,
    instances: int,
    stateful: bool = False,
) -> list[Path]:
    """Write ``bundle`` as a version of its models in the repository ``out``; returns its folders.

    These are two, and with ``stateful`` that of streams.
    Versions that are there stay; device and instances become those of all of them. The Python
    backend runs the graphs by the onnxruntime package of the server's Python; each of its instances
    is a process.

    A version that only some of the models have, of the same bundle, is completed: a call before may
    have failed between two of them. Raises BundleError, before anything is written, if the version
    exists or if the others of the repository have other inputs and outputs or another backend, or
    if ``stateful`` is asked of a bundle without steps or for the Python backend.
    """
    _check_arguments(name, version, instances)
    models = _models(bundle, out, name)
    if stateful:
        models.append(_stream_model(bundle, out, name, backend))
    versions = [_versions(model.folder) for model in models]
    known = [{each.number: each.bundle_id for each in found} for found in versions]
    bundle_id = bundle.manifest.bundle_id
    is_begun = {ids.get(version) for ids in known} == {bundle_id, None}
    for model, found in zip(models, versions, strict=True):
        for each in found:
            _check_fits(each, bundle.manifest, backend, bool(model.state))
            if each.number == version and not is_begun:
                raise BundleError(
                    f"{each.folder}: exists, of bundle {each.bundle_id}; versions are not "
                    "overwritten, expected a new number"
                )
    written = []
    for model, ids in zip(models, known, strict=True):
        is_there = version in ids
        bundle_ids = ids | {version: bundle_id}
        config = _config(model, bundle.manifest, backend, device, instances, bundle_ids)
        _write_config(model.folder, config)
        folder = model.folder / str(version)
        written.append(folder if is_there else _write_version(model, bundle, backend, folder))
    return written


def _check_arguments(name: str, version: int, instances: int) -> None:
    if not _NAME.fullmatch(name):
        raise BundleError(
            "name: expected a name of letters, digits, '_', '.' and '-' that begins with a "
            f"letter or digit, got {name!r}"
        )
    for what, number in (("version", version), ("instances", instances)):
        if number < 1:
            raise BundleError(f"{what}: expected 1 or more, got {number}")


def _models(bundle: Bundle, out: Path, name: str) -> list[_Model]:
    D, C, W = _sizes(bundle.manifest.model_dump()).values()
    snippet = _Model(
        out / f"{name}-snippet",
        bundle.snippet_graph,
        MAX_BATCH_SIZE,
        (_Tensor("features", (-1, D)), _Tensor("valid", (-1,), "TYPE_BOOL")),
        (
            _Tensor("scores", (-1, C)),
            _Tensor("cas", (-1, C)),
            _Tensor("attention", (-1,)),
            _Tensor("embedding", (-1, W)),
        ),
    )
    # Bundles of schema versions 1 and 2 know of one stretch alone.
    with loading(bundle.instance_graph):
        session = onnxruntime.InferenceSession(bundle.instance_graph, providers=[CPU_PROVIDER])
    known = {each.name for each in session.get_inputs()}
    inputs = (
        _Tensor("features", (-1, W)),
        _Tensor("proposals", (-1, 2)),
        _Tensor("stretch", (-1, 2), "TYPE_INT64"),
    )
    instance = _Model(
        out / f"{name}-instance",
        bundle.instance_graph,
        0,  # no axis for a batch: stretches differ in length, and proposals in number
        tuple(each for each in inputs if each.name in known),
        (
            _Tensor("completeness", (-1, C)),
            _Tensor("refined", (-1, 2)),
            _Tensor("refined_completeness", (-1, C)),
        ),
    )
    return [snippet, instance]


def _stream_model(bundle: Bundle, out: Path, name: str, backend: Backend) -> _Model:
    step, graph = bundle.manifest.step, bundle.step_graph
    if step is None or graph is None:
        raise BundleError(f"{bundle.folder}: expected a bundle with step.onnx, got one without")
    if backend != "onnxruntime":
        raise BundleError(
            "stateful: expected the onnxruntime backend, since the Python backend hands no state "
            f"on, got {backend}"
        )
    snippet = _models(bundle, out, name)[0]
    return _Model(
        out / f"{name}-stream",
        graph,
        MAX_BATCH_SIZE,
        snippet.inputs,
        snippet.outputs,
        (
            *(_Tensor(part, shape) for part, shape in step.state.items()),
            _Tensor("history", (step.history,), "TYPE_BOOL"),
        ),
    )


def _sizes(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What all versions of a model must agree in: D, C and W."""
    return {
        "features (D)": manifest["feature_dim"],
        "classes (C)": len(manifest["classes"]),
        "embedding width (W)": manifest["embedding_width"],
    }


# --- what is there -------------------------------------------------------------------------------


def _versions(folder: Path) -> list[_Version]:
    """The versions of a model. Raises BundleError for a model of somebody else."""
    if not folder.exists():
        return []
    found = []
    for path in sorted(each for each in folder.iterdir() if each.name.isdecimal()):
        try:
            # Not read as a bundle: its golden windows are not here.
            about = json.loads((path / MANIFEST).read_bytes())
            _sizes(about)
            found.append(_Version(path, str(about["bundle_id"]), about))
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise BundleError(
                f"{path / MANIFEST}: expected a version that hrpro bundle triton wrote: {error}"
            ) from None
    return found


def _check_fits(there: _Version, manifest: Manifest, backend: Backend, has_state: bool) -> None:
    sizes, found = _sizes(manifest.model_dump()), _sizes(there.manifest)
    if has_state:
        sizes["state"] = manifest.model_dump(mode="json")["step"]
        found["state"] = there.manifest.get("step")
    for what, size in found.items():
        if size != sizes[what]:
            raise BundleError(
                f"{there.folder}: {what}: expected {sizes[what]} as in bundle "
                f"{manifest.bundle_id}, got {size}; the versions of a model have the same inputs "
                "and outputs: give it another name"
            )
    written_for = "python" if (there.folder / CODE).exists() else "onnxruntime"
    if written_for != backend:
        raise BundleError(
            f"{there.folder}: expected a version for the {backend} backend, got one for "
            f"{written_for}; the versions of a model share it: give it another name"
        )


# --- what is written -----------------------------------------------------------------------------


def _config(
    model: _Model,
    manifest: Manifest,
    backend: Backend,
    device: Device,
    instances: int,
    bundle_ids: Mapping[int, str],
) -> str:
    """config.pbtxt, in protobuf's text format."""
    name, max_batch_size = model.folder.name, model.max_batch_size
    parts = [_HEAD.format(name=name, backend=backend, max_batch_size=max_batch_size)]
    for side, tensors in (("input", model.inputs), ("output", model.outputs)):
        parts += [
            _TENSOR.format(side=side, name=each.name, kind=each.kind, dims=list(each.dims))
            for each in tensors
        ]
    if model.state:
        parts.append(_sequences(model.state))
    elif max_batch_size:
        parts.append(_BATCHING)
        T, D = manifest.window_snippets, manifest.feature_dim
        parts += [
            _WARMUP.format(batch=batch, features=[T, D], valid=[T]) for batch in (1, max_batch_size)
        ]
    parts.append(_INSTANCES.format(count=instances, kind=f"KIND_{device.upper()}"))
    if device == "gpu" and backend == "onnxruntime":
        parts.append(_GPU_NOTE)
    # A single thread does not spin for the next run, which would take the others' cores.
    parameters = {"intra_op_thread_count": "1"}
    parameters |= {f"bundle_id.{version}": bundle_ids[version] for version in sorted(bundle_ids)}
    parts += [_PARAMETER.format(key=key, value=value) for key, value in parameters.items()]
    return "".join(parts)


def _sequences(state: tuple[_Tensor, ...]) -> str:
    states = "".join(
        _STATE.format(name=each.name, kind=each.kind, dims=list(each.dims)) for each in state
    )
    return _SEQUENCES.format(idle_us=IDLE_S * 1_000_000, streams=STREAMS, states=states)


def _write_config(folder: Path, text: str) -> None:
    """Before the version: a server that looks in between finds a configuration to every version."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{CONFIG}.part"
    temporary.write_text(text)
    temporary.replace(folder / CONFIG)


def _write_version(model: _Model, bundle: Bundle, backend: Backend, target: Path) -> Path:
    with replaced_folder(target) as folder:
        if model.state:
            _write_stateful_graph(bundle, folder / GRAPH)
        else:
            shutil.copyfile(model.graph, folder / GRAPH)
        shutil.copyfile(bundle.folder / MANIFEST, folder / MANIFEST)
        if backend == "python":
            shutil.copyfile(Path(__file__).with_name("triton_model.py"), folder / CODE)
    return target


def _write_stateful_graph(bundle: Bundle, path: Path) -> None:
    # Imported here: all else is to be had without the package onnx.
    from hrpro.export.stateful import write_stateful_graph

    assert bundle.step_graph is not None
    assert bundle.manifest.step is not None
    write_stateful_graph(bundle.step_graph, bundle.manifest.step, path)
