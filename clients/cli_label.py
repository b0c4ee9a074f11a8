"""`hrpro label`: point labels by watching videos in a local page."""

from __future__ import annotations

import contextlib
import signal
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hrpro.clients.cli_data import DataAssignments, PresetOption, data_config
from hrpro.clients.cli_shared import say
from hrpro.engine.wire import HrproError

if TYPE_CHECKING:
    from hrpro.clients.label.app import Labelling


def label(
    videos: Annotated[list[Path], typer.Argument(help="Videos; each is a recording of its name.")],
    data: Annotated[
        Path, typer.Option("--data", help="Data folder; the points go to its point_labels/.")
    ],
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C", help="Classes besides those of the data folder, in the order of keys."
        ),
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open", help="Open the page in this machine's browser.")
    ] = False,
    port: Annotated[
        int, typer.Option(help="Port on 127.0.0.1 (default: a free one).", min=0, max=65535)
    ] = 0,
    preset: PresetOption = None,
    set_: DataAssignments = None,
) -> None:
    """Label actions with one point each, in a local page: play, and press a class's number when it
    happens. Each key press is saved to the CSV that training reads."""
    try:
        from hrpro.clients.label.server import serve
    except ImportError as error:
        raise HrproError(
            f"labelling needs the package {error.name}: pip install 'hrpro-stream[label]'"
        ) from None

    opened: list[Labelling] = []

    def ready(url: str, labelling: Labelling) -> None:
        opened.append(labelling)
        say(f"points  {_told(labelling)}")
        say(f"page    {url}")
        if open_:
            webbrowser.open(url)

    given = [each for each in (classes or "").split(",") if each.strip()]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        serve(videos, data, data_config(preset, set_), given, port, ready)
    for labelling in opened:
        say(f"points  {_told(labelling)}")
        say(f"next    hrpro data check {data} tells what else training needs")


def _told(labelling: Labelling) -> str:
    return f"{labelling.points.path}, {labelling.points.counts().total()} so far"
