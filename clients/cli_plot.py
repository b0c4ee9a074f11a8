"""`hrpro plot`: pictures of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hrpro.clients.cli_shared import DataFolder, JsonFlag, say


def plot(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    data: DataFolder,
    out: Annotated[Path, typer.Option("--out", help="Folder of the pictures.")],
    recordings: Annotated[
        int, typer.Option(help="Timelines of so many test recordings.", min=0)
    ] = 3,
    recording: Annotated[
        list[str] | None, typer.Option(help="Timeline of this recording, of either split.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Timelines, reliability before and after stage 2, embedding map, learning curves."""
    from hrpro.training.figures import plot_run

    paths = plot_run(run, data, out, recordings, recording or [])
    if as_json:
        print(json.dumps({"pictures": [str(path) for path in paths]}))
        return
    for path in paths:
        say(str(path))
