"""`hrpro events`: what is in the event log of an engine, whether it runs or not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hrpro.clients.cli_shared import aligned


def events(
    state: Annotated[Path, typer.Option(help="State folder of the engine.")],
    since: Annotated[int, typer.Option(help="Those with larger numbers.", min=0)] = 0,
    stream: Annotated[str | None, typer.Option(help="Only this stream.")] = None,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print JSON lines.")] = False,
) -> None:
    """Print the publications in an event log, the oldest first; the engine may be running."""
    from hrpro.clients.watching import LOG_COLUMNS, log_row, to_json
    from hrpro.engine.event_reader import reading
    from hrpro.engine.protocol import decode_logged

    with reading(state) as log:
        newest, gone = log.newest, log.oldest - 1 - since
        if gone > 0:
            said = f"hrpro: {gone} of the numbers asked for are no longer in the log"
            print(said, file=sys.stderr)
        has_heading = False
        while since < newest:  # what comes meanwhile is not waited for
            page, since = log.read(since, stream)
            logged = [(each.logged_s, decode_logged(each.header)) for each in page]
            if jsonl:
                for _, publication in logged:
                    print(to_json(publication))
            elif logged:
                # Lines, which a terminal may wrap and nobody cuts.
                lines = aligned([LOG_COLUMNS, *(log_row(*each) for each in logged)])
                print("\n".join(lines[has_heading:]))
                has_heading = True
