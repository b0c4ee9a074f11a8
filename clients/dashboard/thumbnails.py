"""Pictures of snippets, from camera clients that offer them.

    GET /streams                         a JSON list of stream ids
    GET /thumbnail/STREAM/INDEX.jpg      the picture at the snippet, or the nearest before it

What they answer is theirs, and is bounded in size and time; only JPEG is passed on.
"""

from __future__ import annotations

import http.client
import json
import logging
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import quote, urlsplit

from hrpro.engine.protocol import HrproError

_log = logging.getLogger(__name__)

LONGEST_PICTURE_BYTES = 1 << 20
_LONGEST_LIST_BYTES = 1 << 20
_MOST_STREAMS = 10_000
_ANSWER_S = 2.0
_ASK_EVERY_S = 5.0
_JPEG_BEGINS = b"\xff\xd8\xff"
_STREAM_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class ThumbnailError(HrproError):
    """A camera client did not answer, or not with what it should."""


class CameraClient:
    """One camera client's pictures. Raises HrproError for a URL that is none."""

    def __init__(self, url: str, token: str | None) -> None:
        try:
            parts = urlsplit(url)
            (parts.hostname or "").encode("idna")
            port = parts.port
        except ValueError:  # also a host that cannot be one
            parts, port = urlsplit(""), None
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
            raise HrproError(f"--thumbnails: expected http://HOST:PORT, came {url}")
        self.url = f"http://{parts.netloc}"
        self._host, self._port = parts.hostname, port
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def streams(self) -> set[str]:
        """The streams that it has pictures of. Raises ThumbnailError."""
        body = self._get("/streams", _LONGEST_LIST_BYTES)
        try:
            listed = json.loads(body or b"")
        except (ValueError, RecursionError):
            listed = None
        if not isinstance(listed, list) or len(listed) > _MOST_STREAMS:
            raise ThumbnailError(f"{self.url}/streams: expected a list of stream ids")
        return {each for each in listed if isinstance(each, str) and _STREAM_ID.fullmatch(each)}

    def picture(self, stream: str, snippet_index: int) -> bytes | None:
        """A JPEG file; None where there is none any more. Raises ThumbnailError."""
        path = f"/thumbnail/{quote(stream, safe='')}/{snippet_index}.jpg"
        body = self._get(path, LONGEST_PICTURE_BYTES)
        if body is not None and not body.startswith(_JPEG_BEGINS):
            raise ThumbnailError(f"{self.url}{path}: expected a JPEG file")
        return body

    def _get(self, path: str, longest_bytes: int) -> bytes | None:
        """The body of a 200, None of a 404, within a time in all, however slowly it drips; nothing
        is followed."""
        until_s = time.monotonic() + _ANSWER_S
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_ANSWER_S)
        try:
            connection.request("GET", path, headers=self._headers)
            answer = connection.getresponse()
            if answer.status == http.HTTPStatus.NOT_FOUND:
                return None
            if answer.status != http.HTTPStatus.OK:
                raise ThumbnailError(f"{self.url}{path}: answered {answer.status}")
            body = b""
            while part := answer.read1(1 << 16):
                body += part
                if len(body) > longest_bytes or time.monotonic() > until_s:
                    raise ThumbnailError(
                        f"{self.url}{path}: expected at most {longest_bytes} bytes within "
                        f"{_ANSWER_S:g} s"
                    )
        except (OSError, http.client.HTTPException) as error:
            raise ThumbnailError(f"{self.url}{path}: no answer: {error!r}") from None
        finally:
            connection.close()
        return body


class Thumbnails:
    """Which camera client has which stream, asked again and again while the block lasts."""

    def __init__(self, clients: Sequence[CameraClient]) -> None:
        self._clients = clients
        self._offered: dict[str, CameraClient] = {}
        self._stopped = threading.Event()
        self._silent: set[str] = set()

    @property
    def streams(self) -> list[str]:
        """Those of which there are pictures."""
        return sorted(self._offered)

    @contextmanager
    def running(self) -> Iterator[None]:
        """A thread asks until the block is left, if there is anybody to ask."""
        if not self._clients:
            yield
            return
        thread = threading.Thread(target=self._follow, name="thumbnails")
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()

    def picture(self, stream: str, snippet_index: int) -> bytes | None:
        """A JPEG file; None where nobody has it. Raises ThumbnailError."""
        client = self._offered.get(stream)
        return None if client is None else client.picture(stream, snippet_index)

    def _follow(self) -> None:
        while not self._stopped.is_set():
            self._offered = {stream: each for each in self._clients for stream in self._ask(each)}
            self._stopped.wait(_ASK_EVERY_S)

    def _ask(self, client: CameraClient) -> set[str]:
        try:
            streams = client.streams()
        except ThumbnailError as error:
            if client.url not in self._silent:
                _log.warning("thumbnails: %s; trying again", error)
            self._silent.add(client.url)
            return set()
        self._silent.discard(client.url)
        return streams
