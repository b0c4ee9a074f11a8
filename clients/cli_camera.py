"""`hrpro feed camera`: cameras and videos, live, through an extractor into an engine."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hrpro.clients import web
from hrpro.clients.cli_shared import KeyFile, address_errors, console, say, speed_factor
from hrpro.engine.wire import HrproError

if TYPE_CHECKING:
    from hrpro.clients.cameras.camera import Camera, CameraStatus
    from hrpro.clients.cameras.extractor import Extractor
    from hrpro.clients.cameras.sources import Source
    from hrpro.clients.feeder import FeatureFeeder

    Report = Callable[[list[CameraStatus]], None]


def feed_camera(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="rtsp://..., http://..., /dev/videoN, a video file, - for standard input, or "
            "@FILE with one of them.",
        ),
    ],
    to: Annotated[str, typer.Option("--to", help="Feed address of the engine.")],
    extractor: Annotated[
        str, typer.Option(help="Folder of an extractor, or a built-in one's name.")
    ] = "efficientnet-lite0",
    stream: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of the stream, once for each source and in their order. "
            "Default: the file's name, or host and path."
        ),
    ] = None,
    speed: Annotated[
        str, typer.Option(help="Files: times their own pace, or max. Cameras have their pace.")
    ] = "1",
    stall: Annotated[
        float,
        typer.Option(
            help="Seconds without a frame after which a camera is connected anew.", min=0.1
        ),
    ] = 10.0,
    rtsp_transport: Annotated[
        Literal["tcp", "udp"], typer.Option(help="What RTSP cameras send their video over.")
    ] = "tcp",
    provider: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where the extractor computes.")
    ] = "auto",
    threads: Annotated[
        int, typer.Option(help="Threads of the extractor on the CPU; 0 is one a core.", min=0)
    ] = 0,
    thumbnails: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Serve small pictures of the streams, for the dashboard."
        ),
    ] = None,
    thumbnails_token_file: Annotated[
        Path | None,
        typer.Option(
            help="File whose first line is asked of who fetches them (or the variable "
            "HRPRO_THUMBNAILS_TOKEN); needed where others can reach it.",
            dir_okay=False,
        ),
    ] = None,
    key: KeyFile = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print a JSON line for each camera each second, nothing else."),
    ] = False,
) -> None:
    """Feed cameras and videos, each as a stream of its own, until they end or SIGTERM or Ctrl-C
    ends the streams."""
    try:
        from hrpro.clients.cameras import thumbnails as pictures
        from hrpro.clients.cameras.camera import Camera, feeder_of, run_cameras
        from hrpro.clients.cameras.extractor import load_extractor
    except ImportError as error:
        raise HrproError(
            f"cameras need the package {error.name}: pip install 'hrpro-stream[camera]'"
        ) from None
    factor = speed_factor(speed)
    named = _named(sources, stream or [])
    token = web.read_token(
        thumbnails_token_file, "--thumbnails-token-file", pictures.TOKEN_VARIABLE
    )
    stop, changed = threading.Event(), threading.Condition()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    loaded = load_extractor(extractor, provider, threads)
    rings = pictures.new_rings(list(named), loaded.clock) if thumbnails is not None else {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(address_errors(to))
        if thumbnails is not None:
            url = stack.enter_context(pictures.thumbnail_server(thumbnails, rings, token))
            print(f"hrpro: thumbnails at {url}", file=sys.stderr, flush=True)
        makers = {
            name: feeder_of(to, name, loaded, source.is_live, key) for name, source in named.items()
        }
        feeders = _connected(to, makers, loaded, key, stop)
        reading = partial(Camera, extractor=loaded, changed=changed, speed=factor, stall_s=stall)
        cameras = [
            reading(
                named[name],
                feeder,
                makers[name],
                rtsp_transport=rtsp_transport,
                thumbnails=rings.get(name),
            )
            for name, feeder in feeders.items()
        ]
        report = stack.enter_context(_reports(as_json))
        report(run_cameras(cameras, loaded, changed, stop, report))
    if not as_json:
        _say_what_came(cameras)
    if any(camera.has_failed for camera in cameras):
        raise typer.Exit(1)


def _named(texts: Sequence[str], names: Sequence[str]) -> dict[str, Source]:
    """The sources by the names of their streams."""
    from hrpro.clients.cameras.sources import parse_source

    if names and len(names) != len(texts):
        raise typer.BadParameter(
            f"expected one for each of {len(texts)} sources, came {len(names)}",
            param_hint="--stream",
        )
    named: dict[str, Source] = {}
    for text, name in zip_longest(texts, names):
        source = parse_source(text)
        if source.kind == "stdin" and any(each.kind == "stdin" for each in named.values()):
            raise HrproError("expected standard input (-) once among the sources")
        stream = source.stream if name is None else name
        if stream in named:
            raise HrproError(
                f"{named[stream].shown} and {source.shown} would both be the stream {stream!r}; "
                "name them with --stream, once for each source"
            )
        named[stream] = source
    return named


def _connected(
    address: str,
    makers: Mapping[str, Callable[[int], FeatureFeeder]],
    extractor: Extractor,
    key: Path | None,
    stop: threading.Event,
) -> dict[str, FeatureFeeder]:
    """A feeder for each stream that the engine has let in; none when stopped before."""
    from hrpro.clients.cameras.camera import FILES_OF_A_CAMERA, connected
    from hrpro.clients.connection import make_room

    make_room(len(makers), FILES_OF_A_CAMERA)
    has_said = threading.Event()

    def say_waiting() -> None:
        if not has_said.is_set():
            doubt = "" if key is None else "; does it know this key?"
            said = f"hrpro: no engine answers at {address} yet; waiting{doubt}"
            print(said, file=sys.stderr, flush=True)
        has_said.set()

    feeders: dict[str, FeatureFeeder] = {}
    with contextlib.ExitStack() as not_all:
        for name, new_feeder in makers.items():
            feeders[name] = not_all.enter_context(contextlib.closing(new_feeder(0)))
            if not connected(feeders[name], extractor, stop, say_waiting):
                return {}
        not_all.pop_all()
    return feeders


@contextlib.contextmanager
def _reports(as_json: bool) -> Iterator[Report]:
    """What shows how the cameras are: JSON lines, a table on a terminal, nothing elsewhere."""
    screen = console()
    if as_json:
        yield _print_json
    elif not screen.is_terminal:
        yield lambda _: None
    else:
        from rich.live import Live
        from rich.logging import RichHandler

        from hrpro.clients.cameras.table import camera_table

        # Log lines stand above the table.
        logging.basicConfig(
            level=logging.WARNING,
            format="%(message)s",
            handlers=[RichHandler(console=screen, show_path=False)],
            force=True,
        )
        with Live(console=screen, auto_refresh=False) as live:
            yield lambda cameras: live.update(camera_table(cameras), refresh=True)


def _print_json(cameras: list[CameraStatus]) -> None:
    for each in cameras:
        say(json.dumps(asdict(each)))


def _say_what_came(cameras: Sequence[Camera]) -> None:
    for camera in cameras:
        status, ended = camera.status(), camera.sender.ended
        came = f", {ended.proposals} proposals, {ended.events} events" if ended else ""
        say(
            f"{status.stream}: {status.sent} snippets, {status.skipped} skipped, "
            f"{status.missing} missing{came}"
        )
