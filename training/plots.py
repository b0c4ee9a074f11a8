"""Timelines of recordings: truth, points, class activation, proposals and events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files; no screen is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from numpy.typing import NDArray

from hrpro.engine.timebase import SnippetClock
from hrpro.training.metrics import Segments

matplotlib.rcParams["text.parse_math"] = False  # a "$" in a name is no formula's

_LEGEND_CLASSES = 20
_LABEL_POINTS = 7
_CHARACTER_POINTS = 4.6  # how wide a character of that size is


@dataclass(frozen=True)
class Timeline:
    """What is drawn of one recording; segments are in seconds, ``cas`` is S (T, C), ``attention``
    A (T,). What is None has no place in the picture."""

    name: str
    truth: Segments
    cas: NDArray[np.float32]
    attention: NDArray[np.float32]
    proposals: Segments
    before: Segments | None = None  # proposals of stage 1 alone
    events: Segments | None = None
    points: Segments | None = None  # from start to end of their snippets


def plot_timeline(
    timeline: Timeline, classes: Sequence[str], clock: SnippetClock, path: Path
) -> None:
    """Write a PNG of one recording (like the paper's Figure 4)."""
    colours = class_colours(len(classes))
    length_s = clock.seconds(len(timeline.cas))
    heights = [1, 2, *([2] if timeline.before else []), 2, *([1] if timeline.events else [])]
    figure, axes = plt.subplots(
        len(heights),
        1,
        # A second should not get narrower than half a millimetre; what is longer gets wider.
        figsize=(min(max(13.0, length_s / 50), 60.0), 1.25 * sum(heights)),
        sharex=True,
        height_ratios=heights,
        layout="constrained",
    )
    rows = iter(axes)
    _draw_truth(next(rows), timeline, classes, colours, length_s)
    _draw_activation(next(rows), timeline, classes, clock, colours)
    if timeline.before:
        _draw_proposals(next(rows), timeline.before, colours, "stage 1 alone")
    _draw_proposals(next(rows), timeline.proposals, colours, "final proposals")
    if timeline.events:
        last = next(rows)
        _draw_bars(last, timeline.events, classes, colours, length_s)
        last.set_ylabel("events")
    axes[-1].set_xlabel("seconds")
    axes[-1].set_xlim(0, length_s)
    figure.suptitle(timeline.name)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def class_colours(count: int) -> NDArray[np.float64]:
    """A colour (4,) for each class, told apart as well as so many can be."""
    if count <= 10:
        return np.asarray(plt.get_cmap("tab10")(np.arange(count)))
    if count <= 20:
        colours = np.asarray(plt.get_cmap("tab20")(np.arange(count)))
        colours[15:16] = to_rgba("#ffd92f")  # its light grey is that of background
        return colours
    return np.asarray(plt.get_cmap("turbo")(np.arange(count) / (count - 1)))


def _draw_truth(
    axes: Axes,
    timeline: Timeline,
    classes: Sequence[str],
    colours: NDArray[np.float64],
    length_s: float,
) -> None:
    _draw_bars(axes, timeline.truth, classes, colours, length_s)
    axes.set_ylabel("truth")
    if timeline.points is not None:
        middle_s = (timeline.points.start_s + timeline.points.end_s) / 2
        axes.scatter(
            middle_s,
            np.full(len(middle_s), 0.62),
            marker="v",
            s=36,
            c=colours[timeline.points.label_index],
            edgecolors="black",
            linewidths=0.5,
        )
        axes.set_ylabel("truth, points")


def _draw_activation(
    axes: Axes,
    timeline: Timeline,
    classes: Sequence[str],
    clock: SnippetClock,
    colours: NDArray[np.float64],
) -> None:
    """S of the classes that are there or seem to be, and A."""
    centres_s = [clock.seconds(index + 0.5) for index in range(len(timeline.cas))]
    lines, names = [], []
    for index in shown_classes(timeline):
        lines += axes.plot(centres_s, timeline.cas[:, index], color=colours[index])
        names.append(classes[index])
    lines += axes.plot(centres_s, timeline.attention, color="0.4", linestyle=":")
    names.append("attention A")
    axes.set_ylabel("activation S")
    axes.set_ylim(-0.03, 1.03)
    figure = axes.get_figure(root=True)
    assert figure is not None
    # Of the figure: one of the axes would push those below away, where classes are many.
    # By hand: left to itself a legend leaves names out that begin with "_".
    figure.legend(lines, names, loc="outside right upper", frameon=False, fontsize=8)


def shown_classes(timeline: Timeline) -> list[int]:
    """The classes that are there, and those that seem to be, the surest first to fill the legend;
    in their order."""
    there = set(timeline.truth.label_index.tolist())
    peak = timeline.cas.max(axis=0, initial=0)  # (C,)
    others = [c for c in np.argsort(-peak, kind="stable").tolist() if peak[c] > 0.5]
    room = max(0, _LEGEND_CLASSES - len(there))
    return sorted(there | set([c for c in others if c not in there][:room]))


def _draw_bars(
    axes: Axes,
    segments: Segments,
    classes: Sequence[str],
    colours: NDArray[np.float64],
    length_s: float,
) -> None:
    """Segments as bars, labelled where there is room; the rows of overlapping ones alternate."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    points_per_s = 72 * 0.8 * figure.get_figwidth() / length_s  # 72 points to the inch
    free_from_s: list[float] = []
    for n in np.argsort(segments.start_s, kind="stable"):
        start_s, end_s = float(segments.start_s[n]), float(segments.end_s[n])
        rows = [row for row, free_s in enumerate(free_from_s) if free_s <= start_s + 1e-6]
        row = rows[0] if rows else len(free_from_s)
        if row == len(free_from_s):
            free_from_s.append(0.0)
        free_from_s[row] = end_s
        index = int(segments.label_index[n])
        axes.barh(-row, end_s - start_s, left=start_s, height=0.8, color=colours[index])
        if (end_s - start_s) * points_per_s < _CHARACTER_POINTS * len(classes[index]):
            continue
        axes.text(
            (start_s + end_s) / 2,
            -row,
            classes[index],
            ha="center",
            va="center",
            fontsize=_LABEL_POINTS,
            clip_on=True,
        )
    axes.set_yticks([])


def _draw_proposals(
    axes: Axes, proposals: Segments, colours: NDArray[np.float64], title: str
) -> None:
    """Proposals at the height of their score; weak ones are pale."""
    for n in np.argsort(proposals.score, kind="stable"):
        score = float(np.clip(proposals.score[n], 0.05, 1))
        axes.hlines(
            proposals.score[n],
            proposals.start_s[n],
            proposals.end_s[n],
            color=colours[int(proposals.label_index[n])],
            linewidth=4,
            alpha=score,
        )
    axes.set_ylabel(f"score\n{title}")
    axes.set_ylim(-0.03, 1.03)
