"""Inference by ONNX Runtime."""

from __future__ import annotations

import os

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from hrpro.export.bundle import Bundle


class OnnxRuntimeBackend:
    """Both graphs of a bundle as ONNX Runtime sessions on the CPU."""

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        # The pool would count the machine's cores, not the ones this process may use.
        options.intra_op_num_threads = threads or _usable_cores()
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        # Threads that spin between calls take the cores that feeders and subscribers need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CPUExecutionProvider"]
        self._snippet = onnxruntime.InferenceSession(bundle.snippet_graph, options, providers)
        self._instance = onnxruntime.InferenceSession(bundle.instance_graph, options, providers)

    def score_snippets(
        self, features: NDArray[np.float32], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Windows (B, T, D) and validity (B, T) -> P (B, T, C) and embedding (B, T, W)."""
        scores, embedding = self._snippet.run(
            ["scores", "embedding"], {"features": features, "valid": valid}
        )
        return scores, embedding

    def score_instances(
        self, embedding: NDArray[np.float32], proposals: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Stage 2, see `hrpro.engine.refine.InstanceScorer`."""
        completeness, refined, refined_completeness = self._instance.run(
            ["completeness", "refined", "refined_completeness"],
            {"features": embedding, "proposals": proposals},
        )
        return completeness, refined, refined_completeness


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
