"""Training and evaluating as the command line does: from folders to folders."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Console
from rich.table import Table

from hrpro.training.annotations import annotated_labels, read_database, read_ground_truth
from hrpro.training.checkpoint import Checkpoints
from hrpro.training.config import TrainingConfig
from hrpro.training.data import (
    DataSet,
    known_classes,
    read_names,
    read_test_split,
    read_training_split,
)
from hrpro.training.data_config import DataConfig
from hrpro.training.evaluate import evaluate
from hrpro.training.metrics import GroundTruth, MeanAveragePrecision
from hrpro.training.model import SnippetModel, window_reach
from hrpro.training.optimisation import training_device
from hrpro.training.parallel import process_group, process_rank
from hrpro.training.predictions import PredictionsError, read_predictions, write_predictions
from hrpro.training.presets import preset_of, read_preset
from hrpro.training.recorder import Recorder
from hrpro.training.run import (
    RunDescription,
    RunError,
    begin_run,
    check_finished_run,
    describe_run,
    finish_run,
    is_finished,
    read_run,
    read_snippet_stage,
    read_state,
    write_figures,
    write_weights,
)
from hrpro.training.simulate import SIMULATED_NOTE, is_simulated
from hrpro.training.train import train


class EvaluationFigures(TypedDict):
    """What `hrpro evaluate --json` prints; ``map`` is by tIoU threshold. Predictions from a file
    have no stage 1."""

    average_map: float
    map: dict[str, float]
    stage1_average_map: float | None
    recordings: int
    instances: int


def train_run(
    data_folder: Path,
    out: Path,
    config: TrainingConfig,
    console: Console,
    resume: bool = False,
) -> dict[str, object]:
    """Train on a data folder and write the run; returns a summary.

    With ``resume`` training goes on where the run in ``out`` was stopped, from the start if
    there is none; if it is finished there is nothing to do. Of several processes the first one
    writes and reports. Raises DataError, RunError, SettingsError, TrainingError and
    TrainingStopped.
    """
    started_s = time.monotonic()
    config.window.length(*window_reach(config.model))  # before the export refuses what is trained
    with process_group(training_device(config)):
        data = read_training_split(data_folder, config.data)
        description = describe_run(config, data)
        known = preset_of(data.classes)
        if known is not None and config.data.preset is None and process_rank() == 0:
            console.print(
                f"these are the classes of {read_preset(known).title}: --set data.preset={known} "
                "brings its clock and the settings that suit it",
                soft_wrap=True,
            )
        if is_simulated(data_folder) and process_rank() == 0:
            console.print(SIMULATED_NOTE, soft_wrap=True)
        if resume and is_finished(out):
            check_finished_run(out, description)
            console.print(f"{out}: the run is finished", markup=False, soft_wrap=True)
            last: dict[str, dict[str, float]] = {}
        else:
            last = _train_and_write(data, out, description, console, resume)
            if process_rank() == 0:
                finish_run(out, description)
        if process_rank():
            return {}
    summary: dict[str, object] = {
        "run": str(out),
        "data_set": data.name,
        "recordings": description.recordings,
        "classes": len(description.classes),
        "points": description.points,
        "seconds": round(time.monotonic() - started_s, 1),
        **{f"{stage}_loss": losses["loss"] for stage, losses in last.items()},
    }
    table = Table("trained", "", show_header=False)
    for name, value in summary.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    return summary


def _train_and_write(
    data: DataSet, out: Path, description: RunDescription, console: Console, resume: bool
) -> dict[str, dict[str, float]]:
    """Train, with all that is written on the way; the last losses of each stage."""
    first = process_rank() == 0
    config = description.config
    state = read_state(out, description) if resume else None
    if first and state is None:
        begin_run(out)
    elif first and state is not None:
        console.print(f"going on after step {state['step']} of stage {state['stage']}")
    resumed = (state["stage"], state["step"]) if state else None
    made_by = description.model_dump(mode="json")
    recording = Recorder(out, config, console, resumed) if first else nullcontext()
    with (
        Checkpoints(out, config.checkpoint_s, made_by, state) as checkpoints,
        recording as recorder,
    ):
        train(
            config,
            data,
            recorder or (lambda *_: None),
            partial(write_weights, out) if first else None,
            checkpoints,
            _stage_before(out, config, data, state),
            scratch=out,
        )
    return recorder.last if recorder else {}


def _stage_before(
    out: Path, config: TrainingConfig, data: DataSet, state: Mapping[str, Any] | None
) -> SnippetModel | None:
    """Stage 1, where training goes on with stage 2."""
    if state is None or state["stage"] == "snippet":
        return None
    return read_snippet_stage(out, config, data)


def evaluate_run(
    run: Path, data_folder: Path, predictions: Path | None = None
) -> EvaluationFigures:
    """Offline mAP of a run on a data folder's test split; noted in the run for the export.

    What was predicted is written to the file ``predictions``, if one is given.
    """
    if predictions is not None and not predictions.parent.is_dir():
        raise PredictionsError(f"{predictions}: expected a folder to write it in, there is none")
    description, model = read_run(run)
    data, truth = read_evaluation_data(data_folder, description)
    found = evaluate(model, data, truth, description.config.localization)
    write_figures(
        run,
        {
            "data_set": data.name,
            "recordings": found.recordings,
            "average_map": found.both_stages.average,
            "stage1_average_map": found.stage1.average,
        },
    )
    if predictions is not None:
        write_predictions(predictions, found.predictions, description.classes)
    figures = _figures(found.both_stages, found.recordings)
    return {**figures, "stage1_average_map": found.stage1.average}


def read_evaluation_data(
    data_folder: Path, description: RunDescription
) -> tuple[DataSet, GroundTruth]:
    """The test split as the run reads its data, and its ground truth; as `read_test_data`."""
    data = read_test_data(data_folder, description)
    names = [recording.name for recording in data.recordings]
    config, classes = description.config.data, description.classes
    return data, read_ground_truth(data_folder, names, classes, config)


def read_test_data(data_folder: Path, description: RunDescription) -> DataSet:
    """The test split as the run reads its data; RunError if it is of another data set."""
    config, classes = description.config.data, description.classes
    there = known_classes(data_folder, config)
    if there is not None and set(there) != set(classes):
        odd = ", ".join(sorted(set(there) ^ set(classes))[:5])
        raise RunError(
            f"the run was trained on {description.data_set!r} with {len(classes)} classes, "
            f"but {data_folder} has {len(there)}; they differ in {odd}"
        )
    return read_test_split(data_folder, classes, config, description.feature_dim)


def evaluate_predictions(
    predictions: Path, data_folder: Path, config: DataConfig
) -> EvaluationFigures:
    """mAP of a file of predictions in ActivityNet's format on a data folder's test split."""
    names = read_names(data_folder, "test", config)
    everyone = list(read_database(data_folder))
    classes = known_classes(data_folder, config) or annotated_labels(data_folder, everyone)
    truth = read_ground_truth(data_folder, names, classes, config)
    blocked = config.published.blocked if config.published else ()
    found = truth.compare(read_predictions(predictions, names, classes, blocked))
    return _figures(found, len(names))


def _figures(found: MeanAveragePrecision, recordings: int) -> EvaluationFigures:
    return {
        "average_map": found.average,
        "map": {f"{tiou:g}": value for tiou, value in found.by_tiou.items()},
        "stage1_average_map": None,
        "recordings": recordings,
        "instances": found.instances,
    }
