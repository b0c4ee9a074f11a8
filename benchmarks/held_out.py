"""Compare training settings on held-out training recordings; the test split is not touched.

    python benchmarks/held_out.py DATA [--share 3] --set "" --set "model.attention_heads=1" ...

Each --set is one row: assignments separated by blanks, over the defaults. The last 1/share of the
training recordings, by name, is held out; the rows are trained on the others.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from hrpro.engine.settings import load_settings
from hrpro.training.config import TrainingConfig
from hrpro.training.data import DataSet, read_training_split, read_truth
from hrpro.training.evaluate import evaluate
from hrpro.training.train import train


def main() -> None:
    """Print a Markdown table, a line for each row as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--share", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="rows")
    arguments = parser.parse_args()
    print("| settings | average mAP | stage 1 alone | at 0.5 | at 0.7 | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in arguments.rows or [""]:
        config = load_settings(TrainingConfig, None, row.split())
        print(measure(arguments.data, arguments.share, config, row), flush=True)


def measure(folder: Path, share: int, config: TrainingConfig, row: str) -> str:
    """Train on one part of the training split, evaluate on the other."""
    data = read_training_split(folder, config.data)
    fitted, held_out = split(data, share)
    names = [recording.name for recording in held_out.recordings]
    truth = read_truth(folder, names, data.classes)
    started_s = time.monotonic()
    model = train(config, fitted, lambda *_: None)
    seconds = time.monotonic() - started_s
    found = evaluate(model, held_out, truth, config.localization)
    both = found.both_stages
    return (
        f"| {row or 'defaults'} | {both.average:.3f} | {found.stage1.average:.3f} "
        f"| {both.by_tiou[0.5]:.3f} | {both.by_tiou[0.7]:.3f} | {seconds:.0f} |"
    )


def split(data: DataSet, share: int) -> tuple[DataSet, DataSet]:
    """The recordings to train on, and those held out."""
    recordings = sorted(data.recordings, key=lambda recording: recording.name)
    first = len(recordings) - max(1, len(recordings) // share)
    return (
        replace(data, recordings=tuple(recordings[:first])),
        replace(data, recordings=tuple(recordings[first:])),
    )


if __name__ == "__main__":
    main()
