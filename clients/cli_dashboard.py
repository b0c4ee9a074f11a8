"""`hrpro dashboard`: a page that shows what an engine sees."""

from __future__ import annotations

import contextlib
import json
import signal
from pathlib import Path
from typing import Annotated

import typer

from hrpro.clients import web
from hrpro.clients.cli_shared import JsonFlag, KeyFile, address_errors, say
from hrpro.engine.wire import HrproError


def dashboard(
    events: Annotated[str, typer.Option(help="Events address of the engine.")],
    control: Annotated[str, typer.Option(help="Control address of the engine.")],
    http: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the page is; port 0 is a free one.")
    ] = "127.0.0.1:8080",
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File whose first line is asked of who opens the page (or the variable "
            "HRPRO_DASHBOARD_TOKEN); needed where others can reach it.",
            dir_okay=False,
        ),
    ] = None,
    thumbnails: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A camera client that offers pictures; again for more."),
    ] = None,
    thumbnails_token_file: Annotated[
        Path | None,
        typer.Option(help="File with the token that the camera clients ask for.", dir_okay=False),
    ] = None,
    key: KeyFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Show streams, actions and the engine's health on a page, live, until SIGTERM or Ctrl-C."""
    try:
        from hrpro.clients.dashboard import door, server
        from hrpro.clients.dashboard.thumbnails import CameraClient
    except ImportError as error:
        raise HrproError(
            f"the dashboard needs the package {error.name}: pip install 'hrpro-stream[dashboard]'"
        ) from None
    token = web.read_token(token_file, "--token-file", door.TOKEN_VARIABLE)
    camera_token = web.read_token(thumbnails_token_file, "--thumbnails-token-file")
    cameras = [CameraClient(url, camera_token) for url in thumbnails or ()]

    def ready(url: str) -> None:
        say(json.dumps({"url": url, "state": "READY"}) if as_json else f"dashboard  {url}\nREADY")

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), address_errors(events, control):
        sources = server.Sources(events, control, key, cameras)
        server.serve(sources, http, token, ready)
