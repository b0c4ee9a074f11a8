"""What servers of pages and pictures have in common: where they listen, and whom they let in.

Without a token only names of this machine are served, so that no page of the web reaches such a
server under a name of its own.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

from hrpro.engine.wire import HrproError

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_SHORTEST_TOKEN = 16

# What all pages are made of: a package, and its folder.
COMMON_FILES = ("hrpro.clients", "web_static")


def parse_http_address(address: str, option: str) -> tuple[str, int]:
    """HOST:PORT as host and port; an empty host is 127.0.0.1. Raises HrproError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise HrproError(f"{option}: expected HOST:PORT, such as 127.0.0.1:8080, came {address}")
    return host.strip("[]") or "127.0.0.1", int(port)


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_reach(host: str, token: str | None, option: str, how: str) -> None:
    """Raises HrproError where others could come in unasked; ``how`` a token can be given."""
    if token is None and not is_loopback(host):
        raise HrproError(
            f"{option} {host}: others could reach it; give a token by {how}, or a loopback "
            "address such as 127.0.0.1:8080"
        )


def listening(host: str, port: int, option: str) -> tuple[socket.socket, str]:
    """A socket that listens there, on a free port for 0, and its URL. Raises HrproError."""
    is_v6 = ":" in host
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if is_v6 else socket.AF_INET, backlog=128
        )
    except OSError as error:
        # Not by its number: what a look-up of names says has numbers of its own.
        reason = (error.strerror or str(error)).partition(" (while ")[0]
        raise HrproError(f"{option} {host}:{port}: cannot listen there: {reason}") from None
    name = f"[{host}]" if is_v6 else host
    return listener, f"http://{name}:{listener.getsockname()[1]}"


def read_token(file: Path | None, option: str, variable: str | None = None) -> str | None:
    """The first line of a file, or else an environment variable, if there is one.

    Raises HrproError for what is easily guessed.
    """
    if file is not None:
        return checked_token(first_line(file), f"{option} {file}")
    told = None if variable is None else os.environ.get(variable)
    return None if told is None else checked_token(told, str(variable))


def first_line(file: Path) -> str:
    """The first line of a file in UTF-8, empty where there is none. Raises HrproError."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise HrproError(f"{file}: expected text in UTF-8, came other bytes") from None
    return lines[0].strip() if lines else ""


def checked_token(token: str, where: str) -> str:
    """The token; HrproError where it is too short to keep anybody out."""
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise HrproError(
            f"{where}: expected a token of at least {_SHORTEST_TOKEN} ASCII characters, came "
            f"{len(token)}; openssl rand -hex 24 makes one"
        )
    return token


def is_same(came: str, expected: str) -> bool:
    """In a time that does not tell where they differ."""
    return hmac.compare_digest(came.encode(), expected.encode())


def bearer(authorization: str) -> str:
    """The token of a header Authorization; empty where it has none."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def snippet_index(text: str) -> int | None:
    """The index in a path, as the protocol has it; None where it is none."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def hostname(host: str) -> str | None:
    """The name in a header Host."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
