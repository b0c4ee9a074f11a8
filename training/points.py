"""Point labels: one time stamp an action, in frames of the original video."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hrpro.training.data_config import DataConfig, DataError, read_text


@dataclass(frozen=True)
class Point:
    """One row of a file of point labels."""

    label: str
    frame: float
    line: int


def points_file(folder: Path, config: DataConfig) -> Path:
    """The file of point labels: the configured one, or the only one."""
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


def read_points(folder: Path, config: DataConfig) -> dict[str, list[Point]]:
    """The rows of the file of point labels by recording, whatever their class and frame."""
    path = points_file(folder, config)
    return parse_points(read_text(path, "one point label a line"), path)


def parse_points(text: str, path: Path) -> dict[str, list[Point]]:
    """The rows of such a file's text by recording. Raises DataError, which names ``path``."""
    points: dict[str, list[Point]] = defaultdict(list)
    rows = csv.DictReader(io.StringIO(text))
    try:
        missing = {"class", "video_id", "point"} - set(rows.fieldnames or ())
        if missing:
            raise DataError(f"{path}: columns are missing: {', '.join(sorted(missing))}")
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            try:
                frame = float(row["point"])
            except (TypeError, ValueError):
                raise DataError(
                    f"{where}: expected a frame number in the column point, got {row['point']!r}"
                ) from None
            if not row["class"] or not row["video_id"]:
                raise DataError(
                    f"{where}: expected a class and a video_id, "
                    f"got {row['class']!r} and {row['video_id']!r}"
                )
            points[row["video_id"]].append(Point(row["class"], frame, rows.line_num))
    except csv.Error as error:  # a field without an end, say
        raise DataError(f"{path}: expected columns with commas between: {error}") from None
    return points


def point_arrays(
    folder: Path,
    name: str,
    points: list[Point],
    classes: tuple[str, ...],
    config: DataConfig,
    length: int,
    rate: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Snippet index and class of each point of one recording, sorted by time.

    ``rate`` is the frame rate of its points. Points of one class in the same snippet say the same
    and count once; one in what a video has left behind its last whole snippet counts for that.
    Raises DataError for a point outside.
    """
    rows = []
    path = points_file(folder, config) if points else None
    for point in points:
        where = f"{path}, line {point.line}: recording {name!r}"
        if point.label not in classes:
            raise DataError(f"{where}: class {point.label!r} is not one of {', '.join(classes)}")
        index = _snippet_of(point.frame, rate, config)
        if index == length:  # features end with the last whole snippet, and videos a little later
            index -= 1
        if not 0 <= index < length:
            raise DataError(
                f"{where}: the point at frame {point.frame:g} (snippet {index}) lies outside the "
                f"recording, which has the snippets 0 to {length - 1}"
            )
        rows.append((index, classes.index(point.label)))
    table = np.array(sorted(set(rows)), dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _snippet_of(frame: float, rate: float, config: DataConfig) -> int:
    """The snippet of a frame that was counted at ``rate`` frames/s; -1 for one that is none."""
    if not 0 <= frame < math.inf:
        return -1
    if rate == config.frames_per_s:
        return config.clock.index_of_frame(int(frame))
    return math.floor(frame * config.frames_per_s / (rate * config.snippet_frames))
