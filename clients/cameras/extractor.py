"""A feature extractor: the frames of a snippet in, its D features out, live and for training alike.

av.VideoFrame -> prepare -> (H, W, 3) -> snippets (n, F, H, W, 3) -> extract -> (n, D)

                   each network:  its frames -> flow, or none -> crop -> normalise
                                  -> ONNX Runtime -> pool over the snippet
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.cameras.efficientnet import NAME, cached_efficientnet
from hrpro.clients.cameras.manifest import ExtractorError, ExtractorManifest, read_manifest
from hrpro.clients.cameras.network import NetworkSession, Provider, centre_crop
from hrpro.engine.timebase import SnippetClock

if TYPE_CHECKING:
    import av

__all__ = [
    "BUILT_IN",
    "Extractor",
    "ExtractorError",
    "ExtractorManifest",
    "Provider",
    "load_extractor",
]


# Folders of the built-in extractors, which are made when they are asked for.
BUILT_IN: dict[str, Callable[[], Path]] = {NAME: cached_efficientnet}


class Extractor:
    """Networks that are loaded; any thread may call. See the module."""

    def __init__(
        self, folder: Path, manifest: ExtractorManifest, networks: Sequence[NetworkSession]
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.clock: SnippetClock = manifest.clock
        self.feature_dim = manifest.feature_dim
        self.frame_offsets = manifest.frame_offsets
        self.height, self.width = manifest.height, manifest.width
        self._networks = tuple(networks)
        self._local = threading.local()

    @property
    def name(self) -> str:
        """Of the manifest."""
        return self.manifest.name

    @property
    def provider(self) -> Literal["cpu", "cuda"]:
        """Where it computes."""
        return self._networks[0].provider

    def prepare(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """A decoded frame as RGB (H, W, 3), upright, scaled and cropped as the manifest says."""
        # What scales is kept, with its tables; it is for one thread.
        if not hasattr(self._local, "scaler"):
            from av.video.reformatter import VideoReformatter

            self._local.scaler = VideoReformatter()
        # Phones store pictures as their sensor lies, and a note of which way is up.
        turns = frame.rotation // 90
        height, width = self._scaled(frame.height, frame.width, is_sideways=turns % 2 == 1)
        scaled = self._local.scaler.reformat(
            frame, width, height, "rgb24", interpolation=self.manifest.interpolation.upper()
        )
        upright = np.rot90(scaled.to_ndarray(), turns)
        return np.ascontiguousarray(centre_crop(upright, self.height, self.width))

    def _scaled(self, height: int, width: int, is_sideways: bool) -> tuple[int, int]:
        """What a frame of this size is scaled to before it is turned upright and cropped."""
        side = self.manifest.short_side
        if side is None:
            return (self.width, self.height) if is_sideways else (self.height, self.width)
        shorter = min(height, width)
        return round(height * side / shorter), round(width * side / shorter)

    def extract(self, snippets: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, D) of n snippets (n, F, H, W, 3), of whatever cameras.

        F are the frames at `frame_offsets`, as `prepare` gave them. Raises ExtractorError.
        """
        expected = (len(self.frame_offsets), self.height, self.width, 3)
        if snippets.dtype != np.uint8 or snippets.ndim != 5 or snippets.shape[1:] != expected:
            raise ExtractorError(
                f"extractor {self.name!r}: expected snippets uint8 (n, "
                f"{', '.join(map(str, expected))}), got {snippets.dtype} {snippets.shape}"
            )
        if not len(snippets):
            return np.zeros((0, self.feature_dim), np.float32)
        return np.concatenate([network.features(snippets) for network in self._networks], axis=1)


def load_extractor(
    path_or_name: str | Path, provider: Provider = "auto", threads: int = 0
) -> Extractor:
    """The extractor of a folder, or the built-in one of that name where there is no such folder.

    ``provider`` auto takes a CUDA GPU where there is one, else the CPU with so many ``threads``
    (0: one a core). Raises ExtractorError.
    """
    folder = _folder(path_or_name)
    manifest = read_manifest(folder)
    networks = [
        NetworkSession(folder, network, manifest, provider, threads)
        for network in manifest.networks
    ]
    return Extractor(folder, manifest, networks)


def _folder(path_or_name: str | Path) -> Path:
    folder, name = Path(path_or_name), str(path_or_name)
    if folder.exists():
        return folder
    if name not in BUILT_IN:
        raise ExtractorError(
            f"{name}: expected the folder of an extractor, or the name of a built-in one: "
            f"{', '.join(BUILT_IN)}"
        )
    return BUILT_IN[name]()
