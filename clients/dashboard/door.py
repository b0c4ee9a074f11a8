"""Who is let in: on this machine everybody, from elsewhere who has the token.

A token comes once, by a form, and is kept by the browser as a cookie that can be derived from it
but does not tell it; programs send it as a bearer. Without a token only names of this machine are
served, so that no page of the web can reach the dashboard under a name of its own.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from hrpro.clients import web

TOKEN_VARIABLE = "HRPRO_DASHBOARD_TOKEN"  # noqa: S105 - the name of one
COOKIE = "hrpro_dashboard"


class Door:
    """Decides by a request's headers. Raises HrproError where others could come in unasked."""

    def __init__(self, host: str, token: str | None) -> None:
        web.check_reach(host, token, "--http", f"--token-file or {TOKEN_VARIABLE}")
        self._token = token
        self._names = web.LOCAL_NAMES | {host}

    @property
    def is_open(self) -> bool:
        """Whether no token is asked for."""
        return self._token is None

    def knows_name(self, headers: Headers) -> bool:
        """Whether the request is for a name that is served."""
        return self._token is not None or web.hostname(headers.get("host", "")) in self._names

    def is_same_origin(self, headers: Headers) -> bool:
        """Whether it comes from the dashboard's own page, or from no page."""
        origin = headers.get("origin")
        if origin is None:
            return True
        try:
            return urlsplit(origin).netloc == headers.get("host")
        except ValueError:
            return False

    def admits(self, headers: Headers) -> bool:
        """Whether the request has the token's cookie, or the token."""
        if self._token is None:
            return True
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        bearer = web.bearer(headers.get("authorization", ""))
        return web.is_same(cookie, self.cookie()) or self.takes(bearer)

    def takes(self, token: str) -> bool:
        """Whether that is the token."""
        return self._token is not None and web.is_same(token.strip(), self._token)

    def cookie(self) -> str:
        """What a browser is given for the token."""
        assert self._token is not None
        return hmac.digest(self._token.encode(), b"hrpro dashboard", "sha256").hex()
