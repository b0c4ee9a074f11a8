"""A recorded session: what feeders gave to an engine and what it published, in one SQLite file.

    takes      a stream from its first Welcome to its Ended: Hello and Welcome, as they were sent
    fed        in the order of acceptance: snippets, gaps and the end, each with its take
    published  publications as they were sent

Times are seconds since the recorder began. Snippets are stored once, with the bytes that came, in
the chunks that they came in: D * 4 bytes a snippet. What was committed survives a killed recorder.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hrpro.engine import protocol
from hrpro.engine.protocol import Hello, HrproError, ProtocolError, Publication, Welcome

SCHEMA = 1
_APPLICATION_ID = 0x48525052
_LITTLE_ENDIAN = np.dtype("<f4")

_NEW_FILE = f"""
    BEGIN;
    CREATE TABLE takes (
        number INTEGER PRIMARY KEY, at_s REAL NOT NULL, hello BLOB NOT NULL, welcome BLOB NOT NULL
    );
    CREATE TABLE fed (
        id INTEGER PRIMARY KEY, at_s REAL NOT NULL, take INTEGER NOT NULL, kind TEXT NOT NULL,
        first_index INTEGER NOT NULL, next_index INTEGER NOT NULL, features BLOB
    );
    CREATE TABLE published (id INTEGER PRIMARY KEY, at_s REAL NOT NULL, header BLOB NOT NULL);
    PRAGMA application_id = {_APPLICATION_ID};
    PRAGMA user_version = {SCHEMA};
    COMMIT;
"""

FedKind = Literal["snippets", "gap", "end"]


class RecordingError(HrproError, ValueError):
    """A file that is no recording, or a damaged one; the message names it."""


@dataclass(frozen=True)
class Take:
    """A stream from its first Welcome to its Ended. `hello.first_index` is its first snippet."""

    number: int
    hello: Hello
    welcome: Welcome


@dataclass(frozen=True, eq=False)
class Fed:
    """What the engine has accepted at `at_s`: `first_index <= index < next_index` of a take.

    `features`, (n, D) float32, are there for the kind "snippets" alone.
    """

    at_s: float
    take: Take
    kind: FedKind
    first_index: int
    next_index: int
    features: NDArray[np.float32] | None = None


class RecordingWriter:
    """A new recording. Raises RecordingError where the file exists, or cannot be written."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            file.touch(exist_ok=False)
        except FileExistsError:
            raise RecordingError(f"{file}: expected a file that is not there yet") from None
        with self._errors():
            self._db = sqlite3.connect(file, isolation_level=None)
            # Writing does not wait for the disk; a killed process loses what is not committed.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_NEW_FILE)

    def discard(self) -> None:
        """Closes, and leaves no file: nothing was to be recorded."""
        self.close()
        self.file.unlink()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise RecordingError(f"{self.file}: cannot be written: {error}") from None

    def begin_take(self, at_s: float, hello: Hello, welcome: Welcome) -> int:
        """Returns the number of the new take."""
        frames = protocol.encode(hello)[0], protocol.encode(welcome)[0]
        return self._insert("INSERT INTO takes VALUES (NULL, ?, ?, ?)", at_s, *frames)

    def add_snippets(
        self, at_s: float, take: int, first_index: int, features: NDArray[np.float32]
    ) -> None:
        """(n, D) float32 features of the snippets from `first_index` on."""
        data = features.astype(_LITTLE_ENDIAN, copy=False).tobytes()
        self._add(at_s, take, "snippets", first_index, first_index + len(features), data)

    def add_gap(self, at_s: float, take: int, first_index: int, next_index: int) -> None:
        """Snippets that never came."""
        self._add(at_s, take, "gap", first_index, next_index)

    def add_end(self, at_s: float, take: int, next_index: int) -> None:
        """The stream has ended."""
        self._add(at_s, take, "end", next_index, next_index)

    def add_publication(self, at_s: float, publication: Publication) -> None:
        """What the engine has published."""
        header = protocol.encode(publication)[-1]
        self._insert("INSERT INTO published VALUES (NULL, ?, ?)", at_s, header)

    def commit(self) -> None:
        """What was added stays from here on, even if the process is killed."""
        if self._db.in_transaction:
            with self._errors():
                self._db.execute("COMMIT")

    def close(self) -> None:
        """Commits, and leaves one file that can also be read where nothing can be written."""
        self.commit()
        with contextlib.suppress(sqlite3.OperationalError):  # it is being read, and stays as it is
            self._db.execute("PRAGMA journal_mode = DELETE")
        self._db.close()

    def _add(
        self,
        at_s: float,
        take: int,
        kind: FedKind,
        first_index: int,
        next_index: int,
        features: bytes | None = None,
    ) -> None:
        values = at_s, take, kind, first_index, next_index, features
        self._insert("INSERT INTO fed VALUES (NULL, ?, ?, ?, ?, ?, ?)", *values)

    def _insert(self, statement: str, *values: object) -> int:
        with self._errors():
            if not self._db.in_transaction:
                self._db.execute("BEGIN")
            number = self._db.execute(statement, values).lastrowid
        assert number is not None
        return number


class Recording:
    """A recording that is open for reading.

    Raises RecordingError, as do its methods, for a file that is none or is damaged.
    """

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise RecordingError(f"{file}: expected a recording, found no such file")
        self.file = file
        self._db = sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)
        try:
            with self._errors():
                self._check_kind()
                self.takes = dict(self._read_takes())
        except RecordingError:
            self._db.close()
            raise

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ProtocolError) as error:
            raise RecordingError(
                f"{self.file}: expected a whole recording of hrpro record: {error}"
            ) from None

    def _check_kind(self) -> None:
        (found,) = self._db.execute("PRAGMA application_id").fetchone()
        (schema,) = self._db.execute("PRAGMA user_version").fetchone()
        if found != _APPLICATION_ID:
            raise RecordingError(f"{self.file}: expected a recording of hrpro record, came another")
        if schema != SCHEMA:
            raise RecordingError(f"{self.file}: expected schema {SCHEMA}, came {schema}")

    def _read_takes(self) -> Iterator[tuple[int, Take]]:
        for number, hello, welcome in self._rows("SELECT number, hello, welcome FROM takes"):
            said, answer = protocol.decode_feed([hello]), protocol.decode_feed_reply([welcome])
            if not isinstance(said, Hello) or not isinstance(answer, Welcome):
                raise RecordingError(f"{self.file}: expected Hello and Welcome in take {number}")
            yield number, Take(number, said, answer)

    def _rows(self, query: str) -> Iterator[tuple[Any, ...]]:
        # No generator: one that is left early closes its cursor, maybe behind the file.
        return iter(self._db.execute(f"{query} ORDER BY 1").fetchone, None)

    def close(self) -> None:
        """Closes the file; what a killed recorder has left beside it is in it then."""
        self._db.close()

    def fed(self, stream: str | None = None) -> Iterator[Fed]:
        """What the engine has accepted, of one stream or all, in that order."""
        columns = "id, at_s, take, kind, first_index, next_index, features"
        with self._errors():
            for number, at_s, take, kind, first, stop, data in self._rows(
                f"SELECT {columns} FROM fed"  # noqa: S608 - no value in it
            ):
                if take not in self.takes or kind not in get_args(FedKind):
                    raise RecordingError(f"{self.file}: fed {number}: of no known take or kind")
                of = self.takes[take]
                if stream in (None, of.hello.stream):
                    features = self._features(number, of, stop - first, data)
                    yield Fed(at_s, of, kind, first, stop, features)

    def _features(
        self, number: int, take: Take, count: int, data: bytes | None
    ) -> NDArray[np.float32] | None:
        if data is None:
            return None
        shape = count, take.hello.feature_dim
        if len(data) != shape[0] * shape[1] * 4:
            raise RecordingError(
                f"{self.file}: fed {number}: expected {shape} float32, came {len(data)} bytes"
            )
        return np.ndarray(shape, _LITTLE_ENDIAN, data).astype(np.float32, copy=False)

    def ended_streams(self) -> set[str]:
        """The streams whose last take has an end."""
        query = "SELECT take FROM fed WHERE kind = 'end'"
        with self._errors():
            ended = {take for (take,) in self._rows(query)}
        last = {take.hello.stream: number for number, take in self.takes.items()}
        return {stream for stream, number in last.items() if number in ended}

    def published(self, stream: str | None = None) -> list[Publication]:
        """What the engine has published of the streams that were fed, or of one, in order."""
        streams = {take.hello.stream for take in self.takes.values()}
        with self._errors():
            rows = list(self._rows("SELECT id, header FROM published"))
            every = [protocol.decode_logged(header) for _, header in rows]
        return [each for each in every if each.stream in streams and stream in (None, each.stream)]
