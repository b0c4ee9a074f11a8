"""What is left of the accuracy when snippets never come, by what stands in for their scores.

    python benchmarks/gaps.py BUNDLE --data DATA

Snippets of the test split are left out in bursts; windows have them masked, as in the engine. The
scores of these positions are then the model's own, as in the engine; or 0; or the last ones before
them; or lie on a straight line across the gap, which needs what comes behind it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from hrpro.clients.stream_eval import read_evaluation_data
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.localizer import localize
from hrpro.engine.serve import load_engine_config
from hrpro.export.bundle import read_bundle
from hrpro.training.metrics import to_segments

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]
STAND_INS = ("model", "zero", "last", "line")
BURSTS, RATES, SEEDS = (1, 4, 16), (0.05, 0.15), (0, 1)


def draw_gaps(snippets: int, burst: int, rate: float, seed: int) -> Flags:
    """Which snippets of a recording come, (T,)."""
    here = np.ones(snippets, dtype=np.bool_)
    count = int(snippets * rate / max(burst, 1))
    draw = np.random.default_rng(seed)
    for start in draw.integers(1, max(2, snippets - burst), count):
        here[start : start + burst] = False
    return here


def fill(scores: Floats, here: Flags, stand_in: str) -> Floats:
    """P (T, C) with something in the place of what is missing."""
    filled, known, every = scores.copy(), np.flatnonzero(here), np.arange(len(scores))
    if stand_in == "zero":
        filled[~here] = 0
    elif stand_in == "last":
        filled = scores[known[np.searchsorted(known, every, side="right") - 1]]
    elif stand_in == "line":
        for column in range(scores.shape[1]):
            filled[:, column] = np.interp(every, known, scores[known, column])
    return filled


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    bundle = read_bundle(options.bundle)
    config = load_engine_config(bundle)
    backend = OnnxRuntimeBackend(bundle, config)
    data, truth = read_evaluation_data(options.data, bundle)
    clock = bundle.manifest.clock

    def average_map(burst: int, rate: float, seed: int, stand_in: str) -> float:
        found = {}
        for recording in data.recordings:
            here = draw_gaps(len(recording.features), burst, rate, seed)
            features = np.where(here[:, None], recording.features, np.float32(0))
            scores, embedding, _ = (
                each[0] for each in backend.score_snippets(features[None], here[None])
            )
            filled = fill(scores, here, stand_in)
            proposals = localize(filled, embedding, config.localization, backend)
            found[recording.name] = to_segments(proposals, clock)
        return truth.compare(found).average

    table = Table("burst", "left out", *STAND_INS, title="average mAP")
    table.add_row("-", "0 %", f"{average_map(0, 0.0, 0, 'model'):.3f}")
    for burst in BURSTS:
        for rate in RATES:
            means = [
                np.mean([average_map(burst, rate, seed, stand_in) for seed in SEEDS])
                for stand_in in STAND_INS
            ]
            table.add_row(str(burst), f"{rate:.0%}", *(f"{mean:.3f}" for mean in means))
    Console().print(table)


if __name__ == "__main__":
    main()
