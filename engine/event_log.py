"""The durable log of all that is published: an SQLite database in WAL mode, in a folder of its own.

    publications, states --> commit: one transaction --> frames, to be sent only then
                                |
                                +-- events        the header of each, under its number
                                +-- heads         of each stream its newest number and session
                                +-- open_actions  the newest event of each action without an end
                                +-- states        of each stream what it needs to go on

Numbers count 1, 2, ... over all streams and are never used again. They skip LOST_AT_MOST where the
machine went down under the engine: what was sent and then lost with the machine's memory had
numbers, too, and a subscriber that has seen them would take new ones for repeats.

Events age by the time that the engine has run, not by the calendar: with a clock that is set
forward, all of them would be old at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from hrpro.engine import protocol
from hrpro.engine.config import LogConfig
from hrpro.engine.event_reader import (
    FILE,
    NEW_LOG,
    PAGE_EVENTS,
    EventReader,
    LogError,
    Logged,
    damaged,
    reading,
)
from hrpro.engine.messages import ActionEvent, Ended, Publication, StreamNotice

# More than the WAL holds between two checkpoints; what these have written is on the disk.
LOST_AT_MOST = 1_000_000
# Streams whose newest number and session are known; the longest silent ones are forgotten first.
STREAMS_REMEMBERED = 65_536
# A trim makes at most 20 deletes of so many rows: more than come in a second, and short enough.
_TRIM_ROWS = 1_000
_TRIMS = 20
_WAL_BYTES = 16 * 2**20

_Head = tuple[int, int]  # number, session
_Action = tuple[str, int, int]  # stream, session, id


class EventLog(EventReader):
    """The log of the one engine that writes it; for one thread at a time.

    Raises LogError where the folder cannot be used; the message says what to do.
    """

    def __init__(self, folder: Path, config: LogConfig | None = None) -> None:
        self._config = config or LogConfig()
        with contextlib.ExitStack() as opened:
            opened.enter_context(_locked(folder))
            db = opened.enter_context(contextlib.closing(_connect(folder / FILE)))
            super().__init__(db, folder / FILE)
            _prepare(db, folder / FILE, self._config)
            self.check_whole()
            self.check_schema()
            self._load()
            self._opened = opened.pop_all()

    def _load(self) -> None:
        """Read what is kept in memory, and note under which start of the machine it is used."""
        meta = dict(self._rows("SELECT key, value FROM meta"))
        self.instance: str = meta["instance"]
        self._newest = super().newest
        self._opened_s = time.monotonic()
        ran_s = self._rows("SELECT ran_s FROM events ORDER BY number DESC LIMIT 1")
        self._ran_s: int = ran_s[0][0] if ran_s else 0
        self._heads: dict[str, _Head] = {
            stream: (number, session)
            for stream, number, session in self._rows("SELECT stream, number, session FROM heads")
        }
        self._open: dict[_Action, bytes] = {
            (stream, session, action): header
            for stream, session, action, header in self._rows("SELECT * FROM open_actions")
        }
        boot = _boot_id()
        if meta.get("boot", boot) != boot:
            self._newest += LOST_AT_MOST
        with self._transaction() as db:
            db.execute("REPLACE INTO meta VALUES ('floor', ?), ('boot', ?)", (self._newest, boot))
        self._row("PRAGMA wal_checkpoint")  # on the disk, or a power cut would take the note, too

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Sets the folder free."""
        with contextlib.suppress(LogError), self._transaction() as db:
            db.execute("DELETE FROM meta WHERE key = 'boot'")
        self._opened.close()

    # ---- reading -------------------------------------------------------------------------------

    @property
    def newest(self) -> int:
        """The number that was given last; 0 at the beginning."""
        return self._newest

    @property
    def sessions(self) -> dict[str, int]:
        """The newest session of each stream."""
        return {stream: session for stream, (_, session) in self._heads.items()}

    def read(
        self, since: int, stream: str | None = None, limit: int = PAGE_EVENTS
    ) -> tuple[list[Logged], int]:
        """As any reader, and at once where a stream has nothing new."""
        if stream is not None and self._heads.get(stream, (0, 0))[0] <= since:
            return [], max(since, self._newest)
        return super().read(since, stream, limit)

    def open_actions(self, stream: str | None = None) -> list[bytes]:
        """The header of the newest ActionEvent of each action that has no end yet."""
        return [each for key, each in self._open.items() if stream in (None, key[0])]

    def ended(self, stream: str) -> Ended | None:
        """What a feeder is told of a stream that has ended, where that was the last of it."""
        number, _ = self._heads.get(stream, (0, 0))
        for (header,) in self._rows("SELECT header FROM events WHERE number = ?", (number,)):
            notice = protocol.decode_logged(header)
            if isinstance(notice, StreamNotice) and notice.kind == "ended":
                return Ended(stream, notice.next_index, notice.proposals, notice.events)
        return None

    def belong(self, features: Mapping[str, object]) -> None:
        """Note what the engine takes and tells of, where nothing is noted; else as `belongs_to`."""
        if not self.belongs_to(features):
            with self._transaction() as db:
                db.execute("INSERT INTO meta VALUES ('features', ?)", (json.dumps(features),))

    def states(self) -> Iterator[tuple[str, bytes]]:
        """The streams that have a state, and it."""
        yield from self._rows("SELECT stream, state FROM states")

    # ---- writing -------------------------------------------------------------------------------

    def commit(
        self, publications: Sequence[Publication], states: Mapping[str, bytes | None] | None = None
    ) -> list[list[bytes]]:
        """Number and log publications, and the states that belong to them, all or nothing.

        A state of None is deleted. Returns the frames of each publication. Raises LogError, and
        then nothing has changed.
        """
        batch = _Batch(self._newest, self._heads, self._open, publications)
        with self._transaction() as db:
            batch.write(db, time.time(), self._now_ran_s())
            for stream, state in (states or {}).items():
                if state is None:
                    db.execute("DELETE FROM states WHERE stream = ?", (stream,))
                else:
                    db.execute("REPLACE INTO states VALUES (?, ?)", (stream, state))
        self._newest = batch.newest
        self._heads |= batch.heads
        for key, header in batch.actions.items():
            self._open.pop(key, None)
            if header is not None:
                self._open[key] = header
        return batch.frames

    def trim(self) -> None:
        """Delete some of the oldest events, if there are too many; the newest one stays."""
        too_old_s = self._now_ran_s() - self._config.days * 86_400
        oldest = "SELECT number, ran_s FROM events WHERE number < ? ORDER BY number LIMIT ?"
        for _ in range(_TRIMS):
            rows = self._rows(oldest, (self._newest, _TRIM_ROWS))
            if not self._too_large():
                rows = [row for row in rows if row[1] < too_old_s]
            if not rows:
                break
            with self._transaction() as db:
                db.execute("DELETE FROM events WHERE number <= ?", (rows[-1][0],))
        if len(self._heads) > 2 * STREAMS_REMEMBERED:
            self._forget_streams()

    def _too_large(self) -> bool:
        names = ("page_count", "freelist_count", "page_size")
        pages, free, page_bytes = (self._row(f"PRAGMA {name}")[0] for name in names)
        return bool((pages - free) * page_bytes > self._config.mb * 2**20)

    def _forget_streams(self) -> None:
        by_number = sorted(self._heads, key=lambda stream: self._heads[stream], reverse=True)
        forgotten = by_number[STREAMS_REMEMBERED:]
        with self._transaction() as db:
            db.executemany("DELETE FROM heads WHERE stream = ?", [(each,) for each in forgotten])
        for stream in forgotten:
            del self._heads[stream]

    def _now_ran_s(self) -> int:
        return int(self._ran_s + time.monotonic() - self._opened_s)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise LogError(f"{self._file}: cannot be written: {error}") from None
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")


class _Batch:
    """Publications with their numbers, and what they change beside the events."""

    def __init__(
        self,
        newest: int,
        heads: Mapping[str, _Head],
        open_actions: Mapping[_Action, bytes],
        publications: Sequence[Publication],
    ) -> None:
        self.newest = newest
        self.frames: list[list[bytes]] = []
        self.heads: dict[str, _Head] = {}
        self.actions: dict[_Action, bytes | None] = {}  # None: it is over
        self._rows: list[tuple[int, str, bytes]] = []
        for publication in publications:
            stream = publication.stream
            previous, _ = self.heads.get(stream) or heads.get(stream, (0, 0))
            self.newest += 1
            frames = protocol.encode(publication, number=self.newest, previous=previous)
            self.frames.append(frames)
            self._rows.append((self.newest, stream, frames[1]))
            self.heads[stream] = (self.newest, publication.session)
            if isinstance(publication, ActionEvent):
                key = (stream, publication.session, publication.id)
                self.actions[key] = None if publication.is_last else frames[1]
            elif isinstance(publication, StreamNotice) and publication.kind == "opened":
                # What a session before has left open was never ended.
                left = (key for key in {**open_actions, **self.actions} if key[0] == stream)
                self.actions |= dict.fromkeys(left)

    def write(self, db: sqlite3.Connection, logged_s: float, ran_s: int) -> None:
        """Within a transaction."""
        db.executemany(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?)",
            [(number, stream, logged_s, ran_s, header) for number, stream, header in self._rows],
        )
        db.executemany(
            "REPLACE INTO heads VALUES (?, ?, ?)",
            [(stream, *head) for stream, head in self.heads.items()],
        )
        for key, header in self.actions.items():
            if header is None:
                db.execute("DELETE FROM open_actions WHERE (stream, session, id) = (?, ?, ?)", key)
            else:
                db.execute("REPLACE INTO open_actions VALUES (?, ?, ?, ?)", (*key, header))


def check_folder(folder: Path, features: Mapping[str, object]) -> None:
    """Raises LogError where no engine that takes and tells of these could keep its log in the
    folder. Nothing is written, and an engine may have it at the moment."""
    try:
        is_begun = (folder / FILE).exists()
        nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    except OSError as error:
        raise LogError(f"state folder {folder}: cannot be used: {error}") from None
    if not nearest.is_dir():
        raise LogError(f"state folder {folder}: expected a folder, {nearest} is none")
    as_effective = os.access in os.supports_effective_ids
    if not os.access(nearest, os.W_OK | os.X_OK, effective_ids=as_effective):
        raise LogError(f"state folder {folder}: expected to be allowed to write in {nearest}")
    if is_begun:
        with reading(folder) as log:
            log.check_whole()
            log.belongs_to(features)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder, which is made if it is not there, for one process alone."""
    import fcntl  # not on every platform, as the rest of the engine is

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+", encoding="ascii")
    except OSError as error:
        raise LogError(f"state folder {folder}: cannot be used: {error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LogError(
                f"state folder {folder}: the engine with process id {file.read().strip()} has it; "
                "each engine needs one of its own"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _connect(file: Path) -> sqlite3.Connection:
    try:
        return sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise LogError(f"{file}: cannot be opened: {error}") from None


def _prepare(db: sqlite3.Connection, file: Path, config: LogConfig) -> None:
    """Set up a connection, and the tables of a new log."""
    try:
        is_new = db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {'FULL' if config.fsync == 'commit' else 'NORMAL'}")
        db.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
        if is_new:
            db.executescript(NEW_LOG)
    except sqlite3.OperationalError as error:
        raise LogError(f"{file}: cannot be opened: {error}") from None
    except sqlite3.DatabaseError as error:
        raise damaged(file, str(error)) from None


def _boot_id() -> str:
    """Another one after each start of the machine; where that is not known, each time."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return secrets.token_hex(8)
