"""Predictions of many recordings in the format of ActivityNet's evaluation.

    {"version": "...", "results": {NAME: [{"label": "...", "score": 0.9, "segment": [s, e]}]},
     "external_data": {}}

Times are in seconds. ActivityNet's own files leave the "v_" of a recording's name away; either is
read, and what is written has the names of the split.

    PredictionsError
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hrpro.engine.wire import HrproError
from hrpro.training.files import replaced_file
from hrpro.training.metrics import Segments

_PREFIX = "v_"


class PredictionsError(HrproError, ValueError):
    """A file of predictions that cannot be used; the message says where and why."""


def write_predictions(
    path: Path, predictions: Mapping[str, Segments], classes: Sequence[str]
) -> None:
    """Write predictions by recording, in falling order of their score; the file or none."""
    results = {}
    for name, segments in predictions.items():
        rows = zip(
            segments.score.tolist(),
            segments.label_index.tolist(),
            segments.start_s.tolist(),
            segments.end_s.tolist(),
            strict=True,
        )
        results[name] = [
            {"label": classes[label], "score": score, "segment": [start_s, end_s]}
            for score, label, start_s, end_s in sorted(rows, key=lambda row: -row[0])
        ]
    content = {"version": "HR-Pro Stream", "results": results, "external_data": {}}
    with replaced_file(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")


def read_predictions(
    path: Path, names: Sequence[str], classes: Sequence[str], blocked: Sequence[str] = ()
) -> dict[str, Segments]:
    """Predictions of the named recordings; those that the file does not have are empty, and those
    of ``blocked`` ones are not looked at.

    Raises PredictionsError for a recording or a label that is unknown, a score that is no finite
    number, and a segment that is not two of them in order.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
    except OSError as error:
        raise PredictionsError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PredictionsError(f'{path}: expected JSON with the key "results": {error!r}') from None
    if not isinstance(results, dict):
        raise PredictionsError(f'{path}: expected recordings by name in "results"')
    known, index = set(names), {label: number for number, label in enumerate(classes)}
    found: dict[str, Segments] = {}
    for key, rows in results.items():
        name = key if key in known else _PREFIX + key
        if key in blocked or name in blocked:
            continue
        if name not in known:
            raise PredictionsError(f"{path}: recording {key!r} is not one of the test split")
        if not isinstance(rows, list):
            raise PredictionsError(f"{path}: {key!r}: expected a list of predictions")
        if name in found:
            raise PredictionsError(f"{path}: {name!r} is there with and without {_PREFIX!r}")
        found[name] = Segments.from_rows(
            [_row(f"{path}: {key!r}, prediction {n}", row, index) for n, row in enumerate(rows)]
        )
    return {name: found.get(name, Segments.from_rows([])) for name in names}


def _row(where: str, row: Any, index: Mapping[str, int]) -> tuple[float, float, int, float]:
    try:
        label, score, (start_s, end_s) = row["label"], float(row["score"]), row["segment"]
        segment = float(start_s), float(end_s)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise PredictionsError(
            f'{where}: expected "label", "score" and "segment", two numbers, got {error!r}'
        ) from None
    if not isinstance(label, str) or label not in index:
        raise PredictionsError(f"{where}: the label {label!r} is not one of the classes")
    if not math.isfinite(score):
        raise PredictionsError(f"{where}: expected a finite score, got {score}")
    if not -math.inf < segment[0] <= segment[1] < math.inf:
        raise PredictionsError(f"{where}: expected a segment from start to end, got {segment}")
    return segment[0], segment[1], index[label], score
