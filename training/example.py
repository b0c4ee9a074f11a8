"""The embedded example: six motion-capture recordings, converted into a data set for training.

The raw file (`example_data/`, with its notice) has 12 body signals at 10 frames/s and an exercise
label for each frame. The conversion gives it the layout of the other data sets:

    FOLDER/
      features/{train,test}/NAME.npy     float32 (T, 96), one row a snippet
      split_train.txt, split_test.txt    seq1 to seq4 train, seq5 and seq6 test
      point_labels/point_gaussian.csv    one point for each training instance
      gt_full.json                       all instances with their borders, for evaluation
      classes.txt                        the 6 classes

There is no video, so the video frames are virtual: 25 frames/s, 16 frames a snippet, 0.64 s. One
snippet covers 6.4 raw frames, which no window of whole raw frames can, so that the signals are
first interpolated to 50 Hz, where a snippet is exactly 32 samples:

    raw frame (10 Hz)    0        1        2   ...    6        7        8   ...
    seconds              0.0      0.1      0.2        0.6      0.7      0.8
    sample (50 Hz)       0....5...10.........  ... 31|32...
    snippet_index        |-------------- 0 ----------|------------- 1 ------
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.timebase import SnippetClock
from hrpro.training.files import write_array

CLOCK = SnippetClock(frames_per_s=25.0, snippet_frames=16)
TRAIN_NAMES = ("seq1", "seq2", "seq3", "seq4")
TEST_NAMES = ("seq5", "seq6")

# A class needs instances enough for a split; exercises seen more rarely are background.
MIN_INSTANCES = 4

RAW_FRAMES_PER_S = 10
SAMPLES_PER_S = 50
SNIPPET_SAMPLES = 32

# Bins of the spectrum of one snippet (1.5625 Hz each): 1.6-3.1, 4.7-7.8 and 9.4-18.8 Hz. The first
# is the rhythm of an exercise; the others, beyond the raw 5 Hz, hold the images that linear
# interpolation leaves of it, and so say how jerky it is. Bin 0 is the mean, which is there already.
POWER_BANDS = ((1, 3), (3, 6), (6, 13))

POINT_SEED = 0


@dataclass(frozen=True)
class _Instance:
    """One exercise without a break: raw frames `start_frame` to `stop_frame` - 1 at 10 frames/s."""

    label: str
    start_frame: int
    stop_frame: int


@dataclass(frozen=True)
class _Raw:
    """One recording as it comes: `signals` float64 (F, 12) at 10 frames/s, and its instances."""

    name: str
    signals: NDArray[np.float64]
    instances: tuple[_Instance, ...]


def write_example_dataset(folder: Path) -> None:
    """Write the example data set into `folder` (made if absent; its files are replaced).

    The result depends on nothing but this package: each run writes the same bytes. Raises OSError
    when `folder` cannot be written.
    """
    recordings = _read_raw()
    classes = _frequent_labels(recordings)
    statistics = {raw.name: snippet_statistics(raw.signals) for raw in recordings}
    features = _standardised(statistics)
    for subset, names in (("train", TRAIN_NAMES), ("test", TEST_NAMES)):
        (folder / "features" / subset).mkdir(parents=True, exist_ok=True)
        _write_lines(folder / f"split_{subset}.txt", names)
        for name in names:
            write_array(folder / "features" / subset / f"{name}.npy", features[name])
    _write_lines(folder / "classes.txt", classes)
    _write_points(folder / "point_labels" / "point_gaussian.csv", recordings, classes)
    truth = json.dumps(_ground_truth(recordings, classes), indent=1)
    _write_lines(folder / "gt_full.json", [truth])


def snippet_statistics(signals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Eight statistics of each signal over each whole snippet: (F, C) at 10 Hz -> (T, 8 * C).

    T = floor(F / 6.4). Columns go statistic by statistic, each with all C signals: mean (the
    pose), standard deviation (how much moves), minimum and maximum (how far), mean absolute
    difference between neighbouring samples (how fast), and the logarithm of the power in three
    bands (in what rhythm). Power is log(1 + |FFT|^2 / samples), summed over a band: angles of 90
    degrees beside angles of 1 would otherwise leave nothing but outliers after standardisation.
    """
    samples = _snippet_samples(signals)
    T, S, C = samples.shape  # snippets, samples a snippet, signals
    # (T, S // 2 + 1, C)
    power = np.abs(np.fft.rfft(samples, axis=1)) ** 2 / S
    # 8 statistics of (T, C) -> (T, 8, C)
    statistics = np.stack(
        [
            samples.mean(axis=1),
            samples.std(axis=1),
            samples.min(axis=1),
            samples.max(axis=1),
            np.abs(np.diff(samples, axis=1)).mean(axis=1),
            *(np.log1p(power[:, low:high].sum(axis=1)) for low, high in POWER_BANDS),
        ],
        axis=1,
    )
    return statistics.reshape(T, 8 * C)


def _snippet_samples(signals: NDArray[np.float64]) -> NDArray[np.float64]:
    """The signals at 50 Hz, cut into snippets: (F, C) -> (T, 32, C).

    Linear interpolation at sample / 50 s. The last samples of a recording can lie up to 0.1 s
    behind its last frame; they repeat it.
    """
    F, C = signals.shape  # raw frames, signals
    T = F * SAMPLES_PER_S // (RAW_FRAMES_PER_S * SNIPPET_SAMPLES)
    frame = np.arange(T * SNIPPET_SAMPLES) * RAW_FRAMES_PER_S / SAMPLES_PER_S
    left = np.minimum(frame.astype(np.int64), F - 1)
    right = np.minimum(left + 1, F - 1)
    fraction = np.minimum(frame - left, 1.0)[:, None]
    # (T * 32, C)
    samples = signals[left] * (1.0 - fraction) + signals[right] * fraction
    return samples.reshape(T, SNIPPET_SAMPLES, C)


def _standardised(
    statistics: dict[str, NDArray[np.float64]],
) -> dict[str, NDArray[np.float32]]:
    """Mean 0 and standard deviation 1 in each column, over the snippets of the training split."""
    train = np.concatenate([statistics[name] for name in TRAIN_NAMES])
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    return {
        name: ((rows - mean) / deviation).astype(np.float32) for name, rows in statistics.items()
    }


def _read_raw() -> list[_Raw]:
    """The recordings of the embedded file, in its order."""
    resource = files("hrpro.training") / "example_data" / "mocap6_raw.npz"
    with as_file(resource) as path, np.load(path, allow_pickle=False) as raw:
        labels = [name.decode() for name in raw["true_state_names"]]
        borders = raw["doc_range"]
        states = np.array(labels)[raw["TrueZ"] - 1]
        signals = raw["X"]
    return [
        _Raw(f"seq{number}", signals[start:stop], _instances(states[start:stop]))
        for number, (start, stop) in enumerate(pairwise(borders), start=1)
    ]


def _instances(states: NDArray[np.str_]) -> tuple[_Instance, ...]:
    """Runs of equal labels, (F,) -> in order of time."""
    changes = np.flatnonzero(states[1:] != states[:-1]) + 1
    borders = [0, *changes.tolist(), len(states)]
    return tuple(_Instance(str(states[start]), start, stop) for start, stop in pairwise(borders))


def _frequent_labels(recordings: Sequence[_Raw]) -> list[str]:
    """The classes of the data set, sorted."""
    counts = Counter(instance.label for raw in recordings for instance in raw.instances)
    return sorted(label for label, count in counts.items() if count >= MIN_INSTANCES)


def _labelled(raw: _Raw, classes: Sequence[str]) -> list[_Instance]:
    """The instances of the data set's classes; the others are background."""
    return [instance for instance in raw.instances if instance.label in classes]


def _write_points(path: Path, recordings: Sequence[_Raw], classes: Sequence[str]) -> None:
    """One point for each training instance, as an annotator would set it: near the middle.

    A point is the frame at a normal deviate around the middle of its instance, with a sixth of
    its length as the standard deviation, so that 3 deviations reach its borders.
    """
    generator = np.random.default_rng(POINT_SEED)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["class", "class_index", "start_frame", "stop_frame", "video_id", "point"])
        for raw in (raw for raw in recordings if raw.name in TRAIN_NAMES):
            for instance in _labelled(raw, classes):
                start, stop = _clock_frame(instance.start_frame), _clock_frame(instance.stop_frame)
                deviate = generator.normal((start + stop) / 2, (stop - start) / 6)
                borders = math.floor(start), math.floor(stop)
                point = min(max(math.floor(deviate), borders[0]), borders[1] - 1)
                index = classes.index(instance.label)
                rows.writerow([instance.label, index, *borders, raw.name, point])


def _clock_frame(raw_frame: int) -> float:
    """The border `raw_frame` in frames of the virtual clock, which may lie between two of them."""
    return raw_frame * CLOCK.frames_per_s / RAW_FRAMES_PER_S


def _ground_truth(recordings: Sequence[_Raw], classes: Sequence[str]) -> dict[str, object]:
    """The annotations in the form of ActivityNet, times in seconds."""
    return {
        "version": "1.0",
        "database": {
            raw.name: {
                "subset": "Validation" if raw.name in TRAIN_NAMES else "Test",
                "duration": len(raw.signals) / RAW_FRAMES_PER_S,
                "fps": CLOCK.frames_per_s,
                "annotations": [
                    {
                        "label": instance.label,
                        "segment": [
                            instance.start_frame / RAW_FRAMES_PER_S,
                            instance.stop_frame / RAW_FRAMES_PER_S,
                        ],
                    }
                    for instance in _labelled(raw, classes)
                ],
            }
            for raw in recordings
        },
    }


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
