"""Losses while training goes on: a line every few steps, TensorBoard scalars, progress bars."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from hrpro.training.config import TrainingConfig
from hrpro.training.files import json_rows, replaced_file

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_EVERY_STEPS = 10
STAGE_TITLES = {"snippet": "stage 1, snippets", "instance": "stage 2, proposals"}


class Recorder:
    """Called with the losses of each step, see `hrpro.training.optimisation.Report`.

    ``resumed`` is the stage and step that training goes on from; what came later is dropped.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainingConfig,
        console: Console,
        resumed: tuple[str, int] | None = None,
    ) -> None:
        self._steps = {
            "snippet": config.snippet_stage.steps,
            "instance": config.instance_stage.steps,
        }
        if resumed is None:
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
            (folder / METRICS).unlink(missing_ok=True)
        else:
            _keep_until(folder / METRICS, *resumed)
        self._metrics = (folder / METRICS).open("a")
        self._scalars = SummaryWriter(str(folder / TENSORBOARD))
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            console=console,
        )
        self._tasks = {
            stage: self._progress.add_task(STAGE_TITLES[stage], total=steps, loss=float("nan"))
            for stage, steps in self._steps.items()
        }
        if resumed is not None and resumed[0] == "instance":
            self._progress.update(self._tasks["snippet"], completed=self._steps["snippet"])
        self.last: dict[str, dict[str, float]] = {}

    def __call__(self, stage: str, step: int, losses: dict[str, float]) -> None:
        """Take note of one step."""
        self._progress.update(self._tasks[stage], completed=step, loss=losses["loss"])
        if step % _EVERY_STEPS and step != self._steps[stage]:
            return
        self.last[stage] = losses
        self._metrics.write(json.dumps({"stage": stage, "step": step, **losses}) + "\n")
        self._metrics.flush()
        for name, value in losses.items():
            self._scalars.add_scalar(f"{stage}/{name}", value, step)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
        self._scalars.close()
        self._metrics.close()


def _keep_until(path: Path, stage: str, step: int) -> None:
    """Drop the lines after a step: they come again. The last one may be torn."""
    order = list(STAGE_TITLES)
    rows = json_rows(path) if path.exists() else []
    known = [row for row in rows if row.get("stage") in order and isinstance(row.get("step"), int)]
    last = (order.index(stage), step)
    kept = [row for row in known if (order.index(row["stage"]), row["step"]) <= last]
    with replaced_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
