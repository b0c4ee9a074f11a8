"""`hrpro watch`: a live table, or one sink that is handed what is published."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hrpro.clients.cli_shared import KeyFile, address_errors, console
from hrpro.engine.wire import HrproError

if TYPE_CHECKING:
    from hrpro.clients.sinks import Position, PositionFile, Sink
    from hrpro.clients.subscriber import EventSubscriber


def watch(
    from_: Annotated[str, typer.Option("--from", help="Events address of the engine.")],
    stream: Annotated[str | None, typer.Option(help="Only this stream.")] = None,
    label: Annotated[str | None, typer.Option(help="Only this class.")] = None,
    min_score: Annotated[
        float | None,
        typer.Option(
            help="Only scores of at least this, 0 to 1; of an action once seen, all that follows.",
            min=0,
            max=1,
        ),
    ] = None,
    final: Annotated[
        bool, typer.Option("--final", help="Only final proposals, which are never changed.")
    ] = False,
    jsonl: Annotated[
        Path | None,
        typer.Option(help="Write JSON lines to this file (- for stdout); goes on where it ends."),
    ] = None,
    webhook: Annotated[
        str | None,
        typer.Option(metavar="URL", envvar="HRPRO_WEBHOOK", help="POST each as JSON, in order."),
    ] = None,
    mqtt: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="HRPRO_MQTT",
            help="Publish to this broker: mqtt://USER:PASSWORD@HOST:PORT/PREFIX; mqtts by TLS.",
        ),
    ] = None,
    exec_: Annotated[
        str | None,
        typer.Option(
            "--exec", metavar="CMD", help="Run this for each, with its JSON on stdin; no shell."
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="File that notes how far --webhook, --mqtt or --exec has come, to go on from "
            "there; what a webhook does not take is beside it, in FILE.dead.jsonl."
        ),
    ] = None,
    retry_s: Annotated[
        float,
        typer.Option(help="Seconds for which a webhook is tried before one is given up.", min=0),
    ] = 120.0,
    since: Annotated[
        int | None,
        typer.Option(
            help="All publications with larger numbers, then the live ones (0: all there are), "
            "unless there is something to go on from. "
            "Default: from now on, and first the actions that are open.",
            min=0,
        ),
    ] = None,
    until_idle: Annotated[
        float | None, typer.Option(help="Leave when nothing came for so many seconds.", min=0)
    ] = None,
    key: KeyFile = None,
) -> None:
    """Watch actions as they start, grow and end: a live table, or one of JSON lines, a webhook, an
    MQTT broker and a command, which go on where they were stopped."""
    from hrpro.clients import sinks
    from hrpro.clients.subscriber import KINDS, EventSubscriber
    from hrpro.clients.watching import show_table

    others = {"--webhook": webhook, "--mqtt": mqtt, "--exec": exec_}
    _check_sinks(jsonl, others, resume)
    # The table counts the streams that are live, whatever else it shows.
    is_table = jsonl is None and not any(others.values())
    kinds = ("final", *(("stream",) if is_table else ())) if final else KINDS
    # Leave as on Ctrl-C, so that the file is closed and the terminal restored.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        contextlib.suppress(KeyboardInterrupt),
        address_errors(from_),
        _begin(jsonl, resume) as (lines, kept, begin),
        EventSubscriber(
            from_,
            stream,
            label,
            kinds=kinds,
            min_score=min_score,
            since=since if begin.number is None else begin.number,
            key=key,
            instance=begin.instance,
        ) as by,
        contextlib.ExitStack() as opened,
    ):
        sink = lines or _sink(webhook, mqtt, exec_, resume, retry_s)
        if sink is not None:
            opened.callback(sink.close)
        _wait_for_engine(by, from_, key)
        if sink is None:
            show_table(by, console(), until_idle, finals=final)
        else:
            _say_what_cannot_resume(by, kept)
            sinks.run(by, sink, kept, until_idle)


def _check_sinks(jsonl: Path | None, others: dict[str, str | None], resume: Path | None) -> None:
    """One sink a watch: each goes on from a place of its own."""
    given = [name for name, value in others.items() if value is not None]
    if len(given) + (jsonl is not None) > 1:
        names = ["--jsonl"] * (jsonl is not None) + given
        raise typer.BadParameter(f"expected one of {', '.join(names)}; start one watch for each")
    if given and resume is None:
        raise typer.BadParameter(
            "expected --resume FILE, to note how far it has come", param_hint=given[0]
        )
    if resume and not given:
        raise typer.BadParameter(
            "expected it with --webhook, --mqtt or --exec; JSON lines go on from the last one",
            param_hint="--resume",
        )


@contextlib.contextmanager
def _begin(
    jsonl: Path | None, resume: Path | None
) -> Iterator[tuple[Sink | None, PositionFile | None, Position]]:
    """The sink of JSON lines, if that was asked for; where it is noted how far a sink is, and where
    it goes on."""
    from hrpro.clients import sinks

    if resume is not None:
        with contextlib.closing(sinks.PositionFile(resume)) as kept:
            yield None, kept, kept.position
    elif jsonl is None or str(jsonl) == "-":
        yield sinks.JsonLines(sys.stdout) if jsonl else None, None, sinks.Position()
    else:
        with sinks.lines_in(jsonl) as begin:
            yield begin


def _sink(
    webhook: str | None, mqtt: str | None, command: str | None, resume: Path | None, retry_s: float
) -> Sink | None:
    """The sink that was asked for; None for JSON lines and the table."""
    from hrpro.clients import sinks

    if webhook is not None and resume is not None:
        from hrpro.clients.sink_webhook import Webhook

        return Webhook(webhook, resume.with_name(resume.name + ".dead.jsonl"), retry_s)
    if mqtt is not None:
        return _mqtt(mqtt)
    return None if command is None else sinks.Command(command)


def _mqtt(url: str) -> Sink:
    try:
        from hrpro.clients.sink_mqtt import Mqtt
    except ImportError:
        raise HrproError(
            "MQTT needs the package paho-mqtt: pip install 'hrpro-stream[mqtt]'"
        ) from None
    return Mqtt(url)


def _say_what_cannot_resume(subscriber: EventSubscriber, kept: PositionFile | None) -> None:
    if kept is not None and subscriber.instance is not None and subscriber.last_number is None:
        said = "hrpro: the engine keeps no log: what it publishes while this is away is missed"
        print(said, file=sys.stderr, flush=True)


def _wait_for_engine(subscriber: EventSubscriber, address: str, key: Path | None) -> None:
    """Say on stderr when the subscription is in force, or that nobody is there yet."""
    from hrpro.clients import NoReplyError

    try:
        subscriber.wait_connected()
        print(f"hrpro: watching {address}", file=sys.stderr, flush=True)
    except NoReplyError:
        doubt = "" if key is None else "; does it know this key?"
        said = f"hrpro: no engine answers at {address} yet; waiting{doubt}"
        print(said, file=sys.stderr, flush=True)
