"""`hrpro features`: features of videos for training, and the extractors that make them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hrpro.clients.cli_shared import JsonFlag, progress, say
from hrpro.engine.wire import HrproError

if TYPE_CHECKING:
    from hrpro.clients.cameras.extraction import Report
    from hrpro.clients.cameras.extractor import Extractor

features_app = typer.Typer(no_args_is_help=True, help="Make snippet features of videos.")

ExtractorOption = Annotated[
    str, typer.Option("--extractor", help="Folder of an extractor, or a built-in one's name.")
]
ProviderOption = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="Where networks compute; auto: on a GPU if there is one."),
]


@features_app.command()
def extract(
    videos: Annotated[list[Path], typer.Argument(help="Videos; each is a recording of its name.")],
    out: Annotated[Path, typer.Option("--out", help="Data folder, new or made by this command.")],
    extractor: ExtractorOption = "efficientnet-lite0",
    split: Annotated[
        Literal["train", "test"], typer.Option(help="test for what training does not see.")
    ] = "train",
    provider: ProviderOption = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Write the features of videos to a data folder for training; what is there stays."""
    loaded = _load(extractor, provider)
    from hrpro.clients.cameras.extraction import extract_videos, snippets_in

    with progress(snippets_in(videos, loaded), "snippets") as advance:
        report = extract_videos(videos, loaded, out, split, advance)
    _show(report, loaded, out, as_json)
    if report.failed:
        raise typer.Exit(1)


def _show(report: Report, extractor: Extractor, out: Path, as_json: bool) -> None:
    for reason in report.failed.values():
        print(f"hrpro: {reason}", file=sys.stderr)
    if as_json:
        print(json.dumps({"feature_dim": extractor.feature_dim, **vars(report)}))
        return
    for name, snippets in report.made.items():
        say(f"{name}: {snippets} snippets")
    for name, snippets in report.there.items():
        say(f"{name}: {snippets} snippets, there already")
    if not report.made and not report.there:
        return
    manifest, usual = extractor.manifest, type(extractor.clock)()
    settings = {
        "data.frames_per_s": (f"{manifest.frames_per_s:g}", usual.frames_per_s),
        "data.snippet_frames": (f"{manifest.snippet_frames}", usual.snippet_frames),
    }
    given = "".join(
        f" --set {name}={value}"
        for name, (value, default) in settings.items()
        if float(value) != default
    )
    say(f"{out}: D = {extractor.feature_dim}; with points in {out / 'point_labels'}, go on with")
    say(f"    hrpro train {out} --out RUN{given}")


@features_app.command("import-i3d")
def import_i3d(
    rgb: Annotated[Path, typer.Argument(help="rgb_imagenet.pt of the PyTorch release.")],
    flow: Annotated[Path, typer.Argument(help="flow_imagenet.pt of it.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the extractor.")],
    flow_method: Annotated[
        Literal["tvl1", "dis"],
        typer.Option(help="tvl1, as I3D was trained with; or dis, far faster, for streams."),
    ] = "tvl1",
) -> None:
    """Make an extractor of the published weights of the two-stream I3D (Kinetics-400)."""
    try:
        from hrpro.clients.cameras import import_i3d as importing
    except ImportError as error:
        raise HrproError(
            f"importing I3D needs the package {error.name}: pip install 'hrpro-stream[train,i3d]'"
        ) from None
    manifest = importing.import_i3d(rgb, flow, out, flow_method)
    say(f"{out}: {manifest.name}, D = {manifest.feature_dim}")


@features_app.command()
def check(
    extractor: Annotated[
        str, typer.Argument(help="Folder of an extractor, or a built-in one's name.")
    ],
    provider: ProviderOption = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Load an extractor, let it compute, and tell what it gives and how long it takes."""
    from hrpro.clients.cameras.measure import measure

    loaded = _load(extractor, provider)
    manifest = loaded.manifest
    alone, batched = measure(loaded)
    figures = {
        "name": manifest.name,
        "extractor_id": manifest.identity,
        "folder": str(loaded.folder),
        "frames_per_s": manifest.frames_per_s,
        "snippet_frames": manifest.snippet_frames,
        "feature_dim": manifest.feature_dim,
        "frame_offsets": list(loaded.frame_offsets),
        "provider": loaded.provider,
        "snippet_ms": round(alone.snippet_ms, 3),
        "batched_snippet_ms": round(batched.snippet_ms, 3),
        "processor_ms": round(batched.processor_ms, 3),
        "cameras": round(1000 * loaded.clock.snippet_s / batched.snippet_ms, 2),
    }
    if as_json:
        print(json.dumps(figures))
        return
    _table(loaded)
    say(
        f"speed      {alone.snippet_ms:.0f} ms a snippet, {batched.snippet_ms:.0f} in a batch, by "
        f"{loaded.provider}: {figures['cameras']:.1f} cameras in real time"
    )
    say(f"           {batched.processor_ms:.0f} ms of processor time a snippet")


def _table(extractor: Extractor) -> None:
    manifest, clock = extractor.manifest, extractor.clock
    say(f"extractor  {manifest.name} ({manifest.identity}), {extractor.folder}")
    say(
        f"clock      {clock.snippet_frames} frames at {clock.frames_per_s:g} frames/s, "
        f"{clock.snippet_s:g} s a snippet"
    )
    say(f"features   D = {extractor.feature_dim}, of {len(extractor.frame_offsets)} frames")
    for network in manifest.networks:
        given = "frames" if network.flow is None else f"flow ({network.flow.method})"
        say(f"           {network.file}: {network.snippet_features} of {given}")


def _load(extractor: str, provider: Literal["auto", "cpu", "cuda"]) -> Extractor:
    try:
        import av  # noqa: F401 (what reads frames; the error is to come before the work)
    except ImportError:
        raise HrproError(
            "features of videos need the package av: pip install 'hrpro-stream[camera]'"
        ) from None
    from hrpro.clients.cameras.extractor import load_extractor

    return load_extractor(extractor, provider)
