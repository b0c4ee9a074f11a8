"""Small pictures of streams, kept for some minutes and served over HTTP.

    GET /streams                         ["front-door", "yard"]
    GET /thumbnail/STREAM/INDEX.jpg      the picture at the snippet, or the nearest before it

Who has the token sends it as a bearer. Without one, only names of this machine are served, so that
no page of the web reaches the pictures under a name of its own.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from fractions import Fraction

import av
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from hrpro.clients import web
from hrpro.engine.timebase import SnippetClock

WIDTH_PX = 160
KEPT_S = 600
OPTION = "--thumbnails"
TOKEN_VARIABLE = "HRPRO_THUMBNAILS_TOKEN"  # noqa: S105 - the name of one
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


def thumbnail_app(
    rings: Mapping[str, ThumbnailRing], token: str | None, host: str = "127.0.0.1"
) -> Starlette:
    """What answers on a host; see the module."""
    names = web.LOCAL_NAMES | {host}

    async def streams(request: Request) -> Response:
        return _refused(request.headers, token, names) or JSONResponse(list(rings))

    async def thumbnail(request: Request) -> Response:
        if answer := _refused(request.headers, token, names):
            return answer
        ring = rings.get(request.path_params["stream"])
        index = web.snippet_index(request.path_params["index"])
        found = ring.at(index) if ring is not None and index is not None else None
        if found is None:
            return PlainTextResponse("no picture of that\n", 404)
        index, jpeg = found
        headers = {"X-Snippet-Index": str(index), "Cache-Control": "no-store"}
        return Response(jpeg, media_type="image/jpeg", headers=headers)

    return Starlette(
        routes=[
            Route("/streams", streams),
            Route("/thumbnail/{stream}/{index}.jpg", thumbnail),
        ]
    )


def _refused(headers: Headers, token: str | None, names: Set[str]) -> Response | None:
    """The answer to a request that is not let in."""
    if token is None:
        if web.hostname(headers.get("host", "")) in names:
            return None
        return PlainTextResponse("expected a name of this machine\n", 421)
    if web.is_same(web.bearer(headers.get("authorization", "")), token):
        return None
    return PlainTextResponse("expected the token\n", 401, {"WWW-Authenticate": "Bearer"})


@contextlib.contextmanager
def thumbnail_server(
    address: str, rings: Mapping[str, ThumbnailRing], token: str | None
) -> Iterator[str]:
    """Answers at HOST:PORT while the block lasts; yields its URL.

    An empty host is 127.0.0.1, and port 0 a free one. Raises HrproError, also for an address that
    others can reach where there is no token.
    """
    host, port = web.parse_http_address(address, OPTION)
    web.check_reach(host, token, OPTION, f"--thumbnails-token-file or {TOKEN_VARIABLE}")
    bound, url = web.listening(host, port, OPTION)
    config = uvicorn.Config(thumbnail_app(rings, token, host), log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), name="thumbnails")
    with bound:
        thread.start()
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join()


def new_rings(streams: Sequence[str], clock: SnippetClock) -> dict[str, ThumbnailRing]:
    """An empty ring for each stream."""
    return {stream: ThumbnailRing(clock) for stream in streams}
