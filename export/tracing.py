"""From a torch module to an ONNX graph, and whether both compute the same.

ExportError    they do not
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import onnxscript.optimizer
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hrpro.engine.backends.session import CPU_PROVIDER, session_options
from hrpro.engine.wire import HrproError

OPSET = 18
_ANY_SIZE = 2**40
# Of the largest absolute difference to the largest absolute feature.
_TOLERANCE = 1e-4


class ExportError(HrproError):
    """An exported graph that does not compute what the torch model computes."""


def trace(
    model: torch.nn.Module,
    arguments: tuple[Any, ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    shapes: tuple[Any, ...],
) -> onnx.ModelProto:
    """The graph of a model, with names and dynamic sizes as they are given."""
    # The exporter prints its progress, and warns of its own internals.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad(), _no_collection():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model.eval(),
                arguments,
                input_names=inputs,
                output_names=outputs,
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=shapes,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    # The exporter leaves what becomes of large weights (a transposition) to the run time: int8
    # needs the weights themselves. The prototypes are an input still, and stay what they are.
    model_proto = onnxscript.optimizer.optimize(
        program.model_proto, input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE
    )
    # Where in torch a node comes from, with addresses in memory: in each process another bundle.
    for node in model_proto.graph.node:
        del node.metadata_props[:]
    return model_proto


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage waits: a trace makes millions of objects, few of them are, and looking for
    those takes a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def save(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph that is a valid one."""
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)


class Folded(torch.nn.Module):
    """A module with normalisations that become part of the convolutions before them.

    ``FOLDED`` has the name of each convolution and of its normalisation. The graph is smaller, and
    takes half the time to make.
    """

    FOLDED: ClassVar[Mapping[str, str]]


def export_features(model: torch.nn.Module, example: Tensor, path: Path) -> None:
    """Write a feature network, images (N, ...) like ``example`` -> features (N, D), N dynamic.

    ``example`` has two images or more. Raises ExportError where ONNX Runtime differs from torch on
    the first by more than 1e-4 of the largest feature.
    """
    save(
        trace(
            _fold(model),
            (example,),
            inputs=("images",),
            outputs=("features",),
            shapes=({0: Dim("batch")},),
        ),
        path,
    )
    one = example[:1]
    with torch.inference_mode():
        expected = model(one).numpy()
    session = onnxruntime.InferenceSession(path, session_options(0), [CPU_PROVIDER])
    (got,) = session.run(None, {"images": one.numpy()})
    difference = float(np.abs(got - expected).max() / np.abs(expected).max())
    if difference > _TOLERANCE:
        raise ExportError(
            f"{path.name}: ONNX Runtime differs from torch by {difference:.1e} of the largest "
            f"feature, expected at most {_TOLERANCE:.0e}"
        )


def _fold(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose `Folded` parts have no normalisation."""
    model = copy.deepcopy(model)
    for part in model.modules():
        if not isinstance(part, Folded):
            continue
        for conv, norm in part.FOLDED.items():
            if hasattr(part, norm):
                setattr(part, conv, fuse_conv_bn_eval(getattr(part, conv), getattr(part, norm)))
                setattr(part, norm, torch.nn.Identity())
    return model
