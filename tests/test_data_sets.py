"""Presets, point clocks, memory maps, ambiguous stretches, drawn points, simulated features."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import assignments, environment, hrpro, hrpro_json, refusal
from tiny_data import CLASSES, TRAIN, write_tiny_data

from hrpro.engine.settings import SettingsError, load_settings
from hrpro.training.annotations import read_ambiguous, read_truth
from hrpro.training.config import SnippetStageConfig, TrainingConfig
from hrpro.training.data import read_test_split, read_training_split
from hrpro.training.data_check import check_data
from hrpro.training.data_config import DataConfig, DataError
from hrpro.training.drawing import draw_points, write_points
from hrpro.training.presets import PRESETS, preset_of, read_preset
from hrpro.training.simulate import simulate_data

RELEASED = Path(__file__).resolve().parents[2] / "shared" / "data" / "annotations"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_data(tmp_path / "tiny")
    return tmp_path / "tiny"


def change_annotations(folder: Path, **entry: Any) -> None:
    """Put something into the entry of each recording."""
    path = folder / "gt_full.json"
    content = json.loads(path.read_text())
    for each in content["database"].values():
        each.update(entry)
    path.write_text(json.dumps(content))


# --- presets -------------------------------------------------------------------------------------


def test_each_preset_is_whole() -> None:
    sizes = {name: len(read_preset(name).classes) for name in PRESETS}
    assert sizes == {
        "thumos14": 20, "gtea": 7, "beoid": 34, "activitynet13": 200, "sbhar": 12, "mocap6": 6,
    }  # fmt: skip
    for name in PRESETS:
        preset = read_preset(name)
        assert list(preset.classes) == sorted(set(preset.classes))
    assert read_preset("activitynet13").tiou_thresholds == tuple(
        pytest.approx(0.5 + 0.05 * step) for step in range(10)
    )
    # The features of GTEA and BEOID are SF-Net's, at the rate of the videos.
    rates = {name: read_preset(name).frames_per_s for name in PRESETS}
    assert rates["gtea"] == 15 and rates["beoid"] == 30 and rates["thumos14"] == 25
    assert read_preset("thumos14").tiou_thresholds == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def test_a_preset_brings_the_settings_that_suit_it() -> None:
    named = {"data": {"preset": "mocap6"}}
    config = TrainingConfig.model_validate(named | {"snippet_stage": {"steps": 7}})
    # What is given wins over the preset, the preset over the defaults.
    assert (config.snippet_stage.steps, config.snippet_stage.batch_size) == (7, 8)
    assert config.snippet_stage.lowest_weight == 0 and config.instance_stage.steps == 600
    assert config.snippet_stage.temperature == SnippetStageConfig().temperature
    assert TrainingConfig.model_validate_json(config.model_dump_json()) == config
    given = load_settings(TrainingConfig, None, ["data.preset=mocap6", "instance_stage.steps=9"])
    assert (given.snippet_stage.steps, given.instance_stage.steps) == (200, 9)
    assert TrainingConfig().snippet_stage.lowest_weight == 1


def test_a_data_set_is_known_by_its_classes() -> None:
    assert preset_of(read_preset("gtea").classes[::-1]) == "gtea"
    assert preset_of(["close", "open"]) is None


@pytest.mark.parametrize("name", ["THUMOS14", "GTEA", "BEOID"])
def test_presets_are_what_was_released(name: str) -> None:
    folder = RELEASED / name
    if not folder.is_dir():
        pytest.skip(f"the released annotations are not here: {folder} is missing")
    config = DataConfig.model_validate({"preset": name.lower()})
    preset = config.published
    assert preset is not None
    names = {s: (folder / f"split_{s}.txt").read_text().split() for s in ("train", "test")}
    assert len(names["train"]) == preset.recordings.train
    assert len(names["test"]) == preset.recordings.test
    assert not set(preset.blocked) & {*names["train"], *names["test"]}
    truth = read_truth(folder, [*names["train"], *names["test"]], preset.classes)
    assert sum(map(len, truth.values())) > 400
    # A drawn point lies in its action once it is turned into seconds by its recording's rate.
    database = json.loads((folder / "gt_full.json").read_text())["database"]
    with (folder / "point_labels" / "point_gaussian.csv").open() as file:
        rows = list(csv.DictReader(file))
    inside = 0
    for row in rows:
        entry = database[row["video_id"]]
        point_s = float(row["point"]) / entry["fps"]
        inside += any(
            each["label"] == row["class"]
            and each["segment"][0] - 0.1 <= point_s <= each["segment"][1] + 0.1
            for each in entry["annotations"]
        )
    assert inside / len(rows) > 0.99
    with pytest.raises(DataError, match=rf"{len(names['train'])} of .* two-stream I3D"):
        read_training_split(folder, config)


def test_a_preset_gives_defaults_and_no_more() -> None:
    config = load_settings(TrainingConfig, None, ["data.preset=thumos14"])
    assert config.data.point_frames_per_s == "annotations"
    assert config.data.point_labels == "point_gaussian.csv"
    config = load_settings(
        TrainingConfig, None, ["data.preset=activitynet13", "data.point_frames_per_s=30"]
    )
    assert config.data.point_frames_per_s == 30
    assert config.data.tiou_thresholds[0] == 0.5 and len(config.data.tiou_thresholds) == 10
    again = load_settings(TrainingConfig, None, (), config.model_dump(mode="json"))
    assert again == config
    with pytest.raises(SettingsError, match=r"data\.preset"):
        load_settings(TrainingConfig, None, ["data.preset=thumos"])


def test_the_classes_of_a_preset_hold(folder: Path) -> None:
    config = DataConfig.model_validate({"preset": "gtea", "point_labels": "points.csv"})
    with pytest.raises(DataError, match=r"class 'hop' is not one of close, open"):
        read_training_split(folder, config.model_copy(update={"point_frames_per_s": None}))
    (folder / "classes.txt").write_text("hop\nspin\n")
    with pytest.raises(DataError, match=r"expected the 7 classes of the preset gtea, differing in"):
        read_training_split(folder, config)


def test_blocked_recordings_are_left_out(folder: Path) -> None:
    config = DataConfig.model_validate({"preset": "thumos14"})
    for old, new in (("test0", "video_test_0000270"), ("test1", "video_test_0000004")):
        path = folder / "features" / "test" / f"{old}.npy"
        path.rename(path.with_name(f"{new}.npy"))
        split = folder / "split_test.txt"
        split.write_text(split.read_text().replace(old, new))
    data = read_test_split(folder, CLASSES, config)
    assert [each.name for each in data.recordings] == ["video_test_0000004", "test2"]
    split.write_text("video_test_0000270\n")
    with pytest.raises(
        DataError, match=r"split_test\.txt: expected a recording that thumos14 does"
    ):
        read_test_split(folder, CLASSES, config)


@pytest.mark.parametrize("depth", [1, 50, 100_000])
def test_a_source_of_features_that_is_nested(folder: Path, depth: int) -> None:
    (folder / "features.json").write_text("[" * depth + "]" * depth)
    with pytest.raises(DataError, match=r"features\.json: "):
        read_training_split(folder)


# --- clocks, maps, stretches ---------------------------------------------------------------------


def test_points_are_counted_at_the_rate_of_their_recording(folder: Path) -> None:
    before = read_training_split(folder).recordings[0].point_index
    points = folder / "point_labels" / "points.csv"
    header, *rows = points.read_text().splitlines()
    cells = [row.split(",") for row in rows]
    # From 25 frames/s to 30: 1.2 times as many; one more is well within the snippet.
    counted = [f"{label},{name},{int(frame) * 6 // 5 + 1}" for label, name, frame in cells]
    points.write_text("\n".join([header, *counted]) + "\n")
    config = DataConfig(point_frames_per_s=30.0)
    assert read_training_split(folder, config).recordings[0].point_index.tolist() == before.tolist()

    config = DataConfig(point_frames_per_s="annotations")
    with pytest.raises(DataError, match=r"'train0': expected its frame rate as fps"):
        read_training_split(folder, config)
    change_annotations(folder, fps=30.0)
    assert read_training_split(folder, config).recordings[0].point_index.tolist() == before.tolist()
    # Of the annotations the rate is read, and nothing else.
    change_annotations(folder, annotations="no list at all", duration=-1)
    assert read_training_split(folder, config).recordings[0].point_index.tolist() == before.tolist()


def test_features_are_maps_that_cannot_be_written(folder: Path) -> None:
    data = read_training_split(folder)
    features = data.recordings[0].features
    assert isinstance(features.base, np.memmap) or isinstance(features, np.memmap)
    assert not features.flags.writeable
    expected = features.tolist()  # before the file is written anew
    path = folder / "features" / "train" / "train0.npy"
    np.save(path, np.asfortranarray(np.load(path).astype(np.float64)))
    again = read_training_split(folder).recordings[0].features
    assert again.dtype == np.float32 and again.flags.c_contiguous
    assert again.tolist() == expected


FEW_DESCRIPTORS = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from hrpro.training.batches import feature_statistics
from hrpro.training.data import read_training_split
data = read_training_split(Path(sys.argv[1]))
feature_statistics(data)
print(len(data.recordings), float(data.recordings[-1].features[0, 0]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_NOFILE")
def test_more_recordings_than_file_descriptors(folder: Path) -> None:
    features = folder / "features" / "train"
    names = [f"more{number}" for number in range(200)]
    for name in names:
        shutil.copy(features / "train0.npy", features / f"{name}.npy")
    with (folder / "split_train.txt").open("a") as file:
        file.write("\n".join(names))
    done = subprocess.run(
        [sys.executable, "-c", FEW_DESCRIPTORS, str(folder)],
        check=False, capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"206 {float(np.load(features / 'train0.npy')[0, 0])}\n"


def test_features_that_change_underway_are_told(folder: Path) -> None:
    recording = read_training_split(folder).recordings[0]
    path = folder / "features" / "train" / "train0.npy"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"train0\.npy: has changed since it was read"):
        _ = recording.features
    path.unlink()
    with pytest.raises(DataError, match=r"train0\.npy: has changed since it was read"):
        _ = recording.features


def test_ambiguous_stretches(folder: Path) -> None:
    config = DataConfig.model_validate({"preset": "thumos14"})
    path = folder / "Ambiguous_test.txt"
    path.write_text("test1  0.5 1.25\nelsewhere 3 4\n\ntest1 7 9.5\n")
    found = read_ambiguous(folder, ["test0", "test1"], config)
    assert found["test0"].shape == (0, 2)
    assert found["test1"].tolist() == [[0.5, 1.25], [7, 9.5]]
    assert read_ambiguous(folder, ["test1"], DataConfig())["test1"].shape == (0, 2)
    for line in ("test1 1", "test1 2 1", "test1 a 2"):
        path.write_text(f"test1 0 1\n{line}\n")
        with pytest.raises(DataError, match="line 2: expected NAME START END"):
            read_ambiguous(folder, ["test1"], config)


# --- drawn points --------------------------------------------------------------------------------


def test_draws() -> None:
    start, end = np.full(4000, 10.0), np.full(4000, 16.0)
    random = np.random.default_rng(0)
    uniform = draw_points(start, end, "uniform", random)
    gaussian = draw_points(start, end, "gaussian", random)
    assert draw_points(start, end, "centre", random).tolist() == [13.0] * 4000
    for drawn in (uniform, gaussian):
        assert drawn.min() >= 10 and drawn.max() < 16
        assert drawn.mean() == pytest.approx(13, abs=0.1)
    assert uniform.std() == pytest.approx(6 / np.sqrt(12), abs=0.05)
    # Sigma is a sixth of the length, 1 s; cut off at three of them.
    assert gaussian.std() == pytest.approx(1.0, abs=0.05)


def test_points_are_written_as_they_are_read(folder: Path) -> None:
    path = folder / "point_labels" / "point_centre.csv"
    assert write_points(folder, path, "centre", 0, DataConfig(), overwrite=False) == 24
    data = read_training_split(folder, DataConfig(point_labels="point_centre.csv"))
    truth = read_truth(folder, TRAIN, CLASSES)
    for recording in data.recordings:
        segments = truth[recording.name]
        centre = (segments.start_s + segments.end_s) / 2 / 0.64
        # The frame is rounded down, so that a border between snippets may be missed by one.
        assert (np.abs(recording.point_index - np.floor(centre + 1e-9)) <= 1).all()
        assert recording.point_label.tolist() == segments.label_index.tolist()
    with pytest.raises(FileExistsError, match="--force"):
        write_points(folder, path, "centre", 0, DataConfig(), overwrite=False)


def test_the_points_command(folder: Path) -> None:
    arguments = ("data", "points", folder, "--distribution", "uniform", "--seed", "3")
    counted, next_command = hrpro(*arguments).stdout.splitlines()
    assert counted.startswith("24 points in")
    assert next_command.endswith("--out run --set data.point_labels=point_uniform.csv")
    elsewhere = hrpro(*arguments, "--out", folder / "p.csv").stdout.splitlines()[1]
    assert elsewhere == f"training reads it from {folder / 'point_labels'}"
    path = folder / "point_labels" / "point_uniform.csv"
    first = path.read_text()
    assert "--force overwrites it" in refusal(*arguments)
    hrpro(*arguments, "--force")
    assert path.read_text() == first
    hrpro(*arguments, "--force", "--seed", "4")
    assert path.read_text() != first
    hrpro("data", "points", folder, "--distribution", "normal", status=2)


# --- simulation ----------------------------------------------------------------------------------


@pytest.fixture
def annotations(folder: Path) -> Path:
    """The tiny data set without features."""
    shutil.rmtree(folder / "features")
    change_annotations(folder, duration=60 * 0.64, fps=25.0)
    return folder


def simulated(annotations: Path, out: Path, seed: int = 0) -> Path:
    steps: list[int] = []
    assert simulate_data(annotations, out, DataConfig(), 64, seed, steps.append) == 9
    assert sum(steps) == 9
    return out


def test_simulated_features_follow_the_timelines(annotations: Path, tmp_path: Path) -> None:
    out = simulated(annotations, tmp_path / "out")
    assert "simulated" in (out / "SIMULATED.txt").read_text()
    data = read_training_split(out)
    assert [each.features.shape for each in data.recordings] == [(60, 64)] * 6
    truth = read_truth(out, TRAIN, CLASSES)
    inside: list[list[np.ndarray]] = [[], []]
    for recording in data.recordings:
        centred = recording.features - recording.features.mean(axis=0)
        segments = truth[recording.name]
        for n in range(len(segments)):
            first, last = (round(float(s) / 0.64) for s in (segments.start_s[n], segments.end_s[n]))
            inside[segments.label_index[n]].append(centred[first:last].mean(axis=0))
    # Instances of a class resemble each other more than those of the other one.
    means = np.array([np.mean(each, axis=0) for each in inside])
    nearest = [
        np.linalg.norm(means - instance, axis=1).argmin() == label
        for label in range(2)
        for instance in inside[label]
    ]
    assert len(nearest) == 24 and np.mean(nearest) > 0.9


def test_a_seed_makes_a_world(annotations: Path, tmp_path: Path) -> None:
    one, same, other = (
        read_training_split(simulated(annotations, tmp_path / str(n), seed)).recordings[0].features
        for n, seed in enumerate((0, 0, 1))
    )
    assert np.array_equal(one, same) and not np.allclose(one, other)


def test_only_what_is_simulated_is_overwritten(
    annotations: Path, folder: Path, tmp_path: Path
) -> None:
    simulated(annotations, simulated(annotations, tmp_path / "out"))
    with pytest.raises(FileExistsError, match="is no simulated data set"):
        simulate_data(annotations, folder, DataConfig(), 4, 0, lambda _: None)
    change_annotations(annotations, duration=None)
    with pytest.raises(DataError, match=r"'train0': expected its duration in seconds, got None"):
        simulate_data(annotations, tmp_path / "new", DataConfig(), 4, 0, lambda _: None)


def test_the_simulate_command(annotations: Path, tmp_path: Path) -> None:
    said = hrpro("data", "simulate", annotations, "--out", tmp_path / "out", "--dim", "8").stdout
    assert "SIMULATED features (D = 8) of 9 recordings" in said
    assert hrpro_json("data", "check", tmp_path / "out")["simulated"] is True


def test_figures_on_simulated_features_are_told_as_such(annotations: Path, tmp_path: Path) -> None:
    data = simulated(annotations, tmp_path / "out")
    quick = assignments({"snippet_stage.steps": 2, "instance_stage.steps": 2, "threads": 1})
    note = "these features are SIMULATED: figures on them say nothing of the benchmark"
    assert note in hrpro("train", data, "--out", tmp_path / "run", *quick).stdout
    assert note in hrpro("evaluate", tmp_path / "run", "--data", data).stdout
    (data / "SIMULATED.txt").unlink()
    assert note not in hrpro("evaluate", tmp_path / "run", "--data", data).stdout


# --- the check -----------------------------------------------------------------------------------


def test_a_good_data_set(folder: Path) -> None:
    found = check_data(folder, DataConfig())
    assert found.errors == [] and found.warnings == []
    assert found.summary == {
        "simulated": False, "train_recordings": 6, "train_hours": 0.06, "test_recordings": 3,
        "test_hours": 0.03, "feature_dim": [6], "points": 24, "train_instances": 24,
        "test_instances": 12,
    }  # fmt: skip
    assert found.points == {"hop": 12, "spin": 12}


def test_all_that_is_wrong_is_told(folder: Path) -> None:
    features = folder / "features"
    (features / "train" / "train1.npy").unlink()
    np.save(features / "train" / "train2.npy", np.zeros((60, 7), np.float32))
    np.save(features / "test" / "test0.npy", np.full((60, 6), np.nan, np.float32))
    shutil.copy(features / "train" / "train0.npy", features / "test")
    with (folder / "split_test.txt").open("a") as file:
        file.write("train0\n")
    (folder / "classes.txt").write_text("hop\nspin\nroll\n")
    with (folder / "point_labels" / "points.csv").open("a") as file:
        file.write("hop,train0,99999\njump,train0,5\n")
    change_annotations(folder, duration=100.0)
    found = check_data(folder, DataConfig())
    told = "\n".join(found.errors)
    for expected in (
        "1 of 6 feature files are missing: train1.npy",
        "most recordings have D = 6, but train2 7",
        "test0.npy: snippet 0 is not finite",
        "recording 'train0' is in both splits",
        "line 26: recording 'train0': the point at frame 99999 (snippet 6249) lies outside",
        "line 27: recording 'train0': class 'jump' is not one of hop, spin, roll",
        "no training point for roll",
    ):
        assert expected in told
    assert len(found.errors) == 7
    assert (
        "train0: 60 snippets of 0.64 s, but the annotations say that it lasts 100 s"
        in (found.warnings[0])
    )


def test_what_may_be_meant_is_warned_of(folder: Path) -> None:
    change_annotations(folder, annotations=[])
    with (folder / "point_labels" / "points.csv").open("a") as file:
        file.write("hop,train9,5\nhop,train8,5\nspin,train9,7\nhop,test0,7\n")
    found = check_data(folder, DataConfig())
    assert found.errors == []
    assert found.warnings == [
        f"{folder}: 3 points are of recordings in no split: train8, train9",
        f"{folder / 'gt_full.json'}: no annotated action in the test split: "
        "nothing can be measured",
    ]
    assert (found.summary["points"], found.summary["test_instances"]) == (24, 0)


def test_points_of_blocked_recordings_are_meant(folder: Path) -> None:
    preset = {"preset": "thumos14", "point_frames_per_s": None, "point_labels": "points.csv"}
    with (folder / "point_labels" / "points.csv").open("a") as file:
        file.write("hop,video_test_0000270,5\nhop,train9,5\n")
    found = check_data(folder, DataConfig.model_validate(preset))
    told = [each for each in found.warnings if "in no split" in each]
    assert told == [f"{folder}: 1 points are of recordings in no split: train9"]


def test_the_check_command(folder: Path) -> None:
    said = hrpro("data", "check", folder).stdout
    assert "0 errors, 0 warnings" in said and "spin" in said
    (folder / "split_train.txt").unlink()
    said = hrpro("data", "check", folder, status=1).stdout
    assert "error: " in said and "split_train.txt: file is missing" in said
