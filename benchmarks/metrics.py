"""What it costs an engine to be measured: the time of each note, and of one answer to Prometheus.

python benchmarks/metrics.py
"""

from __future__ import annotations

import itertools
import timeit
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from prometheus_client import generate_latest

from hrpro.engine.messages import FinalProposal
from hrpro.engine.metrics import Metrics

Floats = NDArray[np.float32]


class _Idle:
    """A backend that computes nothing."""

    def score_snippets(self, *windows: Floats) -> tuple[Floats, Floats]:
        return windows[0], windows[0]

    def score_instances(self, *proposals: Floats) -> tuple[Floats, Floats, Floats]:
        return proposals[0], proposals[0], proposals[0]


def main() -> None:
    """Print a line for each."""
    metrics, idle = Metrics(), _Idle()
    timed = metrics.timed(idle)
    features, valid = np.zeros((4, 2, 2), np.float32), np.ones((4, 2), np.bool_)
    indices = itertools.count(1)

    def arrived() -> None:
        index = next(indices)
        metrics.arrivals.came("cam", index, processed=index - 2)

    arrival = _us(arrived, 20_000)
    final = FinalProposal(
        stream="cam", session=1, sequence=0, id=0, label="a", start_s=0.0, end_s=1.0, score=0.5,
        published_index=next(indices) - 2, published_s=4.0, action_id=None, bundle_id="b",
    )  # fmt: skip
    batch = _us(lambda: timed.score_snippets(features, valid), 20_000)
    batch -= _us(lambda: idle.score_snippets(features), 20_000)
    print(f"a chunk    {arrival:.1f} us")
    print(f"a batch    {batch:.1f} us")
    print(f"a message  {_us(lambda: metrics.published(final), 20_000):.1f} us")
    print(f"an answer  {_us(lambda: generate_latest(metrics.registry), 20):.0f} us")


def _us(call: Callable[[], object], count: int) -> float:
    """The best of five."""
    return min(timeit.repeat(call, number=count, repeat=5)) / count * 1e6


if __name__ == "__main__":
    main()
