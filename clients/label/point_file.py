"""The CSV of point labels that training reads, changed one recording at a time.

Whatever else is in the file stays: rows of other recordings, further columns, the order. Times are
seconds from a video's first frame; the file has frames, counted at the rate of the point labels.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import math
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hrpro.engine.wire import HrproError
from hrpro.training.data_config import DataConfig, DataError, read_text
from hrpro.training.files import replaced_file
from hrpro.training.points import Point, parse_points, points_file

_COLUMNS = ("class", "video_id", "point")
_NEW_NAME = "points.csv"


class ConflictError(HrproError):
    """The file is no longer what its reader has seen."""


@dataclass(frozen=True)
class Mark:
    """One point of one recording, ``seconds`` from its first frame."""

    label: str
    seconds: float


@dataclass(frozen=True)
class _Row:
    """One line, as it is in the file, and what it says."""

    name: str
    point: Point
    fields: list[str]


@dataclass(frozen=True)
class _Table:
    """All of the file; ``version`` is a hash of its text."""

    columns: list[str]
    rows: list[_Row]
    version: str


def point_file_path(folder: Path, config: DataConfig) -> Path:
    """The file that training would read: the configured one, the only one, or else a new one."""
    place = folder / "point_labels"
    if config.point_labels is None and not list(place.glob("*.csv")):
        return place / _NEW_NAME
    return points_file(folder, config)


class PointFile:
    """Reads and replaces the points of single recordings; safe to use from several threads.

    ``rates`` are the frames per second of the points of each recording. Raises DataError for a
    file that training could not read either.
    """

    def __init__(self, path: Path, rates: Mapping[str, float]) -> None:
        self.path = path
        self._rates = rates
        self._changing = threading.Lock()

    def counts(self) -> Counter[str]:
        """Points of each class, of all recordings in the file."""
        return Counter(row.point.label for row in self._read().rows)

    def marks(self, name: str) -> tuple[list[Mark], str]:
        """The points of a recording by time, and the version of the file that has them."""
        table, rate = self._read(), self._rates[name]
        marks = [
            Mark(row.point.label, row.point.frame / rate) for row in table.rows if row.name == name
        ]
        return sorted(marks, key=lambda mark: mark.seconds), table.version

    def replace(self, name: str, marks: Sequence[Mark], version: str) -> str:
        """Have a recording just these points; they are on the disk when this returns.

        Returns the file's new version. Raises ConflictError where ``version`` is not that of the
        file: another page or program has changed it.
        """
        with self._changing:
            table = self._read()
            if table.version != version:
                raise ConflictError(f"{self.path}: has been changed by another page or program")
            own = self._rows(name, marks, table)
            text = _csv_text(table.columns, _with_rows_of(name, own, table.rows))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(self.path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            return _version(text)

    def _read(self) -> _Table:
        if not self.path.exists():
            return _Table(list(_COLUMNS), [], _version(""))
        text = read_text(self.path, "one point label a line")
        points = parse_points(text, self.path)
        named = {point.line: (name, point) for name, each in points.items() for point in each}
        lines = csv.reader(io.StringIO(text))
        columns = next(lines)
        rows = [_Row(*named[lines.line_num], fields) for fields in lines if lines.line_num in named]
        for row in rows:
            if not 0 <= row.point.frame < math.inf:
                raise DataError(
                    f"{self.path}, line {row.point.line}: expected a frame number of at least 0, "
                    f"got {row.point.frame:g}"
                )
        return _Table(columns, rows, _version(text))

    def _rows(self, name: str, marks: Sequence[Mark], table: _Table) -> list[list[str]]:
        """A point that was there keeps its line, and so what else stands in it."""
        there = defaultdict(list)
        for row in table.rows:
            if row.name == name:
                there[row.point.label, _frame_text(row.point.frame)].append(row.fields)
        rows = []
        for mark in sorted(marks, key=lambda mark: mark.seconds):
            frame = _frame_text(mark.seconds * self._rates[name])
            known = there[mark.label, frame]
            says = {"class": mark.label, "video_id": name, "point": frame}
            rows.append(known.pop(0) if known else [says.get(each, "") for each in table.columns])
        return rows


def _with_rows_of(name: str, own: list[list[str]], rows: Sequence[_Row]) -> list[list[str]]:
    """The lines of the file with those of one recording where its first was, or else at the end."""
    first = next((n for n, row in enumerate(rows) if row.name == name), len(rows))
    before = [row.fields for row in rows[:first]]
    return before + own + [row.fields for row in rows[first:] if row.name != name]


def _csv_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def _frame_text(frame: float) -> str:
    """To a thousandth of a frame: exact for what a video's clock can say, and short."""
    return f"{frame:.3f}".rstrip("0").rstrip(".")


def _version(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """The file for one process alone. Raises HrproError where another has it.

    What is locked stands beside it: the file itself is replaced again and again.
    """
    import fcntl  # not on every platform, as with the engine's event log

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise HrproError(
                f"{path}: is being labelled by the process with id {file.read().strip()}; "
                "stop it first, or label into another file with --set point_labels=NAME.csv"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
