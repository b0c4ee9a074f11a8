"""`hrpro bundle`: look at bundles, check them, change what needs no new export."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hrpro.clients.cli_shared import JsonFlag, console, say
from hrpro.engine.wire import HrproError

if TYPE_CHECKING:
    from hrpro.export.bundle import Bundle

bundle_app = typer.Typer(no_args_is_help=True, help="Look at bundles, check and change them.")

BundleFolder = Annotated[Path, typer.Argument(help="Folder of the bundle.")]
TrustedKey = Annotated[
    Path | None, typer.Option("--trusted-key", help="Public key (PEM) that must have signed it.")
]


@bundle_app.command()
def show(bundle: BundleFolder, as_json: JsonFlag = False) -> None:
    """What a bundle is, where it comes from, and what was measured of it."""
    from rich.markup import escape
    from rich.table import Table

    from hrpro.export.bundle import SIGNATURE, read_bundle

    manifest = read_bundle(bundle).manifest
    if as_json:
        print(manifest.model_dump_json())
        return
    names = [manifest.display_names.get(label, label) for label in manifest.classes]
    sizes = {name: (bundle / name).stat().st_size / 1e6 for name in manifest.files}
    rows: dict[str, object] = {
        "id": manifest.bundle_id,
        "exported": manifest.created or "?",
        "signed": "yes" if (bundle / SIGNATURE).exists() else "no",
        "trained on": f"{manifest.data_set}, seed {manifest.training.get('seed', '?')}",
        "classes": ", ".join(names),
        "features": f"{manifest.feature_dim} a snippet of {manifest.snippet_s:g} s",
        "window": f"{manifest.window_snippets} snippets, "
        + (
            f"exact from {manifest.context_snippets} to -{manifest.lookahead_snippets}"
            if manifest.exact
            else "not exact"
        ),
        "precision": f"{manifest.precision}, {manifest.window_flops / 1e9:.3g} GFLOP a window",
        "figures": _values(manifest.figures),
        "beside fp32": _values(manifest.compared),
        "differs from torch": _values(manifest.verified),
        "files": ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items()),
        "made by": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    table = Table(show_header=False, title=escape(str(bundle)))
    for name, value in rows.items():
        table.add_row(name, escape(str(value)))
    console().print(table)


def _values(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


@bundle_app.command()
def verify(bundle: BundleFolder, trusted_key: TrustedKey = None, as_json: JsonFlag = False) -> None:
    """Check the files, the signature if a key is given, and the golden windows on this machine."""
    from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
    from hrpro.export.golden import check_golden

    checked = read_checked(bundle, trusted_key)
    differences = check_golden(checked, OnnxRuntimeBackend(checked))
    if as_json:
        print(json.dumps({"bundle_id": checked.manifest.bundle_id, "golden": differences}))
        return
    say(f"{bundle}: bundle {checked.manifest.bundle_id}, all files are what it says")
    if trusted_key is not None:
        say(f"signed by {trusted_key}")
    if not differences:
        say("no golden windows: exported by an earlier version, nothing to compare with")
    for name, difference in differences.items():
        limit = checked.manifest.tolerances[name]
        say(f"golden windows, {name:<13}differ by {difference:.1e}, at most {limit:.0e}")


def read_checked(bundle: Path, trusted_key: Path | None) -> Bundle:
    """A bundle, signed if a key is given."""
    from hrpro.export.bundle import read_bundle

    if trusted_key is None:
        return read_bundle(bundle)
    trusted: Bundle = _signing().read_trusted_bundle(bundle, trusted_key)
    return trusted


def _signing() -> ModuleType:
    try:
        from hrpro.export import signing
    except ImportError:
        raise HrproError(
            "signed bundles need the package cryptography: pip install 'hrpro-stream[sign]'"
        ) from None
    return signing


@bundle_app.command()
def diff(
    one: BundleFolder,
    other: Annotated[Path, typer.Argument(help="Folder of another one.")],
    as_json: JsonFlag = False,
) -> None:
    """What differs between two bundles; exit code 1 if anything does."""
    from hrpro.engine.settings import differences
    from hrpro.export.bundle import read_bundle

    found = differences(
        read_bundle(one).manifest.model_dump(mode="json"),
        read_bundle(other).manifest.model_dump(mode="json"),
    )
    if as_json:
        print(json.dumps({name: [was, now] for name, was, now in found}))
    for name, was, now in found if not as_json else ():
        say(f"{name}: {json.dumps(was)} -> {json.dumps(now)}")
    raise typer.Exit(1 if found else 0)


@bundle_app.command("set")
def set_settings(
    bundle: BundleFolder,
    assignments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[GROUP.NAME=VALUE ...]", help="Settings of window, localization."),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(metavar="LABEL=TEXT", help="Display name of a class.")
    ] = None,
) -> None:
    """Override settings and display names without a new export; the bundle gets another id."""
    from hrpro.export.bundle import change_settings

    names = {}
    for text in name or []:
        label, equals, shown = text.partition("=")
        if not equals or not shown:
            raise typer.BadParameter(f"--name: expected LABEL=TEXT, got {text!r}")
        names[label] = shown
    manifest = change_settings(bundle, assignments or [], names)
    say(f"{bundle}: is bundle {manifest.bundle_id} now, not signed")


@bundle_app.command()
def sign(
    bundle: BundleFolder,
    key: Annotated[Path, typer.Option("--key", help="Private Ed25519 key (PEM).")],
) -> None:
    """Sign a bundle, so that engines which trust the key take it."""
    say(f"{bundle}: bundle {_signing().sign_bundle(bundle, key).manifest.bundle_id} is signed")


@bundle_app.command()
def prototypes(
    bundle: BundleFolder,
    from_: Annotated[Path, typer.Option("--from", help="Run whose memory it is given.")],
    as_json: JsonFlag = False,
) -> None:
    """Refresh the memory of a bundle from another run of the same model, without a new graph."""
    from hrpro.export.memory import replace_prototypes

    manifest, change = replace_prototypes(bundle, from_)
    if as_json:
        print(json.dumps({"bundle_id": manifest.bundle_id, "largest_change": change}))
        return
    say(f"{bundle}: is bundle {manifest.bundle_id} now, prototypes moved by up to {change:.3g}")
