"""Timelines of recordings: truth, class activation, proposals and events above each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files; no screen is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from hrpro.engine.timebase import SnippetClock
from hrpro.training.metrics import Segments


@dataclass(frozen=True)
class Timeline:
    """What is drawn of one recording; segments are in seconds, ``cas`` is S (T, C)."""

    name: str
    truth: Segments
    cas: NDArray[np.float32]
    attention: NDArray[np.float32]
    proposals: Segments
    events: Segments


def plot_timeline(
    timeline: Timeline, classes: Sequence[str], clock: SnippetClock, path: Path
) -> None:
    """Write a PNG of one recording."""
    colours = plt.get_cmap("tab20")(np.arange(len(classes)) % 20)
    figure, axes = plt.subplots(
        4, 1, figsize=(13, 7.5), sharex=True, height_ratios=[1, 2, 2, 1], layout="constrained"
    )
    _draw_bars(axes[0], timeline.truth, classes, colours)
    axes[0].set_ylabel("truth")
    centres_s = [clock.seconds(index + 0.5) for index in range(len(timeline.cas))]
    for index, label in enumerate(classes):
        axes[1].plot(centres_s, timeline.cas[:, index], color=colours[index], label=label)
    axes[1].plot(centres_s, timeline.attention, color="0.4", linestyle=":", label="attention A")
    axes[1].set_ylabel("activation S")
    axes[1].set_ylim(-0.03, 1.03)
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _draw_proposals(axes[2], timeline.proposals, colours)
    _draw_bars(axes[3], timeline.events, classes, colours)
    axes[3].set_ylabel("events")
    axes[3].set_xlabel("seconds")
    axes[3].set_xlim(0, clock.seconds(len(timeline.cas)))
    figure.suptitle(f"{timeline.name}: truth, scores, final proposals and action events")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_bars(
    axes: Axes,
    segments: Segments,
    classes: Sequence[str],
    colours: NDArray[np.float64],
) -> None:
    """Segments as labelled bars; the rows of overlapping ones alternate."""
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
        axes.text(
            (start_s + end_s) / 2,
            -row,
            classes[index],
            ha="center",
            va="center",
            fontsize=7,
            clip_on=True,
        )
    axes.set_yticks([])


def _draw_proposals(axes: Axes, proposals: Segments, colours: NDArray[np.float64]) -> None:
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
    axes.set_ylabel("proposal score")
    axes.set_ylim(-0.03, 1.03)
