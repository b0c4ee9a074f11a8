"""The `hrpro` command: one function a command; what a command needs is imported when it runs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hrpro.clients import (
    cli_ablate,
    cli_bench,
    cli_bundle,
    cli_bundle_triton,
    cli_camera,
    cli_chaos,
    cli_dashboard,
    cli_data,
    cli_deploy,
    cli_events,
    cli_features,
    cli_feed,
    cli_keys,
    cli_label,
    cli_plot,
    cli_record,
    cli_status,
    cli_stream_eval,
    cli_training,
    cli_watch,
)
from hrpro.clients.cli_shared import (
    Assignments,
    ConfigFile,
    JsonFlag,
    address_errors,
    console,
    say,
    speed_factor,
)
from hrpro.engine.logs import LogFormat, LogLevel, configure_logs
from hrpro.engine.wire import HrproError

if TYPE_CHECKING:
    from hrpro.engine.config import EngineConfig
    from hrpro.engine.pipeline import Pipeline
    from hrpro.engine.serve import Addresses, Doors
    from hrpro.export.bundle import Bundle

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
feed_app = typer.Typer(no_args_is_help=True, help="Send snippet features to an engine.")
app.add_typer(feed_app, name="feed")
app.add_typer(cli_bench.bench_app, name="bench")
app.add_typer(cli_data.data_app, name="data")
app.add_typer(cli_features.features_app, name="features")
app.add_typer(cli_bundle.bundle_app, name="bundle")
app.add_typer(cli_keys.keys_app, name="keys")
cli_bundle.bundle_app.command()(cli_bundle_triton.triton)
feed_app.command("features")(cli_feed.features)
feed_app.command("camera")(cli_camera.feed_camera)

app.command()(cli_training.train)
app.command()(cli_training.evaluate)
app.command()(cli_training.export)
app.command()(cli_ablate.ablate)
app.command()(cli_chaos.chaos)
app.command()(cli_label.label)
app.command()(cli_dashboard.dashboard)
app.command()(cli_plot.plot)
app.command()(cli_deploy.deploy)
app.command()(cli_events.events)
app.command()(cli_record.record)
app.command()(cli_record.replay)
app.command()(cli_status.status)
app.command()(cli_status.streams)
app.command()(cli_status.drain)
app.command()(cli_watch.watch)
app.command("stream-eval")(cli_stream_eval.stream_eval)
app.command("config")(cli_training.show_config)


def _say_version(asked: bool) -> None:
    if asked:
        say(f"hrpro-stream {version('hrpro-stream')}")
        raise typer.Exit


@app.callback()
def hrpro(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_version, is_eager=True, help="Say the version and leave."
        ),
    ] = False,
) -> None:
    """Streaming action localization, trained from one point label per action."""


@app.command()
def serve(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    feed: Annotated[str | None, typer.Option(help="Address that feeders connect to.")] = None,
    events: Annotated[str | None, typer.Option(help="Address that subscribers connect to.")] = None,
    control: Annotated[
        str | None, typer.Option(help="Address for status, deploys and drain.")
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|none",
            help="Folder of the event log, for this engine alone; none keeps nothing.",
        ),
    ] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    trusted_key: cli_bundle.TrustedKey = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="Folder of keys (hrpro keys new): let nobody in without one."),
    ] = None,
    trusted_network: Annotated[
        bool,
        typer.Option(
            "--trusted-network",
            help="Serve without keys where others can reach it: they may do everything.",
        ),
    ] = False,
    follow: Annotated[
        Path | None, typer.Option(help="Deploy bundles that appear in this folder.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Answer /metrics, /healthz and /readyz over HTTP."),
    ] = None,
    log_format: Annotated[LogFormat, typer.Option(help="Form of the lines on stderr.")] = "human",
    log_level: Annotated[
        LogLevel | None, typer.Option(help="Default: warning for human, info for json.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Say what is wrong, or else what follows; serve nothing."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run the engine until SIGTERM. With a log, its streams go on when it is started again; without
    one they end, and what is left of them is published."""
    sides = {"feed": feed, "events": events, "control": control}
    from hrpro.engine import serve as engine

    doors = engine.Doors(keys, trusted_network)
    folder = None if state in (None, "none") else Path(state)
    if check:
        read_bundle = partial(cli_bundle.read_checked, bundle, trusted_key)
        _check(read_bundle, sides, doors, metrics, folder, config, set_ or [], as_json)
        return
    from hrpro.engine.metrics import Metrics
    from hrpro.engine.metrics_http import metrics_server

    addresses = engine.Addresses(**{side: _given(side, at) for side, at in sides.items()})
    if state is None:
        raise typer.BadParameter("expected a folder, or none", param_hint="--state")
    configure_logs(log_format, log_level)
    measured = Metrics()

    def read(folder: Path) -> tuple[Bundle, EngineConfig]:
        loaded = cli_bundle.read_checked(folder, trusted_key)
        return loaded, engine.load_engine_config(loaded, config, set_ or [])

    with contextlib.ExitStack() as stack:
        stack.enter_context(address_errors(*vars(addresses).values()))
        # Before the bundle is loaded, so that it can be seen that the engine starts.
        url = stack.enter_context(metrics_server(metrics, measured)) if metrics else None

        def ready(bound: Addresses, pipeline: Pipeline) -> None:
            for line in _ready_lines(bound, url, folder, pipeline, as_json):
                say(line)

        engine.serve(bundle, read, addresses, ready, follow, measured, folder, doors)


def _given(side: str, address: str | None) -> str:
    if address is None:
        raise typer.BadParameter("expected an address, came none", param_hint=f"--{side}")
    return address


def _check(
    read: Callable[[], Bundle],
    sides: Mapping[str, str | None],
    doors: Doors,
    metrics: str | None,
    state: Path | None,
    config: Path | None,
    assignments: Sequence[str],
    as_json: bool,
) -> None:
    from hrpro.clients import serve_check

    problems, figures = serve_check.check(read, sides, doors, metrics, state, config, assignments)
    if as_json:
        print(serve_check.as_json(problems, figures))
    else:
        serve_check.show(problems, figures)
        for problem in problems:
            print(f"hrpro: {problem}", file=sys.stderr)
    if problems:
        raise typer.Exit(1)


def _ready_lines(
    bound: Addresses, metrics: str | None, state: Path | None, pipeline: Pipeline, as_json: bool
) -> list[str]:
    if as_json:
        said: dict[str, str | None] = {
            "feed": bound.feed,
            "events": bound.events,
            "control": bound.control,
        }
        said["log"] = None if state is None else str(state)
        if metrics is not None:
            said["metrics"] = metrics
        return [json.dumps({**said, "bundle_id": pipeline.bundle_id, "state": "READY"})]
    clock = pipeline.clock
    window_s = clock.seconds(pipeline.window_snippets)
    return [
        f"bundle   {pipeline.bundle_id}, {len(pipeline.classes)} classes, "
        f"{pipeline.feature_dim} features a snippet of {clock.snippet_s:g} s",
        f"window   {pipeline.window_snippets} snippets ({window_s:.2f} s), hop "
        f"{pipeline.hop_snippets}, look-ahead {pipeline.lookahead_s:g} s"
        + (" (strict)" if pipeline.deployments.current.config.lookahead_s == "strict" else ""),
        f"feed     {bound.feed}",
        f"events   {bound.events}",
        f"control  {bound.control}",
        "log      "
        + (str(state) if state else "none: who does not listen when it is published has missed it"),
        *([f"metrics  {metrics}"] if metrics else []),
        "READY",
    ]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for run, bundle, pictures.")] = Path(
        "hrpro-demo"
    ),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the stream-eval object to this file.")
    ] = None,
    speed: Annotated[str, typer.Option(help="Times the pace of the snippet clock, or max.")] = "10",
) -> None:
    """Train on the example recordings, export, stream the held-out ones, show what comes."""
    from hrpro.clients.demo import run_demo

    figures = run_demo(out, speed_factor(speed), console())
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    """Entry point: errors that a user can mend are one message, not a traceback."""
    # Torch's threads would spin between two loops, and take the cores that others need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="hrpro: %(message)s")
    # So that what a command has started ends with it; serve and watch have their own ways.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except (HrproError, OSError) as error:
        print(f"hrpro: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
