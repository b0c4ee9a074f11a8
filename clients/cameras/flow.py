"""Optical flow by OpenCV; needs the extra `i3d`."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.cameras.manifest import ExtractorError, FlowMethod

_local = threading.local()


def optical_flow(frames: NDArray[np.uint8], method: FlowMethod) -> NDArray[np.float32]:
    """Motion (F - 1, H, W, 2) in pixels, x and y, from each RGB frame (F, H, W, 3) to the next.

    tvl1 is what I3D was trained with (Zach, Pock and Bischof, *A Duality Based Approach for
    Realtime TV-L1 Optical Flow*, 2007); dis is far faster (Kroeger et al., *Fast Optical Flow using
    Dense Inverse Search*, 2016). Raises ExtractorError where OpenCV is not installed.
    """
    by = _by(method)
    grey = [_grey(frame) for frame in frames]
    return np.stack([by.calc(before, after, None) for before, after in itertools.pairwise(grey)])


def _by(method: FlowMethod) -> Any:
    # Each keeps its buffers between calls, and is for one thread.
    if not hasattr(_local, method):
        try:
            import cv2
            from cv2 import optflow
        except ImportError:
            raise ExtractorError(
                "optical flow needs OpenCV with its contributed modules: "
                "pip install 'hrpro-stream[i3d]'"
            ) from None
        # OpenCV's own types know nothing of the former.
        if method == "tvl1":
            by: Any = optflow.DualTVL1OpticalFlow_create()  # type: ignore[attr-defined]
        else:
            by = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        setattr(_local, method, by)
    return getattr(_local, method)


def _grey(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import cv2

    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8)
