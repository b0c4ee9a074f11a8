"""Does a data set hold together? All that is wrong with it, and a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hrpro.training.annotations import point_rates, read_ambiguous, read_database, truth_of
from hrpro.training.data import (
    check_features_are_there,
    feature_path,
    read_classes,
    read_features,
    read_names,
)
from hrpro.training.data_config import SPLITS, DataConfig, DataError, Split
from hrpro.training.feature_source import check_clock
from hrpro.training.points import point_arrays, read_points
from hrpro.training.simulate import is_simulated

# Features end where the last whole snippet of a video does, or with one that is padded.
_SNIPPETS_APART = 2


@dataclass
class Findings:
    """``errors`` keep a data set from being used, ``warnings`` may be meant."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    points: Counter[str] = field(default_factory=Counter)
    instances: dict[str, Counter[str]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


def check_data(folder: Path, config: DataConfig) -> Findings:
    """Read everything that training and evaluation would, and go on where something is wrong."""
    found = Findings()
    found.summary["simulated"] = is_simulated(folder)
    lengths: dict[Split, dict[str, int]] = {"train": {}, "test": {}}
    dims: dict[str, int] = {}
    _try(found, check_clock, folder, config)
    for split in SPLITS:
        names = _try(found, read_names, folder, split, config) or []
        _check_size(found, config, split, len(names))
        _try(found, check_features_are_there, folder, split, names, config)
        lengths[split] = _lengths(found, folder, split, names, dims)
        snippets = sum(lengths[split].values())
        found.summary[f"{split}_recordings"] = len(names)
        found.summary[f"{split}_hours"] = round(config.clock.seconds(snippets) / 3600, 2)
    for name in sorted(lengths["train"].keys() & lengths["test"].keys()):
        found.errors.append(f"{folder}: recording {name!r} is in both splits")
    found.summary["feature_dim"] = sorted(set(dims.values()))
    if len(set(dims.values())) > 1:
        common = Counter(dims.values()).most_common(1)[0][0]
        odd = [f"{name} {dim}" for name, dim in dims.items() if dim != common]
        found.errors.append(f"{folder}: most recordings have D = {common}, but {_some(odd)}")
    _check_points(found, folder, config, lengths["train"], lengths["test"])
    _check_annotations(found, folder, config, lengths)
    return found


def _check_size(found: Findings, config: DataConfig, split: Split, count: int) -> None:
    preset = config.published
    if preset is None:
        return
    expected = preset.recordings.train if split == "train" else preset.recordings.test
    if count != expected:
        found.warnings.append(
            f"split_{split}.txt: {preset.title} has {expected} recordings, here are {count}"
        )


def _lengths(
    found: Findings, folder: Path, split: Split, names: Sequence[str], dims: dict[str, int]
) -> dict[str, int]:
    """Snippets of each recording whose features can be read; 0 where they cannot."""
    lengths = dict.fromkeys(names, 0)
    for name in names:
        path = feature_path(folder, split, name)
        features = _try(found, read_features, path) if path.exists() else None
        if features is not None:
            lengths[name], dims[name] = features.shape
    return lengths


def _check_points(
    found: Findings,
    folder: Path,
    config: DataConfig,
    lengths: dict[str, int],
    tests: dict[str, int],
) -> None:
    points = _try(found, read_points, folder, config)
    if points is None:
        return
    classes = _try(found, read_classes, folder, points, list(lengths), config)
    rates = _try(found, point_rates, folder, list(lengths), config)
    if classes is None or rates is None:
        return
    found.classes = classes
    blocked = config.published.blocked if config.published else ()
    strays = sorted(points.keys() - lengths.keys() - tests.keys() - {*blocked})
    if strays:
        count = sum(len(points[name]) for name in strays)
        found.warnings.append(
            f"{folder}: {count} points are of recordings in no split: {_some(strays)}"
        )
    for name, length in lengths.items():
        for point in points[name]:
            if not length:  # its features are missing, which was said
                found.points[point.label] += 1
                continue
            one = _try(
                found, point_arrays, folder, name, [point], classes, config, length, rates[name]
            )
            found.points[point.label] += one is not None
        if not points[name]:
            found.warnings.append(f"{folder}: training recording {name!r} has no point")
    missing = [label for label in classes if not found.points[label]]
    if missing:
        found.errors.append(f"{folder}: no training point for {_some(missing)}")
    found.summary["points"] = sum(found.points.values())


def _check_annotations(
    found: Findings, folder: Path, config: DataConfig, lengths: dict[Split, dict[str, int]]
) -> None:
    """Ground truth is needed for the test split; of the training split it is taken where it is."""
    database = _try(found, read_database, folder)
    if database is None or not found.classes:
        return
    for split in SPLITS:
        found.instances[split] = Counter()
        for name, length in lengths[split].items():
            if split == "train" and name not in database:
                continue
            truth = _try(found, truth_of, folder, database, name, found.classes)
            if truth is None:
                continue
            labels = np.array(found.classes)[truth.label_index]
            found.instances[split].update(labels.tolist())
            _check_duration(found, name, length, database[name], config)
        found.summary[f"{split}_instances"] = sum(found.instances[split].values())
    if lengths["test"] and not found.summary["test_instances"]:
        found.warnings.append(
            f"{folder / 'gt_full.json'}: no annotated action in the test split: "
            "nothing can be measured"
        )
    _try(found, read_ambiguous, folder, list(lengths["test"]), config)


def _check_duration(
    found: Findings, name: str, length: int, entry: Any, config: DataConfig
) -> None:
    duration_s = entry.get("duration") if isinstance(entry, dict) else None
    if not length or not isinstance(duration_s, int | float):
        return
    expected = config.clock.position(duration_s)
    if abs(length - expected) > _SNIPPETS_APART:
        found.warnings.append(
            f"{name}: {length} snippets of {config.clock.snippet_s:g} s, but the annotations say "
            f"that it lasts {duration_s:g} s ({expected:.1f} snippets)"
        )


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")


def _try(found: Findings, read: Any, *arguments: Any) -> Any:
    """What ``read`` returns; None, and its error among the findings, if it raises DataError."""
    try:
        return read(*arguments)
    except DataError as error:
        found.errors.append(str(error))
        return None
