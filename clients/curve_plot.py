"""The picture of `hrpro stream-eval --curve`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files; no screen is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hrpro.clients.curve import Curve, Point, points_by_hop

_MARKERS = "osD^vPX*"
_LOOKAHEAD = "look-ahead, s"


def plot_curve(curve: Curve, path: Path) -> None:
    """Write a picture: accuracy and delay against the look-ahead, cost against the hop."""
    by_hop = points_by_hop(curve)
    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.85, len(by_hop)))
    figure, (accuracy, delay, cost) = plt.subplots(
        1, 3, figsize=(15, 4.6), width_ratios=(1.5, 1.5, 1), layout="constrained"
    )
    finite = [
        p.lookahead_s
        for p in curve.points
        if p.lookahead_s is not None and p.average_map is not None
    ]
    endless_at = 2.0 * max(finite, default=1.0)
    for n, (hop, points) in enumerate(by_hop.items()):
        style = {"color": colours[n], "marker": _MARKERS[n % len(_MARKERS)], "markersize": 5}
        _draw_accuracy(accuracy, points, endless_at, f"hop {hop}", style)
        _draw_delay(delay, points, style)
    accuracy.axhline(
        curve.offline_average_map, color="0.5", linestyle="--", linewidth=1, label="offline"
    )
    accuracy.set_ylabel("average mAP")
    accuracy.set_title("accuracy (large mark: strict)")
    accuracy.legend(frameon=False, fontsize=9, loc="lower right")
    _lookahead_axis(accuracy, finite, endless_at)
    delay.set_ylabel("from end to publication, s")
    delay.set_title("delay of final proposals")
    delay.set_ylim(bottom=0)
    median = Line2D([], [], color="0.3", linestyle="-", label="p50")
    slowest = Line2D([], [], color="0.3", linestyle=":", label="p90")
    delay.legend(handles=[median, slowest], frameon=False, fontsize=9)
    _lookahead_axis(delay, finite, None)
    _draw_cost(cost, by_hop, colours)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_accuracy(
    axes: Axes, points: Sequence[Point], endless_at: float, label: str, style: dict[str, object]
) -> None:
    """A line over the look-ahead; the whole recording stands at the right end."""
    at = [(endless_at if p.lookahead_s is None else p.lookahead_s, p.average_map) for p in points]
    at.sort(key=lambda each: each[0])
    axes.plot(*zip(*at, strict=True), label=label, linewidth=1.4, **style)  # type: ignore[arg-type]
    strict = [p for p in points if p.lookahead == "strict"]
    axes.plot(
        [p.lookahead_s or 0.0 for p in strict],
        [p.average_map or 0.0 for p in strict],
        linestyle="none",
        **{**style, "markersize": 10},  # type: ignore[arg-type]
    )


def _draw_delay(axes: Axes, points: Sequence[Point], style: dict[str, object]) -> None:
    told = [p for p in points if p.lookahead_s is not None and p.delay_s is not None]
    told.sort(key=lambda each: each.lookahead_s or 0.0)
    lookaheads = [p.lookahead_s or 0.0 for p in told]
    for percent, line in (("p50", "-"), ("p90", ":")):
        delays = [(p.delay_s or {})[percent] for p in told]
        axes.plot(lookaheads, delays, line, linewidth=1.4, **style)  # type: ignore[arg-type]


def _lookahead_axis(axes: Axes, finite: Sequence[float], endless_at: float | None) -> None:
    axes.set_xscale("log")
    # Ticks that do not touch each other, from short to long.
    ticks: list[float] = []
    for value in sorted(finite):
        if not ticks or value > 1.25 * ticks[-1]:
            ticks.append(value)
    texts = [f"{value:.3g}" for value in ticks]
    if endless_at is not None:
        ticks, texts = [*ticks, endless_at], [*texts, "all"]
    axes.set_xticks(ticks, texts)
    axes.xaxis.minorticks_off()
    axes.set_xlabel(_LOOKAHEAD)
    axes.grid(alpha=0.25)


def _draw_cost(axes: Axes, by_hop: dict[int, Sequence[Point]], colours: np.ndarray) -> None:
    """The median over the runs of a hop, which differ in nothing that costs much."""
    for n, points in enumerate(by_hop.values()):
        costs = [p.cost for p in points if p.cost is not None]
        if not costs:
            axes.annotate("n/a", (n, 0), ha="center", va="bottom", fontsize=9)
            continue
        inference = float(np.median([each.inference_ms for each in costs]))
        total = float(np.median([each.total_ms for each in costs]))
        axes.bar(n, inference, color=colours[n])
        axes.bar(n, total - inference, bottom=inference, color=colours[n], alpha=0.35)
        axes.annotate(f"{total:.2f}", (n, total), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(by_hop)), [str(hop) for hop in by_hop])
    axes.set_xlabel("hop, snippets")
    axes.set_ylabel("ms of a snippet")
    axes.set_title("compute (dark: inference)")
    axes.margins(y=0.12)
