"""Ablation: the same training with parts left out, or settings changed, over several seeds.

The rows of the paper's Table 3 build the method up; those of its Table A draw the points anew. Any
other comparison is a row of settings. Each row is trained with the seeds 0, 1, ... and evaluated
on the test split, or, for choosing settings, on held-out training recordings.

DIR/
  results.jsonl     one line a trained model; what is in it is not trained again
  ablation.md       the table: mean and spread over the seeds
  ablation.csv      the same, with the value of each seed
"""

from __future__ import annotations

import csv
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
from hrpro.training.annotations import read_ground_truth, read_truth
from hrpro.training.config import TrainingConfig
from hrpro.training.data import DataSet, read_test_split, read_training_split
from hrpro.training.drawing import DISTRIBUTIONS, draw_points
from hrpro.training.evaluate import evaluate
from hrpro.training.files import json_rows
from hrpro.training.metrics import GroundTruth
from hrpro.training.train import train

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
    """One trained model: mAP by tIoU threshold, and their mean."""

    row: str
    seed: int
    settings: dict[str, Any]
    average_map: float
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

    With ``held_out`` n the last 1/n of the training recordings, by name, are evaluated and the
    others trained on; the test split is not touched. Writes the tables to ``out``.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = {row.name: _settings(base, row) for row in rows}  # errors come before the work
    done = _read_trials(out / RESULTS)
    trials = []
    for row in rows:
        for seed in range(seeds):
            config = settings[row.name].model_copy(update={"seed": seed})
            made_by = _made_by(config, row, folder, held_out)
            trial = done.get((row.name, seed))
            if trial is None or trial.settings != made_by:
                trial = _measure(folder, config, row, held_out, made_by)
                _append_line(out / RESULTS, json.dumps(vars(trial)))
            trials.append(trial)
            report(trial)
    (out / MARKDOWN).write_text(markdown_table(trials))
    (out / CSV).write_text(csv_table(trials))
    return trials


def _settings(base: TrainingConfig, row: Row) -> TrainingConfig:
    return load_settings(TrainingConfig, None, row.settings, base.model_dump(mode="json"))


def _made_by(
    config: TrainingConfig, row: Row, folder: Path, held_out: int | None
) -> dict[str, Any]:
    """All that a result depends on."""
    return {
        "config": config.model_dump(mode="json"),
        "stage": row.stage,
        "points": row.points,
        "data": str(folder.resolve()),
        "held_out": held_out,
    }


def _measure(
    folder: Path, config: TrainingConfig, row: Row, held_out: int | None, made_by: dict[str, Any]
) -> Trial:
    started_s = time.monotonic()
    fitted, evaluated, truth = _splits(folder, config, row, held_out)
    if row.stage == 1:  # a step, since there is no model without
        instance = config.instance_stage.model_copy(update={"steps": 1})
        config = config.model_copy(update={"instance_stage": instance})
    model = train(config, fitted, lambda *_: None)
    found = evaluate(model, evaluated, truth, config.localization)
    figures = found.both_stages if row.stage == 2 else found.stage1
    return Trial(
        row=row.name,
        seed=config.seed,
        settings=made_by,
        average_map=figures.average,
        by_tiou={f"{tiou:g}": value for tiou, value in figures.by_tiou.items()},
        seconds=round(time.monotonic() - started_s, 1),
    )


def _splits(
    folder: Path, config: TrainingConfig, row: Row, held_out: int | None
) -> tuple[DataSet, DataSet, GroundTruth]:
    """Recordings to train on, recordings to evaluate, and their ground truth."""
    fitted = read_training_split(folder, config.data)
    if row.points is not None:
        fitted = _with_points(fitted, folder, row.points, config.seed)
    if held_out is None:
        evaluated = read_test_split(folder, fitted.classes, config.data, fitted.feature_dim)
    else:
        fitted, evaluated = split(fitted, held_out)
    names = [recording.name for recording in evaluated.recordings]
    if held_out is None:
        truth = read_ground_truth(folder, names, fitted.classes, config.data)
    else:  # the ambiguous stretches are of the test split
        segments = read_truth(folder, names, fitted.classes)
        truth = GroundTruth(segments, len(fitted.classes), config.data.tiou_thresholds)
    return fitted, evaluated, truth


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
        order = np.argsort(index, kind="stable")
        recordings.append(
            replace(recording, point_index=index[order], point_label=segments.label_index[order])
        )
    return replace(data, recordings=tuple(recordings))


def split(data: DataSet, share: int) -> tuple[DataSet, DataSet]:
    """The recordings to train on, and the last 1/share of them, held out."""
    recordings = sorted(data.recordings, key=lambda recording: recording.name)
    first = len(recordings) - max(1, len(recordings) // share)
    if not first:
        raise HrproError("held out: expected at least two training recordings")
    return (
        replace(data, recordings=tuple(recordings[:first])),
        replace(data, recordings=tuple(recordings[first:])),
    )


# --- tables --------------------------------------------------------------------------------------


def markdown_table(trials: Sequence[Trial]) -> str:
    """One line a row: mean and standard deviation of the average mAP over seeds, mean mAPs."""
    shown = [key for key in trials[0].by_tiou if float(key) in _SHOWN_TIOUS]
    shown = shown or list(trials[0].by_tiou)
    lines = [
        "| row | average mAP | spread | " + " | ".join(f"at {key}" for key in shown) + " | seeds |",
        "| --- " * (len(shown) + 4) + "|",
    ]
    for name, group in _by_row(trials).items():
        mean, spread = _mean_and_spread(group)
        at = [statistics.fmean(trial.by_tiou[key] for trial in group) for key in shown]
        cells = [f"{mean:.3f}", f"{spread:.3f}", *(f"{value:.3f}" for value in at)]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(group)} |")
    return "\n".join(lines) + "\n"


def csv_table(trials: Sequence[Trial]) -> str:
    """As the Markdown table, with full precision, one column a tIoU threshold and a seed."""
    text = io.StringIO()
    tious = list(trials[0].by_tiou)
    seeds = sorted({trial.seed for trial in trials})
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["row", "average_map", "spread", *(f"map_at_{tiou}" for tiou in tious)]
        + [f"average_map_seed_{seed}" for seed in seeds]
        + ["seconds"]
    )
    for name, group in _by_row(trials).items():
        by_seed = {trial.seed: trial.average_map for trial in group}
        writer.writerow(
            [name, *_mean_and_spread(group)]
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
