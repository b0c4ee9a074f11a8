"""`hrpro record` and `hrpro replay`: a session in a file, and once more."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hrpro.clients import cli_bundle
from hrpro.clients.cli_shared import (
    Assignments,
    ConfigFile,
    JsonFlag,
    KeyFile,
    address_errors,
    progress,
    say,
    speed_factor,
)

if TYPE_CHECKING:
    from hrpro.clients.recording import Recording, RecordingWriter
    from hrpro.clients.relay import AcceptanceLog, FeedRelay
    from hrpro.clients.subscriber import EventSubscriber

_TURN_MS = 50
# How long the last publications may take at the end.
_LAST_S = 0.5
_LEAVE_S = 5.0


def record(
    file: Annotated[Path, typer.Argument(help="The recording, a new file.")],
    from_: Annotated[str, typer.Option("--from", help="Feed address of the engine.")],
    events: Annotated[str, typer.Option(help="Events address of the engine.")],
    feed: Annotated[str, typer.Option(help="Address for feeders in place of the engine's.")],
    key: KeyFile = None,
    events_key: Annotated[
        Path | None,
        typer.Option(help="File with the key of a subscriber or operator.", dir_okay=False),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Stand between feeders and an engine, and keep what it accepts and publishes until SIGTERM.

    With keys, --key is a producer's.
    """
    from hrpro.clients.recording import RecordingWriter
    from hrpro.clients.relay import AcceptanceLog, FeedRelay
    from hrpro.clients.subscriber import EventSubscriber

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with address_errors(from_, events, feed), EventSubscriber(events, key=events_key) as subscriber:
        subscriber.wait_connected()  # nothing is published of what is fed before
        writer = RecordingWriter(file)
        log = AcceptanceLog(writer)
        try:
            relay = FeedRelay(feed, from_, log, key)
        except BaseException:
            writer.discard()
            raise
        with contextlib.closing(writer), contextlib.closing(relay):
            if as_json:
                say(json.dumps({"feed": relay.address, "file": str(file), "state": "READY"}))
            else:
                say(f"feed     {relay.address}\nREADY")
            _keep(stop, relay, log, writer, subscriber)


def _keep(
    stop: threading.Event,
    relay: FeedRelay,
    log: AcceptanceLog,
    writer: RecordingWriter,
    subscriber: EventSubscriber,
) -> None:
    while not stop.is_set():
        relay.turn(_TURN_MS)
        _take(writer, log, subscriber, 0.0)
        writer.commit()
    leave_at_s = time.monotonic() + _LEAVE_S
    while _take(writer, log, subscriber, _LAST_S) and time.monotonic() < leave_at_s:
        writer.commit()


def _take(
    writer: RecordingWriter, log: AcceptanceLog, subscriber: EventSubscriber, wait_s: float
) -> int:
    """Add what was published; returns how much. What was open before is not of this session."""
    count = 0
    while count < 1000 and (publication := subscriber.receive(wait_s)) is not None:
        if not subscriber.is_snapshot:
            writer.add_publication(log.now_s, publication)
        count += 1
    return count


def replay(
    file: Annotated[Path, typer.Argument(help="The recording.")],
    to: Annotated[str | None, typer.Option("--to", help="Feed address of an engine.")] = None,
    speed: Annotated[str, typer.Option(help="Times the recorded pace, or max.")] = "1",
    stream: Annotated[str | None, typer.Option(help="Only this stream.")] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Without an engine: this bundle, in this process, as fast as it goes."),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="With --bundle: print what differs from the recording; 1 if any does."
        ),
    ] = False,
    config: ConfigFile = None,
    set_: Assignments = None,
    key: KeyFile = None,
) -> None:
    """Play a recording: into an engine, or through a bundle, whose publications are printed as JSON
    lines."""
    from hrpro.clients.recording import Recording, RecordingError

    if (to is None) == (bundle is None):
        raise typer.BadParameter("expected either --to or --bundle")
    if compare and bundle is None:
        raise typer.BadParameter("expected --bundle with it", param_hint="--compare")
    factor = speed_factor(speed)
    recording = Recording(file)
    try:
        if stream is not None and all(
            take.hello.stream != stream for take in recording.takes.values()
        ):
            raise RecordingError(f"{file}: expected the stream {stream!r}, it is not recorded")
        if bundle is not None:
            differs = _run(recording, bundle, config, set_ or [], stream, compare)
            raise typer.Exit(int(differs))
        assert to is not None
        from hrpro.clients.replaying import feed_recording

        with address_errors(to), progress(None, "snippets") as advance:
            snippets = feed_recording(recording, to, factor, stream, key=key, progress=advance)
        say(f"{snippets} snippets")
    finally:
        recording.close()


def _run(
    recording: Recording,
    folder: Path,
    config: Path | None,
    assignments: list[str],
    stream: str | None,
    compare: bool,
) -> bool:
    """Print the publications, or what differs; returns whether something does."""
    from hrpro.clients.replaying import differences, run_recording
    from hrpro.clients.watching import to_json
    from hrpro.engine.serve import load_engine_config, new_deployment

    loaded = cli_bundle.read_checked(folder, None)
    settings = load_engine_config(loaded, config, assignments)
    replayed = run_recording(recording, new_deployment(loaded, settings), stream)
    if not compare:
        for publication in replayed:
            print(to_json(publication))
        return False
    recorded, ended = recording.published(stream), recording.ended_streams()
    lines = differences(recorded, replayed, ended)
    for line in lines:
        print(line)
    said = f"{len(recorded)} recorded publications, {len(lines)} lines of differences"
    print(f"hrpro: {said}", file=sys.stderr)
    return bool(lines)
