"""Stage 1 by an NVIDIA Triton Inference Server, over gRPC; see `hrpro.export.triton`.

A server may restart, and come back with other models. So the version that has the bundle is looked
up when a connection begins and after each silence, and is named in every request.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from hrpro.engine.backends.onnxruntime import InstanceStage
from hrpro.engine.backends.triton_connection import CallError, Connection
from hrpro.engine.backends.triton_memory import Region, Regions, padded_bytes
from hrpro.engine.config import EngineConfig
from hrpro.engine.inference import BackendError, Outputs
from hrpro.export.bundle import Bundle, Manifest

# A server takes longer to be replaced by another one than it may be silent without being asked
# for its versions again.
_SILENCE_S = 0.2
# Waited before a request that follows a failed one: twice as long each time.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_VERSION_PARAMETER = "bundle_id."


class TritonBackend(InstanceStage):
    """Windows on the server, stage 2 by ONNX Runtime here. Safe to use from several threads.

    Raises BackendError for a server that is not there or has no version with the bundle. Each
    request raises it, too, and pauses first if the one before has; the next one connects anew.
    """

    provider = "triton"

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        super().__init__(bundle, config)
        self._bundle_id = bundle.manifest.bundle_id
        self._outputs = {
            "scores": (len(bundle.manifest.classes),),
            "embedding": (bundle.manifest.embedding_width,),
            "attention": (),
        }
        self._model = f"{config.triton.name}-snippet"
        self._address = config.triton.address
        self._deadline_s = config.triton.deadline_s
        self._max_batch = config.batch_limit
        self._regions = _new_regions(bundle.manifest, config)
        self._connection: Connection | None = None
        self._pause_s = 0.0

    def score_snippets(self, features: NDArray[np.float32], valid: NDArray[np.bool_]) -> Outputs:
        """Windows (B, T, D) and validity (B, T) -> P (B, T, C), embedding (B, T, W) and attention
        (B, T)."""
        time.sleep(self._pause_s)
        try:
            outputs = self._infer(features, valid)
        except (BackendError, ValueError) as error:
            # A ValueError comes from an answer that is not what it says.
            what = f"{self._model}: " if isinstance(error, CallError) else ""
            reason = f"Triton at {self._address}: {what}{error}"
        else:
            self._pause_s = 0.0
            return outputs
        # Not closed here: another thread may wait for its answer, which is as good as ever.
        self._connection = None
        self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
        raise BackendError(reason)

    def _infer(self, features: NDArray[np.float32], valid: NDArray[np.bool_]) -> Outputs:
        connection = self._connection or Connection(self._address, self._deadline_s)
        if time.monotonic() - connection.answered_s > _SILENCE_S:
            connection.version = self._find_version(connection)
            connection.registered.clear()  # it may be another server
            self._connection = connection
        request = service_pb2.ModelInferRequest(
            model_name=self._model, model_version=connection.version
        )
        lent = contextlib.nullcontext() if self._regions is None else self._regions.lent(connection)
        with lent as region:
            contents = [
                *_add_input(request, "features", "FP32", features, region),
                *_add_input(request, "valid", "BOOL", valid, region),
            ]
            shapes = {name: (*valid.shape, *width) for name, width in self._outputs.items()}
            places = {name: _add_output(request, name, shapes[name], region) for name in shapes}
            response = connection.infer(request, contents)
            connection.answered_s = time.monotonic()
            scores, embedding, attention = (
                _output(response, name, shapes[name], places[name]) for name in shapes
            )
        return scores, embedding, attention

    def _find_version(self, connection: Connection) -> str:
        """The newest version that has the bundle."""
        request = service_pb2.ModelConfigRequest(name=self._model)
        answer = connection.call("ModelConfig", request)
        bundle_ids = {
            int(key.removeprefix(_VERSION_PARAMETER)): each.string_value
            for key, each in answer.config.parameters.items()
            if key.startswith(_VERSION_PARAMETER)
        }
        fitting = [version for version, found in bundle_ids.items() if found == self._bundle_id]
        if not fitting:
            there = (f"{version} has {bundle_ids[version]}" for version in sorted(bundle_ids))
            raise BackendError(
                f"{self._model}: expected a version with bundle {self._bundle_id}, "
                f"got {', '.join(there) or 'none that names one'}"
            )
        if answer.config.max_batch_size < self._max_batch:
            raise BackendError(
                f"{self._model}: expected batches of max_batch {self._max_batch} to be taken, "
                f"got a model that takes {answer.config.max_batch_size}"
            )
        return str(max(fitting))


def _new_regions(manifest: Manifest, config: EngineConfig) -> Regions | None:
    """Shared memory for the largest batch, if the settings ask for it."""
    mode, address = config.triton.shared_memory, config.triton.address
    if mode == "never" or (mode == "auto" and not _is_here(address)):
        return None
    own = config.window.length(manifest.context_snippets, manifest.lookahead_snippets)
    B = max(config.batch_limit, 2)  # there are two golden windows
    T = max(own, manifest.window_length)
    widths = (manifest.feature_dim, len(manifest.classes), manifest.embedding_width)
    size_bytes = padded_bytes((B, T), np.bool_) + padded_bytes((B, T), np.float32)
    size_bytes += sum(padded_bytes((B, T, each), np.float32) for each in widths)
    return Regions(address, size_bytes, config.triton.batches_in_flight, mode == "always")


def _is_here(address: str) -> bool:
    """Whether a server is on this machine, by its address alone."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _add_input(
    request: Any, name: str, kind: str, array: NDArray[Any], region: Region | None
) -> list[NDArray[Any]]:
    """Say what an input is; returns what is to be sent of it, nothing if it is in the region."""
    tensor = request.inputs.add(name=name, datatype=kind, shape=array.shape)
    if region is None:
        return [array]
    region.take(tensor, array.shape, array.dtype)[...] = array
    return []


def _add_output(
    request: Any, name: str, shape: tuple[int, ...], region: Region | None
) -> NDArray[np.float32] | None:
    """Ask for an output; the place where the answer will be, if it is not in the response."""
    tensor = request.outputs.add(name=name)
    return None if region is None else region.take(tensor, shape, np.float32)


def _output(
    response: Any, name: str, shape: tuple[int, ...], place: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    names = [each.name for each in response.outputs]
    if name not in names:
        raise BackendError(f"{name}: expected FP32 {shape}, got nothing")
    at = names.index(name)
    kind, got = response.outputs[at].datatype, tuple(response.outputs[at].shape)
    if kind != "FP32" or got != shape:
        raise BackendError(f"{name}: expected FP32 {shape}, got {kind} {got}")
    if place is not None:
        return place.copy()
    return np.frombuffer(response.raw_output_contents[at], np.float32).reshape(shape)
