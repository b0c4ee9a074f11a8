"""`hrpro deploy`: another bundle for a running engine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hrpro.clients.cli_shared import JsonFlag, KeyFile, address_errors, say
from hrpro.engine.wire import HrproError


def deploy(
    to: Annotated[str, typer.Option("--to", help="Control address of the engine.")],
    bundle: Annotated[
        Path | None, typer.Argument(help="Folder of the bundle, as the engine's machine has it.")
    ] = None,
    canary: Annotated[
        list[str] | None,
        typer.Option(metavar="STREAM", help="Only for this stream; may be given several times."),
    ] = None,
    roll_back: Annotated[
        bool, typer.Option("--rollback", help="End the canary, or go back to the bundle before.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the engine to load the bundle.", min=0)
    ] = 60.0,
    key: KeyFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Let a running engine go on with another bundle, without an interruption."""
    from hrpro.clients.control import request_deploy, request_roll_back

    if (bundle is None) != roll_back or (roll_back and canary):
        raise HrproError("deploy: expected a bundle, with or without --canary, or --rollback alone")
    with address_errors(to):
        if bundle is None:
            reply = request_roll_back(to, timeout, key)
        else:
            reply = request_deploy(to, bundle.absolute(), canary or [], timeout, key)
    if as_json:
        print(json.dumps(asdict(reply)))
        return
    say(f"bundle    {reply.bundle_id}")
    if reply.canary_bundle_id is not None:
        say(f"canary    {reply.canary_bundle_id}")
    if reply.previous_bundle_id is not None:
        say(f"previous  {reply.previous_bundle_id}, for --rollback")
    say(f"changed   {reply.changed_streams} open streams")
