"""Data sets in the layout of HR-Pro's release: features, point labels, splits, ground truth.

    DATA/
      features/{train,test}/NAME.npy     float32 (T, D), one row a snippet
      split_train.txt, split_test.txt    one recording name a line
      point_labels/*.csv                 class, video_id, point (a frame); others are ignored
      classes.txt                        one class a line (or else all labels, sorted)
      gt_full.json                       database: {NAME: {"annotations": [{"label", "segment"}]}}

Training reads the training split's features and points and nothing else; ``gt_full.json`` is read
for evaluation alone.

    DataError
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from hrpro.engine.settings import Settings
from hrpro.engine.timebase import SnippetClock
from hrpro.engine.wire import HrproError, ProtocolError, checked
from hrpro.engine.wire import label as wire_label
from hrpro.training.metrics import Segments


class DataError(HrproError, ValueError):
    """A data set that does not hold together; the message names the file and what was expected."""


class DataConfig(Settings):
    """How a data set on disk is to be read."""

    frames_per_s: float = Field(25.0, gt=0, description="frames per second of the point labels")
    snippet_frames: int = Field(16, ge=1, description="frames in one snippet")
    point_labels: str | None = Field(
        None, description="file in point_labels/ to use (default: the only one there)"
    )

    @property
    def clock(self) -> SnippetClock:
        """The snippet clock of the data set."""
        return SnippetClock(frames_per_s=self.frames_per_s, snippet_frames=self.snippet_frames)


@dataclass(frozen=True)
class Recording:
    """One recording: ``features`` float32 (T, D) and its points.

    ``point_index`` (N,) are snippet indices, ``point_label`` (N,) class indices; both int64,
    sorted by time. Test recordings have none.
    """

    name: str
    features: NDArray[np.float32]
    point_index: NDArray[np.int64]
    point_label: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class DataSet:
    """One split of a data set."""

    name: str
    classes: tuple[str, ...]
    clock: SnippetClock
    recordings: tuple[Recording, ...]

    @property
    def feature_dim(self) -> int:
        """D, the same in all recordings."""
        return int(self.recordings[0].features.shape[1])


def read_training_split(folder: Path, config: DataConfig | None = None) -> DataSet:
    """Features and points of the training recordings."""
    config = config or DataConfig()
    names = _read_names(folder / "split_train.txt")
    points = _read_points(folder, config)
    classes = _read_classes(folder, points, names)
    recordings = []
    for name in names:
        features = _read_features(folder / "features" / "train" / f"{name}.npy")
        index, label = _point_arrays(folder, name, points[name], classes, config, len(features))
        recordings.append(Recording(name, features, index, label))
    _check_dimensions(folder, recordings)
    _check_classes_have_points(folder, classes, recordings)
    return DataSet(folder.resolve().name, classes, config.clock, tuple(recordings))


def read_test_split(
    folder: Path,
    classes: Sequence[str],
    config: DataConfig | None = None,
    feature_dim: int | None = None,
) -> DataSet:
    """Features of the test recordings, without any label.

    Raises DataError where D is not ``feature_dim``, if that is given.
    """
    config = config or DataConfig()
    none = np.zeros(0, dtype=np.int64)
    recordings = [
        Recording(name, _read_features(folder / "features" / "test" / f"{name}.npy"), none, none)
        for name in _read_names(folder / "split_test.txt")
    ]
    _check_dimensions(folder, recordings)
    data = DataSet(folder.resolve().name, tuple(classes), config.clock, tuple(recordings))
    if feature_dim not in (None, data.feature_dim):
        raise DataError(
            f"{folder}: expected features of D = {feature_dim}, which the model was trained on, "
            f"got D = {data.feature_dim}"
        )
    return data


def read_truth(folder: Path, names: Sequence[str], classes: Sequence[str]) -> dict[str, Segments]:
    """Ground-truth instances of the named recordings, in seconds."""
    path = folder / "gt_full.json"
    try:
        database = json.loads(path.read_text())["database"]
    except FileNotFoundError:
        raise DataError(f"{path}: file is missing; evaluation needs the full annotations") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f'{path}: expected JSON with the key "database", got {error!r}') from None
    class_index = {label: index for index, label in enumerate(classes)}
    truth = {}
    for name in names:
        if not isinstance(database, dict) or name not in database:
            raise DataError(f"{path}: recording {name!r} of the split has no entry")
        rows = []
        for label, start_s, end_s in _annotations(path, name, database[name]):
            if label not in class_index:
                raise DataError(f"{path}: {name!r} has the label {label!r}, not one of the classes")
            rows.append((start_s, end_s, class_index[label], 1.0))
        truth[name] = Segments.from_rows(rows)
    return truth


def _annotations(path: Path, name: str, entry: Any) -> list[tuple[str, float, float]]:
    """Label, start and end in seconds of each instance of one recording."""
    rows = []
    try:
        for annotation in entry["annotations"]:
            start_s, end_s = map(float, annotation["segment"])
            if not 0 <= start_s <= end_s < math.inf:
                raise ValueError(f"segment {annotation['segment']}")
            rows.append((str(annotation["label"]), start_s, end_s))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f'{path}: {name!r}: expected annotations with "label" and "segment", two numbers, '
            f"got {error!r}"
        ) from None
    return rows


def _read_names(path: Path) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected text in UTF-8, came other bytes") from None
    except FileNotFoundError:
        raise DataError(f"{path}: file is missing; it lists one recording name a line") from None
    if not names:
        raise DataError(f"{path}: expected at least one recording name, the file is empty")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: recordings named more than once: {', '.join(repeated)}")
    return names


def _read_features(path: Path) -> NDArray[np.float32]:
    try:
        features = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: feature file is missing; expected float32 (T, D)") from None
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a readable .npy array: {error}") from None
    if features.ndim != 2 or 0 in features.shape or features.dtype.kind != "f":
        raise DataError(
            f"{path}: expected a float array (T, D) with T, D >= 1, "
            f"got {features.dtype} {features.shape}"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite
        features = np.ascontiguousarray(features, dtype=np.float32)
    bad_rows = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad_rows):
        raise DataError(f"{path}: snippet {bad_rows[0]} is not finite ({len(bad_rows)} such rows)")
    return features


@dataclass(frozen=True)
class _Point:
    label: str
    frame: float
    line: int


def _points_file(folder: Path, config: DataConfig) -> Path:
    if config.point_labels is not None:
        return folder / "point_labels" / config.point_labels
    files = sorted((folder / "point_labels").glob("*.csv"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise DataError(
            f"{folder / 'point_labels'}: expected one .csv file, found {found}; "
            "name one with data.point_labels"
        )
    return files[0]


def _read_points(folder: Path, config: DataConfig) -> dict[str, list[_Point]]:
    path = _points_file(folder, config)
    points: dict[str, list[_Point]] = defaultdict(list)
    try:
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            missing = {"class", "video_id", "point"} - set(rows.fieldnames or ())
            if missing:
                raise DataError(f"{path}: columns are missing: {', '.join(sorted(missing))}")
            for line, row in enumerate(rows, start=2):
                try:
                    frame = float(row["point"])
                except (TypeError, ValueError):
                    raise DataError(
                        f"{path}, line {line}: expected a frame number in the column point, "
                        f"got {row['point']!r}"
                    ) from None
                points[row["video_id"]].append(_Point(row["class"], frame, line))
    except FileNotFoundError:
        raise DataError(f"{path}: file is missing; it holds one point label a line") from None
    return points


def _read_classes(
    folder: Path, points: dict[str, list[_Point]], names: Sequence[str]
) -> tuple[str, ...]:
    path = folder / "classes.txt"
    if path.exists():
        classes = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
        if len(set(classes)) != len(classes) or not classes:
            raise DataError(f"{path}: expected distinct class names, one a line")
    else:
        path = folder / "point_labels"
        classes = tuple(sorted({point.label for name in names for point in points[name]}))
    for label in classes:
        try:
            checked("class", wire_label, label)
        except ProtocolError as error:  # it would not fit into the topic of an event
            raise DataError(f"{path}: {error}") from None
    return classes


def _point_arrays(
    folder: Path,
    name: str,
    points: list[_Point],
    classes: tuple[str, ...],
    config: DataConfig,
    length: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Snippet index and class of each point of one recording, sorted by time.

    Points of one class in the same snippet say the same and count once.
    """
    rows = []
    for point in points:
        where = f"{_points_file(folder, config)}, line {point.line}: recording {name!r}"
        if point.label not in classes:
            raise DataError(f"{where}: class {point.label!r} is not one of {', '.join(classes)}")
        frame = point.frame if 0 <= point.frame < math.inf else -1.0
        index = config.clock.index_of_frame(int(frame)) if frame >= 0 else -1
        if not 0 <= index < length:
            raise DataError(
                f"{where}: the point at frame {point.frame:g} (snippet {index}) lies outside the "
                f"recording, which has the snippets 0 to {length - 1}"
            )
        rows.append((index, classes.index(point.label)))
    table = np.array(sorted(set(rows)), dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _check_dimensions(folder: Path, recordings: Sequence[Recording]) -> None:
    feature_dim = recordings[0].features.shape[1]
    for recording in recordings:
        if recording.features.shape[1] != feature_dim:
            raise DataError(
                f"{folder}: recording {recording.name!r} has D = {recording.features.shape[1]}, "
                f"but {recordings[0].name!r} has D = {feature_dim}"
            )


def _check_classes_have_points(
    folder: Path, classes: tuple[str, ...], recordings: Sequence[Recording]
) -> None:
    labelled = set(np.concatenate([recording.point_label for recording in recordings]).tolist())
    if not labelled:
        raise DataError(f"{folder}: no training point for any recording of the split")
    missing = [label for index, label in enumerate(classes) if index not in labelled]
    if missing:
        raise DataError(
            f"{folder}: no training point for {', '.join(missing)}; "
            "each class needs at least one to start its prototype from (eq. 2)"
        )
