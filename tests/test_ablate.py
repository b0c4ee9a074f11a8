"""Ablations: which rows there are, what a row changes, and the tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from commands import assignments, hrpro, refusal
from tiny_data import CLASSES, TRAIN, write_tiny_data

from hrpro.engine.settings import SettingsError
from hrpro.training.ablate import (
    PAPER_ROWS,
    Row,
    Trial,
    ablate,
    csv_table,
    markdown_table,
    select_rows,
    split,
)
from hrpro.training.config import TrainingConfig
from hrpro.training.data import read_training_split

QUICK = {
    "threads": 1,
    "model": {"blocks": 1, "attention_past": 8, "instance_width": 16},
    "snippet_stage": {"steps": 30, "batch_size": 4, "crop_snippets": 40, "learning_rate": 0.01},
    "instance_stage": {"steps": 20, "batch_size": 32},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablate") / "tiny"
    write_tiny_data(folder)
    return folder


def test_rows() -> None:
    names = [row.name for row in PAPER_ROWS]
    assert names[:7] == [
        "base", "contrastive", "rab", "regression", "score", "reliable", "negative",
    ]  # fmt: skip
    assert set(names[7:]) == {"points-uniform", "points-centre", "points-gaussian"}
    assert select_rows([], []) == list(PAPER_ROWS)
    assert [row.name for row in select_rows(["rab", "base"], [])] == ["rab", "base"]
    own = Row("wide", ("model.width=64", "seed=3"))
    assert select_rows([], ["wide: model.width=64 seed=3"]) == [own]
    assert select_rows(["base"], ["plain:"]) == [PAPER_ROWS[0], Row("plain")]


@pytest.mark.parametrize(
    ("names", "own", "message"),
    [
        (["rap"], [], "--rows: expected some of base, contrastive, .*, got 'rap'"),
        ([], ["model.width=64"], "--row: expected 'NAME: KEY=VALUE ...', got 'model.width=64'"),
        (["base"], ["base: seed=1"], "two rows have the name 'base'"),
    ],
)
def test_rows_that_are_refused(names: list[str], own: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        select_rows(names, own)


def test_each_row_of_the_paper_trains(data: Path, tmp_path: Path) -> None:
    reported: list[Trial] = []
    config = TrainingConfig.model_validate(QUICK)
    trials = ablate(data, tmp_path, config, PAPER_ROWS, 1, None, reported.append)
    assert trials == reported
    assert [trial.row for trial in trials] == [row.name for row in PAPER_ROWS]
    by_row = {trial.row: trial for trial in trials}
    # Stage 1 with attention blocks is one model, whatever stage 2 makes of it.
    assert by_row["rab"].settings["config"] == by_row["negative"].settings["config"]
    assert by_row["base"].settings["config"]["model"]["blocks"] == 0
    assert by_row["regression"].settings["config"]["instance_stage"]["score_weight"] == 0
    assert all(0 <= trial.average_map <= 1 for trial in trials)
    assert len({trial.average_map for trial in trials}) > 5


def test_what_is_measured_is_not_trained_again(data: Path, tmp_path: Path) -> None:
    config = TrainingConfig.model_validate(QUICK)
    rows = [Row("plain"), Row("wide", ("model.width=8",))]
    first = ablate(data, tmp_path, config, rows, 2, 3, lambda _: None)
    assert [(trial.row, trial.seed) for trial in first] == [
        ("plain", 0), ("plain", 1), ("wide", 0), ("wide", 1),
    ]  # fmt: skip
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + '\n{"row": "pl')  # torn
    again = ablate(data, tmp_path, config, rows, 2, 3, lambda _: None)
    assert again == first  # the very seconds
    other = config.model_copy(update={"checkpoint_s": 1.0})
    changed = ablate(data, tmp_path, other, rows[:1], 1, 3, lambda _: None)
    assert changed[0] != first[0]
    assert ablate(data, tmp_path, other, rows[:1], 1, 3, lambda _: None) == changed


def test_held_out_recordings_are_the_last_and_are_not_trained_on(data: Path) -> None:
    fitted, held_out = split(read_training_split(data), 3)
    assert [recording.name for recording in fitted.recordings] == list(TRAIN[:4])
    assert [recording.name for recording in held_out.recordings] == list(TRAIN[4:])
    assert fitted.classes == held_out.classes == CLASSES


def trial(row: str, seed: int, average: float) -> Trial:
    return Trial(row, seed, {}, average, {"0.1": average + 0.1, "0.2": 0.5, "0.5": 0.25}, 2.0)


def test_tables_have_mean_and_spread() -> None:
    trials = [trial("a", 0, 0.5), trial("a", 1, 0.7), trial("b", 0, 0.25)]
    # Mean 0.6, standard deviation sqrt((0.01 + 0.01) / 1); tIoU 0.2 is not shown.
    assert markdown_table(trials).splitlines() == [
        "| row | average mAP | spread | at 0.1 | at 0.5 | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
        "| a | 0.600 | 0.141 | 0.700 | 0.250 | 2 |",
        "| b | 0.250 | 0.000 | 0.350 | 0.250 | 1 |",
    ]
    rows = list(csv.DictReader(csv_table(trials).splitlines()))
    assert [row["row"] for row in rows] == ["a", "b"]
    assert float(rows[0]["average_map"]) == pytest.approx(0.6)
    assert float(rows[0]["spread"]) == pytest.approx(np.sqrt(0.02))
    assert (rows[0]["average_map_seed_1"], rows[1]["average_map_seed_1"]) == ("0.7", "")


def test_the_command(data: Path, tmp_path: Path) -> None:
    arguments = ("ablate", data, "--out", tmp_path, "--rows", "rab", *assignments(QUICK))
    said = hrpro(*arguments, "--row", "own: model.width=8").stdout
    assert "rab, seed 0: " in said and "| own | " in said
    table = (tmp_path / "ablation.md").read_text()
    assert table in said and len(table.splitlines()) == 4
    trials = json.loads(hrpro(*arguments, "--json").stdout)
    assert [each["row"] for each in trials] == ["rab"]
    assert "no such setting" in refusal(*arguments, "--row", "own: model.widht=8")
