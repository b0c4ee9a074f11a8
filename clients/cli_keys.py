"""`hrpro keys`: who may connect to an engine that has keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hrpro.clients.cli_shared import JsonFlag, say
from hrpro.engine.client_key import Role

keys_app = typer.Typer(no_args_is_help=True, help="Keys of an engine and its clients.")

Keys = Annotated[Path, typer.Option("--keys", help="Folder of the engine's keys.", file_okay=False)]


@keys_app.command()
def new(
    name: Annotated[str, typer.Argument(help="Of the key, in lists and in the engine's log.")],
    role: Annotated[
        Role, typer.Option(help="Feed streams, see them, or control the engine and see all.")
    ],
    keys: Keys,
    streams: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="A stream id, or the beginning of ids and *; may be given several times.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the client (default: NAME.key in this folder).", dir_okay=False
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a key; the first one makes the engine's own, too."""
    from hrpro.engine.keys import new_client

    out = out or Path(f"{name}.key")
    record = new_client(keys, name, role, tuple(streams or ()), out)
    if as_json:
        print(json.dumps({"name": record.name, "public": record.public, "file": str(out)}))
    else:
        say(f"{out}: for the {role}; whoever has this file has the key")


@keys_app.command("list")
def list_keys(keys: Keys, as_json: JsonFlag = False) -> None:
    """The keys of clients, a line each."""
    from hrpro.engine.keys import read_clients

    records = read_clients(keys)
    if as_json:
        print(json.dumps({"keys": [record.model_dump(mode="json") for record in records]}))
        return
    for record in records:
        say(f"{record.name}  {record.role}  {' '.join(record.streams)}  {record.public}")


@keys_app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="Of the key.")], keys: Keys, as_json: JsonFlag = False
) -> None:
    """Take a key away; an engine that runs notices within seconds."""
    from hrpro.engine.keys import revoke as revoke_key

    revoke_key(keys, name)
    if as_json:
        print(json.dumps({"revoked": name}))
    else:
        say(f"{name}: revoked")
