"""Several processes that train on one global batch, started by torchrun; one is the usual case.

Each process computes its share of a batch that all draw alike. Sums and counts that a loss is
divided by run over all processes, so the gradient is that of one process with the whole batch.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch import distributed as dist


def process_count() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    """Number of this process, from 0; the first one writes and reports."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes where torchrun started this one; does nothing otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    # Counts are summed up where they are: those of the data on the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        # What still holds the group, a model in a cycle of references say, would end its threads
        # with the interpreter, which aborts.
        gc.collect()
        dist.destroy_process_group()


def total(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes; no gradient flows through it."""
    if not dist.is_initialized():
        return x
    summed = x.detach().clone()
    dist.all_reduce(summed)
    return summed


def share(x: Tensor) -> Tensor:
    """The rows of a global batch, (B, ...), that this process computes."""
    return x[process_rank() :: process_count()]
