"""How ONNX Runtime is told to use a machine: threads, their manners, the CPU's provider."""

from __future__ import annotations

import onnxruntime

from hrpro.engine.config import usable_cores

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
# Results are held to float32, not to TF32; a search for the best convolution takes long, and each
# new shape would begin one.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Options of a session with so many threads; 0 for as many as there are cores to use."""
    options = onnxruntime.SessionOptions()
    # The pool would count the machine's cores, not the ones this process may use.
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Threads that spin between calls take the cores that feeders and subscribers need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
