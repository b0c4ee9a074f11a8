"""How long a training step takes, and what of it a plain loop over snippets would take.

    python benchmarks/training_step.py [--batch 16] [--snippets 340] [--dim 128] [--classes 20]

Prints the time of a step of stage 1 with the default settings, beside one with attention over the
whole matrix and one in float32, and the vectorised parts beside the same written as loops: pseudo
snippets, proposals with their contrast, soft-NMS, evaluation. All in one run, as ratios: absolute
times of a shared machine mean little.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.proposals import RunDetector
from hrpro.engine.soft_nms import soft_nms
from hrpro.engine.timebase import SnippetClock
from hrpro.training.candidates import find_candidates
from hrpro.training.config import TrainingConfig
from hrpro.training.data import DataSet, Recording
from hrpro.training.metrics import Segments, mean_average_precision
from hrpro.training.pseudo_snippets import mine_pseudo_snippets
from hrpro.training.snippet_stage import SnippetStage


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--snippets", type=int, default=340)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    B, T, D, C = arguments.batch, arguments.snippets, arguments.dim, arguments.classes
    print(f"B = {B}, T = {T}, D = {D}, C = {C}, {torch.get_num_threads()} threads\n")
    print("| | ms | the other way, ms | ratio |")
    print("| --- | --- | --- | --- |")
    random = np.random.default_rng(0)
    data = _data(B, T, D, C, random)
    step = _step(data, B, T, {})
    whole = _step(data, B, T, {"model": {"attention_past": None}})
    pairs: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("step of stage 1, against attention over the whole matrix", step, whole),
        ("the same, against float32", step, _step(data, B, T, {"precision": "float32"})),
    ]
    attention = torch.from_numpy(random.random((B, T)).astype(np.float32))
    points = torch.from_numpy(random.random((B, T, C)) < 0.5 / T)
    valid = torch.ones(B, T, dtype=torch.bool)
    pairs.append(
        (
            "pseudo snippets of the batch, against a loop",
            lambda: mine_pseudo_snippets(attention[..., None], attention, points, valid, 0.95, 0.1),
            lambda: _mine_plainly(attention.tolist(), points.numpy()),
        )
    )
    scores = _smooth(random.random((T, C)))
    config = LocalizationConfig()
    pairs.append(
        (
            "proposals of a recording, against a loop",
            lambda: find_candidates(scores, config),
            lambda: _find_plainly(scores, config),
        )
    )
    start = random.random(300) * T
    end, score = start + 1 + 20 * random.random(300), random.random(300)
    pairs.append(
        (
            "soft-NMS of 300 proposals, against a loop",
            lambda: soft_nms(start, end, score, 0.3),
            lambda: _soft_nms_plainly(start.tolist(), end.tolist(), score.tolist()),
        )
    )
    truth, found = _segments(random, 15, C), _segments(random, 400, C)
    pairs.append(
        (
            "evaluation of a recording, against a loop",
            lambda: mean_average_precision({"a": truth}, {"a": found}, C),
            lambda: _evaluate_plainly(truth, found, C),
        )
    )
    for name, ours, plain in pairs:
        fast, slow = _timed(ours, plain, arguments.repeats)
        print(f"| {name} | {fast:.2f} | {slow:.2f} | {slow / fast:.1f} |", flush=True)


def _timed(
    ours: Callable[[], object], plain: Callable[[], object], repeats: int
) -> tuple[float, float]:
    """Median milliseconds of both, run in turns; the first turn is not counted."""
    times: list[list[float]] = [[], []]
    for turn in range(repeats + 1):
        for kind, call in enumerate((ours, plain)):
            started_s = time.perf_counter()
            call()
            if turn:
                times[kind].append(1000 * (time.perf_counter() - started_s))
    return statistics.median(times[0]), statistics.median(times[1])


def _data(B: int, T: int, D: int, C: int, random: np.random.Generator) -> DataSet:  # noqa: N803
    """As many random recordings, of the length of a crop, with 15 points each."""
    recordings = []
    for number in range(B):
        index = np.sort(random.choice(T, size=15, replace=False)).astype(np.int64)
        label = np.arange(15, dtype=np.int64) % C
        features = random.normal(size=(T, D)).astype(np.float32)
        recordings.append(Recording(str(number), features, index, label))
    label = np.arange(C, dtype=np.int64)
    everything = Recording("all", random.normal(size=(T, D)).astype(np.float32), label, label)
    classes = tuple(f"class {c}" for c in range(C))
    return DataSet("random", classes, SnippetClock(), (*recordings, everything))


def _step(
    data: DataSet, batch: int, length: int, settings: dict[str, object]
) -> Callable[[], object]:
    """A step of stage 1 with these settings beside the defaults."""
    stage_settings = {"batch_size": batch, "crop_snippets": length, "steps": 9_999}
    config = TrainingConfig.model_validate({"snippet_stage": stage_settings, **settings})
    torch.manual_seed(0)
    stage = SnippetStage(config, data, torch.device("cpu"))
    numbers = itertools.count(1)
    return lambda: stage.step(next(numbers))


def _smooth(x: np.ndarray) -> np.ndarray:
    window = np.ones(5) / 5
    smooth = np.stack([np.convolve(column, window, "same") for column in x.T], axis=1)
    return (smooth**3).astype(np.float32)


def _segments(random: np.random.Generator, count: int, classes: int) -> Segments:
    start = 200 * random.random(count)
    label = random.integers(classes, size=count)
    return Segments(start, start + 1 + 10 * random.random(count), label, random.random(count))


# --- the same as loops ---------------------------------------------------------------------------


def _mine_plainly(attention: list[list[float]], points: np.ndarray) -> list[set[tuple[int, int]]]:
    """Algorithm 1, snippet by snippet; action alone."""
    found = []
    for row, marked in zip(attention, points, strict=True):
        action: set[tuple[int, int]] = set()
        is_point = marked.any(axis=1).tolist()
        for t, c in np.argwhere(marked).tolist():
            action.add((t, c))
            for step in (1, -1):
                at = t + step
                while 0 <= at < len(row) and row[at] > 0.95 and not is_point[at]:
                    action.add((at, c))
                    at += step
        background = [t for t, a in enumerate(row) if a < 0.1]
        found.append(action | {(t, -1) for t in background})
    return found


def _find_plainly(scores: np.ndarray, config: LocalizationConfig) -> list[float]:
    detector = RunDetector(scores.shape[1], config)
    contrast = []
    for row in scores:
        contrast += [detector.outer_inner_contrast(run) for run in detector.push(row)]
    return contrast


def _soft_nms_plainly(
    start: Sequence[float], end: Sequence[float], score: Sequence[float]
) -> list[float]:
    left, kept = list(range(len(start))), list(score)
    while left:
        best = max(left, key=lambda n: kept[n])
        left.remove(best)
        for n in left:
            shared = max(0.0, min(end[n], end[best]) - max(start[n], start[best]))
            union = end[n] - start[n] + end[best] - start[best] - shared
            kept[n] *= float(np.exp(-((shared / union) ** 2) / 0.3))
    return kept


def _evaluate_plainly(truth: Segments, found: Segments, classes: int) -> float:
    """mAP at 0.1 to 0.7, one pair of segments after the other."""
    total = 0.0
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        for label in range(classes):
            instances = [n for n in range(len(truth)) if truth.label_index[n] == label]
            order = [n for n in range(len(found)) if found.label_index[n] == label]
            order.sort(key=lambda n: -found.score[n])
            taken: set[int] = set()
            hits: list[bool] = []
            for n in order:
                best, best_tiou = None, threshold
                for m in instances:
                    shared = min(found.end_s[n], truth.end_s[m]) - max(
                        found.start_s[n], truth.start_s[m]
                    )
                    shared = max(0.0, shared)
                    union = found.end_s[n] - found.start_s[n] + truth.end_s[m] - truth.start_s[m]
                    if m not in taken and shared / (union - shared) >= best_tiou:
                        best, best_tiou = m, shared / (union - shared)
                if best is not None:
                    taken.add(best)
                hits.append(best is not None)
            precision = [sum(hits[: k + 1]) / (k + 1) for k in range(len(hits))]
            total += sum(
                max(precision[k:]) / max(1, len(instances)) for k, hit in enumerate(hits) if hit
            )
    return total / (7 * classes)


if __name__ == "__main__":
    main()
