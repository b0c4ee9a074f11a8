"""What both stages share: descent by AdamW with a one-cycle rate, and averaged weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

_GRADIENT_NORM = 1.0

# Called after each optimiser step with the stage's name, the step (from 1), and its losses.
Report = Callable[[str, int, dict[str, float]], None]

Model = TypeVar("Model", bound=nn.Module)


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
            self._parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay
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

    def result(self) -> Model:
        """The averaged model in evaluation mode."""
        for averaged, newest in zip(self._averaged.buffers(), self._model.buffers(), strict=True):
            averaged.copy_(newest)
        return self._averaged.eval()
