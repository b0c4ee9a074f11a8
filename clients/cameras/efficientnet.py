"""The built-in extractor efficientnet-lite0, made at its first use and kept in the user's cache.

A frame's features are those of EfficientNet-Lite0 with ImageNet weights. A snippet's are the mean
over four of its frames, and behind it the mean absolute difference of neighbours among them, which
says how much changes.
"""

from __future__ import annotations

import os
from pathlib import Path

from hrpro.clients.cameras.manifest import (
    SCHEMA_VERSION,
    ExtractorError,
    ExtractorManifest,
    Network,
    complete_folder,
    write_manifest,
)

NAME = "efficientnet-lite0"
# Raised with every change that makes other features: those of training must be the live ones.
_REVISION = 1
_GRAPH = "efficientnet-lite0.onnx"
_FRAMES = (2, 6, 10, 14)


def cached_efficientnet() -> Path:
    """The folder of the extractor, which is made where it is not there.

    Raises ExtractorError where a package for making it is missing.
    """
    folder = _cache() / "extractors" / f"{NAME}-{_REVISION}"
    if not folder.exists():
        _make(folder)
    return folder


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is to be ignored, says the specification.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "hrpro"


def _make(folder: Path) -> None:
    try:
        import torch

        from hrpro.export.efficientnet import FEATURES, SIDE, pretrained
        from hrpro.export.tracing import export_features

        model = pretrained()
    except ImportError as error:
        raise ExtractorError(
            f"{NAME}: its first use needs {error.name}, to make {folder}: "
            "pip install 'hrpro-stream[extract]'"
        ) from None
    example = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with complete_folder(folder) as made:
        export_features(model, example, made / _GRAPH)
        write_manifest(made, _manifest(FEATURES, SIDE))


def _manifest(features: int, side: int) -> ExtractorManifest:
    network = Network(
        file=_GRAPH,
        frames=_FRAMES,
        layout="NCHW",
        # What the weights were trained with: batch statistics of the first layer fit no other.
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
        features=features,
        pooling="mean_and_difference",
    )
    return ExtractorManifest(
        schema_version=SCHEMA_VERSION,
        name=NAME,
        frames_per_s=25.0,
        snippet_frames=16,
        feature_dim=network.snippet_features,
        height=side,
        width=side,
        short_side=side + 32,
        interpolation="bicubic",
        networks=(network,),
        files={_GRAPH: ""},
    )
