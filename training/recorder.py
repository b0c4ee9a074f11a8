"""Losses while training goes on: a line every few steps, TensorBoard scalars, progress bars."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
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
    Scalars of each stage are in a folder of their own: TensorBoard drops by step alone, and both
    stages count from 1.
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
        kept = _last_kept(self._steps, resumed) if resumed else None
        if kept is None:
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
            (folder / METRICS).unlink(missing_ok=True)
        else:
            _keep_until(folder / METRICS, kept)
        self._metrics = (folder / METRICS).open("a")
        self._scalars = {
            stage: SummaryWriter(
                str(folder / TENSORBOARD / stage), purge_step=kept[stage] + 1 if kept else None
            )
            for stage in self._steps
        }
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
            self._scalars[stage].add_scalar(f"{stage}/{name}", value, step)
        self._scalars[stage].flush()  # as the metrics: a run that is killed has them

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
        for scalars in self._scalars.values():
            scalars.close()
        self._metrics.close()


def _last_kept(steps: Mapping[str, int], resumed: tuple[str, int]) -> dict[str, int]:
    """The last step of each stage that does not come again, 0 where all of them do."""
    stage, step = resumed
    order = list(steps)
    before = order[: order.index(stage)]
    return {**dict.fromkeys(order, 0), **{name: steps[name] for name in before}, stage: step}


def _keep_until(path: Path, last: Mapping[str, int]) -> None:
    """Drop the lines after the last step of each stage. The last line may be torn."""
    rows = json_rows(path) if path.exists() else []
    known = [row for row in rows if row.get("stage") in last and isinstance(row.get("step"), int)]
    kept = [row for row in known if row["step"] <= last[row["stage"]]]
    with replaced_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
