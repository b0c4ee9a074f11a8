"""The page over HTTP. All of it lies below /TOKEN/, which who was told the URL alone can name.

    GET  /                        the page
    GET  /static/...              what the page is made of
    GET  /api/session             videos, classes, the file of points
    PUT  /api/classes             all classes, in the order of their keys
    GET  /api/videos/N            how far it is made ready; begins with that
    GET  /api/videos/N/media      the video, with ranges
    GET  /api/videos/N/times      float64, little-endian: seconds of each frame from the first
    GET  /api/videos/N/points     its points, and the file's version as ETag
    PUT  /api/videos/N/points     all its points; If-Match is the version that they come from

A PUT is answered when the file is on the disk; 412 says that another one has changed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hrpro.clients.label.classes import ClassFile
from hrpro.clients.label.point_file import ConflictError, Mark, PointFile
from hrpro.clients.label.videos import Playable, Video
from hrpro.clients.web import COMMON_FILES
from hrpro.engine.wire import HrproError

_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
# Longer than any video, and what it makes at any frame rate is a number.
_LONGEST_S = 1e7
_Seconds = Annotated[float, Field(ge=0, le=_LONGEST_S, allow_inf_nan=False)]
_POINTS = TypeAdapter(list[tuple[str, _Seconds]])
_LABELS = TypeAdapter(list[str])


@dataclass(frozen=True)
class Labelling:
    """What one run of `hrpro label` works on."""

    videos: Sequence[Video]
    points: PointFile
    classes: ClassFile


def create_app(labelling: Labelling, token: str, port: int) -> ASGIApp:
    """The whole application, with its door before it."""
    pages = _Pages(labelling)
    video = "/api/videos/{number:int}"
    routes = [
        Route("/", pages.index),
        Route("/api/session", pages.session),
        Route("/api/classes", pages.put_classes, methods=["PUT"]),
        Route(video, pages.video),
        Route(f"{video}/media", pages.media),
        Route(f"{video}/times", pages.times),
        Route(f"{video}/points", pages.points),
        Route(f"{video}/points", pages.put_points, methods=["PUT"]),
        Mount("/static", StaticFiles(packages=[("hrpro.clients.label", "static"), COMMON_FILES])),
    ]
    refusals = {HrproError: _refused, OSError: _failed, ValidationError: _not_understood}
    app = Starlette(routes=[Mount(f"/{token}", routes=routes)], exception_handlers=refusals)
    return _Door(app, port)


def _static() -> Path:
    return Path(str(files("hrpro.clients.label") / "static"))


class _Door:
    """Serves the names of this machine alone, and lets no other page change anything.

    A page of the web can make its own name lead here, but is known by it then; and what it sends
    to this machine's names carries its own origin.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._names = {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        answer = self._refusal(scope) or self._app
        await answer(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host")
        if host not in self._names:
            return PlainTextResponse("this name is not served here\n", 403)
        changes = scope["method"] not in ("GET", "HEAD")
        if changes and headers.get("origin") != f"http://{host}":
            return PlainTextResponse("that is for the page itself to do\n", 403)
        return None


class _Pages:
    """What each route answers. Those that read files are run in threads."""

    def __init__(self, labelling: Labelling) -> None:
        self._videos = labelling.videos
        self._points = labelling.points
        self._classes = labelling.classes

    def index(self, _request: Request) -> Response:
        return FileResponse(_static() / "index.html")

    def session(self, _request: Request) -> Response:
        return JSONResponse(
            {
                "videos": [{"name": each.name, "file": each.path.name} for each in self._videos],
                "classes": self._classes.labels,
                "counts": self._points.counts(),
                "points_file": str(self._points.path),
            }
        )

    async def put_classes(self, request: Request) -> Response:
        labels = _LABELS.validate_json(await request.body())
        missing = (await run_in_threadpool(self._points.counts)).keys() - set(labels)
        if missing:
            raise HTTPException(409, f"there are points of {', '.join(sorted(missing))}")
        await run_in_threadpool(self._classes.replace, labels)
        return JSONResponse({"classes": self._classes.labels})

    def video(self, request: Request) -> Response:
        video = self._video(request)
        video.prepare()
        said = {"state": video.state, "share": video.share_done, "problem": video.problem}
        return JSONResponse(said)

    def media(self, request: Request) -> Response:
        playable = self._playable(request)
        if not playable.file.is_file():
            raise HTTPException(404, f"{playable.file}: it is not there any more")
        return FileResponse(playable.file, media_type=playable.media_type)

    def times(self, request: Request) -> Response:
        times_s = self._playable(request).times_s.astype("<f8")
        return Response(times_s.tobytes(), media_type="application/octet-stream")

    def points(self, request: Request) -> Response:
        marks, version = self._points.marks(self._video(request).name)
        points = [asdict(mark) for mark in marks]
        return JSONResponse({"points": points}, headers={"ETag": f'"{version}"'})

    async def put_points(self, request: Request) -> Response:
        video = self._video(request)
        marks = [Mark(*each) for each in _POINTS.validate_json(await request.body())]
        unknown = {mark.label for mark in marks} - set(self._classes.labels)
        if unknown:
            raise HTTPException(422, f"no class is called {', '.join(sorted(unknown))}")
        version = request.headers.get("if-match", "").strip('"')
        made = await run_in_threadpool(self._points.replace, video.name, marks, version)
        return Response(status_code=204, headers={"ETag": f'"{made}"'})

    def _video(self, request: Request) -> Video:
        number = request.path_params["number"]
        if number >= len(self._videos):
            raise HTTPException(404, f"there are {len(self._videos)} videos, numbered from 0")
        return self._videos[number]

    def _playable(self, request: Request) -> Playable:
        playable = self._video(request).playable
        if playable is None:
            raise HTTPException(409, "it is not ready yet")
        return playable


def _refused(_request: Request, error: Exception) -> Response:
    return PlainTextResponse(f"{error}", 412 if isinstance(error, ConflictError) else 409)


def _failed(_request: Request, error: Exception) -> Response:
    return PlainTextResponse(f"{error}", 500)


def _not_understood(_request: Request, error: Exception) -> Response:
    return PlainTextResponse(f"not understood: {error}", 422)
