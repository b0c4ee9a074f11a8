"""What the modules of the command line share: options that several commands take, and output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hrpro.engine.wire import HrproError

if TYPE_CHECKING:
    from rich.console import Console

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with settings.", dir_okay=False)
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one setting, such as group.name=1."),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--key",
        envvar="HRPRO_KEY",
        help="File with the key for an engine that has keys (hrpro keys new).",
        dir_okay=False,
    ),
]
DataFolder = Annotated[Path, typer.Option("--data", help="Data folder in the release's layout.")]


def say(line: str) -> None:
    """A line that may be copied: as it is, without markup and wrapping."""
    print(line, flush=True)


def console(quiet: bool = False) -> Console:
    """Where people read: stdout, or stderr when stdout is for a JSON object alone."""
    from rich.console import Console

    # Streams are named as site:key:3, which would be a picture of a key.
    return Console(stderr=quiet, highlight=False, emoji=False)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, in columns that are as wide as they must be: nothing is cut."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


@contextlib.contextmanager
def address_errors(*addresses: str) -> Iterator[None]:
    """ZeroMQ says little of an address that it cannot use."""
    import zmq

    try:
        yield
    except zmq.ZMQError as error:
        raise HrproError(f"cannot use {', '.join(addresses)}: {error}") from None


@contextlib.contextmanager
def progress(total: int | None, what: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal; yields what advances it."""
    from rich.progress import Progress

    screen = console(quiet=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def speed_factor(text: str) -> float | None:
    """A factor above 0, or None for as fast as it goes (max)."""
    if text == "max":
        return None
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise typer.BadParameter(
            f"expected a number above 0 or max, got {text!r}", param_hint="--speed"
        )
    return factor
