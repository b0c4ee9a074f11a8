"""The state of a run while it is being trained: written every so often, read to go on.

HrproError
+-- TrainingStopped         SIGTERM or Ctrl-C came; the state is saved
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import torch

from hrpro.engine.wire import HrproError
from hrpro.training.files import replaced_file
from hrpro.training.parallel import process_count, process_rank, total

CHECKPOINT = "checkpoint.pt"

# What torch.load raises for a file that it did not write.
UNREADABLE = (OSError, RuntimeError, TypeError, ValueError, EOFError, pickle.UnpicklingError)


def reason_of(error: BaseException) -> str:
    """The first line of what an error says; torch's go on over many."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class TrainingStopped(HrproError):
    """Training was asked to stop by the signal ``number``, and saved its state first."""

    def __init__(self, number: int, path: Path) -> None:
        self.number = number
        name = signal.Signals(number).name
        super().__init__(f"{name}: stopped; the state is saved in {path}, --resume goes on from it")


class Stateful(Protocol):
    """A stage of training, as far as its checkpoint is concerned."""

    name: str

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""
        ...


class Checkpoints:
    """Saves the state of a stage, with the random state, and stops training between two steps.

    ``made_by`` says what the state belongs to: configuration and data. SIGTERM and SIGINT are
    taken while the object is entered; the second one has its usual effect. Of several processes
    the first one writes, and all stop after the same step. Without a folder nothing is saved.
    """

    def __init__(
        self,
        folder: Path | None = None,
        every_s: float = 300.0,
        made_by: Mapping[str, Any] | None = None,
        resumed: Mapping[str, Any] | None = None,
    ) -> None:
        self._path = folder / CHECKPOINT if folder else None
        self._every_s = every_s
        self._made_by = dict(made_by or {})
        self._resumed = resumed
        self._saved_s = time.monotonic()
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    @property
    def resumed_stage(self) -> str | None:
        """The stage that the state read at the start is of."""
        return self._resumed["stage"] if self._resumed else None

    def restore(self, stage: Stateful) -> int:
        """Give ``stage`` the state that was read, if it is one of this stage; its step, or 0."""
        if self._resumed is None or self._resumed["stage"] != stage.name:
            return 0
        stage.load_state_dict(self._resumed["state"])
        step = int(self._resumed["step"])
        if process_rank() == 0:  # the others must not drop what the first one drops
            _set_random_state(self._resumed["random"])
        return step

    def after_step(self, stage: Stateful, step: int) -> None:
        """Save where it is time to, or where it was asked to stop; raises TrainingStopped then."""
        if self._path is None:
            return
        self._agree_on_stopping()
        if self._signal or time.monotonic() - self._saved_s >= self._every_s:
            self.save(stage, step)
        self.check()

    def save(self, stage: Stateful, step: int) -> None:
        """Write the state after ``step`` in place of the one before."""
        if self._path is None or process_rank():
            return
        content = {
            "made_by": self._made_by,
            "stage": stage.name,
            "step": step,
            "state": stage.state_dict(),
            "random": _random_state(),
        }
        write_atomically(self._path, content)
        self._saved_s = time.monotonic()

    def check(self) -> None:
        """Raise TrainingStopped if it was asked to stop; what is saved is the newest state."""
        if self._signal and self._path is not None:
            raise TrainingStopped(self._signal, self._path)

    def _agree_on_stopping(self) -> None:
        """Processes get a signal at different steps; one that went on would wait for the others."""
        if process_count() > 1:
            votes = total(torch.tensor([self._signal or 0, int(self._signal is not None)]))
            self._signal = int(votes[0] // votes[1]) if votes[1] else None

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._give_back()

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """What `Checkpoints` wrote to a folder, on the CPU; None if there is nothing.

    Raises HrproError for a file that cannot be read.
    """
    path = folder / CHECKPOINT
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if set(content) != {"made_by", "stage", "step", "state", "random"}:
            raise TypeError(f"keys {', '.join(map(str, content))}")
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        raise HrproError(
            f"{path}: expected the state of a run that was stopped: {reason_of(error)}"
        ) from None
    return dict(content)


def write_atomically(path: Path, content: object) -> None:
    """`torch.save` to ``path``: the whole file or none, also if the machine goes down."""
    with replaced_file(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
