"""`hrpro ablate`: what each part of the method brings, as a table."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hrpro.clients.cli_shared import Assignments, ConfigFile, JsonFlag, console, say

if TYPE_CHECKING:
    from hrpro.training.ablate import Trial


def ablate(
    data: Annotated[Path, typer.Argument(help="Data folder: features and point labels.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the tables.")],
    rows: Annotated[
        str | None, typer.Option(help="Rows of the paper's Tables 3 and A, with commas between.")
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(metavar="'NAME: KEY=VALUE ...'", help="A row of settings of one's own."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of each row: 0, 1, ...", min=1)] = 1,
    held_out: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Evaluate every N-th of the training recordings, by name, not trained on, in "
            "place of the test split: for choosing settings.",
            min=2,
        ),
    ] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    as_json: JsonFlag = False,
) -> None:
    """Train with parts left out, or settings changed, and compare (paper, Tables 3 and A)."""
    from hrpro.engine.settings import load_settings
    from hrpro.training import ablate as ablation
    from hrpro.training.config import TrainingConfig
    from hrpro.training.simulate import SIMULATED_NOTE, is_simulated

    chosen = ablation.select_rows(rows.split(",") if rows else [], row or [])
    base = load_settings(TrainingConfig, config, set_ or [])
    screen = console(as_json)
    number = itertools.count(1)

    def report(trial: Trial) -> None:
        screen.print(
            f"{next(number)} of {len(chosen) * seeds}: {trial.row}, seed {trial.seed}: "
            f"{trial.average_map:.3f} in {trial.seconds:.0f} s",
            markup=False,
        )

    trials = ablation.ablate(data, out, base, chosen, seeds, held_out, report)
    if as_json:
        print(json.dumps([vars(trial) for trial in trials]))
        return
    say("")
    say(ablation.markdown_table(trials))
    if is_simulated(data):
        say(SIMULATED_NOTE)
    say(f"written: {out / ablation.MARKDOWN}, {out / ablation.CSV}")
