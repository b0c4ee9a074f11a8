"""`hrpro stream-eval`: how good a bundle is when recordings come live."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hrpro.clients.cli_shared import (
    Assignments,
    ConfigFile,
    DataFolder,
    JsonFlag,
    console,
    progress,
)


def stream_eval(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    data: DataFolder,
    config: ConfigFile = None,
    set_: Assignments = None,
    curve: Annotated[
        bool,
        typer.Option("--curve", help="Against look-ahead and hop, in this process, with the cost."),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture of the curve (.png, .svg, .pdf).")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Streaming accuracy: a real engine on loopback, fed the test split, beside offline."""
    from hrpro.clients import stream_eval as streaming
    from hrpro.clients.engine_process import running_engine
    from hrpro.clients.feeding import Source
    from hrpro.engine.serve import load_engine_config
    from hrpro.export.bundle import read_bundle

    if plot is not None and not curve:
        raise typer.BadParameter("expected --curve with it", param_hint="--plot")
    loaded = read_bundle(bundle)
    settings = load_engine_config(loaded, config, set_ or [])
    recordings, truth = streaming.read_evaluation_data(data, loaded)
    if curve:
        from hrpro.clients import curve as curves

        with progress(curves.count_points(settings), "points") as advance:
            measured = curves.measure_curve(loaded, settings, recordings, truth, advance)
        if plot is not None:
            from hrpro.clients.curve_plot import plot_curve

            plot_curve(measured, plot)
        if as_json:
            print(json.dumps(measured.figures()))
        else:
            console().print(curves.curve_table(measured))
        return
    sources = [Source(each.name, each.features) for each in recordings.recordings]
    with running_engine(bundle, settings) as addresses:
        run = streaming.stream_recordings(addresses, sources, loaded.manifest.clock)
    figures = streaming.evaluate_streaming(loaded, settings, recordings, truth, run)
    if as_json:
        print(json.dumps(figures))
    else:
        console().print(streaming.figures_table(figures))
