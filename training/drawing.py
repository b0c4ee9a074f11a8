"""Point labels drawn from full annotations, one an instance (paper, Table A)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hrpro.training.annotations import annotated_labels, point_rates, read_truth
from hrpro.training.data import read_names
from hrpro.training.data_config import DataConfig
from hrpro.training.files import replaced_file

Distribution = Literal["uniform", "centre", "gaussian"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)

# Of the Gaussian, as a share of the instance's length; six of them span it. A choice: the paper
# gives none, and no published code draws such points (SF-Net's video_dataset.py draws uniformly,
# from a histogram, or the centre and a normal deviate of 1 s). The released point_gaussian.csv lie
# closer to the centre, with a deviation of about a frame (THUMOS14 1.1, GTEA 0.5, BEOID 0.7) of
# whatever length the instance is: they are next to what "centre" gives.
_SIGMA = 1 / 6


def draw_points(
    start_s: NDArray[np.float64],
    end_s: NDArray[np.float64],
    distribution: str,
    random: np.random.Generator,
) -> NDArray[np.float64]:
    """A time in seconds within each instance ``start_s`` to ``end_s``, (N,) each.

    Uniform over the instance, its centre, or a Gaussian around the centre, drawn again where it
    falls outside.
    """
    N = len(start_s)
    if distribution == "uniform":
        share = random.random(N)
    elif distribution == "centre":
        share = np.full(N, 0.5)
    else:
        assert distribution == "gaussian", distribution
        share = np.full(N, -1.0)
        while (outside := (share < 0) | (share >= 1)).any():
            share[outside] = random.normal(0.5, _SIGMA, int(outside.sum()))
    return start_s + share * (end_s - start_s)


def write_points(
    folder: Path, path: Path, distribution: str, seed: int, config: DataConfig, overwrite: bool
) -> int:
    """Draw a point for each annotated instance of the training split; returns their number.

    Frames are counted at the rate of the point labels. Raises FileExistsError for a file that is
    there, unless it may be overwritten.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: is there already; --force overwrites it")
    names = read_names(folder, "train", config)
    preset = config.published
    classes = preset.classes if preset else annotated_labels(folder, names)
    truth, rates = read_truth(folder, names, classes), point_rates(folder, names, config)
    random = np.random.default_rng(seed)
    rows = []
    for name in names:
        segments, rate = truth[name], rates[name]
        point_s = draw_points(segments.start_s, segments.end_s, distribution, random)
        for n in range(len(segments)):
            index = int(segments.label_index[n])
            frames = (segments.start_s[n] * rate, segments.end_s[n] * rate, point_s[n] * rate)
            start, stop, point = (int(frame) for frame in frames)
            rows.append((classes[index], index, start, stop, name, point))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("class", "class_index", "start_frame", "stop_frame", "video_id", "point"))
        writer.writerows(rows)
    return len(rows)
