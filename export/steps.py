"""Recordings computed by steps: the host's part in `hrpro.export.step`, as plain as it can be.

Streams join, rest, go on beside others and leave; each step takes some of them, and rows of all
of those alike. A stream goes on for `delay` rows behind its end, until all its positions are final;
a step that is longer than what it has left is filled with anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from hrpro.export.bundle import StepLayout
from hrpro.export.graphs import SNIPPET_OUTPUTS

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

# Features (B, n, D), valid (B, history + n), arrival (B,), state -> outputs, what is new of it.
Step = Callable[[Floats, Flags, NDArray[np.int64], list[Floats]], tuple[list[Floats], list[Floats]]]


def onnx_step(session: onnxruntime.InferenceSession, layout: StepLayout) -> Step:
    """A step of step.onnx."""
    outputs = [*SNIPPET_OUTPUTS, *(f"new_{name}" for name in layout.state)]

    def step(
        features: Floats, valid: Flags, arrival: NDArray[np.int64], state: list[Floats]
    ) -> tuple[list[Floats], list[Floats]]:
        feed = {"features": features, "valid": valid, "arrival": arrival}
        feed |= dict(zip(layout.state, state, strict=True))
        found = session.run(outputs, feed)
        return found[: len(SNIPPET_OUTPUTS)], found[len(SNIPPET_OUTPUTS) :]

    return step


class _Stream:
    """A recording, and where it stands."""

    def __init__(
        self, features: Floats, valid: Flags, layout: StepLayout, delay: int, filling: int
    ) -> None:
        self.length, self.delay = len(features), delay
        rest = ((0, delay + filling), (0, 0))
        self.features = np.pad(features, rest, mode="edge")
        before = np.zeros(layout.history, dtype=np.bool_)
        self.valid = np.concatenate([before, valid, np.zeros(delay + filling, dtype=np.bool_)])
        self.arrival = 0
        self.state = {name: np.zeros(shape, np.float32) for name, shape in layout.state.items()}
        self.outputs: list[list[Floats]] = []

    @property
    def goes_on(self) -> bool:
        return self.arrival < self.length + self.delay

    def take(self, outputs: list[Floats], new: list[Floats], capacity: int, n: int) -> None:
        """Its rows of what a step gave."""
        self.outputs.append(outputs)
        rows = (self.arrival + np.arange(n)) % capacity
        for name, part in zip(self.state, new, strict=True):
            if name.startswith(("keys_", "values_")):
                for row, each in zip(rows, part.swapaxes(0, 1), strict=True):
                    self.state[name][:, row] = each
            else:
                self.state[name] = part
        self.arrival += n

    def result(self) -> list[Floats]:
        """Outputs of the whole recording."""
        joined = [np.concatenate(each) for each in zip(*self.outputs, strict=True)]
        return [each[self.delay : self.delay + self.length] for each in joined]


def run_steps(
    step: Step,
    layout: StepLayout,
    delay: int,
    recordings: Sequence[tuple[Floats, Flags]],
    random: np.random.Generator,
) -> list[list[Floats]]:
    """Outputs of each recording of features (T, D) and validity (T,), in steps of any length.

    A position is final ``delay`` snippets later: the look-ahead of a window.
    """
    history, capacity = layout.history, layout.capacity
    lengths = (1, 1, 2, 5, capacity, capacity + 3)
    streams = [
        _Stream(features, valid, layout, delay, max(lengths)) for features, valid in recordings
    ]
    while going_on := [each for each in streams if each.goes_on]:
        count = random.integers(1, len(going_on) + 1)
        chosen = [going_on[k] for k in random.permutation(len(going_on))[:count]]
        n = int(random.choice(lengths))
        outputs, new = step(
            np.stack([each.features[each.arrival : each.arrival + n] for each in chosen]),
            np.stack([each.valid[each.arrival : each.arrival + history + n] for each in chosen]),
            np.array([each.arrival for each in chosen]),
            [np.stack([each.state[name] for each in chosen]) for name in layout.state],
        )
        for k, each in enumerate(chosen):
            each.take([part[k] for part in outputs], [part[k] for part in new], capacity, n)
    return [each.result() for each in streams]
