"""How long an extractor takes, on pictures in which something moves."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.cameras.extractor import Extractor

_AT_LEAST_S = 1.0  # of measuring, and at least one run
_BATCH = 8
_SLOW_MS = 1000.0  # one that takes longer for a snippet gains nothing from a batch
_BLOCK = 8  # pixels


@dataclass(frozen=True)
class Speed:
    """Milliseconds for a snippet: on the clock, and of processors, which others do not disturb."""

    snippet_ms: float
    processor_ms: float


def measure(extractor: Extractor) -> tuple[Speed, Speed]:
    """A snippet alone, and one in a batch of eight."""
    alone = _measure(extractor, 1)
    return alone, alone if alone.snippet_ms > _SLOW_MS else _measure(extractor, _BATCH)


def _measure(extractor: Extractor, count: int) -> Speed:
    """The quickest of a second's runs."""
    snippets = np.stack([moving_picture(extractor)] * count)
    taken_s, processor_s, until_s = np.inf, np.inf, time.monotonic() + _AT_LEAST_S
    while taken_s == np.inf or time.monotonic() < until_s:
        begin_s, begin_processor_s = time.monotonic(), time.process_time()
        extractor.extract(snippets)
        taken_s = min(taken_s, time.monotonic() - begin_s)
        processor_s = min(processor_s, time.process_time() - begin_processor_s)
    return Speed(1000 * taken_s / count, 1000 * processor_s / count)


def moving_picture(extractor: Extractor) -> NDArray[np.uint8]:
    """One snippet (F, H, W, 3): blocks of colour, two pixels further with each frame."""
    H, W = extractor.height, extractor.width
    blocks = np.random.default_rng(0).integers(
        0, 256, (H // _BLOCK + 1, W // _BLOCK + 1, 3), dtype=np.uint8
    )
    picture = blocks.repeat(_BLOCK, axis=0).repeat(_BLOCK, axis=1)[:H, :W]
    return np.stack([np.roll(picture, 2 * offset, axis=1) for offset in extractor.frame_offsets])
