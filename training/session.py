"""Training and evaluating as the command line does: from folders to folders."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TypedDict

from rich.console import Console
from rich.table import Table

from hrpro.training.config import TrainingConfig
from hrpro.training.data import read_test_split, read_training_split, read_truth
from hrpro.training.evaluate import evaluate
from hrpro.training.recorder import Recorder
from hrpro.training.run import (
    begin_run,
    describe_run,
    finish_run,
    read_run,
    write_checkpoint,
    write_figures,
)
from hrpro.training.train import train


class EvaluationFigures(TypedDict):
    """What `hrpro evaluate --json` prints; ``map`` is by tIoU threshold."""

    average_map: float
    map: dict[str, float]
    stage1_average_map: float
    recordings: int
    instances: int


def train_run(
    data_folder: Path, out: Path, config: TrainingConfig, console: Console
) -> dict[str, object]:
    """Train on a data folder and write the run; returns a summary."""
    data = read_training_split(data_folder, config.data)
    begin_run(out)
    started_s = time.monotonic()
    with Recorder(out, config, console) as recorder:
        train(config, data, recorder, partial(write_checkpoint, out))
    description = describe_run(config, data)
    finish_run(out, description)
    summary: dict[str, object] = {
        "run": str(out),
        "data_set": data.name,
        "recordings": len(data.recordings),
        "classes": len(data.classes),
        "points": description.points,
        "seconds": round(time.monotonic() - started_s, 1),
        "snippet_loss": recorder.last["snippet"]["loss"],
        "instance_loss": recorder.last["instance"]["loss"],
    }
    table = Table("trained", "", show_header=False)
    for name, value in summary.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
    return summary


def evaluate_run(run: Path, data_folder: Path) -> EvaluationFigures:
    """Offline mAP of a run on a data folder's test split; noted in the run for the export."""
    description, model = read_run(run)
    config = description.config
    data = read_test_split(data_folder, description.classes, config.data, description.feature_dim)
    truth = read_truth(
        data_folder, [recording.name for recording in data.recordings], description.classes
    )
    found = evaluate(model, data, truth, config.localization)
    figures: EvaluationFigures = {
        "average_map": found.both_stages.average,
        "map": {f"{tiou:g}": value for tiou, value in found.both_stages.by_tiou.items()},
        "stage1_average_map": found.stage1.average,
        "recordings": found.recordings,
        "instances": found.both_stages.instances,
    }
    write_figures(
        run,
        {
            "data_set": data.name,
            "recordings": found.recordings,
            "average_map": found.both_stages.average,
            "stage1_average_map": found.stage1.average,
        },
    )
    return figures
