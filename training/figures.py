"""Pictures of a run: timelines, reliability, embedding, learning curves (`hrpro plot`)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.manifold import TSNE

from hrpro.engine.soft_nms import temporal_iou
from hrpro.engine.wire import HrproError
from hrpro.training.annotations import read_truth
from hrpro.training.data import DataSet, Recording, read_training_split
from hrpro.training.files import json_rows
from hrpro.training.localize import all_proposals, localize_recording
from hrpro.training.metrics import Segments
from hrpro.training.plots import Timeline, class_colours, plot_timeline
from hrpro.training.recorder import METRICS, STAGE_TITLES
from hrpro.training.run import RunDescription, read_run
from hrpro.training.session import read_test_data
from hrpro.training.snippet_stage import SnippetScores, snippet_scores
from hrpro.training.train import TrainedModel

_EMBEDDED_SNIPPETS = 2000  # what t-SNE maps in seconds
_BINS = 10
_DOTS = 500  # proposals that overlap little


@dataclass(frozen=True)
class Looked:
    """One recording seen by both stages.

    ``scored`` are all proposals before soft-NMS, before and after stage 2; ``embedding`` (N, W)
    that of the snippets to be drawn, and ``label`` (N,) their classes, -1 on background.
    """

    truth: Segments
    scored: tuple[Segments, Segments]
    embedding: NDArray[np.float32]
    label: NDArray[np.int64]


def plot_run(
    run: Path, folder: Path, out: Path, recordings: int, named: Sequence[str]
) -> list[Path]:
    """Write the pictures of a run on a data folder; returns their paths.

    Timelines are those of the ``named`` recordings of either split, else of the first ones of the
    test split. Raises HrproError for a name that is in neither.
    """
    description, model = read_run(run)
    curves = read_curves(run)
    test = read_test_data(folder, description)
    chosen = _chosen(description, folder, test, recordings, named)
    names = dict.fromkeys(each.name for each in (*test.recordings, *chosen))
    segments = read_truth(folder, list(names), description.classes)
    out.mkdir(parents=True, exist_ok=True)
    paths, seen = [], []
    drawn = _drawn_snippets(test)
    for recording, snippets in zip(test.recordings, drawn, strict=True):
        output = snippet_scores(model.snippet, recording.features)
        seen.append(look_at(output, segments[recording.name], snippets, description, model))
    for recording in chosen:
        path = out / f"timeline_{recording.name}.png"
        shown = timeline(recording, segments[recording.name], description, model)
        plot_timeline(shown, description.classes, test.clock, path)
        paths.append(path)
    trust = float(model.instance.trust)
    paths.append(_plot_reliability(seen, trust, out / "reliability.png"))
    paths.append(_plot_embedding(seen, description.classes, out / "embedding.png"))
    paths.append(_plot_learning(curves, out / "learning.png"))
    return paths


def _drawn_snippets(data: DataSet) -> list[NDArray[np.int64]]:
    """Which snippets of each recording are drawn in the map of the embedding."""
    ends = np.cumsum([len(recording) for recording in data.recordings])
    chosen = np.random.default_rng(0).permutation(int(ends[-1]))[:_EMBEDDED_SNIPPETS]
    owner = np.searchsorted(ends, chosen, side="right")
    return [
        np.sort(chosen[owner == n]) - end + len(recording)
        for n, (recording, end) in enumerate(zip(data.recordings, ends, strict=True))
    ]


def _chosen(
    description: RunDescription, folder: Path, test: DataSet, count: int, named: Sequence[str]
) -> list[Recording]:
    """The recordings whose timelines are drawn."""
    if not named:
        return list(test.recordings[:count])
    training = read_training_split(folder, description.config.data)
    everything = [*test.recordings, *training.recordings]
    by_name = {recording.name: recording for recording in everything}
    for name in named:
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise HrproError(f"--recording: {name!r} is in neither split of {folder}{hint}")
    return [by_name[name] for name in named]


def look_at(
    output: SnippetScores,
    truth: Segments,
    snippets: NDArray[np.int64],
    description: RunDescription,
    model: TrainedModel,
) -> Looked:
    """Run stage 2 over a recording; ``snippets`` (N,) are to be drawn."""
    clock, config = description.config.data.clock, description.config.localization
    label = np.full(len(snippets), -1, dtype=np.int64)
    centre_s = (snippets + 0.5) * clock.snippet_s
    for n in range(len(truth)):
        label[(centre_s >= truth.start_s[n]) & (centre_s < truth.end_s[n])] = truth.label_index[n]
    before, after = (all_proposals(output, config, clock, each) for each in (None, model.instance))
    return Looked(truth, (before, after), output.embedding[snippets], label)


def timeline(
    recording: Recording, truth: Segments, description: RunDescription, model: TrainedModel
) -> Timeline:
    """What is drawn of a recording: with its points, and the proposals of either stage."""
    clock, config = description.config.data.clock, description.config.localization
    output = snippet_scores(model.snippet, recording.features)
    before, after = (
        localize_recording(output, config, clock, each) for each in (None, model.instance)
    )
    index = recording.point_index
    points = Segments.from_rows(
        [
            (clock.seconds(t), clock.seconds(t + 1), label, 1.0)
            for t, label in zip(index.tolist(), recording.point_label.tolist(), strict=True)
        ]
    )
    return Timeline(
        recording.name,
        truth,
        output.cas,
        output.attention,
        after,
        before=before,
        points=points if len(points) else None,
    )


# --- reliability, Figure 5 -----------------------------------------------------------------------


def best_tiou(proposals: Segments, truth: Segments) -> NDArray[np.float64]:
    """The best tIoU of each proposal with an instance of its class, (N,); 0 where there is none."""
    tiou = temporal_iou(
        proposals.start_s[:, None],
        proposals.end_s[:, None],
        truth.start_s[None],
        truth.end_s[None],
    )
    same = proposals.label_index[:, None] == truth.label_index[None]
    return np.where(same, tiou, 0.0).max(axis=1, initial=0.0)


def rank_correlation(score: NDArray[np.float64], tiou: NDArray[np.float64]) -> float:
    """Spearman's, in [-1, 1]; 0 where one of both does not vary."""
    if len(score) < 2 or np.ptp(score) == 0 or np.ptp(tiou) == 0:
        return 0.0
    return float(spearmanr(score, tiou).statistic)


def _plot_reliability(seen: Sequence[Looked], trust: float, path: Path) -> Path:
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    titles = ("before stage 2", f"after stage 2, which has a say of {trust:.2f}")
    for after, title in enumerate(titles):
        score = np.concatenate([each.scored[after].score for each in seen])
        tiou = [best_tiou(each.scored[after], each.truth) for each in seen]
        _draw_reliability(axes[after], score, np.concatenate(tiou), title)
    axes[0].set_ylabel("best tIoU with an instance of its class")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_reliability(
    axes: Axes, score: NDArray[np.float64], tiou: NDArray[np.float64], title: str
) -> None:
    """All proposals, and the mean tIoU of those with about the same score."""
    # Thousands of dots are pale, so that it shows where they lie thick; a few can be seen.
    alpha = min(max(_DOTS / max(len(score), 1), 0.05), 0.8)
    axes.scatter(score, tiou, s=8, alpha=alpha, color="tab:blue", edgecolors="none")
    bins = np.minimum((score * _BINS).astype(int), _BINS - 1)
    filled = [n for n in range(_BINS) if (bins == n).any()]
    centre = [float(score[bins == n].mean()) for n in filled]
    axes.plot(
        centre, [float(tiou[bins == n].mean()) for n in filled], "o-", color="tab:orange",
        label="mean of a tenth of the range",
    )  # fmt: skip
    axes.set_title(f"{title}: rank correlation {rank_correlation(score, tiou):.2f}")
    axes.set_xlabel("score of the proposal")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, loc="upper left")


# --- embedding, Figure B -------------------------------------------------------------------------


def _plot_embedding(seen: Sequence[Looked], classes: Sequence[str], path: Path) -> Path:
    """The embedded snippets of the test split in the plane, by t-SNE as in the paper."""
    embedding = np.concatenate([each.embedding for each in seen])
    label = np.concatenate([each.label for each in seen])
    figure, axes = plt.subplots(figsize=(9.5, 7), layout="constrained")
    if len(label) > 3:
        perplexity = min(30.0, (len(label) - 1) / 3)
        plane = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(embedding)
        colours = class_colours(len(classes))
        dots, names = [], []
        for index in [-1, *range(len(classes))]:
            shown = label == index
            if shown.any():
                colour = "0.8" if index < 0 else colours[index]
                dots.append(axes.scatter(plane[shown, 0], plane[shown, 1], s=9, color=colour))
                names.append("background" if index < 0 else classes[index])
        axes.legend(
            dots, names, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8,
            markerscale=2,
        )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"embedding X^e of {len(label)} snippets of the test split (t-SNE)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# --- learning curves -----------------------------------------------------------------------------

Curves = dict[str, dict[str, NDArray[np.float64]]]


def read_curves(run: Path) -> Curves:
    """Values by stage and name, "step" among them, of metrics.jsonl; a torn line is left out.

    Raises HrproError where there is none, and where the lines of a stage have not the same values.
    """
    path = run / METRICS
    rows: dict[str, list[dict[str, float]]] = {}
    try:
        found = json_rows(path)
    except OSError as error:
        raise HrproError(f"{path}: cannot be read: {error.strerror}") from None
    for row in found:
        if "stage" in row and "step" in row:
            rows.setdefault(row.pop("stage"), []).append(row)
    if not rows:
        raise HrproError(f"{path}: expected the losses of a run, one line every few steps")
    try:
        return {
            stage: {name: np.array([row[name] for row in group], float) for name in group[0]}
            for stage, group in rows.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise HrproError(f"{path}: expected the same losses in all lines: {error!r}") from None


def _plot_learning(curves: Curves, path: Path) -> Path:
    figure, axes = plt.subplots(1, len(curves), figsize=(6.5 * len(curves), 4.5), squeeze=False)
    for panel, (stage, values) in zip(axes[0], curves.items(), strict=True):
        for name, series in values.items():
            if name != "step" and not name.startswith("pseudo"):
                panel.plot(values["step"], series, label=name.replace("_", " "))
        panel.set_title(STAGE_TITLES.get(stage, stage))
        panel.set_xlabel("step")
        panel.set_yscale("symlog", linthresh=1e-2)
        panel.yaxis.set_major_formatter("{x:g}")  # powers would be formulas, which are not set
        panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
