"""Ablations: which rows there are, what a row changes, and the tables."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import assignments, hrpro, refusal
from tiny_data import CLASSES, SNIPPET_FRAMES, SNIPPET_S, TRAIN, tiny_truth, write_tiny_data

from hrpro.engine.settings import SettingsError, load_settings
from hrpro.engine.wire import HrproError
from hrpro.training import ablate as ablation
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
from hrpro.training.data import DataSet, read_test_split, read_training_split
from hrpro.training.data_config import DataError
from hrpro.training.evaluate import evaluate
from hrpro.training.train import TrainedModel, train, train_snippet_stage

Points = dict[str, list[tuple[int, int]]]

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


@pytest.fixture
def own_data(data: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(data, tmp_path / "tiny"))


@dataclass
class Trainings:
    """What each stage was trained on, in turn; ``scratch`` is where stage 2 put its file."""

    stage1: list[DataSet] = field(default_factory=list)
    stage2: list[DataSet] = field(default_factory=list)
    scratch: set[Path] = field(default_factory=set)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    seen = Trainings()

    def seen_stage1(config: TrainingConfig, data: DataSet, *others: Any) -> Any:
        seen.stage1.append(data)
        return train_snippet_stage(config, data, *others)

    def seen_train(config: TrainingConfig, data: DataSet, *others: Any, **named: Any) -> Any:
        seen.stage2.append(data)
        seen.scratch.add(named["scratch"])
        assert named["snippet"] is not None
        return train(config, data, *others, **named)

    monkeypatch.setattr(ablation, "train_snippet_stage", seen_stage1)
    monkeypatch.setattr(ablation, "train", seen_train)
    return seen


def quick(**changed: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({**QUICK, **changed})


def points_of(data: DataSet) -> Points:
    """Snippet index and class of each point, by recording."""
    return {
        each.name: list(zip(each.point_index.tolist(), each.point_label.tolist(), strict=True))
        for each in data.recordings
    }


def labels(folder: Path) -> list[tuple[str, str, int]]:
    """Class, recording and frame of the point labels."""
    with (folder / "point_labels" / "points.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [(label, name, int(frame)) for label, name, frame in rows]


def write_labels(folder: Path, rows: list[tuple[str, str, int]]) -> None:
    with (folder / "point_labels" / "points.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("class", "video_id", "point"), *rows])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted path."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        below = flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {}
        found.update(below or {f"{prefix}{name}": value})
    return found


def test_rows() -> None:
    names = [row.name for row in PAPER_ROWS]
    assert names[:7] == [
        "base", "contrastive", "rab", "regression", "score", "reliable", "negative",
    ]  # fmt: skip
    assert set(names[7:]) == {"points-uniform", "points-centre", "points-gaussian"}
    assert select_rows([], []) == list(PAPER_ROWS)
    assert [row.name for row in select_rows(["rab", "base"], [])] == ["rab", "base"]
    own = Row("wide", ("model.width=64", "model.blocks=3"))
    assert select_rows([], ["wide: model.width=64 model.blocks=3"]) == [own]
    assert select_rows(["base"], ["plain:"]) == [PAPER_ROWS[0], Row("plain")]


@pytest.mark.parametrize(
    ("names", "own", "message"),
    [
        (["rap"], [], "--rows: expected some of base, contrastive, .*, got 'rap'"),
        ([], ["model.width=64"], "--row: expected 'NAME: KEY=VALUE ...', got 'model.width=64'"),
        (["base"], ["base: threads=1"], "two rows have the name 'base'"),
    ],
)
def test_rows_that_are_refused(names: list[str], own: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        select_rows(names, own)


# What each row of the paper changes of the whole method.
CONTRAST, BLOCKS = "snippet_stage.contrastive_weight", "model.blocks"
SCORE, RELIABLE = "instance_stage.score_weight", "instance_stage.reliable"
NEGATIVE = "instance_stage.negative_share"
CHANGED: dict[str, dict[str, Any]] = {
    "base": {CONTRAST: 0.0, BLOCKS: 0},
    "contrastive": {BLOCKS: 0},
    "rab": {},
    "regression": {SCORE: 0.0, RELIABLE: "none", NEGATIVE: 0.0},
    "score": {RELIABLE: "none", NEGATIVE: 0.0},
    "reliable": {NEGATIVE: 0.0},
    "negative": {},
    "points-uniform": {},
    "points-centre": {},
    "points-gaussian": {},
}


def test_each_row_of_the_paper_trains(data: Path, tmp_path: Path, trainings: Trainings) -> None:
    reported: list[Trial] = []
    trials = ablate(data, tmp_path, quick(), PAPER_ROWS, 1, None, reported.append)
    assert trials == reported
    assert [trial.row for trial in trials] == [row.name for row in PAPER_ROWS] == list(CHANGED)
    whole = flat(quick().model_dump(mode="json"))
    for each in trials:
        own = flat(each.settings["config"])
        assert {key: own[key] for key in own if own[key] != whole[key]} == CHANGED[each.row]
        assert each.settings["stage"] == (1 if each.row in ("base", "contrastive", "rab") else 2)
    # The rows from rab to negative share stage 1; the first three have no stage 2.
    stage1, stage2 = (
        [points_of(each) for each in seen] for seen in (trainings.stage1, trainings.stage2)
    )
    labelled = points_of(read_training_split(data))
    assert stage1[:3] == [labelled] * 3 and stage2[:4] == [labelled] * 4
    assert stage1[3:] == stage2[4:] and len(stage1) == 6
    # Table A: other points each, and those of the centres are known.
    uniform, centre, gaussian = stage1[3:]
    assert centre == centres(data)
    drawn = [labelled, uniform, centre, gaussian]
    assert all(drawn.count(each) == 1 for each in drawn)
    assert trainings.scratch == {tmp_path}


def centres(folder: Path) -> Points:
    """The snippet in the middle of each annotated action."""
    database = json.loads((folder / "gt_full.json").read_text())["database"]
    return {
        name: sorted(
            (int(sum(each["segment"]) / 2 / SNIPPET_S), CLASSES.index(each["label"]))
            for each in database[name]["annotations"]
        )
        for name in TRAIN
    }


def test_a_row_gives_what_training_it_alone_gives(data: Path, tmp_path: Path) -> None:
    rows = select_rows(["rab", "regression", "negative"], [])
    rab, _, negative = ablate(data, tmp_path, quick(), rows, 1, None, lambda _: None)
    fitted = read_training_split(data)
    model: TrainedModel = train(quick(), fitted, lambda *_: None)
    test = read_test_split(data, CLASSES)
    found = evaluate(model, test, tiny_truth(data), quick().localization)
    assert rab.average_map == found.stage1.average
    assert negative.average_map == found.both_stages.average
    assert list(negative.by_tiou.values()) == list(found.both_stages.by_tiou.values())


def test_stage_1_is_shared_by_rows_that_have_the_same(
    data: Path, tmp_path: Path, trainings: Trainings
) -> None:
    rows = [
        Row("plain"),
        Row("strict", ("localization.peak_gate=0.2", "model.instance_width=8")),
        Row("drawn", points="centre"),
        Row("wide", ("model.width=8",)),
    ]
    ablate(data, tmp_path, quick(), rows, 2, 3, lambda _: None)
    assert (len(trainings.stage1), len(trainings.stage2)) == (2 * 3, 2 * 4)


def test_points_of_a_class_in_one_snippet_count_once(
    own_data: Path, tmp_path: Path, trainings: Trainings
) -> None:
    path = own_data / "gt_full.json"
    content = json.loads(path.read_text())
    hop = {"label": "hop", "segment": [10 * SNIPPET_S, 13 * SNIPPET_S]}
    content["database"]["train0"]["annotations"] = [
        hop, hop, {**hop, "label": "spin"}, {**hop, "segment": [0.0, SNIPPET_S]},
    ]  # fmt: skip
    path.write_text(json.dumps(content))
    rows = [Row("drawn", points="centre", stage=1)]
    ablate(own_data, tmp_path / "out", quick(), rows, 1, None, lambda _: None)
    assert points_of(trainings.stage1[0])["train0"] == [(0, 0), (11, 0), (11, 1)]


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (
            [],
            "data.tiou_thresholds=[0.5]",
            r"row 'odd': data.tiou_thresholds: expected those of all rows, \[0.1, .*, got \[0.5\]",
        ),
        ([], "seed=0", "row 'odd': seed: expected none, .*--seeds says how many; got 0"),
        (["seed=0"], "threads=1", "^seed: expected none, .*--seeds says how many; got 0"),
    ],
)
def test_settings_of_the_ablation_itself_are_refused_before_the_work(
    data: Path,
    tmp_path: Path,
    trainings: Trainings,
    given: list[str],
    settings: str,
    message: str,
) -> None:
    base = load_settings(TrainingConfig, None, given, QUICK)
    rows = [Row("plain"), Row("odd", (settings,))]
    with pytest.raises(SettingsError, match=message):
        ablate(data, tmp_path, base, rows, 1, None, lambda _: None)
    assert not trainings.stage1


def test_thresholds_of_all_rows_are_taken(data: Path, tmp_path: Path) -> None:
    base = quick(data={"tiou_thresholds": (0.5,)})
    (trial,) = ablate(data, tmp_path, base, [Row("plain", stage=1)], 1, None, lambda _: None)
    assert list(trial.by_tiou) == ["0.5"]


def test_what_is_measured_is_not_trained_again(
    data: Path, tmp_path: Path, trainings: Trainings
) -> None:
    config = quick()
    rows = [Row("plain"), Row("wide", ("model.width=8",))]
    first = ablate(data, tmp_path, config, rows, 2, 3, lambda _: None)
    assert [(trial.row, trial.seed) for trial in first] == [
        ("plain", 0), ("wide", 0), ("plain", 1), ("wide", 1),
    ]  # fmt: skip
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    older = json.dumps({**json.loads(lines[0]), "settings": {"data": str(data)}})
    (tmp_path / "results.jsonl").write_text("\n".join([older, *lines]) + '\n{"row": "pl')  # torn
    trainings.stage1.clear()
    again = ablate(data, tmp_path, config, rows, 2, 3, lambda _: None)
    assert again == first  # the very seconds
    assert not trainings.stage1
    other = config.model_copy(update={"checkpoint_s": 1.0})
    changed = ablate(data, tmp_path, other, rows[:1], 1, 3, lambda _: None)
    assert changed[0].settings != first[0].settings and len(trainings.stage1) == 1
    assert ablate(data, tmp_path, other, rows[:1], 1, 3, lambda _: None) == changed
    assert len(trainings.stage1) == 1


def test_other_data_are_trained_on_again(
    own_data: Path, tmp_path: Path, trainings: Trainings
) -> None:
    def measure() -> int:
        """How often training was needed."""
        before = len(trainings.stage1)
        rows = [Row("plain", stage=1)]
        ablate(own_data, tmp_path / "out", quick(), rows, 1, None, lambda _: None)
        return len(trainings.stage1) - before

    assert (measure(), measure()) == (1, 0)
    (label, name, frame), *others = labels(own_data)
    write_labels(own_data, [(label, name, frame + SNIPPET_FRAMES), *others])
    assert (measure(), measure()) == (1, 0)
    path = own_data / "features" / "test" / "test0.npy"
    np.save(path, np.load(path) + np.float32(1))
    assert (measure(), measure()) == (1, 0)
    path = own_data / "features" / "train" / "train3.npy"
    features = np.load(path)
    features[17, 2] += np.float32(0.5)  # one value, neither at an end nor in the middle
    np.save(path, features)
    assert (measure(), measure()) == (1, 0)
    path = own_data / "gt_full.json"
    content = json.loads(path.read_text())
    content["database"]["test0"]["annotations"].pop()
    path.write_text(json.dumps(content))
    assert (measure(), measure()) == (1, 0)


def test_held_out_recordings_are_every_nth_and_are_not_trained_on(
    own_data: Path, tmp_path: Path, trainings: Trainings
) -> None:
    fitted, held_out = split(read_training_split(own_data), 3)
    assert [recording.name for recording in fitted.recordings] == [
        "train0", "train1", "train3", "train4",
    ]  # fmt: skip
    assert [recording.name for recording in held_out.recordings] == ["train2", "train5"]
    assert fitted.classes == held_out.classes == CLASSES
    # The test split is not touched: it need not be there.
    (own_data / "split_test.txt").unlink()
    shutil.rmtree(own_data / "features" / "test")
    rows = [Row("plain"), Row("drawn", points="uniform")]
    ablate(own_data, tmp_path / "out", quick(), rows, 1, 3, lambda _: None)
    seen = trainings.stage1 + trainings.stage2
    assert len(seen) == 4
    assert all(list(points_of(each)) == list(points_of(fitted)) for each in seen)


def test_classes_are_held_out_alike_where_names_go_by_class(
    own_data: Path, tmp_path: Path, trainings: Trainings
) -> None:
    """Three recordings of each class, one after the other; the last half has all of one class."""
    rows = labels(own_data)
    write_labels(own_data, [row for row in rows if (row[0] == "hop") == (row[1] in TRAIN[:3])])
    ablate(own_data, tmp_path / "out", quick(), [Row("one", stage=1)], 1, 2, lambda _: None)
    assert list(points_of(trainings.stage1[0])) == ["train0", "train2", "train4"]


def test_held_out_recordings_that_leave_too_little_are_refused(
    own_data: Path, tmp_path: Path, trainings: Trainings
) -> None:
    def run(row: Row, share: int) -> None:
        ablate(own_data, tmp_path / "out", quick(), [row], 1, share, lambda _: None)

    with pytest.raises(
        HrproError, match="held out: expected at least 7 training recordings, got 6"
    ):
        run(Row("plain"), 7)
    # Only recordings that are held out have points of spin; the annotations have them in all.
    held_out = ("train2", "train5")
    rows = labels(own_data)
    write_labels(own_data, [row for row in rows if row[0] == "hop" or row[1] in held_out])
    with pytest.raises(DataError, match="row 'plain': no point for spin in the 4 recordings"):
        run(Row("plain"), 3)
    assert not trainings.stage1
    run(Row("drawn", points="centre", stage=1), 3)


def trial(row: str, seed: int, average: float) -> Trial:
    return Trial(
        row, seed, {}, average, average - 0.1, {"0.1": average + 0.1, "0.2": 0.5, "0.5": 0.25}, 2.0
    )


def test_tables_have_mean_and_spread() -> None:
    trials = [trial("a", 0, 0.5), trial("a", 1, 0.7), trial("b", 0, 0.25)]
    # Mean 0.6, standard deviation sqrt((0.01 + 0.01) / 1); tIoU 0.2 is not shown.
    assert markdown_table(trials).splitlines() == [
        "| row | average mAP | spread | stage 1 alone | at 0.1 | at 0.5 | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| a | 0.600 | 0.141 | 0.500 | 0.700 | 0.250 | 2 |",
        "| b | 0.250 | 0.000 | 0.150 | 0.350 | 0.250 | 1 |",
    ]
    rows = list(csv.DictReader(csv_table(trials).splitlines()))
    assert [row["row"] for row in rows] == ["a", "b"]
    assert float(rows[0]["average_map"]) == pytest.approx(0.6)
    assert float(rows[1]["stage1_average_map"]) == pytest.approx(0.15)
    assert float(rows[0]["spread"]) == pytest.approx(np.sqrt(0.02))
    assert (rows[0]["average_map_seed_1"], rows[1]["average_map_seed_1"]) == ("0.7", "")


def test_the_command(data: Path, tmp_path: Path) -> None:
    arguments = ("ablate", data, "--out", tmp_path, "--rows", "rab", *assignments(QUICK))
    said = hrpro(*arguments, "--row", "own: model.width=8").stdout
    assert "1 of 2: rab, seed 0: " in said and "2 of 2: own, seed 0: " in said
    assert "| own | " in said and "SIMULATED" not in said
    table = (tmp_path / "ablation.md").read_text()
    assert table in said and len(table.splitlines()) == 4
    trials = json.loads(hrpro(*arguments, "--json").stdout)
    assert [each["row"] for each in trials] == ["rab"]
    folder = shutil.copytree(data, tmp_path / "simulated")
    (folder / "SIMULATED.txt").touch()
    said = hrpro("ablate", folder, "--out", tmp_path / "out", "--rows", "rab", *assignments(QUICK))
    assert "these features are SIMULATED" in said.stdout
    assert "no such setting" in refusal(*arguments, "--row", "own: model.widht=8")
