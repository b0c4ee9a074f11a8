"""model.py of Triton's Python backend: runs model.onnx, which lies beside it, by ONNX Runtime.

A copy of this file stands in each version of a model, see `hrpro.export.triton`; it is imported
there alone, by the server's Python, and uses nothing of hrpro.

Parameter of the configuration: ``intra_op_thread_count``, as of Triton's onnxruntime backend.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it would tell its maker about each session
import onnxruntime
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]
from numpy.typing import NDArray

Arrays = list[NDArray[Any]]


class TritonPythonModel:
    """An instance of the model; the server calls each from one thread, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph. Raises RuntimeError if it cannot run on the device that is asked for."""
        config = json.loads(args["model_config"])
        self._inputs = [each["name"] for each in config["input"]]
        self._outputs = [each["name"] for each in config["output"]]
        self._is_batched = config["max_batch_size"] > 0
        options = onnxruntime.SessionOptions()
        threads = config["parameters"]["intra_op_thread_count"]["string_value"]
        options.intra_op_num_threads = int(threads)
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        # Threads that spin between calls take the cores of the other instances.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list[Any] = ["CPUExecutionProvider"]
        if args["model_instance_kind"] == "GPU":
            device = {"device_id": args["model_instance_device_id"]}
            providers.insert(0, ("CUDAExecutionProvider", device))
        graph = Path(args["model_repository"], args["model_version"], "model.onnx")
        self._session = onnxruntime.InferenceSession(graph, options, providers)
        # It would go on without the GPU, and only warn.
        got = self._session.get_providers()
        if len(got) < len(providers):
            raise RuntimeError(f"{graph}: expected the CUDA provider, got {', '.join(got)}")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests; what comes at once for a model with a batch's axis is one run.

        The server puts only requests of equal shape together, apart from the batch's axis.
        """
        tensors = [[_input(request, name) for name in self._inputs] for request in requests]
        if not self._is_batched:
            return [self._response(self._run(each)) for each in tensors]
        # (B_1, ...), (B_2, ...) -> (B_1 + B_2, ...)
        outputs = self._run([np.concatenate(each) for each in zip(*tensors, strict=True)])
        ends = np.cumsum([len(first) for first, *_ in tensors])[:-1]
        parts = zip(*(np.split(each, ends) for each in outputs), strict=True)
        return [self._response(list(part)) for part in parts]

    def _run(self, inputs: Arrays) -> Arrays:
        outputs = self._session.run(self._outputs, dict(zip(self._inputs, inputs, strict=True)))
        return list(outputs)

    def _response(self, outputs: Arrays) -> Any:
        pairs = zip(self._outputs, outputs, strict=True)
        return pb_utils.InferenceResponse([_tensor(name, each) for name, each in pairs])


def _without_capsules(unraisable: sys.UnraisableHookArgs) -> None:
    """Servers mark what they have taken by DLPack as NumPy does not: it complains of each tensor,
    and has nothing to do with it any more, for the server frees it."""
    if "PyCapsule_GetPointer" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


sys.unraisablehook = _without_capsules


# By DLPack both ways: as_numpy() and Tensor() of servers that were built against NumPy 1 give empty
# tensors where NumPy 2 is installed, and no error.
def _input(request: Any, name: str) -> NDArray[Any]:
    return np.from_dlpack(pb_utils.get_input_tensor_by_name(request, name))


def _tensor(name: str, array: NDArray[Any]) -> Any:
    if array.size == 0:  # its strides would be refused
        return pb_utils.Tensor(name, array)
    return pb_utils.Tensor.from_dlpack(name, np.ascontiguousarray(array))
