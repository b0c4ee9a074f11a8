"""The commands that train, evaluate and export; `hrpro.clients.cli` registers them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from hrpro.clients.cli_shared import Assignments, ConfigFile, DataFolder, JsonFlag, console, say


def train(
    data: Annotated[Path, typer.Argument(help="Data folder: features and point labels.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    config: ConfigFile = None,
    set_: Assignments = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=N.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run in --out was stopped.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train both stages from point labels."""
    from hrpro.engine.settings import load_settings
    from hrpro.training.checkpoint import TrainingStopped
    from hrpro.training.config import TrainingConfig
    from hrpro.training.run import check_unused
    from hrpro.training.session import train_run

    if not resume:
        check_unused(out)
    assignments = [*(set_ or []), *([f"seed={seed}"] if seed is not None else [])]
    settings = load_settings(TrainingConfig, config, assignments)
    try:
        summary = train_run(data, out, settings, console(as_json), resume)
    except TrainingStopped as stopped:
        print(f"hrpro: {stopped}", file=sys.stderr)
        raise typer.Exit(128 + stopped.number) from None
    if not summary:  # not the first of several processes
        return
    if as_json:
        print(json.dumps(summary))
    else:
        say(f"next: hrpro evaluate {out} --data {data}")


def evaluate(
    data: DataFolder,
    run: Annotated[Path | None, typer.Argument(help="Folder of a finished run.")] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Evaluate this file, in ActivityNet's format, in place of a run."),
    ] = None,
    write_predictions: Annotated[
        Path | None, typer.Option(help="Write what the run predicts to this file.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Data set of --predictions: thumos14, gtea, ...")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Mean average precision on the test split, whole recordings at once."""
    from hrpro.engine.settings import load_settings
    from hrpro.training.data_config import DataConfig
    from hrpro.training.session import evaluate_predictions, evaluate_run
    from hrpro.training.simulate import SIMULATED_NOTE, is_simulated

    if run is not None and predictions is None and preset is None:
        figures = evaluate_run(run, data, write_predictions)
    elif run is None and predictions is not None and write_predictions is None:
        config = load_settings(DataConfig, None, [f"preset={preset}"] if preset else [])
        figures = evaluate_predictions(predictions, data, config)
    else:
        raise typer.BadParameter(
            "expected a run, with or without --write-predictions, or --predictions, with or "
            "without --preset"
        )
    if as_json:
        print(json.dumps(figures))
        return
    from rich.table import Table

    table = Table(
        "", *figures["map"], "average", title=f"mAP at tIoU, {run or predictions}, {data}"
    )
    row = (f"{value:.3f}" for value in figures["map"].values())
    table.add_row("both stages" if run else "", *row, f"{figures['average_map']:.3f}")
    if figures["stage1_average_map"] is not None:
        table.add_row(
            "stage 1", *("" for _ in figures["map"]), f"{figures['stage1_average_map']:.3f}"
        )
    console().print(table)
    if is_simulated(data):
        say(SIMULATED_NOTE)
    if run is not None:
        say(f"next: hrpro export {run} --out bundle")


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the bundle.")],
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8, of the snippet graph.")] = (
        "fp32"
    ),
    data: Annotated[
        Path | None,
        typer.Option(help="Data folder on whose test split fp16 and int8 are held against fp32."),
    ] = None,
    gate: Annotated[
        float, typer.Option(help="Average mAP that fp16 or int8 may cost.", min=0)
    ] = 0.01,
    force: Annotated[
        bool, typer.Option("--force", help="Write fp16 or int8 whatever it costs.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write the deployment bundle: the ONNX graphs and what the engine needs to know."""
    from hrpro.export.bundle import PRECISIONS
    from hrpro.export.export import Comparison, export_bundle
    from hrpro.training.run import read_figures, read_run
    from hrpro.training.session import read_evaluation_data

    if precision not in PRECISIONS:
        raise typer.BadParameter(f"expected {', '.join(PRECISIONS)}, got {precision!r}")
    if precision != "fp32" and data is None and not force:
        raise typer.BadParameter(
            f"{precision}: expected --data to hold it against fp32, or --force to do without"
        )
    description, model = read_run(run)
    comparison = None
    if data is not None and precision != "fp32":
        comparison = Comparison(*read_evaluation_data(data, description), gate, force)
    bundle = export_bundle(description, model, read_figures(run), out, precision, comparison)
    manifest = bundle.manifest
    if as_json:
        said = manifest.model_dump(mode="json", include={"bundle_id", "verified", "compared"})
        print(json.dumps(said))
        return
    for name, value in manifest.compared.items():
        say(f"{precision}, {name.replace('_', ' ')}: {value:.4f}")
    size_mb = sum((out / name).stat().st_size for name in manifest.files) / 1e6
    say(f"bundle {manifest.bundle_id} in {out}, {size_mb:.1f} MB")
    say(f"a window of {manifest.window_length} snippets is {manifest.window_flops / 1e9:.3g} GFLOP")
    say("ONNX Runtime differs from torch by")
    for name, difference in manifest.verified.items():
        say(f"  {name:<13}{difference:.1e}")
    if not manifest.figures:
        say("no figures in the bundle: hrpro evaluate measures them")
    say(
        f"next: hrpro serve {out} --feed tcp://127.0.0.1:5555 "
        "--events tcp://127.0.0.1:5556 --control tcp://127.0.0.1:5557 --state state"
    )


def show_config(
    what: Annotated[str, typer.Argument(help="train or engine.")],
    explained: Annotated[
        bool, typer.Option("--explain", help="Print a YAML file with all of them, for --config.")
    ] = False,
) -> None:
    """List the settings of a command, with their defaults and what they mean."""
    from rich.markup import escape
    from rich.table import Table

    from hrpro.engine.config import EngineConfig
    from hrpro.engine.serve import BROUGHT_BY_BUNDLE
    from hrpro.engine.settings import Settings, describe, explain
    from hrpro.training.config import TrainingConfig

    models: dict[str, type[Settings]] = {"train": TrainingConfig, "engine": EngineConfig}
    if what not in models:
        raise typer.BadParameter(f"expected {' or '.join(models)}, got {what!r}", param_hint="WHAT")
    if explained:
        print(_headings[what])
        print(explain(models[what], BROUGHT_BY_BUNDLE if what == "engine" else ()), end="")
        return
    table = Table("setting", "type", "default", "meaning")
    for row in describe(models[what]):
        table.add_row(escape(row.path), escape(row.type), escape(str(row.default)), row.description)
    console().print(table)


_headings = {
    "train": "# Settings of hrpro train, with their defaults: hrpro train --config FILE ...",
    "engine": "# Settings of hrpro serve, with their defaults: hrpro serve --config FILE ...\n"
    "# A --set name=value wins over this file; hrpro serve --check says what follows from both.",
}
