"""Small pictures of streams, kept for some minutes and served over HTTP.

    GET /streams                         ["front-door", "yard"]
    GET /thumbnail/STREAM/INDEX.jpg      the picture at the snippet, or the nearest before it

Who has the token sends it as a bearer. Without one, only names of this machine are served, so that
no page of the web reaches the pictures under a name of its own.
"""

from __future__ import annotations

import bisect
import contextlib
import hmac
import ipaddress
import math
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from urllib.parse import urlsplit

import av
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from hrpro.engine.timebase import SnippetClock
from hrpro.engine.wire import HrproError

WIDTH_PX = 160
KEPT_S = 600
TOKEN_VARIABLE = "HRPRO_THUMBNAILS_TOKEN"  # noqa: S105 - the name of one
_SHORTEST_TOKEN = 16
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_SECONDS_BETWEEN = 1.0


class ThumbnailRing:
    """The newest pictures of one stream, about one a second; filled by one thread, read by any."""

    def __init__(self, clock: SnippetClock) -> None:
        self._step = math.ceil(_SECONDS_BETWEEN / clock.snippet_s)  # snippets
        self._room = math.ceil(KEPT_S / (self._step * clock.snippet_s))
        self._kept: list[tuple[int, bytes]] = []  # ascending
        self._turn = threading.Lock()
        self._encoder = _JpegEncoder()

    def offer(self, index: int, frame: av.VideoFrame) -> None:
        """A frame of snippet ``index``; most are not needed."""
        if self._kept and index < self._kept[-1][0] + self._step:
            return
        jpeg = self._encoder.encode(frame)
        with self._turn:
            self._kept.append((index, jpeg))
            del self._kept[: -self._room]

    def at(self, index: int) -> tuple[int, bytes] | None:
        """The newest picture of snippet ``index`` or before: its snippet and the JPEG."""
        with self._turn:
            behind = bisect.bisect_right(self._kept, index, key=lambda each: each[0])
            return self._kept[behind - 1] if behind else None


class _JpegEncoder:
    """JPEG by FFmpeg, WIDTH_PX wide."""

    def __init__(self) -> None:
        self._context: av.VideoCodecContext | None = None
        self._count = 0

    def encode(self, frame: av.VideoFrame) -> bytes:
        height = max(2, round(frame.height * WIDTH_PX / frame.width / 2) * 2)
        if self._context is None or self._context.height != height:
            self._context = _new_context(height)
        small = frame.reformat(WIDTH_PX, height, "yuvj420p", interpolation="AREA")
        # Frames are counted for the encoder, which takes none twice.
        small.pts, small.time_base = self._count, self._context.time_base
        self._count += 1
        return b"".join(bytes(packet) for packet in self._context.encode(small))


def _new_context(height: int) -> av.VideoCodecContext:
    context = av.VideoCodecContext.create("mjpeg", "w")
    context.width, context.height, context.pix_fmt = WIDTH_PX, height, "yuvj420p"
    context.time_base = Fraction(1, 25)
    context.options = {"qmin": "4", "qmax": "4"}
    return context


# ---- served --------------------------------------------------------------------------------------


def read_token(file: Path | None) -> str | None:
    """The token of a file's first line, or else of the environment. Raises HrproError."""
    if file is None:
        token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    else:
        lines = file.read_text(encoding="utf-8").splitlines()
        token, where = lines[0].strip() if lines else "", str(file)
    if token is not None and (len(token) < _SHORTEST_TOKEN or not token.isascii()):
        raise HrproError(
            f"{where}: expected a token of at least {_SHORTEST_TOKEN} ASCII characters, came "
            f"{len(token)}; openssl rand -hex 24 makes one"
        )
    return token


def thumbnail_app(rings: Mapping[str, ThumbnailRing], token: str | None) -> Starlette:
    """What answers; see the module."""

    async def streams(request: Request) -> Response:
        return _refused(request.headers, token) or JSONResponse(list(rings))

    async def thumbnail(request: Request) -> Response:
        if answer := _refused(request.headers, token):
            return answer
        ring = rings.get(request.path_params["stream"])
        found = ring.at(request.path_params["index"]) if ring is not None else None
        if found is None:
            return PlainTextResponse("no picture of that\n", 404)
        index, jpeg = found
        headers = {"X-Snippet-Index": str(index), "Cache-Control": "no-store"}
        return Response(jpeg, media_type="image/jpeg", headers=headers)

    return Starlette(
        routes=[
            Route("/streams", streams),
            Route("/thumbnail/{stream}/{index:int}.jpg", thumbnail),
        ]
    )


def _refused(headers: Headers, token: str | None) -> Response | None:
    """The answer to a request that is not let in."""
    if token is None:
        if _hostname(headers.get("host", "")) in _LOCAL_NAMES:
            return None
        return PlainTextResponse("expected a name of this machine\n", 421)
    scheme, _, came = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and hmac.compare_digest(came.encode(), token.encode()):
        return None
    return PlainTextResponse("expected the token\n", 401, {"WWW-Authenticate": "Bearer"})


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


@contextlib.contextmanager
def thumbnail_server(
    address: str, rings: Mapping[str, ThumbnailRing], token: str | None
) -> Iterator[str]:
    """Answers at HOST:PORT while the block lasts; yields its URL.

    An empty host is 127.0.0.1, and port 0 a free one. Raises HrproError, also for an address that
    others can reach where there is no token.
    """
    host, port = _parse(address)
    if token is None and not _is_loopback(host):
        raise HrproError(
            f"--thumbnails {address}: others could reach it; give a token by "
            f"--thumbnails-token-file or {TOKEN_VARIABLE}, or a loopback address"
        )
    try:
        bound = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        reason = error.strerror or error
        raise HrproError(f"--thumbnails {address}: cannot listen there: {reason}") from None
    config = uvicorn.Config(thumbnail_app(rings, token), log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), name="thumbnails")
    with bound:
        thread.start()
        try:
            shown = f"[{host}]" if ":" in host else host
            yield f"http://{shown}:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def _parse(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise HrproError(
            f"--thumbnails: expected HOST:PORT, such as 127.0.0.1:8090, came {address}"
        )
    return host.strip("[]") or "127.0.0.1", int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def new_rings(streams: Sequence[str], clock: SnippetClock) -> dict[str, ThumbnailRing]:
    """An empty ring for each stream."""
    return {stream: ThumbnailRing(clock) for stream in streams}
