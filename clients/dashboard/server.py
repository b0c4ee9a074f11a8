"""The dashboard as it runs: its sockets and threads, until it is told to stop."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from hrpro.clients.connection import Key
from hrpro.clients.dashboard.app import create_app
from hrpro.clients.dashboard.board import Board
from hrpro.clients.dashboard.door import Door, parse_http_address
from hrpro.clients.dashboard.thumbnails import CameraClient, Thumbnails
from hrpro.clients.dashboard.watch import EngineWatch
from hrpro.engine.protocol import HrproError

# Pages that do not go when they are asked to.
_GOODBYE_S = 2
_LONGEST_MESSAGE_BYTES = 1024  # of a page, which says nothing


@dataclass(frozen=True)
class Sources:
    """Where the dashboard gets what it shows."""

    events: str
    control: str
    key: Key
    cameras: Sequence[CameraClient]


def serve(sources: Sources, http: str, token: str | None, ready: Callable[[str], None]) -> None:
    """Until SIGTERM or Ctrl-C; `ready` is told the page's URL. Raises HrproError."""
    host, port = parse_http_address(http)
    door = Door(host, token)
    board, thumbnails = Board(), Thumbnails(sources.cameras)
    watch = EngineWatch(board, sources.events, sources.control, sources.key)
    app = create_app(board, door, thumbnails)
    with (
        contextlib.closing(_listening(host, port)) as listener,
        watch.running(),
        thumbnails.running(),
    ):
        name = f"[{host}]" if ":" in host else host
        ready(f"http://{name}:{listener.getsockname()[1]}/")
        new_server(app).run(sockets=[listener])


def new_server(app: ASGIApp) -> uvicorn.Server:
    """It says nothing but warnings, and does not wait for pages that stay."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="wsproto",
        ws_max_size=_LONGEST_MESSAGE_BYTES,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=_GOODBYE_S,
    )
    return uvicorn.Server(config)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise HrproError(
            f"--http {host}:{port}: cannot listen there: {os.strerror(error.errno or 0)}"
        ) from None
