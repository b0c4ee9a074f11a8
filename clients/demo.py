"""The demo: the whole path on the example recordings, in a few minutes on a laptop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hrpro.clients import stream_eval
from hrpro.clients.engine_process import running_engine
from hrpro.clients.feeding import Source
from hrpro.engine.protocol import ActionEvent, Publication
from hrpro.engine.serve import load_engine_config
from hrpro.engine.soft_nms import temporal_iou
from hrpro.export.export import export_bundle
from hrpro.training.config import TrainingConfig
from hrpro.training.example import write_example_dataset
from hrpro.training.metrics import Segments
from hrpro.training.plots import Timeline, plot_timeline
from hrpro.training.run import read_figures, read_run
from hrpro.training.session import evaluate_run, train_run
from hrpro.training.snippet_stage import snippet_scores


def run_demo(out: Path, speed: float | None, console: Console) -> dict[str, object]:
    """Train, export, stream, compare; returns what `hrpro stream-eval --json` would print."""
    data_folder, run, bundle_folder = out / "data", out / "run", out / "bundle"
    console.rule("1. train on four recordings, from one point label an action")
    write_example_dataset(data_folder)
    config = TrainingConfig.model_validate({"data": {"preset": "mocap6"}})
    train_run(data_folder, run, config, console)
    console.rule("2. export")
    evaluate_run(run, data_folder)
    description, model = read_run(run)
    bundle = export_bundle(description, model, read_figures(run), bundle_folder)
    console.print(
        f"bundle {bundle.manifest.bundle_id} in {bundle_folder}", markup=False, soft_wrap=True
    )

    console.rule("3. stream the two held-out recordings through an engine of its own process")
    settings = load_engine_config(bundle)
    data, truth = stream_eval.read_evaluation_data(data_folder, bundle)
    sources = [Source(each.name, each.features) for each in data.recordings]
    with running_engine(bundle_folder, settings) as addresses:
        streamed = stream_eval.stream_recordings(
            addresses,
            sources,
            bundle.manifest.clock,
            speed,
            lambda publication: _say(console, publication),
        )
    console.rule("4. what came of it")
    classes = bundle.manifest.classes
    figures = stream_eval.evaluate_streaming(bundle, settings, data, truth, streamed)
    for recording in data.recordings:
        name = recording.name
        events = stream_eval.published_segments(streamed.events(name), classes)
        console.print(_comparison(name, truth.segments[name], events, classes))
        output = snippet_scores(model.snippet, recording.features)
        timeline = Timeline(
            name,
            truth.segments[name],
            output.cas,
            output.attention,
            stream_eval.published_segments(streamed.finals(name), classes),
            events=events,
        )
        picture = out / f"timeline_{name}.png"
        plot_timeline(timeline, classes, bundle.manifest.clock, picture)
        console.print(f"picture: {picture}", markup=False, soft_wrap=True)
    console.print(stream_eval.figures_table(figures))
    return figures


def _say(console: Console, publication: Publication) -> None:
    """An action as it starts or ends; what grows in between would fill the screen."""
    if not isinstance(publication, ActionEvent) or publication.kind == "update":
        return
    borders = f"{publication.start_s:5.1f} s -"
    if publication.end_s is not None:
        borders += f" {publication.end_s:5.1f} s, score {publication.score:.2f}"
    colour = {"start": "green", "end": "cyan"}.get(publication.kind, "red")
    console.print(
        f"[dim]{publication.published_s:6.2f} s[/dim]  {escape(publication.stream)}  "
        f"[{colour}]{publication.kind:<7}[/{colour}] {escape(publication.label):<12} {borders}"
    )


def _comparison(name: str, truth: Segments, events: Segments, classes: Sequence[str]) -> Table:
    """Each true action beside the event of its class that overlaps it most, then what is left."""
    table = Table("truth", "from", "to", "event", "from", "to", "score", "tIoU", title=name)
    left = set(range(len(events)))
    for n in np.argsort(truth.start_s):
        tiou = np.where(
            (events.label_index == truth.label_index[n]) & np.isin(range(len(events)), list(left)),
            temporal_iou(truth.start_s[n], truth.end_s[n], events.start_s, events.end_s),
            0.0,
        )
        row = [
            escape(classes[truth.label_index[n]]),
            f"{truth.start_s[n]:.1f}",
            f"{truth.end_s[n]:.1f}",
        ]
        if len(tiou) and tiou.max() > 0:
            best = int(tiou.argmax())
            left.discard(best)
            table.add_row(*row, *_event_cells(events, best, classes), f"{tiou[best]:.2f}")
        else:
            table.add_row(*row, "[red]missed[/red]")
    for n in sorted(left, key=lambda each: float(events.start_s[each])):
        table.add_row("[red]none[/red]", "", "", *_event_cells(events, n, classes), "")
    return table


def _event_cells(events: Segments, n: int, classes: Sequence[str]) -> list[str]:
    return [
        escape(classes[events.label_index[n]]),
        f"{events.start_s[n]:.1f}",
        f"{events.end_s[n]:.1f}",
        f"{events.score[n]:.2f}",
    ]
