"""The published weights of the two-stream I3D as an extractor."""

from __future__ import annotations

from pathlib import Path

import torch

from hrpro.clients.cameras.manifest import (
    SCHEMA_VERSION,
    ExtractorManifest,
    Flow,
    FlowMethod,
    Network,
    complete_folder,
    write_manifest,
)
from hrpro.export.i3d import CHANNELS, FEATURES, FRAMES, SIDE, Stream, read_i3d
from hrpro.export.tracing import export_features

# Frames are kept larger than the networks see them, so that flow knows what enters the crop.
_SHORT_SIDE = 256
_FLOW_LIMIT_PX = 20.0


def import_i3d(rgb: Path, flow: Path, out: Path, method: FlowMethod) -> ExtractorManifest:
    """Write the extractor of two files of weights to the folder ``out``.

    Raises WeightsError for a file that does not fit, FileExistsError where ``out`` is there.
    """
    if out.exists():
        raise FileExistsError(f"{out}: is there already; not overwritten")
    models = (read_i3d(rgb, "rgb"), read_i3d(flow, "flow"))
    networks = (
        _network("rgb", None),
        _network("flow", Flow(method=method, limit_px=_FLOW_LIMIT_PX)),
    )
    manifest = ExtractorManifest(
        schema_version=SCHEMA_VERSION,
        name=f"i3d-{method}",
        frames_per_s=25.0,
        snippet_frames=FRAMES,
        feature_dim=len(networks) * FEATURES,
        height=_SHORT_SIDE,
        width=_SHORT_SIDE,
        short_side=_SHORT_SIDE,
        networks=networks,
        files={network.file: "" for network in networks},
    )
    with complete_folder(out) as made:
        for model, network in zip(models, networks, strict=True):
            size = (2, network.channel_count, FRAMES, SIDE, SIDE)
            example = torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1
            export_features(model, example, made / network.file)
        write_manifest(made, manifest)
    return manifest


def _network(stream: Stream, flow: Flow | None) -> Network:
    """Colours and motion in [-1, 1]; the flow into a snippet's first frame is the snippet's."""
    half, middle = (127.5, 127.5) if flow is None else (flow.limit_px, 0.0)
    return Network(
        file=f"{stream}.onnx",
        flow=flow,
        frames=tuple(range(FRAMES) if flow is None else range(-1, FRAMES)),
        layout="NCTHW",
        crop=(SIDE, SIDE),
        mean=(middle,) * CHANNELS[stream],
        std=(half,) * CHANNELS[stream],
        features=FEATURES,
        pooling="none",
    )
