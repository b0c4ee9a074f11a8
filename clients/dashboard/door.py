"""Who is let in: on this machine everybody, from elsewhere who has the token.

A token comes once, by a form, and is kept by the browser as a cookie that can be derived from it
but does not tell it; programs send it as a bearer. Without a token only names of this machine are
served, so that no page of the web can reach the dashboard under a name of its own.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from hrpro.engine.protocol import HrproError

TOKEN_VARIABLE = "HRPRO_DASHBOARD_TOKEN"  # noqa: S105 - the name of one
COOKIE = "hrpro_dashboard"
_SHORTEST_TOKEN = 16
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def parse_http_address(address: str) -> tuple[str, int]:
    """HOST:PORT as host and port; an empty host is 127.0.0.1. Raises HrproError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise HrproError(f"--http: expected HOST:PORT, such as 127.0.0.1:8080, came {address}")
    return host.strip("[]") or "127.0.0.1", int(port)


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(file: Path | None, option: str) -> str | None:
    """The first line of a file. Raises HrproError for one that is easily guessed."""
    if file is None:
        return None
    lines = file.read_text(encoding="utf-8").splitlines()
    return checked_token(lines[0].strip() if lines else "", f"{option} {file}")


def dashboard_token(file: Path | None) -> str | None:
    """The token of --token-file, or else of the environment. Raises HrproError."""
    if file is None and (told := os.environ.get(TOKEN_VARIABLE)) is not None:
        return checked_token(told, TOKEN_VARIABLE)
    return read_token(file, "--token-file")


def checked_token(token: str, where: str) -> str:
    """The token; HrproError where it is too short to keep anybody out."""
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise HrproError(
            f"{where}: expected a token of at least {_SHORTEST_TOKEN} ASCII characters, came "
            f"{len(token)}; openssl rand -hex 24 makes one"
        )
    return token


class Door:
    """Decides by a request's headers. Raises HrproError where others could come in unasked."""

    def __init__(self, host: str, token: str | None) -> None:
        if token is None and not is_loopback(host):
            raise HrproError(
                f"--http {host}: others could reach it; give a token by --token-file or "
                f"{TOKEN_VARIABLE}, or a loopback address such as 127.0.0.1:8080"
            )
        self._token = token
        self._names = _LOCAL_NAMES | {host}

    @property
    def is_open(self) -> bool:
        """Whether no token is asked for."""
        return self._token is None

    def knows_name(self, headers: Headers) -> bool:
        """Whether the request is for a name that is served."""
        return self._token is not None or _hostname(headers.get("host", "")) in self._names

    def is_same_origin(self, headers: Headers) -> bool:
        """Whether it comes from the dashboard's own page, or from no page."""
        origin = headers.get("origin")
        return origin is None or urlsplit(origin).netloc == headers.get("host")

    def admits(self, headers: Headers) -> bool:
        """Whether the request has the token's cookie, or the token."""
        if self._token is None:
            return True
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        return _same(cookie, self.cookie()) or (scheme.lower() == "bearer" and self.takes(bearer))

    def takes(self, token: str) -> bool:
        """Whether that is the token."""
        return self._token is not None and _same(token.strip(), self._token)

    def cookie(self) -> str:
        """What a browser is given for the token."""
        assert self._token is not None
        return hmac.digest(self._token.encode(), b"hrpro dashboard", "sha256").hex()


def _same(came: str, expected: str) -> bool:
    """In a time that does not tell where they differ."""
    return hmac.compare_digest(came.encode(), expected.encode())


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
