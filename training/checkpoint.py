"""The state of a run while it is being trained: written every so often, read to go on.

HrproError
+-- TrainingStopped         SIGTERM or Ctrl-C came; the state is saved
"""

from __future__ import annotations

import pickle
import signal
import time
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import torch

from hrpro.engine.wire import HrproError
from hrpro.training.files import replaced_file
from hrpro.training.parallel import process_rank, total

CHECKPOINT = "checkpoint.pt"

_STOPPING = (signal.SIGTERM, signal.SIGINT)

# What reading a file raises that torch did not write, or that is damaged.
UNREADABLE = (
    OSError, RuntimeError, TypeError, ValueError, LookupError, EOFError, pickle.UnpicklingError,
    zipfile.BadZipFile, zlib.error, NotImplementedError,
)  # fmt: skip


def reason_of(error: BaseException) -> str:
    """The first line of what an error says; torch's go on over many."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_tensors(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU; raises one of UNREADABLE.

    torch.load does not look at the checksums: of a file with a wrong bit it gives wrong weights.
    """
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


class TrainingStopped(HrproError):
    """Training was asked to stop by the signal ``number``, and saved its state first."""

    def __init__(self, number: int, path: Path) -> None:
        self.number = number
        name = signal.Signals(number).name
        super().__init__(f"{name}: stopped; the state is saved in {path}, --resume goes on from it")


class Stateful(Protocol):
    """A stage of training, as far as its checkpoint is concerned."""

    name: str
    steps: int

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""
        ...


class Checkpoints:
    """Saves the state of a stage, with the random state, and stops training between two steps.

    ``made_by`` says what the state belongs to: configuration and data. SIGTERM and SIGINT are
    taken while the object is entered; a second SIGINT has its usual effect, a second SIGTERM none
    (torchrun may send it twice, and the state is being saved). Of several processes
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
        self._asked: int | None = None  # to stop, by this signal
        self._handlers: dict[int, Any] = {}

    def restore(self, stage: Stateful) -> int:
        """Give ``stage`` the state that was read, if it is one of this stage; its step, or 0."""
        if self._resumed is None or self._resumed["stage"] != stage.name:
            return 0
        stage.load_state_dict(self._resumed["state"])
        step = int(self._resumed["step"])
        _set_random_state(self._resumed["random"])
        return step

    def after_step(self, stage: Stateful, step: int) -> None:
        """Save where it is time to, at the end of a stage, and where it was asked to stop; raises
        TrainingStopped then."""
        if self._path is None:
            return
        stopping = self._agreed()
        is_due = time.monotonic() - self._saved_s >= self._every_s
        if stopping or is_due or step == stage.steps:
            self._save(stage, step)
        if stopping:
            raise TrainingStopped(stopping, self._path)

    def _save(self, stage: Stateful, step: int) -> None:
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
        """Raise TrainingStopped if it was asked to stop; what is saved is the newest state.

        Of several processes, all call it as often.
        """
        if self._path is not None and (stopping := self._agreed()):
            raise TrainingStopped(stopping, self._path)

    def _agreed(self) -> int | None:
        """The signal that any of the processes was asked to stop by.

        They get it at different steps, and one that went on would wait for the others. What comes
        while they vote counts the next time.
        """
        votes = total(torch.tensor([self._asked == number for number in _STOPPING]).int())
        return next((each for each, vote in zip(_STOPPING, votes, strict=True) if vote), None)

    def __enter__(self) -> Self:
        for number in _STOPPING:
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
        self._asked = number
        if number == signal.SIGINT:
            signal.signal(number, self._handlers[number])

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
        content = read_tensors(path)
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
    """`torch.save` to ``path``: the whole file or none."""
    with replaced_file(path) as temporary:
        torch.save(content, temporary)


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
