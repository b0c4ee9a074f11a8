"""How long an extractor takes, on pictures in which something moves."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.cameras.extractor import Extractor

_AT_LEAST_S = 1.0  # of measuring, and at least one run
_BLOCK = 8  # pixels


def snippet_ms(extractor: Extractor, count: int) -> float:
    """Milliseconds for one snippet in a batch of ``count``, the quickest of a second's runs."""
    snippets = np.stack([moving_picture(extractor)] * count)
    quickest_s, until_s = np.inf, time.monotonic() + _AT_LEAST_S
    while quickest_s == np.inf or time.monotonic() < until_s:
        begin_s = time.monotonic()
        extractor.extract(snippets)
        quickest_s = min(quickest_s, time.monotonic() - begin_s)
    return float(1000 * quickest_s / count)


def moving_picture(extractor: Extractor) -> NDArray[np.uint8]:
    """One snippet (F, H, W, 3): blocks of colour, two pixels further with each frame."""
    H, W = extractor.height, extractor.width
    blocks = np.random.default_rng(0).integers(
        0, 256, (H // _BLOCK + 1, W // _BLOCK + 1, 3), dtype=np.uint8
    )
    picture = blocks.repeat(_BLOCK, axis=0).repeat(_BLOCK, axis=1)[:H, :W]
    return np.stack([np.roll(picture, 2 * offset, axis=1) for offset in extractor.frame_offsets])
