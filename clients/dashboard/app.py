"""The dashboard over HTTP: the page, its files, thumbnails, and one WebSocket for each page.

    GET  /                               the page, or the way to /login
    GET  /login, POST /login             the form for the token, and its cookie
    POST /logout                         takes the cookie away
    GET  /static/...                     what the page is made of; public, there is nothing to hide
    GET  /thumbnail/STREAM/INDEX.jpg     passed on from a camera client
    WS   /live                           all that the board has, then what changes; nothing is read

Everything only reads. What a browser may do with the page is said in its headers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from hrpro.clients.dashboard.board import Board
from hrpro.clients.dashboard.door import COOKIE, Door
from hrpro.clients.dashboard.thumbnails import ThumbnailError, Thumbnails
from hrpro.clients.web import COMMON_FILES, snippet_index

# From one message to a page to the next; what came meanwhile is in one.
UPDATE_EVERY_S = 0.25
# Where nothing changes, a page still hears that the dashboard is there.
SIGN_EVERY_S = 5.0
MOST_PAGES = 64
PICTURES_AT_A_TIME = 4
_LONGEST_FORM_BYTES = 4096
_TRY_AGAIN_LATER = 1013
_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    # With less, the form for the token would come without its origin.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_PUBLIC = ("/static/", "/login")


def create_app(board: Board, door: Door, thumbnails: Thumbnails) -> ASGIApp:
    """The whole application, with its door before it."""
    pages = _Pages(board, door, thumbnails)
    static = StaticFiles(packages=[("hrpro.clients.dashboard", "static"), COMMON_FILES])
    return _Entrance(
        Starlette(
            routes=[
                Route("/", pages.index),
                Route("/login", pages.login_form, methods=["GET"]),
                Route("/login", pages.login, methods=["POST"]),
                Route("/logout", pages.logout, methods=["POST"]),
                Route("/thumbnail/{stream}/{index}.jpg", pages.thumbnail),
                WebSocketRoute("/live", pages.live),
                Mount("/static", static),
            ],
        ),
        door,
    )


def _static() -> Path:
    return Path(str(files("hrpro.clients.dashboard") / "static"))


class _Entrance:
    """Turns away who may not come in, and puts the headers on every answer."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                if not scope["path"].startswith("/thumbnail/"):
                    headers["Cache-Control"] = "no-cache"
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send_with_headers)
        elif scope["type"] == "websocket":
            await WebSocket(scope, receive, send).close()  # before it is accepted: 403
        else:
            await refusal(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if not self._door.knows_name(headers):
            return PlainTextResponse("this name is not served here\n", 403)
        changes = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD")
        if changes and not self._door.is_same_origin(headers):
            return PlainTextResponse("that is for the dashboard's own page\n", 403)
        if scope["path"].startswith(_PUBLIC) or self._door.admits(headers):
            return None
        if scope["path"] == "/":
            return RedirectResponse("/login", 303)
        return PlainTextResponse("expected the token\n", 401, {"WWW-Authenticate": "Bearer"})


class _Pages:
    """What each route answers."""

    def __init__(self, board: Board, door: Door, thumbnails: Thumbnails) -> None:
        self._board = board
        self._door = door
        self._thumbnails = thumbnails
        self._connected = 0
        self._pictures = asyncio.Semaphore(PICTURES_AT_A_TIME)

    async def index(self, _request: Request) -> Response:
        return FileResponse(_static() / "index.html")

    async def login_form(self, _request: Request) -> Response:
        return FileResponse(_static() / "login.html")

    async def login(self, request: Request) -> Response:
        form = await _form(request)
        if not self._door.takes(form.get("token", "")):
            return RedirectResponse("/login?refused", 303)
        answer = RedirectResponse("/", 303)
        is_secret = request.url.scheme == "https"
        answer.set_cookie(
            COOKIE, self._door.cookie(), secure=is_secret, httponly=True, samesite="strict"
        )
        return answer

    async def logout(self, _request: Request) -> Response:
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return answer

    async def thumbnail(self, request: Request) -> Response:
        stream, index = request.path_params["stream"], snippet_index(request.path_params["index"])
        if index is None:
            return PlainTextResponse("expected the index of a snippet\n", 404)
        try:
            async with self._pictures:
                picture = await asyncio.to_thread(self._thumbnails.picture, stream, index)
        except ThumbnailError as error:
            return PlainTextResponse(f"{error}\n", 502)
        if picture is None:
            return PlainTextResponse("nobody has this picture\n", 404)
        return Response(picture, media_type="image/jpeg", headers=_PICTURE_HEADERS)

    async def live(self, socket: WebSocket) -> None:
        """Each page at its own pace: what it has not read yet holds up nobody else."""
        if self._connected >= MOST_PAGES:
            await socket.accept()
            await socket.close(_TRY_AGAIN_LATER, "too many pages are open")
            return
        self._connected += 1
        try:
            await socket.accept()
            telling = asyncio.create_task(self._tell(socket))
            await _until_closed(socket)
            telling.cancel()
            with contextlib.suppress(asyncio.CancelledError, WebSocketDisconnect):
                await telling
        finally:
            self._connected -= 1

    async def _tell(self, socket: WebSocket) -> None:
        async for text in self._messages():
            await socket.send_text(text)  # waits while the page has enough to read

    async def _messages(self) -> AsyncIterator[str]:
        """One for all that has changed since the one before was taken, or as a sign of life."""
        revision, offered, quiet_s = 0, None, 0.0
        while True:
            streams = self._thumbnails.streams
            if self._board.revision > revision or streams != offered or quiet_s >= SIGN_EVERY_S:
                more: dict[str, Any] = {"needs_token": not self._door.is_open}
                if streams != offered:
                    more["thumbnails"] = streams
                # The first one may be megabytes; other pages go on meanwhile.
                revision, text = await asyncio.to_thread(self._message, revision, more)
                offered, quiet_s = streams, 0.0
                yield text
            await asyncio.sleep(UPDATE_EVERY_S)
            quiet_s += UPDATE_EVERY_S

    def _message(self, since: int, more: Mapping[str, Any]) -> tuple[int, str]:
        """What has changed, and up to which revision."""
        message = {**self._board.changes(since), **more}
        return message["revision"], json.dumps(message, ensure_ascii=False, separators=(",", ":"))


# A snippet's picture does not change; who may see it is asked again after a while.
_PICTURE_HEADERS: Mapping[str, str] = {"Cache-Control": "private, max-age=300"}


async def _until_closed(socket: WebSocket) -> None:
    """Pages have nothing to say."""
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            await socket.receive_text()


async def _form(request: Request) -> Mapping[str, str]:
    """The fields of a form; none of one that is too long."""
    body = b""
    with contextlib.suppress(ClientDisconnect):
        async for part in request.stream():
            body += part
            if len(body) > _LONGEST_FORM_BYTES:
                return {}
    fields = parse_qs(body.decode("utf-8", "replace"))
    return {name: values[0] for name, values in fields.items()}
