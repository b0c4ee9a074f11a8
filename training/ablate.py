"""Ablation: the same training with parts left out, or settings changed, over several seeds.

The rows of the paper's Table 3 build the method up; those of its Table A draw the points anew. Any
other comparison is a row of settings. Each row is trained with the seeds 0, 1, ... and evaluated
on the test split, or, for choosing settings, on held-out training recordings. Rows that follow one
another and have the same stage 1 share it.

DIR/
  results.jsonl     one line a trained model; what is in it is not trained again
  ablation.md       the table: mean and spread over the seeds
  ablation.csv      the same, with the value of each seed
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hrpro.engine.settings import SettingsError, load_settings
from hrpro.engine.wire import HrproError
from hrpro.training.annotations import (
    read_ground_truth,
    read_measurable_truth,
    read_truth,
)
from hrpro.training.config import TrainingConfig
from hrpro.training.data import DataSet, read_test_split, read_training_split
from hrpro.training.data_config import DataConfig, DataError
from hrpro.training.drawing import DISTRIBUTIONS, draw_points
from hrpro.training.evaluate import evaluate
from hrpro.training.files import json_rows
from hrpro.training.localize import localize_recording
from hrpro.training.metrics import GroundTruth, MeanAveragePrecision
from hrpro.training.model import SnippetModel
from hrpro.training.run import data_digest
from hrpro.training.snippet_stage import snippet_scores
from hrpro.training.train import train, train_snippet_stage

RESULTS, MARKDOWN, CSV = "results.jsonl", "ablation.md", "ablation.csv"
_SHOWN_TIOUS = (0.1, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Row:
    """What one row changes: ``settings`` are assignments over the configuration, ``points`` a
    distribution to draw the point labels from, ``stage`` the one whose proposals count."""

    name: str
    settings: tuple[str, ...] = ()
    stage: int = 2
    points: str | None = None


_NO_CONTRAST = "snippet_stage.contrastive_weight=0"
_NO_BLOCKS = "model.blocks=0"
_NO_RELIABLE = "instance_stage.reliable=none"
_NO_NEGATIVES = "instance_stage.negative_share=0"

# Table 3 of the paper, each row with one part more, and Table A.
PAPER_ROWS = (
    Row("base", (_NO_CONTRAST, _NO_BLOCKS), stage=1),
    Row("contrastive", (_NO_BLOCKS,), stage=1),
    Row("rab", stage=1),
    Row("regression", ("instance_stage.score_weight=0", _NO_RELIABLE, _NO_NEGATIVES)),
    Row("score", (_NO_RELIABLE, _NO_NEGATIVES)),
    Row("reliable", (_NO_NEGATIVES,)),
    Row("negative"),
    *(Row(f"points-{distribution}", points=distribution) for distribution in DISTRIBUTIONS),
)
"""The last row of Table 3, with the negative proposals, is the whole method."""


@dataclass(frozen=True)
class Trial:
    """One trained model: mAP by tIoU threshold, their mean, and the mean of stage 1 alone.

    ``settings`` are all that it depends on. ``seconds`` are those of what was trained for it: a
    stage 1 that rows share counts for the first of them.
    """

    row: str
    seed: int
    settings: dict[str, Any]
    average_map: float
    stage1_average_map: float
    by_tiou: dict[str, float]
    seconds: float


def select_rows(names: Sequence[str], own: Sequence[str]) -> list[Row]:
    """The paper's rows of these names (all, if none are named), then rows "NAME: SETTINGS"."""
    known = {row.name: row for row in PAPER_ROWS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SettingsError(f"--rows: expected some of {', '.join(known)}, got {unknown[0]!r}")
    rows = [known[name] for name in names] or ([] if own else list(PAPER_ROWS))
    for text in own:
        name, colon, settings = text.partition(":")
        if not colon or not name.strip():
            raise SettingsError(f"--row: expected 'NAME: KEY=VALUE ...', got {text!r}")
        rows.append(Row(name.strip(), tuple(settings.split())))
    repeated = [row.name for row in rows if [each.name for each in rows].count(row.name) > 1]
    if repeated:
        raise SettingsError(f"two rows have the name {repeated[0]!r}")
    return rows


@dataclass(frozen=True)
class _Job:
    """What one trial trains on and is held against; ``made_by`` is all that it depends on."""

    row: Row
    config: TrainingConfig
    fitted: DataSet
    evaluated: DataSet
    truth: GroundTruth
    made_by: dict[str, Any]


def ablate(
    folder: Path,
    out: Path,
    base: TrainingConfig,
    rows: Sequence[Row],
    seeds: int,
    held_out: int | None,
    report: Callable[[Trial], None],
) -> list[Trial]:
    """Train and evaluate each row with each seed; ``report`` is called as they come.

    With ``held_out`` n every n-th of the training recordings, by name, is evaluated and the others
    are trained on; the test split is not touched. Writes the tables to ``out``, which also holds
    training's scratch file. Settings and data are looked at before anything is trained.
    """
    jobs = _jobs(folder, base, rows, seeds, held_out)
    out.mkdir(parents=True, exist_ok=True)
    done = _read_trials(out / RESULTS)
    trials, newest = [], _NewestSnippetModel()
    for job in jobs:
        trial = done.get((job.row.name, job.config.seed))
        if trial is None or trial.settings != job.made_by:
            trial = _measure(job, newest, out)
            _append_line(out / RESULTS, json.dumps(vars(trial)))
        trials.append(trial)
        report(trial)
    (out / MARKDOWN).write_text(markdown_table(trials))
    (out / CSV).write_text(csv_table(trials))
    return trials


# --- what is trained -----------------------------------------------------------------------------


def _jobs(
    folder: Path, base: TrainingConfig, rows: Sequence[Row], seeds: int, held_out: int | None
) -> list[_Job]:
    """All trials, seed by seed: rows with the same stage 1 then stand side by side."""
    configs = [_row_config(base, row) for row in rows]
    kinds = {config.data for config in configs}  # rows may have different files of points
    splits = {kind: _read_splits(folder, kind, held_out) for kind in kinds}
    annotations = hashlib.sha256((folder / "gt_full.json").read_bytes()).hexdigest()
    jobs = []
    for seed in range(seeds):
        for row, row_config in zip(rows, configs, strict=True):
            config = row_config.model_copy(update={"seed": seed})
            fitted, evaluated, truth = splits[config.data]
            if row.points is not None:
                fitted = _with_points(fitted, folder, row.points, seed)
            _check_classes_have_points(row, fitted)
            depends_on = {
                "config": config.model_dump(mode="json"),
                "fitted": data_digest(fitted),
                "evaluated": data_digest(evaluated),
                "annotations": annotations,
                "stage": row.stage,
                "points": row.points,
                "held_out": held_out,
            }
            jobs.append(_Job(row, config, fitted, evaluated, truth, depends_on))
    return jobs


def _row_config(base: TrainingConfig, row: Row) -> TrainingConfig:
    """The settings of a row, whose seed is still to come. Raises SettingsError."""
    below = base.model_dump(mode="json", exclude={"seed"})
    config = load_settings(TrainingConfig, None, row.settings, below)
    for where, given in (("", base), (f"row {row.name!r}: ", config)):
        if "seed" in given.model_fields_set:
            raise SettingsError(
                f"{where}seed: expected none, since each row is trained with the seeds 0, 1, ...; "
                f"--seeds says how many; got {given.seed}"
            )
    common, own = base.data.tiou_thresholds, config.data.tiou_thresholds
    if own != common:
        raise SettingsError(
            f"row {row.name!r}: data.tiou_thresholds: expected those of all rows, {list(common)}, "
            f"got {list(own)}; --set changes them for all"
        )
    return config


def _read_splits(
    folder: Path, config: DataConfig, held_out: int | None
) -> tuple[DataSet, DataSet, GroundTruth]:
    """Recordings to train on, recordings to evaluate, and their ground truth."""
    fitted = read_training_split(folder, config)
    classes = fitted.classes
    if held_out is None:
        evaluated = read_test_split(folder, classes, config, fitted.feature_dim)
        names = [recording.name for recording in evaluated.recordings]
        return fitted, evaluated, read_ground_truth(folder, names, classes, config)
    fitted, evaluated = split(fitted, held_out)
    names = [recording.name for recording in evaluated.recordings]
    segments = read_measurable_truth(folder, names, classes)
    # The ambiguous stretches are of the test split.
    return fitted, evaluated, GroundTruth(segments, len(classes), config.tiou_thresholds)


def split(data: DataSet, share: int) -> tuple[DataSet, DataSet]:
    """The recordings to train on, and every ``share``-th by name, held out; ``share`` is 2 or more.

    Names often go by class: the last ones alone would leave classes without a recording to train
    on. Points play no part, so that all rows are evaluated on the same recordings.
    """
    recordings = sorted(data.recordings, key=lambda recording: recording.name)
    held_out = recordings[share - 1 :: share]
    fitted = [each for n, each in enumerate(recordings, start=1) if n % share]
    if not held_out:
        raise HrproError(
            f"held out: expected at least {share} training recordings, got {len(recordings)}"
        )
    return replace(data, recordings=tuple(fitted)), replace(data, recordings=tuple(held_out))


def _with_points(data: DataSet, folder: Path, distribution: str, seed: int) -> DataSet:
    """The same recordings with points drawn from their full annotations."""
    truth = read_truth(folder, [recording.name for recording in data.recordings], data.classes)
    random = np.random.default_rng(seed)
    recordings = []
    for recording in data.recordings:
        segments = truth[recording.name]
        point_s = draw_points(segments.start_s, segments.end_s, distribution, random)
        index = np.floor(point_s / data.clock.snippet_s).astype(np.int64)
        index = index.clip(0, len(recording) - 1)
        # Sorted by time; points of one class in the same snippet say the same and count once.
        points = np.unique(np.stack([index, segments.label_index], axis=1), axis=0)
        recordings.append(replace(recording, point_index=points[:, 0], point_label=points[:, 1]))
    return replace(data, recordings=tuple(recordings))


def _check_classes_have_points(row: Row, fitted: DataSet) -> None:
    labelled = set(np.concatenate([each.point_label for each in fitted.recordings]).tolist())
    missing = [label for index, label in enumerate(fitted.classes) if index not in labelled]
    if missing:
        raise DataError(
            f"row {row.name!r}: no point for {', '.join(missing)} in the {len(fitted.recordings)} "
            "recordings to train on; each class needs at least one to start its prototype from "
            "(eq. 2); where recordings are held out, another --held-out may leave it one"
        )


# --- training and evaluation ---------------------------------------------------------------------


# Settings that stage 1 does not depend on.
_NOT_OF_STAGE_1: Any = {
    "instance_stage": True, "localization": True, "window": True, "model": {"instance_width"},
}  # fmt: skip


class _NewestSnippetModel:
    """The stage 1 that was trained last, for the trials that have the same one.

    One is kept: it may have hundreds of megabytes.
    """

    def __init__(self) -> None:
        self._made_by: object = None
        self._model: SnippetModel | None = None

    def of(self, job: _Job) -> SnippetModel:
        """Stage 1 of a trial, trained if it is another one."""
        belongs_to = (job.config.model_dump(exclude=_NOT_OF_STAGE_1), job.made_by["fitted"])
        if self._model is None or belongs_to != self._made_by:
            self._model = None
            self._model = train_snippet_stage(job.config, job.fitted, lambda *_: None)
            self._made_by = belongs_to
        return self._model


def _measure(job: _Job, newest: _NewestSnippetModel, scratch: Path) -> Trial:
    started_s = time.monotonic()
    config, snippet = job.config, newest.of(job)
    if job.row.stage == 1:
        figures = stage1 = _evaluate_snippet_stage(snippet, job)
    else:
        model = train(config, job.fitted, lambda *_: None, snippet=snippet, scratch=scratch)
        found = evaluate(model, job.evaluated, job.truth, config.localization)
        figures, stage1 = found.both_stages, found.stage1
    return Trial(
        row=job.row.name,
        seed=config.seed,
        settings=job.made_by,
        average_map=figures.average,
        stage1_average_map=stage1.average,
        by_tiou={f"{tiou:g}": value for tiou, value in figures.by_tiou.items()},
        seconds=round(time.monotonic() - started_s, 1),
    )


def _evaluate_snippet_stage(snippet: SnippetModel, job: _Job) -> MeanAveragePrecision:
    """What `evaluate` says of stage 1, without a stage 2."""
    predictions = {}
    for recording in job.evaluated.recordings:
        output = snippet_scores(snippet, recording.features)
        predictions[recording.name] = localize_recording(
            output, job.config.localization, job.evaluated.clock, None
        )
    return job.truth.compare(predictions)


# --- tables --------------------------------------------------------------------------------------


def markdown_table(trials: Sequence[Trial]) -> str:
    """One line a row: mean and standard deviation of the average mAP over seeds, mean mAPs."""
    shown = [key for key in trials[0].by_tiou if float(key) in _SHOWN_TIOUS]
    shown = shown or list(trials[0].by_tiou)
    lines = [
        "| row | average mAP | spread | stage 1 alone | "
        + " | ".join(f"at {key}" for key in shown)
        + " | seeds |",
        "| --- " * (len(shown) + 5) + "|",
    ]
    for name, group in _by_row(trials).items():
        mean, spread = _mean_and_spread(group)
        at = [statistics.fmean(trial.by_tiou[key] for trial in group) for key in shown]
        stage1 = statistics.fmean(trial.stage1_average_map for trial in group)
        cells = [f"{value:.3f}" for value in (mean, spread, stage1, *at)]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(group)} |")
    return "\n".join(lines) + "\n"


def csv_table(trials: Sequence[Trial]) -> str:
    """As the Markdown table, with full precision, one column a tIoU threshold and a seed."""
    text = io.StringIO()
    tious = list(trials[0].by_tiou)
    seeds = sorted({trial.seed for trial in trials})
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["row", "average_map", "spread", "stage1_average_map"]
        + [f"map_at_{tiou}" for tiou in tious]
        + [f"average_map_seed_{seed}" for seed in seeds]
        + ["seconds"]
    )
    for name, group in _by_row(trials).items():
        by_seed = {trial.seed: trial.average_map for trial in group}
        writer.writerow(
            [name, *_mean_and_spread(group)]
            + [statistics.fmean(trial.stage1_average_map for trial in group)]
            + [statistics.fmean(trial.by_tiou[tiou] for trial in group) for tiou in tious]
            + [by_seed.get(seed, "") for seed in seeds]
            + [statistics.fmean(trial.seconds for trial in group)]
        )
    return text.getvalue()


def _by_row(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.row, []).append(trial)
    return groups


def _mean_and_spread(group: Sequence[Trial]) -> tuple[float, float]:
    """Mean and standard deviation over seeds; the latter is 0 for a single seed."""
    values = [trial.average_map for trial in group]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _append_line(path: Path, line: str) -> None:
    """Add a line; one before it that was torn ends first."""
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if torn else "") + line + "\n")


def _read_trials(path: Path) -> dict[tuple[str, int], Trial]:
    """What is there by row and seed, the newest of each; a torn line is left out."""
    trials = {}
    for row in json_rows(path) if path.exists() else []:
        try:
            trial = Trial(**row)
        except TypeError:  # of another version
            continue
        trials[trial.row, trial.seed] = trial
    return trials
