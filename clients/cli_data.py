"""`hrpro data`: check a data set, draw its points, simulate its features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hrpro.clients.cli_shared import JsonFlag, console, progress, say

if TYPE_CHECKING:
    from hrpro.training.data_check import Findings
    from hrpro.training.data_config import DataConfig

data_app = typer.Typer(no_args_is_help=True, help="Check, label and simulate data sets.")

PresetOption = Annotated[
    str | None, typer.Option(help="A published data set: thumos14, gtea, beoid, activitynet13, ...")
]
DataAssignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a data setting, such as frames_per_s=30."),
]


def data_config(preset: str | None, assignments: list[str] | None) -> DataConfig:
    """The data settings that the options of a command name."""
    from hrpro.engine.settings import load_settings
    from hrpro.training.data_config import DataConfig

    chosen = [f"preset={preset}"] if preset else []
    given = [each.removeprefix("data.") for each in assignments or []]
    return load_settings(DataConfig, None, [*chosen, *given])


@data_app.command()
def check(
    data: Annotated[Path, typer.Argument(help="Data folder in the release's layout.")],
    preset: PresetOption = None,
    set_: DataAssignments = None,
    as_json: JsonFlag = False,
) -> None:
    """Read all that training and evaluation would, and tell everything that is wrong."""
    from hrpro.training.data_check import check_data

    found = check_data(data, data_config(preset, set_))
    if as_json:
        print(json.dumps({"errors": found.errors, "warnings": found.warnings, **found.summary}))
    else:
        _show(found)
    if found.errors:
        raise typer.Exit(1)


def _show(found: Findings) -> None:
    from rich.markup import escape
    from rich.table import Table

    screen = console()
    table = Table("", "", show_header=False)
    for name, value in found.summary.items():
        table.add_row(name.replace("_", " "), str(value))
    screen.print(table)
    if found.classes:
        counts = Table("class", "points", "training instances", "test instances")
        for label in found.classes:
            instances = (
                str(found.instances[split][label]) if split in found.instances else ""
                for split in ("train", "test")
            )
            counts.add_row(escape(label), str(found.points[label]), *instances)
        screen.print(counts)
    for warning in found.warnings:
        say(f"warning: {warning}")
    for error in found.errors:
        say(f"error: {error}")
    say(f"{len(found.errors)} errors, {len(found.warnings)} warnings")


@data_app.command()
def points(
    data: Annotated[Path, typer.Argument(help="Data folder with full annotations.")],
    distribution: Annotated[str, typer.Option(help="uniform, centre or gaussian.")],
    seed: Annotated[int, typer.Option(help="Of the random draws.", min=0)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write (default: point_labels/point_DISTRIBUTION.csv)."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    preset: PresetOption = None,
    set_: DataAssignments = None,
) -> None:
    """Draw a point label for each annotated action of the training split."""
    from hrpro.training.drawing import DISTRIBUTIONS, write_points

    if distribution not in DISTRIBUTIONS:
        raise typer.BadParameter(
            f"expected {', '.join(DISTRIBUTIONS)}, got {distribution!r}",
            param_hint="--distribution",
        )
    path = out or data / "point_labels" / f"point_{distribution}.csv"
    count = write_points(data, path, distribution, seed, data_config(preset, set_), force)
    say(f"{count} points in {path}")
    if path.resolve().parent == (data / "point_labels").resolve():
        known = f" --set data.preset={preset}" if preset else ""
        say(f"next: hrpro train {data} --out run{known} --set data.point_labels={path.name}")
    else:
        say(f"training reads it from {data / 'point_labels'}")


@data_app.command()
def simulate(
    annotations: Annotated[
        Path, typer.Argument(help="Folder with gt_full.json, splits and point labels.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Data folder to write.")],
    dim: Annotated[int, typer.Option(help="Feature dimension D.", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="Of the random draws.", min=0)] = 0,
    preset: PresetOption = None,
    set_: DataAssignments = None,
) -> None:
    """SIMULATED features over published timelines, for work on scale and speed alone."""
    from hrpro.training.simulate import simulate_data

    config = data_config(preset, set_)
    with progress(None, "recordings") as advance:
        count = simulate_data(annotations, out, config, dim, seed, advance)
    say(f"SIMULATED features (D = {dim}) of {count} recordings in {out}; they say nothing of")
    say("the benchmark whose timelines they follow")
    option = f" --preset {preset}" if preset else ""
    say(f"next: hrpro data check {out}{option}")
