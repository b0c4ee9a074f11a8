"""The keys of an engine: a folder with its own secret and a file for each client.

    KEYS/                 mode 0700
      engine.secret       0600: the engine's pair of CURVE keys
      NAME.client         0644: name, role, streams and public key of a client

All are JSON. A client's secret is in none of them: `hrpro keys new` writes it to a file of its own,
for the client (`hrpro.engine.client_key`). An engine looks at the folder every second: a file that
is gone, or cannot be read any more, is a key that is revoked.

What a stream pattern means: an id, or the beginning of ids with `*` behind it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import zmq
from pydantic import AfterValidator, Field, ValidationError, model_validator

from hrpro.engine.client_key import (
    VERSION,
    KeyFileError,
    Role,
    is_z85_key,
    read_private_json,
    write_new,
    write_private_json,
)
from hrpro.engine.logs import fact
from hrpro.engine.settings import Settings

_log = logging.getLogger(__name__)

ENGINE_SECRET = "engine.secret"  # noqa: S105 - the name of a file
CLIENT_SUFFIX = ".client"
# How long a revoked key works at most, but for the turn of the loop that is running.
LOOK_INTERVAL_S = 1.0
MAX_PATTERNS = 64
# A client's file has 64 patterns of 65 characters at most.
_MAX_FILE_BYTES = 16_384

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_PATTERN = re.compile(r"[A-Za-z0-9._:-]{1,64}|[A-Za-z0-9._:-]{0,64}\*")


def _pattern(value: str) -> str:
    if not _PATTERN.fullmatch(value):
        raise ValueError("expected a stream id, or the beginning of ids and * behind it")
    return value


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("expected 1 to 64 of the characters A-Z a-z 0-9 . _ - and no . at first")
    return value


def _public(value: str) -> str:
    if not is_z85_key(value):
        raise ValueError("expected the 40 characters of a CURVE key in Z85")
    return value


class ClientRecord(Settings):
    """Who has a key, and what may be done with it.

    A producer feeds its streams, a subscriber sees them, and an operator does all that there is on
    control and sees all streams.
    """

    version: Literal[1] = VERSION  # type: ignore[assignment]
    name: Annotated[str, AfterValidator(_name)]
    role: Role
    streams: tuple[Annotated[str, AfterValidator(_pattern)], ...] = Field(
        ("*",), min_length=1, max_length=MAX_PATTERNS
    )
    public: Annotated[str, AfterValidator(_public)]

    @model_validator(mode="after")
    def _operators_see_all(self) -> ClientRecord:
        if self.role == "operator" and self.streams != ("*",):
            raise ValueError("streams: expected none for an operator, who sees all")
        return self

    def may_feed(self, stream: str) -> bool:
        """Whether the key is one for feeding this stream."""
        return self.role == "producer" and self._fits(stream)

    def may_see(self, stream: str) -> bool:
        """Whether the key is one for what comes of this stream."""
        return self.role != "producer" and self._fits(stream)

    @property
    def sees_all(self) -> bool:
        """Whether it may see every stream."""
        return self.role != "producer" and "*" in self.streams

    def _fits(self, stream: str) -> bool:
        return any(
            stream.startswith(each[:-1]) if each.endswith("*") else stream == each
            for each in self.streams
        )


class Keyring:
    """The keys of a folder as they are now. Raises KeyFileError for one that cannot be used.

    `now_s` is a clock that never goes back.
    """

    def __init__(self, folder: Path, now_s: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._now_s = now_s
        _check_folder(folder)
        content = read_private_json(folder / ENGINE_SECRET)
        public, secret = content.get("public"), content.get("secret")
        if not (is_z85_key(public) and is_z85_key(secret)):
            raise KeyFileError(f"{folder / ENGINE_SECRET}: expected public and secret, CURVE keys")
        self.public, self.secret = str(public).encode(), str(secret).encode()
        self._banned: set[str] = set()
        self._looked = _fingerprint(folder)
        self._look_at_s = now_s() + LOOK_INTERVAL_S
        self.clients: Mapping[str, ClientRecord] = {
            record.public: record for record in read_clients(folder)
        }
        """By public key."""

    def ban(self, public: str) -> None:
        """Refuses this key for as long as the engine runs, whatever the folder says."""
        self._banned.add(public)
        self.clients = {key: each for key, each in self.clients.items() if key != public}

    def due_in_s(self) -> float:
        """When `look` has something to do."""
        return max(0.0, self._look_at_s - self._now_s())

    def look(self) -> bool:
        """Reads the folder if it is time to and it has changed; whether a key has less rights now.

        Never raises: what cannot be read is a key less.
        """
        if self.due_in_s() > 0:
            return False
        self._look_at_s = self._now_s() + LOOK_INTERVAL_S
        looked = _fingerprint(self._folder)
        if looked == self._looked:
            return False
        self._looked, before = looked, self.clients
        self.clients = self._read_again()
        added = self.clients.keys() - before.keys()
        gone = [record for key, record in before.items() if self.clients.get(key) != record]
        _log.warning(
            "keys in %s: %d added, revoked or changed: %s",
            self._folder,
            len(added),
            ", ".join(record.name for record in gone) or "none",
            extra=fact("keys_changed", added=len(added), revoked=len(gone)),
        )
        return bool(gone)

    def _read_again(self) -> dict[str, ClientRecord]:
        found: dict[str, ClientRecord] = {}
        try:
            _check_folder(self._folder)
            files = _client_files(self._folder)
        except (KeyFileError, OSError) as error:
            _log.error("no key is valid any more: %s", error)
            return found
        for file in files:
            try:
                record = _read_client(file)
            except KeyFileError as error:
                _log.error("a key is not valid: %s", error)
                continue
            if record.public not in self._banned:
                found[record.public] = record
        return found


def read_clients(folder: Path) -> list[ClientRecord]:
    """The clients of a folder, by name. Raises KeyFileError."""
    try:
        files = _client_files(folder)
    except OSError as error:
        raise KeyFileError(f"{folder}: cannot be read: {error.strerror}") from None
    return [_read_client(file) for file in files]


def new_client(
    folder: Path, name: str, role: Role, streams: tuple[str, ...], out: Path
) -> ClientRecord:
    """Makes a key: its record in the folder, and its secret in the file ``out``, for the client.

    Makes folder and engine's key where there are none. Raises KeyFileError, and makes nothing then.
    """
    public, secret = (each.decode() for each in zmq.curve_keypair())
    try:
        record = ClientRecord(name=name, role=role, streams=streams or ("*",), public=public)
    except ValidationError as error:
        raise KeyFileError(_first(error)) from None
    if role != "operator" and not streams:
        raise KeyFileError(f"a {role} has streams: expected one at least, such as 'cam*' or '*'")
    file = folder / f"{name}{CLIENT_SUFFIX}"
    if file.exists():
        raise KeyFileError(f"{file}: exists; revoke that key first, or choose another name")
    engine = _engine_public(folder)
    pair = {"public": public, "secret": secret, "engine": engine}
    write_private_json(out, {"version": VERSION, "name": name, **pair})
    # Renamed into its place, so that an engine that is looking sees the whole file or none.
    part = folder / f".{name}.part"
    part.unlink(missing_ok=True)
    write_new(part, json.dumps(record.model_dump(mode="json"), indent=2) + "\n", 0o644)
    part.replace(file)
    return record


def revoke(folder: Path, name: str) -> None:
    """Takes a key away. Raises KeyFileError where there is none of this name."""
    file = folder / f"{name}{CLIENT_SUFFIX}"
    try:
        if not _NAME.fullmatch(name):
            raise FileNotFoundError
        file.unlink()
    except FileNotFoundError:
        known = ", ".join(each.stem for each in _client_files(folder)) if folder.is_dir() else ""
        raise KeyFileError(f"{folder}: no key {name!r}; there are: {known or 'none'}") from None


def _engine_public(folder: Path) -> str:
    if not folder.exists():
        folder.mkdir(mode=0o700, parents=True)
    _check_folder(folder)
    file = folder / ENGINE_SECRET
    if not file.exists():
        public, secret = (each.decode() for each in zmq.curve_keypair())
        write_private_json(file, {"version": VERSION, "public": public, "secret": secret})
    return Keyring(folder).public.decode()


def _check_folder(folder: Path) -> None:
    """Whoever can write to the folder can give keys to anybody."""
    make = f"hrpro keys new NAME --role producer --streams 'cam*' --keys {folder}"
    try:
        found = folder.stat()
    except OSError as error:
        raise KeyFileError(f"{folder}: no keys: {error.strerror}; make them with: {make}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise KeyFileError(f"{folder}: expected a folder of keys; make one with: {make}")
    _check_owner(folder, found)


def _check_owner(path: Path, found: os.stat_result) -> None:
    if found.st_mode & 0o022:
        raise KeyFileError(
            f"{path}: expected that its owner alone can write to it, got mode "
            f"{stat.S_IMODE(found.st_mode):04o}; chmod go-w {path}"
        )
    # Root makes keys for an engine that runs as somebody else.
    if found.st_uid not in (0, os.geteuid()) and os.geteuid() != 0:
        raise KeyFileError(f"{path}: expected this user or root as its owner, got {found.st_uid}")


def _client_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"[!.]*{CLIENT_SUFFIX}"))


def _read_client(file: Path) -> ClientRecord:
    try:
        with file.open("rb") as opened:
            _check_owner(file, os.fstat(opened.fileno()))
            record = ClientRecord.model_validate_json(opened.read(_MAX_FILE_BYTES), strict=True)
    except OSError as error:
        raise KeyFileError(f"{file}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise KeyFileError(f"{file}: {_first(error)}") from None
    if record.name != file.stem:
        raise KeyFileError(
            f"{file}: expected the key of {file.stem!r}, got that of {record.name!r}"
        )
    return record


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}{': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"


def _fingerprint(folder: Path) -> object:
    """What changes when a file of the folder comes, goes or is written to."""
    try:
        with os.scandir(folder) as entries:
            found = [(each.name, each.stat()) for each in entries]
    except OSError as error:
        return error.errno
    return sorted((name, at.st_mtime_ns, at.st_ctime_ns, at.st_ino) for name, at in found)
