"""Where `hrpro watch` hands publications over: a file, a command, an HTTP receiver
(sink_webhook.py), an MQTT broker (sink_mqtt.py).

    subscriber --> deliver to the sink --> note the number --> next
                       ^         |
                       +- again -+

One at a time, in the order of the numbers: a delivery that fails is not overtaken, neither by what
follows of its own stream nor by that of others. What a sink has taken is noted after it has taken
it: who is killed in between delivers that one again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol
from urllib.parse import SplitResult, urlsplit

from hrpro.clients.subscriber import EventSubscriber
from hrpro.clients.watching import publications, to_json
from hrpro.engine.protocol import HrproError, Publication

_log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 30.0  # from one attempt to the next
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
        if position is None or subscriber.is_snapshot:
            continue
        if isinstance(sink, JsonLines):
            if publication is not None:
                continue  # its line says it
            sink.settle()
        position.save(Position(subscriber.instance, subscriber.last_number))


# ---- where to go on ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Position:
    """All up to ``number`` was delivered; numbers count within the log of an ``instance``."""

    instance: str | None = None
    number: int | None = None


class PositionFile:
    """Keeps a position, open until `close`, for this process alone. Raises HrproError for a file
    that has something else, or that another process has.

    What is kept has always the same length and is written in place, at once, into one block of the
    disk: a kill leaves the old or the new position, and so does a loss of power, which may leave an
    older one.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _take_alone(self._file, path)
            text = os.read(self._file, _POSITION_BYTES + 1)
            self.position = _kept_position(path, text) if text else Position()
        except HrproError:
            self.close()
            raise

    def save(self, position: Position) -> None:
        """Replace what is kept; nothing where the engine does not number."""
        if position.number is None or position == self.position:
            return
        os.pwrite(self._file, _position_text(position), 0)
        self.position = position

    def forget(self) -> None:
        """As if nothing had been delivered."""
        os.ftruncate(self._file, 0)
        self.position = Position()

    def close(self) -> None:
        """Nothing more is saved."""
        os.close(self._file)


def _position_text(position: Position) -> bytes:
    text = json.dumps({"instance": position.instance, "number": position.number})
    return text.ljust(_POSITION_BYTES - 1).encode() + b"\n"


def _kept_position(path: Path, text: bytes) -> Position:
    """Of a position file: exactly what is saved there."""
    position = _position(_object(text))
    if position is None or position.number is None or text != _position_text(position):
        raise HrproError(f"{path}: expected a position that hrpro watch has noted, came another")
    return position


def _object(text: bytes) -> dict[str, Any]:
    """A JSON object; an empty one for something else."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _position(found: dict[str, Any]) -> Position | None:
    """None where it has none. A number may be null, as where an engine keeps no log."""
    instance, number = found.get("instance"), found.get("number", "")
    if not isinstance(instance, str | None) or not isinstance(number, int | None):
        return None
    if isinstance(number, bool):
        return None
    return Position(instance, number)


def _take_alone(file: int, path: Path) -> None:
    """An open file for this process alone, until it is closed."""
    import fcntl  # not on every platform, as with the engine's event log

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HrproError(
            f"{path}: another hrpro watch has it; stop that one, or give this one another file"
        ) from None


# ---- JSON lines --------------------------------------------------------------------------------


class JsonLines:
    """One line each, in a file or on stdout."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._is_settled = True

    def deliver(self, _publication: Publication, line: str, /) -> None:
        """Written and handed to the operating system."""
        self._file.write(line + "\n")
        self._file.flush()
        self._is_settled = False

    def settle(self) -> None:
        """On the disk. A loss of power must not leave a position that is behind lost lines."""
        if not self._is_settled:
            os.fsync(self._file.fileno())
        self._is_settled = True

    def close(self) -> None:
        """The file is the caller's."""


@contextlib.contextmanager
def lines_in(path: Path) -> Iterator[tuple[JsonLines, PositionFile | None, Position]]:
    """JSON lines that go on in a file: the sink, what notes how far it is, and where to begin.

    The last line says what is not to be repeated; where nothing of what came since was wanted,
    `.NAME.position` beside the file is further. A file that is not there any more has said nothing,
    and a pipe or a device keeps nothing. Raises HrproError, and leaves the file, where it has
    something else, or where another process writes to it.
    """
    is_new = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        if not path.is_file():
            yield JsonLines(file), None, Position()
            return
        _take_alone(file.fileno(), path)
        end = end_of_lines(path)
        with contextlib.closing(PositionFile(path.with_name(f".{path.name}.position"))) as kept:
            if is_new:
                kept.forget()
            yield JsonLines(file), kept, _further(end, kept.position)


def _further(end: Position, kept: Position) -> Position:
    """Of another instance than the last line's, what is kept is older, or nothing of that one was
    wanted yet."""
    if end == Position():
        return kept
    is_behind = kept.instance == end.instance and (kept.number or 0) > (end.number or 0)
    return kept if is_behind else end


def end_of_lines(path: Path) -> Position:
    """Where a file of JSON lines ends. A line that a kill has left unfinished is cut off.

    Raises HrproError, and leaves the file, where it has something else.
    """
    with path.open("r+b") as file:
        lines = _lines_backwards(file)
        torn = next(lines)
        if torn[: len(_LINE_BEGINS)] != _LINE_BEGINS[: len(torn)]:
            raise _no_lines(path)
        found = (_line_position(path, line) for line in lines)
        position = next((each for each in found if each is not None), Position())
        file.truncate(file.seek(0, os.SEEK_END) - len(torn))
    return position


def _line_position(path: Path, line: bytes) -> Position | None:
    """None for an action that was open at the beginning: its number is old."""
    found = _object(line) if line.startswith(_LINE_BEGINS) else {}
    position = _position(found)
    if position is None:
        raise _no_lines(path)
    return None if found.get("snapshot") is True else position


def _no_lines(path: Path) -> HrproError:
    return HrproError(f"{path}: expected what hrpro watch writes, came something else")


def _lines_backwards(file: BinaryIO) -> Iterator[bytes]:
    """What follows the last whole line, then the whole lines from the last to the first."""
    start, tail = file.seek(0, os.SEEK_END), b""
    while start > 0:
        length = min(start, _BLOCK_BYTES)
        start -= length
        file.seek(start)
        tail, *lines = (file.read(length) + tail).split(b"\n")
        yield from reversed(lines)
    yield tail


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


# ---- addresses -----------------------------------------------------------------------------------


def split_url(url: str, option: str, schemes: tuple[str, ...]) -> SplitResult:
    """The parts of an option's URL. Raises HrproError where it is none of these schemes, or has a
    host that cannot be one."""
    try:
        url.encode()
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna"), parts.port
    except ValueError:  # also of what cannot be encoded
        parts, host, port = urlsplit(""), b"", None
    has_blanks = any(each <= 0x20 or each == 0x7F for each in host)
    if parts.scheme not in schemes or not host or has_blanks or port == 0:
        # Not as it came: it may have a password.
        raise HrproError(
            f"{option}: expected an address such as {schemes[0]}://HOST:PORT/PATH, with %XX for "
            "what is special in USER:PASSWORD@"
        )
    return parts
