"""What a browser can play of a video, and when each of its frames is shown.

A video that browsers play is served as it is; of another one a copy is made, once, in a cache
folder: H.264 with a key frame every few frames, so that steps are quick, and the same time stamps.
Either way a page gets the time of every frame, and need not guess a frame rate.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from hrpro.engine.wire import HrproError

Progress = Callable[[float], None]

# What Chromium, Firefox and Safari decode, by container; 8 bits with halved colours alone.
_PLAYABLE = {"mp4": {"h264", "vp9", "av1"}, "webm": {"vp8", "vp9", "av1"}}
_PIXELS = {"yuv420p", "yuvj420p"}

# Quick to make rather than small: 390 frames of 768 x 576 a second on two cores.
_OPTIONS = {"preset": "ultrafast", "crf": "26", "g": "12", "bf": "0"}
_MOST_LINES = 720
_KEPT_S = 30 * 24 * 3600.0


class VideoError(HrproError, ValueError):
    """A file that no frames can be had from; the message names it."""


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path}: expected a video, there is none in it")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        raise VideoError(f"{path}: cannot be read as a video: {error.strerror}") from None


def playable_type(path: Path) -> str | None:
    """The media type if browsers play it as it is, by its codec and not by its name."""
    with _opened(path) as (container, stream):
        codec = stream.codec_context
        formats = set(container.format.name.split(",")) & _PLAYABLE.keys()
        fits = any(codec.codec.canonical_name in _PLAYABLE[each] for each in formats)
        return f"video/{formats.pop()}" if fits and codec.pix_fmt in _PIXELS else None


def frame_times(path: Path, progress: Progress) -> NDArray[np.float64]:
    """When each frame is shown, (N,) seconds from the first; read without decoding."""
    with _opened(path) as (container, stream):
        if stream.time_base is None:
            raise VideoError(f"{path}: its frames have no time stamps")
        is_vp8 = stream.codec_context.codec.canonical_name == "vp8"
        shown = set()
        for packet in container.demux(stream):
            # VP8 has frames that are only referred to; a bit of the first byte tells.
            hidden = packet.is_discard or (is_vp8 and packet.size and not bytes(packet)[0] & 0x10)
            if packet.pts is not None and not hidden:
                shown.add(packet.pts)
                progress(_share(packet.pts, stream))
    if not shown:
        raise VideoError(f"{path}: expected frames with time stamps, there are none")
    stamps = np.array(sorted(shown), dtype=np.int64)
    base = Fraction(stream.time_base)
    return (stamps - stamps[0]) * base.numerator / base.denominator


def _share(pts: int, stream: VideoStream) -> float:
    """How much of the video lies before a time stamp, as far as its header tells."""
    return min((pts - (stream.start_time or 0)) / stream.duration, 1.0) if stream.duration else 0.0


def playable_copy(path: Path, progress: Progress) -> Path:
    """A copy that browsers play, made now or before, with the frames and times of the original."""
    status = path.stat()
    source = f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}\n{_OPTIONS}{_MOST_LINES}"
    folder = _cache_folder()
    copy = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.mp4"
    if copy.exists():
        os.utime(copy)
        return copy
    unfinished = copy.with_suffix(f".{os.getpid()}.part")
    try:
        _convert(path, unfinished, progress)
        unfinished.replace(copy)
    finally:
        unfinished.unlink(missing_ok=True)
    return copy


def _cache_folder() -> Path:
    """The cache, without what has not been used for a month."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "hrpro" / "label"
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process clears, too
            if file.stat().st_mtime < time.time() - _KEPT_S:
                file.unlink()
    return folder


def _convert(path: Path, to: Path, progress: Progress) -> None:
    with (
        _opened(path) as (container, stream),
        av.open(str(to), "w", format="mp4", options={"movflags": "+faststart"}) as output,
    ):
        stream.thread_type = "AUTO"
        made = output.add_stream("libx264", rate=stream.average_rate or 25, options=_OPTIONS)
        last: int | None = None
        for frame in _frames(container, stream):
            if frame.pts is None or (last is not None and frame.pts <= last):
                continue  # it has no time of its own at which it could be shown
            if last is None:
                _like(made, frame, stream)
            last = frame.pts
            picture = frame.reformat(made.width, made.height, "yuv420p")
            picture.pts, picture.time_base = last, frame.time_base
            picture.pict_type = PictureType.NONE  # else key frames would be where they were
            output.mux(made.encode(picture))
            progress(_share(last, stream))
        if last is None:
            raise VideoError(f"{path}: expected frames with time stamps, there are none")
        output.mux(made.encode(None))


def _frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """A damaged packet costs its own frames and no more."""
    for packet in container.demux(stream):
        with contextlib.suppress(av.InvalidDataError):
            yield from packet.decode()


def _like(made: VideoStream, frame: VideoFrame, stream: VideoStream) -> None:
    """The form of a copy: even numbers of pixels, and not more lines than a page shows."""
    scale = min(1.0, _MOST_LINES / frame.height)
    made.width = max(2, int(frame.width * scale / 2) * 2)
    made.height = max(2, int(frame.height * scale / 2) * 2)
    made.pix_fmt = "yuv420p"
    if stream.sample_aspect_ratio:
        made.codec_context.sample_aspect_ratio = stream.sample_aspect_ratio
    assert frame.time_base is not None  # a decoder gives it
    made.codec_context.time_base = frame.time_base
    if frame.rotation:
        made.set_display_rotation(frame.rotation)
