"""The embedded example data set: its values, and that they never change."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrpro.training.example import (
    CLOCK,
    TEST_NAMES,
    TRAIN_NAMES,
    snippet_statistics,
    write_example_dataset,
)

SNIPPETS = {"seq1": 59, "seq2": 32, "seq3": 39, "seq4": 69, "seq5": 60, "seq6": 60}
# Another conversion of the same recordings, where the development data lie beside the repository.
REFERENCE = Path(__file__).resolve().parents[1] / "../shared/data/mocap6"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    write_example_dataset(folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def features_of(folder: Path, subset: str, name: str) -> np.ndarray:
    return np.load(folder / "features" / subset / f"{name}.npy", allow_pickle=False)


def annotations_of(folder: Path) -> dict[str, list[tuple[str, float, float]]]:
    database = json.loads((folder / "gt_full.json").read_text())["database"]
    return {
        name: [(row["label"], *row["segment"]) for row in entry["annotations"]]
        for name, entry in database.items()
    }


def points_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "point_labels" / "point_gaussian.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_layout(folder: Path) -> None:
    assert sorted(files_of(folder)) == [
        "classes.txt",
        "features/test/seq5.npy",
        "features/test/seq6.npy",
        "features/train/seq1.npy",
        "features/train/seq2.npy",
        "features/train/seq3.npy",
        "features/train/seq4.npy",
        "gt_full.json",
        "point_labels/point_gaussian.csv",
        "split_test.txt",
        "split_train.txt",
    ]
    assert (folder / "split_train.txt").read_text() == "seq1\nseq2\nseq3\nseq4\n"
    assert (folder / "split_test.txt").read_text() == "seq5\nseq6\n"
    assert (folder / "classes.txt").read_text().split() == [
        "ArmCircle",
        "Jog",
        "JumpJack",
        "KneeRaise",
        "Squat",
        "Twist",
    ]


def test_features_are_finite_standardised_float32(folder: Path) -> None:
    train = [features_of(folder, "train", name) for name in TRAIN_NAMES]
    test = [features_of(folder, "test", name) for name in TEST_NAMES]
    for name, features in zip(TRAIN_NAMES + TEST_NAMES, train + test, strict=True):
        assert features.shape == (SNIPPETS[name], 96)
        assert features.dtype == np.float32
        assert np.isfinite(features).all()
    rows = np.concatenate(train)
    np.testing.assert_allclose(rows.mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(rows.std(axis=0), 1.0, atol=1e-4)


def test_instances_have_the_borders_of_the_annotation(folder: Path) -> None:
    annotations = annotations_of(folder)
    assert sum(map(len, annotations.values())) == 31
    assert annotations["seq1"] == [
        ("JumpJack", 0.0, 3.8),
        ("Twist", 3.8, 10.0),
        ("ArmCircle", 10.0, 15.9),
        ("KneeRaise", 22.4, 31.6),
        ("Squat", 31.6, 38.2),
    ]
    assert annotations["seq6"] == [
        ("JumpJack", 0.0, 3.5),
        ("Twist", 3.5, 7.1),
        ("KneeRaise", 7.1, 14.1),
        ("ArmCircle", 30.6, 38.7),
    ]
    labels = Counter(label for rows in annotations.values() for label, _, _ in rows)
    assert labels == {
        "JumpJack": 6,
        "KneeRaise": 6,
        "Twist": 7,
        "ArmCircle": 4,
        "Jog": 4,
        "Squat": 4,
    }


def test_the_ground_truth_names_subset_and_clock(folder: Path) -> None:
    database = json.loads((folder / "gt_full.json").read_text())["database"]
    assert {name: (entry["subset"], entry["duration"]) for name, entry in database.items()} == {
        "seq1": ("Validation", 38.2),
        "seq2": ("Validation", 20.5),
        "seq3": ("Validation", 25.1),
        "seq4": ("Validation", 44.6),
        "seq5": ("Test", 38.7),
        "seq6": ("Test", 38.7),
    }
    for name, entry in database.items():
        assert entry["fps"] == CLOCK.frames_per_s
        # Whole snippets only: the rest of a recording is shorter than one.
        assert 0 <= entry["duration"] - CLOCK.seconds(SNIPPETS[name]) < CLOCK.snippet_s


def test_each_training_instance_has_one_point_inside(folder: Path) -> None:
    points = points_of(folder)
    assert len(points) == 21
    assert [(row["class"], row["point"]) for row in points if row["video_id"] == "seq1"] == [
        ("JumpJack", "49"),
        ("Twist", "169"),
        ("ArmCircle", "339"),
        ("KneeRaise", "679"),
        ("Squat", "857"),
    ]
    annotations = annotations_of(folder)
    instances = [(name, *row) for name in TRAIN_NAMES for row in annotations[name]]
    for row, (name, label, start_s, end_s) in zip(points, instances, strict=True):
        assert (row["video_id"], row["class"]) == (name, label)
        assert start_s <= int(row["point"]) / CLOCK.frames_per_s < end_s


def test_every_class_is_seen_in_training_and_test(folder: Path) -> None:
    annotations = annotations_of(folder)
    classes = set((folder / "classes.txt").read_text().split())
    for names in (TRAIN_NAMES, TEST_NAMES):
        assert {label for name in names for label, _, _ in annotations[name]} == classes


def test_written_again_it_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_example_dataset(tmp_path)
    write_example_dataset(tmp_path)
    assert files_of(tmp_path) == files_of(folder)


def test_statistics_of_a_still_body_are_its_pose_alone() -> None:
    statistics = snippet_statistics(np.full((64, 2), [3.0, -1.0])).reshape(10, 8, 2)
    for column in (0, 2, 3):  # mean, minimum, maximum
        np.testing.assert_allclose(statistics[:, column], np.full((10, 2), [3.0, -1.0]))
    for column in (1, 4, 5, 6, 7):  # deviation, speed, power
        np.testing.assert_allclose(statistics[:, column], 0.0, atol=1e-12)


def test_statistics_of_a_ramp() -> None:
    # 1 a second: 0.02 between samples, 31 of them between the first and last of a snippet.
    signals = np.arange(65.0)[:, None] / 10
    statistics = snippet_statistics(signals).reshape(10, 8)
    starts_s = 0.64 * np.arange(10)
    np.testing.assert_allclose(statistics[:, 0], starts_s + 0.31)
    np.testing.assert_allclose(statistics[:, 2], starts_s, atol=1e-12)
    np.testing.assert_allclose(statistics[:, 3], starts_s + 0.62)
    np.testing.assert_allclose(statistics[:, 4], 0.02)


def test_a_rhythm_falls_into_the_first_band() -> None:
    # 1.5625 Hz is bin 1 of a snippet, one turn in 0.64 s: |FFT|^2 / samples = (10 * 16)^2 / 32
    # times what linear interpolation from 10 Hz leaves of it: sinc^2 in amplitude, sinc^4 in power.
    signals = 10 * np.sin(2 * np.pi * 1.5625 * np.arange(65) / 10)[:, None]
    bands = snippet_statistics(signals).reshape(10, 8)[:, 5:]
    np.testing.assert_allclose(bands[:, 0], np.log1p(800 * np.sinc(0.15625) ** 4), rtol=0.002)
    assert (bands[:, 1:] < 0.7).all()


@given(frames=st.integers(0, 200), signals=st.integers(1, 3))
def test_any_length_gives_whole_snippets(frames: int, signals: int) -> None:
    statistics = snippet_statistics(np.ones((frames, signals)))
    assert statistics.shape == (int(frames * 10 // 64), 8 * signals)
    assert np.isfinite(statistics).all()


def test_agrees_with_the_development_data(folder: Path) -> None:
    if not REFERENCE.is_dir():
        pytest.skip(f"no development data at {REFERENCE.resolve()}: labels were not compared")
    truth = (json.loads((root / "gt_full.json").read_text()) for root in (folder, REFERENCE))
    assert next(truth) == next(truth)
    assert points_of(folder) == points_of(REFERENCE)
    for name in ("classes.txt", "split_train.txt", "split_test.txt"):
        assert (folder / name).read_text().split() == (REFERENCE / name).read_text().split()
    for subset, names in (("train", TRAIN_NAMES), ("test", TEST_NAMES)):
        for name in names:
            expected = features_of(REFERENCE, subset, name)
            np.testing.assert_allclose(features_of(folder, subset, name), expected, atol=1e-4)
