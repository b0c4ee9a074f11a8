"""The snippet graph in fp16 or int8, for speed; the instance graph, small, stays fp32.

fp16 is for GPUs: a CPU casts to and fro. int8 has integer matrix products, whose inputs are scaled
as they come (dynamic quantisation); weights have a scale for each column.
"""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from hrpro.export.bundle import Precision
from hrpro.export.verify import TOLERANCES

# By how much the outputs of golden windows may differ from machine to machine; an int8 product
# depends on the processor's instructions.
GOLDEN_TOLERANCES: dict[Precision, dict[str, float]] = {
    "fp32": TOLERANCES,
    "fp16": TOLERANCES | {"scores": 1e-2, "embedding": 5e-2},
    "int8": TOLERANCES | {"scores": 5e-2, "embedding": 5e-1},
}


def convert(graph: Path, precision: Precision, out: Path) -> None:
    """Write a snippet graph in another precision; inputs and outputs stay float32."""
    model = onnx.load(graph)
    if precision == "fp16":
        half = OnnxModel(convert_float_to_float16(model, keep_io_types=True))
        half.topological_sort()  # the casts stand at the end
        onnx.checker.check_model(half.model, full_check=True)
        onnx.save(half.model, out)
    elif precision == "int8":
        del model.graph.value_info[:]  # shapes that quantisation makes wrong
        logger = logging.getLogger()
        level = logger.level
        logger.setLevel(logging.ERROR)  # it advises to prepare the graph, which is done
        try:
            quantize_dynamic(
                model,
                out,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
        finally:
            logger.setLevel(level)
    else:
        onnx.save(model, out)
