"""Where frames come from, by FFmpeg: RTSP and HTTP cameras, devices, files, standard input.

    rtsp://, rtsps://     live; over TCP unless asked otherwise
    http://, https://     live: MJPEG, HLS, MPEG-TS and whatever else FFmpeg reads
    /dev/videoN           live, by Video4Linux
    a file, or -          a recording: it has an end
    @FILE                 the address in the first line of a file: passwords are then on no command
                          line, where other users of the machine could read them

What a source is called in messages has no user, password, query or parameter of it.

    SourceError    a source that cannot be opened or read; the message names it
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import av
import av.error
from av.container import InputContainer
from av.video.stream import VideoStream

from hrpro.clients.web import first_line
from hrpro.engine.wire import HrproError

RtspTransport = Literal["tcp", "udp"]
Kind = Literal["rtsp", "http", "device", "file", "stdin"]

TimedFrame = tuple[av.VideoFrame, Fraction]  # and from when on it is shown, in seconds

STALL_S = 10.0
_SCHEMES: dict[str, Kind] = {"rtsp": "rtsp", "rtsps": "rtsp", "http": "http", "https": "http"}
_DEVICE = re.compile(r"/dev/video\d+")
_LONGEST_NAME = 64
# Of a format without time stamps whose rate is not known, too: that of FFmpeg's raw formats.
_USUAL_RATE = Fraction(25)
_AVFMT_NOTIMESTAMPS = 0x80


class SourceError(HrproError):
    """A source that cannot be opened or read; the message names it, without its password."""


@dataclass(frozen=True)
class Source:
    """A source as it was given: ``shown`` is its name in messages, ``stream`` the stream's."""

    kind: Kind
    address: str = field(repr=False)
    shown: str
    stream: str

    @property
    def is_live(self) -> bool:
        """Whether it goes on without end, at its own pace, and cannot be read again."""
        return self.kind in ("rtsp", "http", "device")


def parse_source(text: str) -> Source:
    """The source that is meant. Raises HrproError for one that cannot be any."""
    if text.startswith("@"):
        return parse_source(first_line(Path(text[1:])).lstrip("@"))
    if text == "-":
        return Source("stdin", "pipe:0", "standard input", "stdin")
    scheme, separator, _ = text.partition("://")
    if separator:
        return _remote(text, scheme.lower())
    if _DEVICE.fullmatch(text):
        return Source("device", text, text, _name(text.rpartition("/")[2]))
    if not Path(text).exists():
        raise SourceError(f"{text}: expected a video file, a device or an address; it is not there")
    return file_source(Path(text))


def file_source(path: Path) -> Source:
    """A video file, whatever its name looks like. Raises SourceError."""
    if not path.exists():
        raise SourceError(f"{path}: expected a video file, it is not there")
    if path.is_dir():
        raise SourceError(f"{path}: expected a video file, came a folder")
    # With the protocol, else a colon in the name would end one.
    return Source("file", f"file:{path}", str(path), _name(path.stem))


def _remote(text: str, scheme: str) -> Source:
    kind = _SCHEMES.get(scheme)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if kind is None or not host:
        # Not as it came: it may have a password.
        raise SourceError(
            f"a source: expected {', '.join(f'{each}://HOST' for each in _SCHEMES)}, a device "
            "/dev/videoN, a file or -"
        )
    # Some cameras have their password in the path, as a parameter.
    plain = [each for each in parts.path.split("/") if each and not re.search("[=&;@]", each)]
    where = [host if port is None else f"{host}:{port}", *plain]
    return Source(kind, text, f"{scheme}://{'/'.join(where)}", _name("-".join(where)))


def _name(text: str) -> str:
    """A stream of that name, as far as the protocol has its characters."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")
    return name[:_LONGEST_NAME] or "camera"


def read_frames(
    source: Source, stall_s: float = STALL_S, rtsp_transport: RtspTransport = "tcp"
) -> Iterator[TimedFrame]:
    """The frames of the first video stream as they are decoded, with their time stamps in seconds.

    Returns where the source ends. Raises SourceError where it cannot be opened or read, and where a
    live one gives no frame for ``stall_s``. What cannot be decoded is left out.
    """
    try:
        with _opened(source, stall_s, rtsp_transport) as container:
            if not container.streams.video:
                raise SourceError(f"{source.shown}: expected a video, there is none in it")
            yield from _decoded(source, container, container.streams.video[0], stall_s)
    except av.error.ExitError:
        raise SourceError(f"{source.shown}: nothing came for {stall_s:g} s") from None
    except (av.error.FFmpegError, OSError, ValueError) as error:
        # Its own text has the address as it was given.
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise SourceError(f"{source.shown}: {reason}") from None


def _opened(source: Source, stall_s: float, rtsp_transport: RtspTransport) -> InputContainer:
    options: dict[str, str] = {"rtsp_transport": rtsp_transport} if source.kind == "rtsp" else {}
    return av.open(
        source.address,
        format="v4l2" if source.kind == "device" else None,
        options=options,
        timeout=stall_s if source.is_live else None,
    )


def _decoded(
    source: Source, container: InputContainer, stream: VideoStream, stall_s: float
) -> Iterator[TimedFrame]:
    if source.is_live:
        stream.thread_count = 1  # several would each keep a frame back
    else:
        stream.thread_type = "AUTO"
    stamps = _TimeStamps(source, container, stream)
    frame_came_s = time.monotonic()
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            frames = []
        for frame in frames:
            if (time_s := stamps.of(frame)) is not None:
                yield frame, time_s
                frame_came_s = time.monotonic()
        if source.is_live and time.monotonic() - frame_came_s > stall_s:
            raise SourceError(f"{source.shown}: no frame with a time stamp for {stall_s:g} s")


class _TimeStamps:
    """When frames are shown, in seconds from any beginning.

    Formats that have no time stamps: frames of a camera are shown when they come, and those of a
    recording follow each other at its rate.
    """

    def __init__(self, source: Source, container: InputContainer, stream: VideoStream) -> None:
        has_none = bool(container.format.flags & _AVFMT_NOTIMESTAMPS)
        self._is_live = source.is_live
        self._by_arrival = source.is_live and (has_none or container.format.name == "mpjpeg")
        self._step_s = 1 / (stream.average_rate or _USUAL_RATE)
        self._next_s = Fraction(0)

    def of(self, frame: av.VideoFrame) -> Fraction | None:
        """None for a camera's frame that has none though others do: RTSP may begin so."""
        if self._by_arrival:
            return Fraction(time.monotonic_ns(), 10**9)
        if frame.pts is not None and frame.time_base is not None:
            time_s = frame.pts * frame.time_base
        elif self._is_live:
            return None
        else:
            time_s = self._next_s
        self._next_s = time_s + self._step_s
        return time_s
