"""Optical flow by TV-L1, as for the published features of I3D; needs the extra `i3d`."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.cameras.manifest import ExtractorError

_local = threading.local()


def optical_flow(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Motion (F - 1, H, W, 2) in pixels, x and y, from each RGB frame (F, H, W, 3) to the next.

    Raises ExtractorError where OpenCV's extra modules are not installed.
    """
    method = _method()
    grey = [_grey(frame) for frame in frames]
    return np.stack([method.calc(*pair, None) for pair in itertools.pairwise(grey)])


def check_flow() -> None:
    """Raise ExtractorError where optical flow cannot be computed."""
    _method()


def _method() -> Any:
    # It keeps pyramids between calls, and is for one thread.
    if not hasattr(_local, "method"):
        try:
            from cv2 import optflow
        except ImportError:
            raise ExtractorError(
                "optical flow needs OpenCV with its extra modules: pip install 'hrpro-stream[i3d]'"
            ) from None
        # OpenCV's own types know nothing of it.
        _local.method = optflow.DualTVL1OpticalFlow_create()  # type: ignore[attr-defined]
    return _local.method


def _grey(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import cv2

    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))
