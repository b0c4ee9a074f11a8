"""`hrpro status`, `streams` and `drain`: how a running engine is, and its orderly end."""

from __future__ import annotations

import contextlib
import json
import signal
from typing import Annotated

import typer

from hrpro.clients.cli_shared import JsonFlag, KeyFile, address_errors, console, say
from hrpro.engine.wire import HrproError, NoReplyError

Control = Annotated[str, typer.Argument(help="Control address of the engine.")]
Patience = Annotated[float, typer.Option("--timeout", help="Seconds to wait for an answer.", min=0)]


def status(
    control: Control,
    once: Annotated[bool, typer.Option("--once", help="Print the table once and leave.")] = False,
    interval: Annotated[
        float, typer.Option(help="Seconds from one look to the next.", min=0.1)
    ] = 1.0,
    timeout: Patience = 5.0,
    key: KeyFile = None,
    as_json: JsonFlag = False,
) -> None:
    """A running engine and its streams: a live table until Ctrl-C."""
    from hrpro.clients.control import request_status
    from hrpro.clients.status_table import show_status, status_lines, status_table

    with address_errors(control):
        if as_json:
            print(json.dumps(request_status(control, timeout, key)))
        elif once:
            reply, screen = request_status(control, timeout, key), console()
            if screen.is_terminal:
                screen.print(status_table(reply))
            else:
                say("\n".join(status_lines(reply)))
        else:
            # Leave as on Ctrl-C, so that the terminal is restored.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with contextlib.suppress(KeyboardInterrupt):
                show_status(control, console(), interval, timeout, key)


def streams(
    control: Control, timeout: Patience = 5.0, key: KeyFile = None, as_json: JsonFlag = False
) -> None:
    """The streams of a running engine, a line each."""
    from hrpro.clients.control import request_status
    from hrpro.clients.status_table import stream_lines

    with address_errors(control):
        entries = request_status(control, timeout, key)["streams"]
    if as_json:
        print(json.dumps({"streams": entries}))
        return
    for line in stream_lines(entries):
        say(line)


def drain(
    control: Control,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait until everything is published.", min=0)
    ] = 60.0,
    key: KeyFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Let a running engine end all streams, publish what is left, and leave."""
    from hrpro.clients.control import request_drain, request_status

    with address_errors(control):
        # An engine that is not there is found out now, not after the whole time.
        count = len(request_status(control, key=key)["streams"])
        try:
            request_drain(control, timeout, key)
        except NoReplyError:
            left = len(request_status(control, key=key)["streams"])
            raise HrproError(
                f"engine at {control}: expected it to be drained within {timeout:g} s, {left} of "
                f"{count} streams are left; it goes on with that"
            ) from None
    if as_json:
        print(json.dumps({"drained_streams": count}))
    else:
        say(f"drained; streams that were open: {count}")
