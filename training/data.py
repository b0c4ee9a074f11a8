"""Data sets in the layout of HR-Pro's release: features, point labels, splits, ground truth.

    DATA/
      features/{train,test}/NAME.npy     float32 (T, D), one row a snippet
      split_train.txt, split_test.txt    one recording name a line
      point_labels/*.csv                 class, video_id, point (a frame); others are ignored
      classes.txt                        one class a line (or else all labels, sorted)
      features.json                      where they were made by `hrpro features extract`
      gt_full.json                       database: {NAME: {"annotations": [{"label", "segment"}]}}

Training reads the training split's features and points; of ``gt_full.json``, which is read for
evaluation, it takes the frame rates of the points where the configuration says so, and no more.
Features are memory maps: a data set may be larger than memory. A map is opened when it is used:
each holds a file descriptor (CPython's mmap duplicates it), of which there may be few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.timebase import SnippetClock
from hrpro.engine.wire import ProtocolError, checked
from hrpro.engine.wire import label as wire_label
from hrpro.training.annotations import point_rates
from hrpro.training.data_config import DataConfig, DataError, Split, read_lines
from hrpro.training.feature_source import check_clock
from hrpro.training.points import Point, point_arrays, read_points

_ROWS_AT_ONCE = 4096  # when all values are looked at


@dataclass(frozen=True)
class FeatureFile:
    """Where features float32 (T, D) = ``shape`` lie in a file, from the byte ``offset`` on."""

    path: Path
    offset: int
    shape: tuple[int, int]

    def map(self) -> NDArray[np.float32]:
        """The features, read-only; what holds them holds a file descriptor."""
        try:
            return np.asarray(np.memmap(self.path, np.float32, "r", self.offset, self.shape))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: has changed since it was read: {error}") from None


@dataclass(frozen=True)
class Recording:
    """One recording: ``features`` float32 (T, D) and its points.

    ``point_index`` (N,) are snippet indices, ``point_label`` (N,) class indices; both int64,
    sorted by time. Test recordings have none. ``stored`` are the features or their file.
    """

    name: str
    stored: NDArray[np.float32] | FeatureFile
    point_index: NDArray[np.int64]
    point_label: NDArray[np.int64]

    def __len__(self) -> int:
        return self.stored.shape[0]

    @property
    def features(self) -> NDArray[np.float32]:
        """The features; a map that is opened here, which is not to be kept for all recordings."""
        return self.stored.map() if isinstance(self.stored, FeatureFile) else self.stored


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
        return self.recordings[0].stored.shape[1]


def read_training_split(folder: Path, config: DataConfig | None = None) -> DataSet:
    """Features and points of the training recordings."""
    config = config or DataConfig()
    check_clock(folder, config)
    names = read_names(folder, "train", config)
    points = read_points(folder, config)
    classes = read_classes(folder, points, names, config)
    rates = point_rates(folder, names, config)
    check_features_are_there(folder, "train", names, config)
    recordings = []
    for name in names:
        features = _stored(feature_path(folder, "train", name))
        index, label = point_arrays(
            folder, name, points[name], classes, config, features.shape[0], rates[name]
        )
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
    check_clock(folder, config)
    none = np.zeros(0, dtype=np.int64)
    names = read_names(folder, "test", config)
    _check_splits_are_apart(folder, names)
    check_features_are_there(folder, "test", names, config)
    recordings = [
        Recording(name, _stored(feature_path(folder, "test", name)), none, none) for name in names
    ]
    _check_dimensions(folder, recordings)
    data = DataSet(folder.resolve().name, tuple(classes), config.clock, tuple(recordings))
    if feature_dim not in (None, data.feature_dim):
        raise DataError(
            f"{folder}: expected features of D = {feature_dim}, which the model was trained on, "
            f"got D = {data.feature_dim}"
        )
    return data


def read_names(folder: Path, split: Split, config: DataConfig) -> list[str]:
    """The recordings of a split, without those that the preset blocks."""
    path = _split_file(folder, split)
    names = _names_in(path)
    if not names:
        raise DataError(f"{path}: expected at least one recording name, the file is empty")
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise DataError(f"{path}: recordings named more than once: {', '.join(repeated)}")
    blocked = config.published.blocked if config.published else ()
    left = [name for name in names if name not in blocked]
    if not left:
        raise DataError(f"{path}: expected a recording that {config.preset} does not leave out")
    return left


def _split_file(folder: Path, split: Split) -> Path:
    return folder / f"split_{split}.txt"


def _names_in(path: Path) -> list[str]:
    """Names may have blanks."""
    return read_lines(path, "one recording name a line")


def _check_splits_are_apart(folder: Path, names: Sequence[str]) -> None:
    """Raise DataError where recordings of the test split are trained on, too."""
    path = _split_file(folder, "train")
    both = sorted({*names} & {*_names_in(path)}) if path.exists() else []  # a test needs no other
    if both:
        raise DataError(
            f"{folder}: expected to test on what is not trained on, but {len(both)} recordings are "
            f"in both splits: {', '.join(both[:5])}"
        )


def feature_path(folder: Path, split: Split, name: str) -> Path:
    """Where the features of a recording are."""
    return folder / "features" / split / f"{name}.npy"


def check_features_are_there(
    folder: Path, split: Split, names: Sequence[str], config: DataConfig
) -> None:
    """Raise DataError that says how many feature files are missing, and what they should be."""
    missing = [name for name in names if not feature_path(folder, split, name).exists()]
    if not missing:
        return
    first = ", ".join(f"{name}.npy" for name in missing[:3]) + (", ..." if missing[3:] else "")
    preset = config.published
    kind = f"float32 (T, {preset.feature_dim}), {preset.features}" if preset else "float32 (T, D)"
    raise DataError(
        f"{folder / 'features' / split}: {len(missing)} of {len(names)} feature files are missing: "
        f"{first}; expected one NAME.npy for each recording of split_{split}.txt, {kind}, "
        f"one row for each {config.snippet_frames} frames at {config.frames_per_s:g} frames/s, "
        "named as in HR-Pro's release"
    )


def read_features(path: Path) -> NDArray[np.float32]:
    """Features (T, D): float32 is mapped into memory, other float types are converted."""
    try:
        # Not np.load, which takes archives, too, and leaves files of damaged ones open.
        stored = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise DataError(f"{path}: feature file is missing; expected float32 (T, D)") from None
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a readable .npy array: {error}") from None
    if stored.ndim != 2 or 0 in stored.shape or stored.dtype.kind != "f":
        raise DataError(
            f"{path}: expected a float array (T, D) with T, D >= 1, "
            f"got {stored.dtype} {stored.shape}"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite
        features = np.ascontiguousarray(stored, dtype=np.float32)
    for first, rows in in_blocks(features):
        bad = ~np.isfinite(rows).all(axis=1)
        if bad.any():
            raise DataError(f"{path}: snippet {first + int(bad.argmax())} is not finite")
    return features


def in_blocks(features: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Features in blocks of rows with the index of their first: what is computed of a whole
    recording could be too much for the memory."""
    for first in range(0, len(features), _ROWS_AT_ONCE):
        yield first, features[first : first + _ROWS_AT_ONCE]


def _stored(path: Path) -> NDArray[np.float32] | FeatureFile:
    """Checked features: their file where they can be mapped as they are, else themselves."""
    features = read_features(path)
    if not isinstance(features.base, np.memmap):
        return features
    T, D = features.shape
    return FeatureFile(path.resolve(), features.base.offset, (T, D))


def known_classes(folder: Path, config: DataConfig) -> tuple[str, ...] | None:
    """The classes that classes.txt lists, else those of the preset; None where neither is there.

    Raises DataError where the two differ.
    """
    path = folder / "classes.txt"
    preset = config.published.classes if config.published else None
    if not path.exists():
        return preset
    classes = tuple(read_lines(path, "one class a line"))
    if len(set(classes)) != len(classes) or not classes:
        raise DataError(f"{path}: expected distinct class names, one a line")
    if preset is not None and set(classes) != set(preset):
        odd = sorted(set(classes) ^ set(preset))
        raise DataError(
            f"{path}: expected the {len(preset)} classes of the preset {config.preset}, "
            f"differing in {', '.join(odd[:5])}"
        )
    return classes


def read_classes(
    folder: Path, points: dict[str, list[Point]], names: Sequence[str], config: DataConfig
) -> tuple[str, ...]:
    """The classes that are known, else all labels of the points, sorted."""
    path, classes = folder / "classes.txt", known_classes(folder, config)
    if classes is None:
        path = folder / "point_labels"
        classes = tuple(sorted({point.label for name in names for point in points[name]}))
    for label in classes:
        try:
            checked("class", wire_label, label)
        except ProtocolError as error:  # it would not fit into the topic of an event
            raise DataError(f"{path}: {error}") from None
    return classes


def _check_dimensions(folder: Path, recordings: Sequence[Recording]) -> None:
    feature_dim = recordings[0].stored.shape[1]
    for recording in recordings:
        if recording.stored.shape[1] != feature_dim:
            raise DataError(
                f"{folder}: recording {recording.name!r} has D = {recording.stored.shape[1]}, "
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
