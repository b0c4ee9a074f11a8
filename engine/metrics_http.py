"""Metrics and health over HTTP, for Prometheus and for whoever starts and stops engines.

    /metrics   what is measured, in Prometheus's text format
    /healthz   200, or 503 when the loop has been in one turn for too long
    /readyz    200 while the engine takes snippets; 503 while it starts or drains

Each request has a thread of its own that reads what the loop has counted.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from hrpro.engine.metrics import Metrics
from hrpro.engine.settings import SettingsError

# So long a peer may take over its request.
_REQUEST_S = 10.0
_TEXT = "text/plain; charset=utf-8"


@contextlib.contextmanager
def metrics_server(address: str, metrics: Metrics) -> Iterator[str]:
    """Answers at HOST:PORT while the block lasts; yields the URL of /metrics.

    An empty host is 127.0.0.1, and port 0 a free one. Raises SettingsError.
    """
    host, port = parse_address(address)
    try:
        server = _HttpServer((host, port), metrics)
    except OSError as error:
        raise SettingsError(f"--metrics {address}: cannot listen there: {error.strerror}") from None
    with server:
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        try:
            shown = f"[{host}]" if ":" in host else host
            yield f"http://{shown}:{server.server_address[1]}/metrics"
        finally:
            server.shutdown()
            thread.join()


def parse_address(address: str) -> tuple[str, int]:
    """HOST:PORT as host and port. Raises SettingsError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise SettingsError(f"--metrics: expected HOST:PORT, such as 127.0.0.1:9100, got {address}")
    return host.strip("[]") or "127.0.0.1", int(port)


class _HttpServer(ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], metrics: Metrics) -> None:
        self.metrics = metrics
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        # A peer that leaves before its answer is nothing to report.
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: _HttpServer
    timeout = _REQUEST_S
    server_version = "hrpro"
    sys_version = ""

    def do_GET(self) -> None:
        metrics = self.server.metrics
        match self.path.partition("?")[0]:
            case "/metrics":
                self._answer(200, generate_latest(metrics.registry), CONTENT_TYPE_LATEST)
            case "/healthz":
                hung_s = metrics.hung_s()
                if hung_s is None:
                    self._answer(200, b"ok\n")
                else:
                    self._answer(503, f"the loop is in one turn for {hung_s:.1f} s\n".encode())
            case "/readyz":
                status = 200 if metrics.state == "serving" else 503
                self._answer(status, f"{metrics.state}\n".encode())
            case _:
                self._answer(404, b"expected /metrics, /healthz or /readyz\n")

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def _answer(self, status: int, body: bytes, content_type: str = _TEXT) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """No line for each request."""
