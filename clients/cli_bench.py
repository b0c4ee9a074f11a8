"""`hrpro bench`: the engine's speed beside bare inference, its latency, and its memory."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hrpro.clients.cli_shared import Assignments, JsonFlag, console, progress, say

if TYPE_CHECKING:
    from hrpro.clients.bench_bundle import BenchModel
    from hrpro.clients.bench_engine import Workload
    from hrpro.engine.config import EngineConfig
    from hrpro.export.bundle import Bundle, Precision

bench_app = typer.Typer(
    no_args_is_help=True, help="Measure the engine on this machine, with random weights."
)

BundleFolder = Annotated[
    Path | None,
    typer.Option(
        "--bundle", help="Measure this bundle, in place of one with random weights (needs torch)."
    ),
]
_SMALL_STREAMS = 32
# Streams that are not fed for a while stay as they are.
_ALWAYS = ("max_streams=4096", "idle_s=1e6")


@bench_app.command("engine")
def bench_engine(
    bundle: BundleFolder = None,
    dim: Annotated[int, typer.Option(help="D, features in a snippet.", min=1)] = 2048,
    classes: Annotated[int, typer.Option(help="C.", min=1)] = 20,
    size: Annotated[str, typer.Option(help="full or lean, as in model.size.")] = "full",
    window: Annotated[int, typer.Option(help="T, snippets in a window.", min=1)] = 128,
    hop: Annotated[int, typer.Option(help="New snippets in a step, or a window.", min=1)] = 4,
    streams: Annotated[int, typer.Option(help="Streams that are fed.", min=1)] = 8,
    batch: Annotated[int, typer.Option(help="Hops in one call of the model.", min=1)] = 8,
    threads: Annotated[int, typer.Option(help="Threads of inference.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds, engine and bare in turn.", min=1)] = 8,
    hops: Annotated[int, typer.Option(help="Hops of each stream in a round.", min=1)] = 2,
    paced: Annotated[int, typer.Option(help="Snippets of each stream at half load.", min=2)] = 40,
    idle: Annotated[int, typer.Option(help="Idle streams, for memory; 0: none.", min=0)] = 1000,
    small: Annotated[bool, typer.Option(help="Measure the latency of a small model, too.")] = True,
    set_: Assignments = None,
    as_json: JsonFlag = False,
) -> None:
    """Snippets a second end to end over bare session.run, added latency, memory of a stream.

    The engine and its feeder are processes of their own. Engine and bare inference take turns, so
    that a busy machine is busy for both.
    """
    from hrpro.clients.bench_bundle import BenchModel
    from hrpro.clients.bench_engine import Workload

    window_settings = [f"window.window_snippets={window}", f"window.hop_snippets={hop}"]
    # By windows, unless said otherwise: they are what T and the ratio speak of.
    how = ["inference=window", *(each for each in set_ or () if each.startswith("inference="))]
    given = [f"threads={threads}", f"max_batch={batch}", *how, *window_settings, *(set_ or [])]
    model = BenchModel(dim, classes, size)
    with prepared(bundle, model, given) as (loaded, config, recording):
        figures = _measured(loaded, config, recording, Workload(streams, hops * hop, rounds, paced))
        figures["model"] = _described(loaded, config, streams)
        if idle:
            figures |= _idle(loaded, config, recording, idle)
    if small:
        # As wide as SBHAR's: a window costs less than what comes after it.
        with prepared(None, BenchModel(56, 12), [f"threads={threads}", *how]) as small_one:
            own = _measured(*small_one, Workload(_SMALL_STREAMS, 128, rounds, 200))
            own["model"] = _described(*small_one[:2], _SMALL_STREAMS)
        figures["small_model"] = own
    if as_json:
        print(json.dumps(figures))
    else:
        _show(figures)


@bench_app.command("cameras")
def bench_cameras(
    bundle: BundleFolder = None,
    dim: Annotated[int, typer.Option(help="D, features in a snippet.", min=1)] = 2048,
    classes: Annotated[int, typer.Option(help="C.", min=1)] = 20,
    size: Annotated[str, typer.Option(help="full or lean, as in model.size.")] = "full",
    precision: Annotated[str, typer.Option(help="fp32 or int8, of the model.")] = "fp32",
    streams: Annotated[str, typer.Option(help="How many to try, in ascending order.")] = (
        "200,400,600,800,1000,1200"
    ),
    seconds: Annotated[float, typer.Option(help="How long each number is fed.", min=1)] = 20,
    tries: Annotated[
        int, typer.Option(help="How often, while other programs disturb it.", min=1)
    ] = 3,
    quiet: Annotated[
        float, typer.Option(help="Share of the time without an action.", min=0, max=0.99)
    ] = 0.8,
    set_: Assignments = None,
    as_json: JsonFlag = False,
) -> None:
    """The greatest number of live streams, at their true pace, that the engine keeps up with.

    Nothing is dropped, and of the scores 99 in 100 are published within a snippet's time of the
    arrival of what they need. Engine and feeders share the machine.
    """
    from hrpro.clients.bench_bundle import BenchModel
    from hrpro.clients.bench_cameras import measure_cameras

    counts = sorted({int(each) for each in streams.split(",")})
    model = BenchModel(dim, classes, size, precision=cast("Precision", precision))
    given = ["mode=throughput", *(set_ or [])]
    with prepared(bundle, model, given, quiet_share=quiet) as (loaded, config, recording):
        figures = measure_cameras(
            loaded, config, recording, counts, seconds, tries, None if as_json else _show_round
        )
        figures["model"] = _described(loaded, config, figures["streams"])
        figures["model"]["precision"] = loaded.manifest.precision
    if as_json:
        print(json.dumps(figures))
    else:
        _show(figures)


def _show_round(figures: dict[str, Any]) -> None:
    console(quiet=True).print(
        f"{figures['streams']} streams: p99 {figures['p99_ms']:.0f} ms, {figures['drops']} drops, "
        f"engine {figures['cpu_share']:.2f} of a core, at try {figures['tries']}"
    )


@bench_app.command("memory")
def bench_memory(
    bundle: BundleFolder = None,
    snippets: Annotated[int, typer.Option(help="Snippets to feed.", min=1000)] = 10_000_000,
    streams: Annotated[int, typer.Option(help="Streams that go on.", min=1)] = 64,
    leak_bytes: Annotated[
        int, typer.Option(help="As a control: lose so many bytes a stream and step.", min=0)
    ] = 0,
    limit: Annotated[
        float, typer.Option(help="Bytes a million snippets from which memory grows.", min=0)
    ] = 200_000,
    set_: Assignments = None,
    as_json: JsonFlag = False,
) -> None:
    """Whether the engine's memory grows with what goes through it; exit code 1 if it does."""
    from hrpro.clients.bench_bundle import BenchModel
    from hrpro.clients.bench_memory import measure_growth

    given = ["threads=1", "window.hop_snippets=16", "lookahead_s=20", *(set_ or [])]
    model = BenchModel(8, 3, attention_past=6)
    with (
        prepared(bundle, model, given, quiet_share=0.8) as (loaded, config, recording),
        progress(snippets, "snippets") as advance,
    ):
        growth = measure_growth(
            loaded, config, recording, snippets, streams, leak_bytes=leak_bytes, progress=advance
        )
    slope = growth.slope_bytes_per_million
    figures = {
        "snippets": int(growth.snippets[-1]),
        "slope_bytes_per_million_snippets": slope,
        "flat": slope < limit,
        "rss_bytes_first": int(growth.rss_bytes[0]),
        "rss_bytes_last": int(growth.rss_bytes[-1]),
        "samples": len(growth.snippets),
    }
    if as_json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            say(f"{name:<34}{value}")
    if slope >= limit:
        raise typer.Exit(1)


@bench_app.command("incremental")
def bench_incremental(
    dim: Annotated[int, typer.Option(help="D, features in a snippet.", min=1)] = 2048,
    classes: Annotated[int, typer.Option(help="C.", min=1)] = 20,
    size: Annotated[str, typer.Option(help="full or lean, as in model.size.")] = "full",
    past: Annotated[
        list[int] | None, typer.Option(help="P, attention's past; repeatable.", min=1)
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="B, streams in a step; repeatable.", min=1)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds, all that is timed in turn.", min=1)] = 3,
    as_json: JsonFlag = False,
) -> None:
    """What a snippet costs by steps and by windows, and what bounds a step; on one thread."""
    from hrpro.clients.bench_bundle import BenchModel
    from hrpro.clients.bench_incremental import measure

    model = BenchModel(dim, classes, size)
    with console(quiet=True).status("steps, windows and a plain product in turn"):
        said = measure(model, past or [32, 64, 128, 256], batch or [1, 16, 64], rounds)
    if as_json:
        print(json.dumps(said))
        return
    table = said.pop("table")
    _show({name: value for name, value in said.items() if value is not None})
    say("   P   B  hop  step ms  window ms  speedup  GFLOP/s  of plain  binds")
    for row in table:
        say(
            f"{row['past']:4}{row['batch']:4}{row['hop']:5}{row['step_ms_per_snippet']:9.3f}"
            f"{row['window_ms_per_snippet']:11.3f}{row['speedup']:9.1f}{row['gflop_per_s']:9.1f}"
            f"{row['gflop_per_s'] / row['plain_gflop_per_s']:10.2f}  {row['binds']}"
        )


@contextlib.contextmanager
def prepared(
    folder: Path | None, model: BenchModel, assignments: list[str], quiet_share: float = 0.5
) -> Iterator[tuple[Bundle, EngineConfig, Path]]:
    """A bundle, its settings, and a file of features for it."""
    import numpy as np

    from hrpro.clients.bench_bundle import material, random_bundle
    from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
    from hrpro.engine.serve import load_engine_config
    from hrpro.export.bundle import read_bundle

    with tempfile.TemporaryDirectory() as made:
        recording = Path(made) / "recording.npy"
        with console(quiet=True).status("a bundle with random weights, and features for it"):
            target = Path(made) / "bundle"
            loaded = random_bundle(model, target) if folder is None else read_bundle(folder)
            config = load_engine_config(loaded, None, [*_ALWAYS, *assignments])
            backend = OnnxRuntimeBackend(loaded, config)
            np.save(recording, material(loaded, backend, quiet_share))
        yield loaded, config, recording


def _measured(
    bundle: Bundle, config: EngineConfig, recording: Path, workload: Workload
) -> dict[str, Any]:
    from hrpro.clients.bench_engine import measure

    with console(quiet=True).status(f"engine and bare inference, {workload.rounds} rounds"):
        return measure(bundle, config, recording, workload)


def _idle(bundle: Bundle, config: EngineConfig, recording: Path, streams: int) -> dict[str, Any]:
    from hrpro.clients.bench_memory import idle_streams
    from hrpro.engine.footprint import stream_bytes

    with console(quiet=True).status(f"{streams} idle streams"):
        own = stream_bytes(bundle.manifest, config).all
        return idle_streams(bundle, config, recording, streams, own)


def _described(bundle: Bundle, config: EngineConfig, streams: int) -> dict[str, Any]:
    from hrpro.engine.incremental import most_in_a_call, runs_by_steps

    manifest = bundle.manifest
    by_steps = runs_by_steps(manifest, config)
    return {
        "inference": "incremental" if by_steps else "window",
        "feature_dim": manifest.feature_dim,
        "classes": len(manifest.classes),
        "window_snippets": config.window.length(
            manifest.context_snippets, manifest.lookahead_snippets
        ),
        "hop_snippets": config.window.hop_snippets,
        "embedding_width": manifest.embedding_width,
        "max_batch": most_in_a_call(manifest, config),
        "threads": config.threads,
        "streams": streams,
    }


def _show(figures: dict[str, Any], indent: str = "") -> None:
    for name, value in figures.items():
        if isinstance(value, dict):
            say(f"{indent}{name}")
            _show(value, indent + "  ")
        elif isinstance(value, list):
            say(f"{indent}{name:<28}{', '.join(f'{each:.3f}' for each in value)}")
        else:
            say(f"{indent}{name:<28}{f'{value:.4g}' if isinstance(value, float) else value}")
