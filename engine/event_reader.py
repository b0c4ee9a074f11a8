"""The tables of an event log, and reading them, also while an engine writes."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hrpro.engine.wire import HrproError

SCHEMA = 1
FILE = "events.db"
PAGE_EVENTS = 500
# Rows that are looked at for a page of one stream; there is no index by stream.
PAGE_ROWS = 5_000

# All of it in one transaction; the version is SCHEMA.
NEW_LOG = """
    BEGIN;
    CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
    CREATE TABLE events (
        number INTEGER PRIMARY KEY, stream TEXT NOT NULL, logged_s REAL NOT NULL,
        ran_s INTEGER NOT NULL, header BLOB NOT NULL
    );
    CREATE TABLE heads (
        stream TEXT PRIMARY KEY, number INTEGER NOT NULL, session INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE open_actions (
        stream TEXT, session INTEGER, id INTEGER, header BLOB NOT NULL,
        PRIMARY KEY (stream, session, id)
    ) WITHOUT ROWID;
    CREATE TABLE states (stream TEXT PRIMARY KEY, state BLOB NOT NULL);
    INSERT INTO meta VALUES ('instance', lower(hex(randomblob(8)))), ('floor', 0);
    PRAGMA user_version = 1;
    COMMIT;
"""


class LogError(HrproError):
    """The event log cannot be opened, read or written; the message says why."""

    def __init__(self, message: str) -> None:
        # The name of a folder need not be text; what is said of it has to be.
        super().__init__(message.encode(errors="backslashreplace").decode())


class Logged(NamedTuple):
    """A publication in the log: ``logged_s`` is the wall clock's, ``header`` as it was sent."""

    number: int
    logged_s: float
    header: bytes


class EventReader:
    """A log that is open. Raises LogError where it cannot be read."""

    def __init__(self, db: sqlite3.Connection, file: Path) -> None:
        self._db = db
        self._file = file

    @property
    def oldest(self) -> int:
        """The smallest number that is still there; the next one to come, where there is none."""
        (number,) = self._row("SELECT min(number) FROM events")
        return self.newest + 1 if number is None else int(number)

    @property
    def newest(self) -> int:
        """The number that was given last; 0 at the beginning."""
        (number,) = self._row(
            "SELECT max((SELECT value FROM meta WHERE key = 'floor'),"
            " coalesce((SELECT max(number) FROM events), 0))"
        )
        return int(number)

    def read(
        self, since: int, stream: str | None = None, limit: int = PAGE_EVENTS
    ) -> tuple[list[Logged], int]:
        """At most ``limit`` publications with larger numbers than ``since``, and how far that goes.

        Of one stream there may be none, and more of them behind: what follows is read with the
        second value as ``since``, until that is the newest.
        """
        until = self.newest
        if stream is not None:
            last, scanned = self._row(
                "SELECT max(number), count(*) FROM"
                " (SELECT number FROM events WHERE number > ? ORDER BY number LIMIT ?)",
                (since, PAGE_ROWS),
            )
            until = last if scanned == PAGE_ROWS else until
        rows = self._rows(
            "SELECT number, logged_s, header FROM events WHERE number > ? AND number <= ?"
            " AND (? IS NULL OR stream = ?) ORDER BY number LIMIT ?",
            (since, until, stream, stream, limit),
        )
        found = [Logged(*row) for row in rows]
        return found, found[-1].number if len(found) == limit else max(since, until)

    def check_schema(self) -> None:
        """Raises LogError for a log of another version."""
        (schema,) = self._row("PRAGMA user_version")
        if schema != SCHEMA:
            raise LogError(
                f"{self._file}: expected an event log of version {SCHEMA}, came {schema}"
            )

    def check_whole(self) -> None:
        """Raises LogError for a log that is damaged."""
        (found,) = self._row("PRAGMA quick_check(1)")
        if found != "ok":
            raise damaged(self._file, found)

    def belongs_to(self, features: Mapping[str, object]) -> bool:
        """Whether an engine that takes and tells of these has written it; False where none has.

        Raises LogError where it was another one: what streams have left could not be gone on from.
        """
        before = self._rows("SELECT value FROM meta WHERE key = 'features'")
        packed = json.dumps(features)
        if before and before[0][0] != packed:
            raise LogError(
                f"{self._file}: belongs to an engine with {before[0][0]}, this one has {packed}; "
                "each kind of engine needs a state folder of its own"
            )
        return bool(before)

    def _row(self, query: str, values: tuple[object, ...] = ()) -> tuple[Any, ...]:
        (row,) = self._rows(query, values)
        return row

    def _rows(self, query: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            if type(error) is sqlite3.DatabaseError:  # not one of its kinds: what is no database
                raise damaged(self._file, str(error)) from None
            raise LogError(f"{self._file}: cannot be read: {error}") from None


def damaged(file: Path, found: str) -> LogError:
    """What to say of a log in which SQLite has found this."""
    return LogError(
        f"{file}: is damaged: {' '.join(found.split())}. "
        f"Move it, {file.name}-wal and {file.name}-shm away: the "
        "engine then begins a new log, under a new instance, and without what the streams of "
        "before have left"
    )


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[EventReader]:
    """The log in a state folder, whether an engine has it or not. Raises LogError."""
    file = folder / FILE
    if not file.is_file():
        raise LogError(f"state folder {folder}: expected the event log {FILE}, found none")
    try:
        db = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)
    except sqlite3.Error as error:
        raise LogError(f"{file}: cannot be read: {error}") from None
    with contextlib.closing(db):
        reader = EventReader(db, file)
        reader.check_schema()
        yield reader
