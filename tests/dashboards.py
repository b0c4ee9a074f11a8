"""What the tests of the dashboard share: it as a process, a browser, and bare requests."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from commands import PATIENCE_S, Engine, running, wait_for

from hrpro.engine.protocol import ActionEvent

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PATIENCE_MS = PATIENCE_S * 1000
# For evaluating in a page: what it knows.
MODEL = "import('/static/main.js').then(({ model }) => { window.model = model; })"


TOKEN = "0123456789abcdef"
ONE = "0" * 16  # an instance
SNIPPET_S = 0.64


@dataclass(frozen=True)
class Dashboard:
    url: str
    process: subprocess.Popen[str]

    @property
    def address(self) -> str:
        return urlsplit(self.url).netloc

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def wait_subscribed(self) -> None:
        """Nothing that the engine sends is missed from here on."""
        with live_page(self.address) as live:
            hears: set[str] = set()
            while hears != {"events", "scores"}:
                hears.update(live.receive().get("engine", {}).get("hears", ()))


@contextlib.contextmanager
def dashboard(served: Engine, *options: object, http: str = "127.0.0.1:0") -> Iterator[Dashboard]:
    """`hrpro dashboard` of an engine; leaves, unless it was killed, in peace and silently."""
    sides = ("--events", served.events, "--control", served.control, "--http", http)
    with running("dashboard", *sides, "--json", *options) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        ready = json.loads(line)
        assert ready.pop("state") == "READY"
        yield Dashboard(**ready, process=process)
        process.terminate()
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
        assert (stdout, stderr) == ("", "")
        assert process.returncode in (0, -9)


def until(page: Page, expression: str, argument: object = None) -> None:
    """Returns once an expression is true in the page, or a function of the argument.

    Playwright's own `wait_for_function` evaluates in the page, which its policy forbids.
    """
    wait_for(lambda: bool(page.evaluate(expression, argument) or page.wait_for_timeout(30)))


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


def ask(address: str, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> Answer:
    """One request, byte by byte as it is told."""
    with request(address, path, method, body, **headers) as connection:
        return read_answer(connection)


@contextlib.contextmanager
def request(
    address: str, path: str, method: str = "GET", body: bytes = b"", **headers: str
) -> Iterator[socket.socket]:
    """A connection on which a request was sent; nothing is read. Names have _ for -."""
    host, _, port = address.rpartition(":")
    fields = {"host": address, "connection": "close", "content_length": str(len(body)), **headers}
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        yield connection


def read_answer(connection: socket.socket) -> Answer:
    """All of an answer; of a WebSocket that was accepted, its headers."""
    came = b""
    while b"\r\n\r\n" not in came:
        part = connection.recv(65536)
        assert part, came
        came += part
    head, _, body = came.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(re.split(r":\s*", line.lower(), maxsplit=1) for line in lines)
    status = int(first.split()[1])
    while status != 101 and (part := connection.recv(65536)):
        body += part
    return Answer(status, headers, body)


def websocket_headers(address: str, **headers: str) -> dict[str, str]:
    """What a browser sends to open a WebSocket from the dashboard's own page."""
    return {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec_websocket_version": "13",
        "sec_websocket_key": base64.b64encode(bytes(16)).decode(),
        "origin": f"http://{address}",
        **headers,
    }


class LivePage:
    """The other end of /live, without a browser: reads when it is told to."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._came = b""

    def receive(self) -> dict[str, Any]:
        """The next message of the server, whose frames are neither masked nor compressed."""
        while True:
            opcode, payload = self._frame()
            if opcode == 1:
                return json.loads(payload)
            assert opcode in (9, 10), (opcode, payload)

    def _frame(self) -> tuple[int, bytes]:
        first, length = self._read(2)
        assert first & 0x80, "expected whole messages"
        if length == 126:
            length = int.from_bytes(self._read(2))
        elif length == 127:
            length = int.from_bytes(self._read(8))
        return first & 0x0F, self._read(length)

    def _read(self, length: int) -> bytes:
        while len(self._came) < length:
            part = self._connection.recv(65536)
            assert part, "the server has closed the connection"
            self._came += part
        taken, self._came = self._came[:length], self._came[length:]
        return taken


@contextlib.contextmanager
def live_page(address: str, **headers: str) -> Iterator[LivePage]:
    """An accepted WebSocket of which nothing was read yet."""
    with request(address, "/live", **websocket_headers(address, **headers)) as connection:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            part = connection.recv(1)
            assert part, head
            head += part
        assert head.startswith(b"HTTP/1.1 101"), head
        yield LivePage(connection)


# ---- what the dashboard is told ----------------------------------------------------------------


def action(
    stream: str = "cam",
    session: int = 1,
    number: int = 1,
    kind: str = "start",
    revision: int = 0,
    end_s: float | None = None,
    index: int = 9,
    label: str = "run",
) -> ActionEvent:
    at_s = (index + 1) * SNIPPET_S
    return ActionEvent(
        stream, session, 1, number, kind, revision, label, 1.0, end_s, 0.5, index, at_s, "b"  # type: ignore[arg-type]
    )  # fmt: skip


# ---- a camera client ---------------------------------------------------------------------------

JPEG = b"\xff\xd8\xff\xe0" + b"picture" * 10
Reply = tuple[int, bytes]


class Cameras:
    """A camera client over HTTP, with what it answers by path."""

    def __init__(self) -> None:
        self.answers: dict[str, Reply] = {"/streams": (200, b'["cam1", "cam2"]')}
        self.asked: list[tuple[str, str | None]] = []

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append((handler.path, handler.headers["Authorization"]))
        status, body = self.answers.get(handler.path, (404, b""))
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        if status == 302:
            handler.send_header("Location", "/thumbnail/cam1/1.jpg")
        handler.end_headers()
        with contextlib.suppress(OSError):  # who asked has had enough
            handler.wfile.write(body)


@contextlib.contextmanager
def camera_client() -> Iterator[tuple[str, Cameras]]:
    cameras = Cameras()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            cameras.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", cameras
        finally:
            server.shutdown()
            thread.join(PATIENCE_S)
