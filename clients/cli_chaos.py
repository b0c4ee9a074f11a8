"""`hrpro chaos`: kill, stop and cut off everything, and count what is lost."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from hrpro.clients.cli_bench import BundleFolder, prepared
from hrpro.clients.cli_shared import Assignments, JsonFlag, console, say

# What is missing is waited for until a feeder that was killed is back.
_ALWAYS = ("threads=1", "gap_wait_s=60", "idle_s=600")


def chaos(
    bundle: BundleFolder = None,
    minutes: Annotated[float, typer.Option(help="How long streams last.", min=0.05)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what happens when.", min=0)] = 0,
    streams: Annotated[int, typer.Option(help="Streams that are fed.", min=1)] = 8,
    pace: Annotated[float, typer.Option(help="Snippets a second of each stream.", min=0.1)] = 10.0,
    no_acks: Annotated[
        bool,
        typer.Option("--no-acks", help="As a control: feeders keep nothing, and losses show."),
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Keep logs and what was received here.", file_okay=False)
    ] = None,
    set_: Assignments = None,
    as_json: JsonFlag = False,
) -> None:
    """Kill engine, feeders and subscriber at random, and hold what was received against what an
    undisturbed pipeline publishes; exit code 1 if they differ.

    Processes are killed and stopped, lines are cut, slowed and silenced, chunks come twice or late.
    """
    from hrpro.clients.bench_bundle import BenchModel
    from hrpro.clients.chaos import ChaosPlan, run_chaos

    plan = ChaosPlan(minutes, seed, streams, pace, no_acks)
    model = BenchModel(8, 3, attention_past=6)
    with (
        prepared(bundle, model, [*_ALWAYS, *(set_ or [])]) as (loaded, config, recording),
        tempfile.TemporaryDirectory() as made,
        console(quiet=True).status("chaos") as status,
    ):
        place = folder or Path(made)
        place.mkdir(parents=True, exist_ok=True)
        figures = run_chaos(loaded, config, recording, plan, place, status.update)
    if as_json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            say(f"{name:<16}{value}")
    if any(figures[name] for name in ("lost", "duplicated", "unexpected", "changed")):
        raise typer.Exit(1)
