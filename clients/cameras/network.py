"""One network of an extractor in ONNX Runtime: images of snippets in, its features out."""

from __future__ import annotations

import ctypes
import logging
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state

from hrpro.clients.cameras.manifest import ExtractorError, ExtractorManifest, Network
from hrpro.engine.backends.session import (
    CPU_PROVIDER,
    CUDA_OPTIONS,
    CUDA_PROVIDER,
    session_options,
)

_log = logging.getLogger(__name__)

Provider = Literal["auto", "cpu", "cuda"]
# ONNX Runtime's exceptions have no ancestor of their own.
_RUNTIME_ERRORS = tuple(
    each
    for each in vars(onnxruntime_pybind11_state).values()
    if isinstance(each, type) and issubclass(each, Exception)
)
_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}
# In one run. On a CPU the activations of more have no room in its caches.
_IMAGES_AT_ONCE = {"cpu": 8, "cuda": 64}


def centre_crop(images: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """The middle (..., height, width, C) of images (..., H, W, C)."""
    H, W = images.shape[-3:-1]
    top, left = (H - height) // 2, (W - width) // 2
    return images[..., top : top + height, left : left + width, :]


class NetworkSession:
    """A network that is loaded and has made features of black images once.

    Raises ExtractorError where it is no network or not the one that the manifest describes.
    """

    def __init__(
        self,
        folder: Path,
        network: Network,
        manifest: ExtractorManifest,
        provider: Provider,
        threads: int,
    ) -> None:
        self._network = network
        self._path = folder / network.file
        self._picked = [manifest.frame_offsets.index(offset) for offset in network.frames]
        self._crop = network.crop or (manifest.height, manifest.width)
        mean, std = np.array(network.mean, np.float32), np.array(network.std, np.float32)
        self._factor, self._offset = np.float32(network.scale) / std, -mean / std
        self._session = _open(self._path, provider, threads)
        self._input, self._dtype = self._check_input()
        self._output = self._check_output()
        images = network.image_count if network.takes_clips else 1
        at_once = _IMAGES_AT_ONCE[self.provider]
        self._rows_at_once = 1 if self._input.shape[0] == 1 else max(1, at_once // images)
        self._run(np.zeros((1, images, *self._crop, network.channel_count), np.float32))

    @property
    def provider(self) -> Literal["cpu", "cuda"]:
        """Where it computes."""
        return "cuda" if self._session.get_providers()[0] == CUDA_PROVIDER else "cpu"

    def features(self, snippets: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, D of this network) of snippets (n, F, H, W, 3), n >= 1."""
        # (n, images, H, W, C)
        images = centre_crop(self._images(snippets[:, self._picked]), *self._crop)
        n, T, *image = images.shape
        if self._network.takes_clips:
            return self._all_rows(images)
        each = self._all_rows(images.reshape(n * T, 1, *image)).reshape(n, T, -1)
        mean = each.mean(axis=1)
        if self._network.pooling == "mean":
            return mean
        difference = np.abs(np.diff(each, axis=1)).mean(axis=1)
        return np.concatenate([mean, difference], axis=1)

    def _images(self, frames: NDArray[np.uint8]) -> NDArray[Any]:
        """Colours (n, T, H, W, 3) or flow (n, T, H, W, 2) of frames (n, F, H, W, 3)."""
        if self._network.flow is None:
            return frames if self._network.channels == "rgb" else frames[..., ::-1]
        from hrpro.clients.cameras.flow import optical_flow

        method, limit_px = self._network.flow.method, self._network.flow.limit_px
        return np.stack([optical_flow(each, method) for each in frames]).clip(-limit_px, limit_px)

    def _all_rows(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """What the network makes (m, features) of rows (m, T, H, W, C), some at a time."""
        made = np.empty((len(images), self._network.features), np.float32)
        for first in range(0, len(images), self._rows_at_once):
            rows = slice(first, first + self._rows_at_once)
            made[rows] = self._run(images[rows] * self._factor + self._offset)
        return made

    def _run(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """One run, for rows (m, T, H, W, C) that are normalised."""
        axes = "NTHWC"
        if not self._network.takes_clips:
            rows, axes = rows[:, 0], "NHWC"
        given = rows.transpose([axes.index(axis) for axis in self._network.layout])
        given = np.ascontiguousarray(given, dtype=self._dtype)
        try:
            (made,) = self._session.run([self._output], {self._input.name: given})
        except _RUNTIME_ERRORS as error:
            raise ExtractorError(
                f"{self._path}: cannot compute an input {given.shape}: {error}"
            ) from None
        expected = (len(rows), self._network.features)
        # Axes of length 1 are what a pooling over all of the image leaves.
        if made.size != expected[0] * expected[1] or made.shape[:2] != expected:
            raise ExtractorError(
                f"{self._path}: expected an output {expected}, as features of "
                f"{'clips' if self._network.takes_clips else 'images'}, got {made.shape}"
            )
        if not np.isfinite(made).all():
            raise ExtractorError(f"{self._path}: expected finite features, got NaN or infinity")
        return made.reshape(expected).astype(np.float32, copy=False)

    def _check_input(self) -> tuple[Any, type[np.generic]]:
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(each.name for each in inputs)
            raise ExtractorError(f"{self._path}: expected one input, got {len(inputs)}: {names}")
        if inputs[0].type not in _DTYPES:
            raise ExtractorError(
                f"{self._path}: expected an input of {', '.join(_DTYPES)}, got {inputs[0].type}"
            )
        sizes = {
            "N": 1,
            "T": self._network.image_count,
            "C": self._network.channel_count,
            "H": self._crop[0],
            "W": self._crop[1],
        }
        expected = tuple(sizes[axis] for axis in self._network.layout)
        shape = inputs[0].shape  # names or None stand for any size
        fits = len(shape) == len(expected) and all(
            not isinstance(has, int) or has == size
            for has, size in zip(shape, expected, strict=True)
        )
        if not fits:
            raise ExtractorError(
                f"{self._path}: expected an input that {self._network.layout} = {expected} fits, "
                f"N being 1 or any, got {shape}"
            )
        return inputs[0], _DTYPES[inputs[0].type]

    def _check_output(self) -> str:
        names = [each.name for each in self._session.get_outputs()]
        if self._network.output is None:
            return str(names[0])
        if self._network.output not in names:
            raise ExtractorError(
                f"{self._path}: expected an output {self._network.output!r}, got {', '.join(names)}"
            )
        return self._network.output


def _open(path: Path, provider: Provider, threads: int) -> onnxruntime.InferenceSession:
    providers: list[Any] = [CPU_PROVIDER]
    if provider == "cuda" or (provider == "auto" and _has_cuda()):
        providers.insert(0, (CUDA_PROVIDER, CUDA_OPTIONS))
    try:
        session = onnxruntime.InferenceSession(path, session_options(threads), providers)
    except _RUNTIME_ERRORS as error:
        raise ExtractorError(f"{path}: no ONNX model that can be run: {error}") from None
    used = session.get_providers()[0]
    # ONNX Runtime falls back to the CPU without an error.
    if len(providers) > 1 and used != CUDA_PROVIDER:
        problem = f"expected ONNX Runtime to compute by {CUDA_PROVIDER}, it took {used}"
        if provider == "cuda":
            raise ExtractorError(
                f"provider cuda: {problem}; its own message above says why (a missing GPU, driver "
                "or library)"
            )
        _log.warning("%s", problem)
    return session


def _has_cuda() -> bool:
    """Whether this ONNX Runtime can use a GPU and its driver is there."""
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        return False
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
