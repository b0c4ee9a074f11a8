"""`hrpro bundle triton`; `hrpro.clients.cli` registers it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hrpro.clients.cli_bundle import BundleFolder, TrustedKey, read_checked
from hrpro.clients.cli_shared import JsonFlag, say


def triton(
    bundle: BundleFolder,
    out: Annotated[Path, typer.Option("--out", help="Model repository; made if it is not there.")],
    backend: Annotated[
        str, typer.Option(help="onnxruntime, or python where the server lacks that one.")
    ] = "onnxruntime",
    name: Annotated[
        str, typer.Option(help="The models are NAME-snippet and NAME-instance.")
    ] = "hrpro",
    version: Annotated[int, typer.Option(help="A new version beside those that are there.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or gpu.")] = "cpu",
    instances: Annotated[int, typer.Option(help="How often each model is loaded.")] = 1,
    stateful: Annotated[
        bool, typer.Option("--stateful", help="Also NAME-stream, which keeps the past of streams.")
    ] = False,
    trusted_key: TrustedKey = None,
    as_json: JsonFlag = False,
) -> None:
    """Write the bundle as a version of its models for an NVIDIA Triton Inference Server."""
    from hrpro.export.triton import BACKENDS, DEVICES, write_repository

    if backend not in BACKENDS:
        raise typer.BadParameter(f"expected {', '.join(BACKENDS)}, got {backend!r}")
    if device not in DEVICES:
        raise typer.BadParameter(f"expected {', '.join(DEVICES)}, got {device!r}")
    loaded = read_checked(bundle, trusted_key)
    folders = write_repository(loaded, out, name, backend, version, device, instances, stateful)
    bundle_id = loaded.manifest.bundle_id
    if as_json:
        print(json.dumps({"bundle_id": bundle_id, "versions": [str(each) for each in folders]}))
        return
    for folder in folders:
        say(f"{folder}: bundle {bundle_id}, for the {backend} backend")
