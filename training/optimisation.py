"""What both stages share: the loop over steps, descent by AdamW with a one-cycle rate, averaged
weights, and how a model is run (precision, compilation, several processes)."""

from __future__ import annotations

import copy
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hrpro.engine.wire import HrproError
from hrpro.training.checkpoint import Checkpoints
from hrpro.training.config import TrainingConfig
from hrpro.training.parallel import process_count, process_rank, total

_GRADIENT_NORM = 1.0


class TrainingError(HrproError):
    """Training cannot go on; the message says why."""


# Called after each optimiser step with the stage's name, the step (from 1), and its losses.
Report = Callable[[str, int, dict[str, float]], None]

Model = TypeVar("Model", bound=nn.Module)


def run_stage(stage: Stage[Any], report: Report, checkpoints: Checkpoints) -> None:
    """All steps of a stage, from where the checkpoint left it.

    Raises TrainingError where the loss is no number any more, before that state is saved.
    """
    for number in range(checkpoints.restore(stage) + 1, stage.steps + 1):
        if process_count() > 1:  # what one drops the others need not
            torch.manual_seed(
                (stage.seed * stage.steps + number) * process_count() + process_rank()
            )
        losses = {name: float(value) for name, value in stage.step(number).items()}
        if not math.isfinite(losses["loss"]):
            raise TrainingError(
                f"step {number} of stage {stage.name}: the loss is {losses['loss']}; expected a "
                f"finite number, lower {stage.name}_stage.learning_rate"
            )
        report(stage.name, number, losses)
        checkpoints.after_step(stage, number)


def training_device(config: TrainingConfig) -> torch.device:
    """Where to train: a GPU if there is one, unless the configuration says otherwise.

    Raises TrainingError for a GPU that is not there.
    """
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError("device: expected a GPU for cuda, torch finds none here")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def as_run(model: nn.Module, config: TrainingConfig) -> Callable[..., Any]:
    """The forward pass of ``model`` across processes and compiled, as configured."""
    run: nn.Module = model
    if process_count() > 1:
        run = DistributedDataParallel(model)
    return torch.compile(run) if config.compile else run


def precision(config: TrainingConfig, device: torch.device) -> AbstractContextManager[None]:
    """Within, a model is computed in the configured precision; weights stay float32."""
    chosen = config.precision
    if chosen == "auto":
        chosen = "bfloat16" if _has_bfloat16(device) else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=chosen == "bfloat16")


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16; torch does it on any, by emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def over_processes(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of each loss over all processes, without a gradient."""
    return {name: total(value.detach()) / process_count() for name, value in losses.items()}


class Schedule(Protocol):
    """The settings of a stage that descent needs."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        ...

    @property
    def learning_rate(self) -> float:
        """Peak of the one-cycle rate."""
        ...

    @property
    def weight_decay(self) -> float:
        """Of AdamW."""
        ...


class Descent:
    """AdamW with clipped gradients; the rate rises to its peak and falls to nothing (one cycle)."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        self._parameters = list(model.parameters())
        self._optimiser = torch.optim.AdamW(
            self._parameters,
            lr=schedule.learning_rate,
            weight_decay=schedule.weight_decay,
            fused=True,
        )
        self._rate = torch.optim.lr_scheduler.OneCycleLR(
            self._optimiser, schedule.learning_rate, total_steps=schedule.steps
        )

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of a scalar loss."""
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, _GRADIENT_NORM)
        self._optimiser.step()
        self._rate.step()

    def state_dict(self) -> dict[str, Any]:
        """Moments and rate."""
        return {"optimiser": self._optimiser.state_dict(), "rate": self._rate.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""
        self._optimiser.load_state_dict(state["optimiser"])
        self._rate.load_state_dict(state["rate"])


class AveragedModel(Generic[Model]):
    """Exponential moving average of a model's weights; buffers are the newest ones."""

    def __init__(self, model: Model, decay: float) -> None:
        self._model = model
        self._decay = decay
        self._averaged = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` (from 1); early steps are forgotten faster."""
        decay = min(self._decay, step / (step + 9))
        for averaged, newest in zip(
            self._averaged.parameters(), self._model.parameters(), strict=True
        ):
            averaged.lerp_(newest, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights."""
        return self._averaged.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such weights."""
        self._averaged.load_state_dict(state)

    def result(self) -> Model:
        """The averaged model in evaluation mode."""
        for averaged, newest in zip(self._averaged.buffers(), self._model.buffers(), strict=True):
            averaged.copy_(newest)
        return self._averaged.eval()


class Stage(ABC, Generic[Model]):
    """One stage of training: a model that descends, its averaged weights, and random draws."""

    name: str

    def __init__(self, model: Model, schedule: Schedule, average_decay: float, seed: int) -> None:
        self.steps = schedule.steps
        self.seed = seed
        self._model = model
        self._averaged = AveragedModel(model, average_decay)
        self._descent = Descent(model, schedule)
        self._generator = torch.Generator().manual_seed(seed)
        model.train()

    @abstractmethod
    def step(self, number: int) -> dict[str, Tensor]:
        """Step ``number``, from 1; returns its losses by name, "loss" among them."""

    def result(self) -> Model:
        """The averaged model, on the CPU and in evaluation mode."""
        return self._averaged.result().cpu()

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step."""
        return {
            "model": self._model.state_dict(),
            "averaged": self._averaged.state_dict(),
            "descent": self._descent.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""
        self._model.load_state_dict(state["model"])
        self._averaged.load_state_dict(state["averaged"])
        self._descent.load_state_dict(state["descent"])
        self._generator.set_state(state["generator"])
