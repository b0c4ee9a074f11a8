"""A small data set in which the classes can be told apart, in the layout of the release."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from hrpro.training.annotations import read_truth
from hrpro.training.metrics import GroundTruth

CLASSES = ("hop", "spin")
DIM = 6
SNIPPET_FRAMES = 16
SNIPPET_S = 0.64
TRAIN = ("train0", "train1", "train2", "train3", "train4", "train5")
TEST = ("test0", "test1", "test2")


def write_tiny_data(folder: Path) -> None:
    """Recordings of 60 snippets, each with 2 actions of each class, of 4 to 8 snippets."""
    random = np.random.default_rng(0)
    database: dict[str, object] = {}
    points: list[tuple[str, str, int]] = []
    for split, names in (("train", TRAIN), ("test", TEST)):
        (folder / "features" / split).mkdir(parents=True)
        (folder / f"split_{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            features = random.normal(0, 0.3, (60, DIM))
            annotations = []
            for slot, label_index in enumerate(random.permutation([0, 1, 0, 1]).tolist()):
                length = int(random.integers(4, 9))
                start = 15 * slot + int(random.integers(2, 5))
                features[start : start + length, label_index] += 2.0
                segment = [start * SNIPPET_S, (start + length) * SNIPPET_S]
                annotations.append({"label": CLASSES[label_index], "segment": segment})
                if split == "train":
                    frame = (start + int(random.integers(1, length - 1))) * SNIPPET_FRAMES
                    points.append((CLASSES[label_index], name, frame))
            np.save(folder / "features" / split / f"{name}.npy", features.astype(np.float32))
            database[name] = {"annotations": annotations}
    (folder / "gt_full.json").write_text(json.dumps({"database": database}))
    (folder / "point_labels").mkdir()
    with (folder / "point_labels" / "points.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("class", "video_id", "point"), *points])


def tiny_truth(folder: Path) -> GroundTruth:
    """What the test split is evaluated against."""
    return GroundTruth(read_truth(folder, TEST, CLASSES), len(CLASSES))
