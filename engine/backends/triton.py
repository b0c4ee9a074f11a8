"""Stage 1 by an NVIDIA Triton Inference Server, over gRPC; see `hrpro.export.triton`.

A server may restart, and come back with other models. So the version that has the bundle is looked
up when a connection begins and after each silence, and is named in every request.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import (
    InferenceServerClient,
    InferInput,
    InferRequestedOutput,
    InferResult,
)
from tritonclient.utils import InferenceServerException

from hrpro.engine.backends.onnxruntime import InstanceStage
from hrpro.engine.config import EngineConfig
from hrpro.engine.inference import BackendError
from hrpro.export.bundle import Bundle

# A server takes longer to be replaced by another one than it may be silent without being asked
# for its versions again.
_SILENCE_S = 0.2
# Waited before a request that follows a failed one: twice as long each time.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Otherwise a new channel waits as long as the one before would have, before it connects.
    ("grpc.use_local_subchannel_pool", 1),
]
_VERSION_PARAMETER = "bundle_id."


class _Connection:
    """A channel to the server, and the version there that has the bundle."""

    def __init__(self, address: str) -> None:
        self.client = InferenceServerClient(address, channel_args=_CHANNEL_OPTIONS)
        self.version = ""
        self.answered_s = -float("inf")


class TritonBackend(InstanceStage):
    """Windows on the server, stage 2 by ONNX Runtime here. Safe to use from several threads.

    Raises BackendError for a server that is not there or has no version with the bundle. Each
    request raises it, too, and pauses first if the one before has; the next one connects anew.
    """

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        super().__init__(bundle, config)
        self._bundle_id = bundle.manifest.bundle_id
        self._outputs = {
            "scores": len(bundle.manifest.classes),
            "embedding": bundle.manifest.embedding_width,
        }
        self._model = f"{config.triton.name}-snippet"
        self._address = config.triton.address
        self._deadline_s = config.triton.deadline_s
        self._max_batch = config.batch_limit
        self._connection: _Connection | None = None
        self._pause_s = 0.0

    def score_snippets(
        self, features: NDArray[np.float32], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Windows (B, T, D) and validity (B, T) -> P (B, T, C) and embedding (B, T, W)."""
        time.sleep(self._pause_s)
        try:
            scores, embedding = self._infer(features, valid)
        except (InferenceServerException, BackendError, ValueError) as error:
            # A ValueError comes from an answer that is not what it says.
            # Not closed here: another thread may wait for its answer, which is as good as ever.
            self._connection = None
            self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
            raise BackendError(f"Triton at {self._address}: {self._reason(error)}") from None
        self._pause_s = 0.0
        return scores, embedding

    def _infer(
        self, features: NDArray[np.float32], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        connection = self._connection or _Connection(self._address)
        if time.monotonic() - connection.answered_s > _SILENCE_S:
            connection.version = self._find_version(connection.client)
            self._connection = connection
        result = connection.client.infer(
            self._model,
            [_input("features", "FP32", features), _input("valid", "BOOL", valid)],
            connection.version,
            outputs=[InferRequestedOutput(name) for name in self._outputs],
            client_timeout=self._deadline_s,
        )
        connection.answered_s = time.monotonic()
        shape = valid.shape  # (B, T)
        scores, embedding = (
            _output(result, name, (*shape, size)) for name, size in self._outputs.items()
        )
        return scores, embedding

    def _find_version(self, client: InferenceServerClient) -> str:
        """The newest version that has the bundle."""
        answer = client.get_model_config(self._model, client_timeout=self._deadline_s)
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

    def _reason(self, error: Exception) -> str:
        if not isinstance(error, InferenceServerException):
            return str(error)
        if "DEADLINE_EXCEEDED" in str(error.status()):
            return f"expected an answer in triton.deadline_s {self._deadline_s:g}, got none"
        return f"{self._model}: {error.message()}"


def _input(name: str, kind: str, array: NDArray[np.generic]) -> InferInput:
    tensor = InferInput(name, list(array.shape), kind)
    tensor.set_data_from_numpy(array)
    return tensor


def _output(result: InferResult, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array: NDArray[np.float32] | None = result.as_numpy(name)
    if array is None or array.dtype != np.float32 or array.shape != shape:
        got = "nothing" if array is None else f"{array.dtype} {array.shape}"
        raise BackendError(f"{name}: expected float32 {shape}, got {got}")
    return array
