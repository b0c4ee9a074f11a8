"""Videos whose frames say which one they are: their number in ten blocks, light for a one."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

BLOCKS = 10
BLOCK = 32
HEIGHT = 96


def picture(number: int) -> NDArray[np.uint8]:
    """RGB (H, W, 3)."""
    image = np.full((HEIGHT, BLOCKS * BLOCK, 3), 60, np.uint8)
    for bit in range(BLOCKS):
        image[:48, bit * BLOCK : (bit + 1) * BLOCK] = 230 if number >> bit & 1 else 20
    return image


def number_of(frame: av.VideoFrame) -> int:
    """What a frame says."""
    light = frame.reformat(BLOCKS * BLOCK, HEIGHT, "gray").to_ndarray()[24, BLOCK // 2 :: BLOCK]
    return sum(1 << bit for bit in range(BLOCKS) if light[bit] > 128)


def write_video(
    path: Path,
    stamps: Sequence[int],
    time_base: Fraction = Fraction(1, 25),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    form: str | None = None,
    rotation: int = 0,
    **options: str,
) -> Path:
    """Frame n is shown at ``stamps[n]`` * ``time_base``."""
    with av.open(str(path), "w", format=form) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = BLOCKS * BLOCK, HEIGHT, pixels
        stream.codec_context.time_base = time_base
        if rotation:
            stream.set_display_rotation(rotation)
        for number, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(picture(number), "rgb24")
            frame.pts, frame.time_base = stamp, time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path
