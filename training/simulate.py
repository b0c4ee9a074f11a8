"""Simulated features over published timelines: for work on scale and speed where the real features
cannot be had. Figures on them say nothing of the benchmark.

Each class has a pattern that turns from a beginning over a middle to an end, and shares a part of
it with its neighbour in the list of classes; each instance has a deviation of its own, some are
weak. Background is a mixture of a few patterns that differ between recordings, part of it close to
an action. Over all lies noise that changes slowly, and a mean of the recording's own.

    FEATURES
    t:     0 ......... start ................. end ......... T
           background   beginning  middle  end   background
           + recording's mean + slow noise + white noise
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hrpro.training.annotations import read_database, read_truth
from hrpro.training.data import feature_path, read_classes, read_names
from hrpro.training.data_config import SPLITS, DataConfig, DataError, Split
from hrpro.training.files import write_array
from hrpro.training.metrics import Segments
from hrpro.training.points import read_points

_MARK = "SIMULATED.txt"
SIMULATED_NOTE = "these features are SIMULATED: figures on them say nothing of the benchmark"

Floats = NDArray[np.float64]

_BACKGROUNDS = 12  # patterns of what is no action
_SHARED = 0.5  # of a class's pattern with its neighbour's
_INSTANCE_DEVIATION = 0.6
_NOISE = 2.2  # of a snippet, over the unit length of a pattern, spread over D
_SLOW_NOISE = 1.2
_CORRELATION = 0.9  # of slow noise, from one snippet to the next
_RECORDING_MEAN = 1.0


def is_simulated(folder: Path) -> bool:
    """Whether the features of a data folder come from `simulate_data`."""
    return (folder / _MARK).exists()


@dataclass(frozen=True)
class World:
    """Patterns that all recordings share: ``actions`` (C, 3, D), ``backgrounds`` (K, D)."""

    actions: Floats
    backgrounds: Floats


def simulate_data(
    annotations: Path,
    out: Path,
    config: DataConfig,
    feature_dim: int,
    seed: int,
    progress: Callable[[int], None],
) -> int:
    """Write a data folder with simulated features (T, D); returns the number of recordings.

    ``annotations`` has gt_full.json with durations, the splits and point labels. Raises DataError
    for what is missing there, FileExistsError where ``out`` has something else in it.
    """
    if out.exists() and any(out.iterdir()) and not is_simulated(out):
        raise FileExistsError(f"{out}: is there and is no simulated data set")
    names: dict[Split, list[str]] = {
        split: read_names(annotations, split, config) for split in SPLITS
    }
    classes = read_classes(annotations, read_points(annotations, config), names["train"], config)
    database = read_database(annotations)
    truth = read_truth(annotations, [*names["train"], *names["test"]], classes)
    world = _world(len(classes), feature_dim, seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).write_text(
        f"These features are simulated, over the timelines of {annotations.resolve().name}: "
        f"D = {feature_dim}, seed {seed}.\nFigures on them say nothing of the benchmark.\n"
    )
    for split, members in names.items():
        feature_path(out, split, "any").parent.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(members):
            length = _length(annotations, name, database[name], config)
            random = np.random.default_rng([seed, split == "test", number])
            features = simulated_features(world, truth[name], length, config, random)
            write_array(feature_path(out, split, name), features)
            progress(1)
    _copy_labels(annotations, out, config)
    return sum(len(members) for members in names.values())


def simulated_features(
    world: World,
    truth: Segments,
    length: int,
    config: DataConfig,
    random: np.random.Generator,
) -> NDArray[np.float32]:
    """Features (T, D) of one recording with these actions."""
    D = world.backgrounds.shape[1]
    features = _background(world, length, random)
    centre_s = (np.arange(length) + 0.5) * config.clock.snippet_s  # (T,)
    for n in range(len(truth)):
        inside = (centre_s >= truth.start_s[n]) & (centre_s < truth.end_s[n])
        if not inside.any():  # shorter than a snippet: the one that holds its middle
            middle_s = (truth.start_s[n] + truth.end_s[n]) / 2
            inside[min(int(middle_s / config.clock.snippet_s), length - 1)] = True
        duration_s = max(truth.end_s[n] - truth.start_s[n], config.clock.snippet_s)
        phase = (centre_s[inside] - truth.start_s[n]) / duration_s
        pattern = _phased(world.actions[truth.label_index[n]], phase.clip(0, 1))
        deviation = random.normal(0, _INSTANCE_DEVIATION / np.sqrt(D), D)
        features[inside] = random.uniform(0.6, 1.4) * (pattern + deviation)
    features += random.normal(0, _RECORDING_MEAN / np.sqrt(D), D)
    features += _slow_noise(length, D, random)
    features += random.normal(0, _NOISE / np.sqrt(D), (length, D))
    return features.astype(np.float32)


def _world(class_count: int, feature_dim: int, seed: int) -> World:
    random = np.random.default_rng(seed)
    own = _unit(random.normal(size=(class_count, 3, feature_dim)))
    own = own + 1.5 * _unit(random.normal(size=(class_count, 1, feature_dim)))  # all its phases
    shared = _SHARED * np.roll(own, 1, axis=0) if class_count > 1 else 0.0
    return World(_unit(own + shared), _unit(random.normal(size=(_BACKGROUNDS, feature_dim))))


def _unit(x: Floats) -> Floats:
    unit: Floats = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return unit


def _phased(pattern: Floats, phase: Floats) -> Floats:
    """The pattern (3, D) at each phase in [0, 1], (N,) -> (N, D), blended between its parts."""
    weight = np.maximum(1 - np.abs(2 * phase[:, None] - np.arange(3)), 0)  # (N, 3)
    blended: Floats = weight @ pattern
    return blended


def _background(world: World, length: int, random: np.random.Generator) -> Floats:
    """Stretches of background of about 15 snippets, one in five of them like a weak action."""
    K = len(world.backgrounds)
    change = random.random(length) < 1 / 15
    stretch = change.cumsum()  # (T,)
    count = int(stretch[-1]) + 1
    kind = world.backgrounds[random.choice(random.permutation(K)[:4], count)]
    alike = world.actions[random.integers(len(world.actions), size=count), 1]
    mixed = np.where(random.random(count)[:, None] < 0.2, 0.5 * alike + 0.5 * kind, kind)
    return mixed[stretch]


def _slow_noise(length: int, feature_dim: int, random: np.random.Generator) -> Floats:
    """AR(1) noise (T, D) with the deviation `_SLOW_NOISE`, stationary from the first snippet."""
    step = random.normal(0, _SLOW_NOISE / np.sqrt(feature_dim), (length, feature_dim))
    step[1:] *= np.sqrt(1 - _CORRELATION**2)
    for t in range(1, length):
        step[t] += _CORRELATION * step[t - 1]
    return step


def _length(folder: Path, name: str, entry: dict[str, object], config: DataConfig) -> int:
    duration_s = entry.get("duration")
    if not isinstance(duration_s, int | float) or not 0 < duration_s < float("inf"):
        raise DataError(
            f"{folder / 'gt_full.json'}: {name!r}: expected its duration in seconds, "
            f"got {duration_s!r}"
        )
    return max(1, int(config.clock.position(duration_s)))


def _copy_labels(annotations: Path, out: Path, config: DataConfig) -> None:
    """What a data folder has beside features."""
    shutil.copytree(annotations / "point_labels", out / "point_labels", dirs_exist_ok=True)
    for name in ("gt_full.json", "split_train.txt", "split_test.txt"):
        shutil.copyfile(annotations / name, out / name)
    optional = ["classes.txt"]
    if config.published is not None and config.published.ambiguous is not None:
        optional.append(config.published.ambiguous)
    for name in optional:
        if (annotations / name).exists():
            shutil.copyfile(annotations / name, out / name)
