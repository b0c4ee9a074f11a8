"""Full annotations: ground truth, ambiguous stretches, and the frame rates of points."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrpro.training.data_config import DataConfig, DataError, read_text
from hrpro.training.metrics import GroundTruth, Segments


def read_truth(folder: Path, names: Sequence[str], classes: Sequence[str]) -> dict[str, Segments]:
    """Ground-truth instances of the named recordings, in seconds."""
    database = read_database(folder)
    return {name: truth_of(folder, database, name, classes) for name in names}


def read_measurable_truth(
    folder: Path, names: Sequence[str], classes: Sequence[str]
) -> dict[str, Segments]:
    """As `read_truth`; DataError where there is no instance: average precision is of some."""
    truth = read_truth(folder, names, classes)
    if not any(len(segments) for segments in truth.values()):
        raise DataError(
            f"{folder / 'gt_full.json'}: expected at least one annotated action in the "
            f"{len(names)} recordings to evaluate on, found none: without, nothing can be measured"
        )
    return truth


def read_ground_truth(
    folder: Path, names: Sequence[str], classes: Sequence[str], config: DataConfig
) -> GroundTruth:
    """All that evaluation on these recordings needs."""
    return GroundTruth(
        read_measurable_truth(folder, names, classes),
        len(classes),
        config.tiou_thresholds,
        read_ambiguous(folder, names, config),
    )


def truth_of(folder: Path, database: dict[str, Any], name: str, classes: Sequence[str]) -> Segments:
    """Ground-truth instances of one recording, from what `read_database` gave."""
    path = folder / "gt_full.json"
    class_index = {label: index for index, label in enumerate(classes)}
    rows = []
    for label, start_s, end_s in _annotations(path, name, _entry(path, database, name)):
        if label not in class_index:
            raise DataError(f"{path}: {name!r} has the label {label!r}, not one of the classes")
        rows.append((start_s, end_s, class_index[label], 1.0))
    return Segments.from_rows(rows)


def read_ambiguous(
    folder: Path, names: Sequence[str], config: DataConfig
) -> dict[str, NDArray[np.float64]]:
    """Stretches that evaluation leaves out of account, (K, 2) seconds by recording.

    A data set has them where its preset names their file (NAME START END a line).
    """
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    preset = config.published
    if preset is not None and preset.ambiguous is not None:
        path = folder / preset.ambiguous
        for number, line in enumerate(read_text(path, "ambiguous segments").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                name, start_s, end_s = line.split()
                segment = float(start_s), float(end_s)
                if not 0 <= segment[0] <= segment[1] < math.inf:
                    raise ValueError(f"segment {segment}")
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: expected NAME START END in seconds, got {line!r} "
                    f"({error})"
                ) from None
            if name in rows:  # others are of no split
                rows[name].append(segment)
    return {name: np.array(each).reshape(-1, 2) for name, each in rows.items()}


def read_database(folder: Path) -> dict[str, Any]:
    """The entries of gt_full.json by recording."""
    path = folder / "gt_full.json"
    try:
        database = json.loads(path.read_text(encoding="utf-8-sig"))["database"]
    except FileNotFoundError:
        raise DataError(f"{path}: file is missing; it has the full annotations") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f'{path}: expected JSON with the key "database", got {error!r}') from None
    if not isinstance(database, dict):
        raise DataError(f'{path}: expected entries by recording in "database"')
    return database


def annotated_labels(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """All labels in the annotations of the named recordings, sorted."""
    path, database = folder / "gt_full.json", read_database(folder)
    labels = {
        label
        for name in names
        for label, _, _ in _annotations(path, name, _entry(path, database, name))
    }
    return tuple(sorted(labels))


def _entry(path: Path, database: dict[str, Any], name: str) -> Any:
    if name not in database:
        raise DataError(f"{path}: recording {name!r} of the split has no entry")
    return database[name]


def point_rates(folder: Path, names: Sequence[str], config: DataConfig) -> dict[str, float]:
    """Frames per second of the point labels of each recording."""
    given = config.point_frames_per_s
    if given != "annotations":
        return dict.fromkeys(names, given or config.frames_per_s)
    path, database = folder / "gt_full.json", read_database(folder)
    rates = {}
    for name in names:
        entry = _entry(path, database, name)
        try:
            rates[name] = float(entry["fps"])
            if not 0 < rates[name] < math.inf:
                raise ValueError(rates[name])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{path}: {name!r}: expected its frame rate as fps, for "
                f"data.point_frames_per_s annotations, got {error!r}"
            ) from None
    return rates


def _annotations(path: Path, name: str, entry: Any) -> list[tuple[str, float, float]]:
    """Label, start and end in seconds of each instance of one recording."""
    rows = []
    try:
        for annotation in entry["annotations"]:
            start_s, end_s = map(float, annotation["segment"])
            if not 0 <= start_s <= end_s < math.inf:
                raise ValueError(f"segment {annotation['segment']}")
            rows.append((str(annotation["label"]), start_s, end_s))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f'{path}: {name!r}: expected annotations with "label" and "segment", two numbers, '
            f"got {error!r}"
        ) from None
    return rows
