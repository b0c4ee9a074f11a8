"""Where `hrpro watch` hands publications over: a file, an HTTP receiver, an MQTT broker, a command.

    subscriber --> deliver to the sink --> note the number --> next
                       ^         |
                       +- again -+

One at a time, in the order of the numbers: a delivery that fails is not overtaken, neither by what
follows of its own stream nor by that of others. What a sink has taken is noted after it has taken
it: who is killed in between delivers that one again.
"""

from __future__ import annotations

import base64
import http.client
import json
import logging
import os
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Protocol
from urllib.parse import SplitResult, unquote, urlsplit

from hrpro.clients.subscriber import EventSubscriber
from hrpro.clients.watching import publications, to_json
from hrpro.engine.protocol import HrproError, Publication

_log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
ATTEMPT_S = 10.0  # for the answer to one POST
_RETRIED = (408, 429)  # of the 4xx; and all 5xx
_POSITION_BYTES = 80
_BLOCK_BYTES = 65536
_LINE_BEGINS = b'{"type": "'


class Sink(Protocol):
    """Takes publications, one after the other."""

    def deliver(self, publication: Publication, line: str, /) -> None:
        """Returns when the publication was taken, or was given up and that was said. ``line`` is
        its JSON."""

    def close(self) -> None:
        """Nothing more will come."""


def run(
    subscriber: EventSubscriber,
    sink: Sink,
    position: PositionFile | None,
    until_idle_s: float | None = None,
) -> None:
    """Deliver what comes and note how far it has come, until interrupted or idle."""
    for publication in publications(subscriber, until_idle_s):
        if publication is not None:
            line = to_json(publication, subscriber.is_snapshot, subscriber.instance)
            sink.deliver(publication, line)
        # The actions that are open come first, and their numbers are old.
        if position is not None and not subscriber.is_snapshot:
            position.save(Position(subscriber.instance, subscriber.last_number))


# ---- where to go on ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Position:
    """All up to ``number`` was delivered; numbers count within the log of an ``instance``."""

    instance: str | None = None
    number: int | None = None


class PositionFile:
    """Keeps a position, open until `close`. Raises HrproError for a file that has something else.

    What is kept has always the same length and is written in place, at once, into one block of the
    disk: a kill leaves the old or the new position, and so does a loss of power, which may leave an
    older one.
    """

    def __init__(self, path: Path) -> None:
        text = path.read_bytes() if path.exists() else b""
        self.position = _position(path, text) if text else Position()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def save(self, position: Position) -> None:
        """Replace what is kept; nothing where the engine does not number."""
        if position.number is None or position == self.position:
            return
        text = json.dumps({"instance": position.instance, "number": position.number})
        os.pwrite(self._file, text.ljust(_POSITION_BYTES - 1).encode() + b"\n", 0)
        self.position = position

    def close(self) -> None:
        """Nothing more is saved."""
        os.close(self._file)


def _position(path: Path, text: bytes) -> Position:
    """Of a position file, or of a line of `--jsonl`."""
    try:
        found = json.loads(text)
        instance, number = found.get("instance"), found["number"]
    except (ValueError, KeyError, AttributeError, TypeError):
        instance, number = None, ""
    if not isinstance(instance, str | None) or not isinstance(number, int | None):
        raise HrproError(f"{path}: expected what hrpro watch writes, came something else")
    return Position(instance, number)


# ---- JSON lines --------------------------------------------------------------------------------


class JsonLines:
    """One line each, in a file: the last one says where to go on, without a repeat."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def deliver(self, _publication: Publication, line: str, /) -> None:
        """Written and handed to the operating system."""
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """The file is the caller's."""


def end_of_lines(path: Path) -> Position:
    """Where a file of JSON lines ends. A line that a kill has left unfinished is cut off.

    Raises HrproError, and leaves the file, where it has something else.
    """
    if not path.is_file():
        return Position()
    with path.open("r+b") as file:
        last, torn = _last_line(file)
        position = _position(path, last) if last else Position()
        if torn[: len(_LINE_BEGINS)] != _LINE_BEGINS[: len(torn)]:
            raise HrproError(f"{path}: expected what hrpro watch writes, came something else")
        file.truncate(file.seek(0, os.SEEK_END) - len(torn))
    return position


def _last_line(file: BinaryIO) -> tuple[bytes, bytes]:
    """The last whole line, and what follows it."""
    start, tail = file.seek(0, os.SEEK_END), b""
    while start > 0 and tail.count(b"\n") < 2:
        length = min(start, _BLOCK_BYTES)
        start -= length
        file.seek(start)
        tail = file.read(length) + tail
    *whole, torn = tail.split(b"\n")
    return (whole[-1] if whole else b""), torn


# ---- HTTP --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Failure:
    """Of one attempt; ``may_pass`` where another one may do."""

    reason: str
    may_pass: bool


class Webhook:
    """POSTs each publication as JSON, again and again for ``retry_s``, then writes it to
    ``dead_letters`` with the reason and goes on.

    Any 2xx takes it. What the receiver refuses (3xx, and 4xx but 408 and 429) is not tried again.
    """

    def __init__(self, url: str, dead_letters: Path, retry_s: float) -> None:
        self._url = split_url(url, "--webhook", ("http", "https"))
        self._dead_letters = dead_letters
        self._retry_s = retry_s
        self._headers = {"Content-Type": "application/json", "User-Agent": "hrpro-stream"}
        if self._url.username is not None:
            pair = f"{unquote(self._url.username)}:{unquote(self._url.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()

    def deliver(self, _publication: Publication, line: str, /) -> None:
        """Taken, or in the dead letters."""
        until_s, pause_s, attempts = time.monotonic() + self._retry_s, FIRST_PAUSE_S, 1
        while failure := self._post(line):
            if not failure.may_pass or time.monotonic() + pause_s > until_s:
                self._bury(line, failure.reason, attempts)
                return
            if attempts == 1:
                _log.warning("webhook: %s; trying again", failure.reason)
            time.sleep(pause_s)
            pause_s, attempts = min(2 * pause_s, LONGEST_PAUSE_S), attempts + 1

    def _post(self, line: str) -> _Failure | None:
        """One attempt, on a connection of its own; what went wrong, if anything."""
        is_secret = self._url.scheme == "https"
        kind = http.client.HTTPSConnection if is_secret else http.client.HTTPConnection
        connection = kind(self._url.hostname or "", self._url.port, timeout=ATTEMPT_S)
        query = f"?{self._url.query}" if self._url.query else ""
        target = (self._url.path or "/") + query
        try:
            connection.request("POST", target, line.encode(), self._headers)
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return _Failure(f"no answer: {error!r}", may_pass=True)
        finally:
            connection.close()
        if 200 <= status < 300:
            return None
        return _Failure(f"answered {status}", may_pass=status in _RETRIED or status >= 500)

    def _bury(self, line: str, reason: str, attempts: int) -> None:
        letter = {"reason": reason, "attempts": attempts, "publication": json.loads(line)}
        with self._dead_letters.open("a", encoding="utf-8") as file:
            file.write(json.dumps(letter, ensure_ascii=False) + "\n")
        _log.warning("webhook: %s; given up, see %s", reason, self._dead_letters)

    def close(self) -> None:
        """Nothing is kept open."""


def split_url(url: str, option: str, schemes: tuple[str, ...]) -> SplitResult:
    """The parts of an option's URL. Raises HrproError where it is none of these schemes."""
    parts = urlsplit(url)
    try:
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        port_fits = False
    if parts.scheme not in schemes or not parts.hostname or not port_fits:
        # Not as it came: it may have a password.
        raise HrproError(f"{option}: expected an address such as {schemes[0]}://HOST:PORT/PATH")
    return parts


# ---- a command ---------------------------------------------------------------------------------


class Command:
    """Starts a command for each publication, without a shell, with its JSON on stdin, and waits
    for its end. One that fails is told and counted, and has had its publication."""

    def __init__(self, command: str) -> None:
        try:
            self._arguments = shlex.split(command)
        except ValueError as error:
            raise HrproError(f"--exec: {error}") from None
        if not self._arguments or shutil.which(self._arguments[0]) is None:
            raise HrproError(f"--exec: expected a command that can be run, came {command!r}")
        self.runs = self.failures = 0

    def deliver(self, publication: Publication, line: str, /) -> None:
        """The command has run."""
        self.runs += 1
        done = subprocess.run(self._arguments, input=line + "\n", text=True, check=False)  # noqa: S603
        if done.returncode != 0:
            self.failures += 1
            _log.warning(
                "%s: exit code %d for number %s of stream %s",
                self._arguments[0], done.returncode, publication.number, publication.stream,
            )  # fmt: skip

    def close(self) -> None:
        """Says how many have failed."""
        if self.failures:
            _log.warning("%d of %d runs of the command failed", self.failures, self.runs)
