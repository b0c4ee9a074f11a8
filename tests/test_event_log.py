"""The event log as files: numbers, transactions, damage, full disks, clocks, and what is kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from logged import action, everything, logged_in, notice, numbers

from hrpro.engine import event_log, protocol
from hrpro.engine.config import LogConfig
from hrpro.engine.event_log import LOST_AT_MOST, EventLog, check_folder
from hrpro.engine.event_reader import FILE, PAGE_EVENTS, PAGE_ROWS, LogError, reading


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    with EventLog(tmp_path / "state") as opened:
        yield opened


# ---- numbers and pages -------------------------------------------------------------------------


def test_each_publication_has_its_number_and_that_of_its_stream_before(log: EventLog) -> None:
    assert (log.oldest, log.newest, log.read(0)) == (1, 0, ([], 0))
    sent = log.commit([notice("a"), notice("b"), notice("a")])
    sent += log.commit([notice("b")])
    found = [protocol.decode_publication(frames) for frames in sent]
    assert found == [
        replace(notice(stream), number=number, previous=previous)
        for stream, number, previous in (("a", 1, 0), ("b", 2, 0), ("a", 3, 1), ("b", 4, 2))
    ]
    rows, following = log.read(0)
    assert [row.header for row in rows] == [frames[1] for frames in sent]
    assert (following, log.oldest, log.newest) == (4, 1, 4)
    assert everything(log, "b", since=2) == [found[3]]


def test_a_log_goes_on_where_it_was_closed(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        instance = log.instance
        log.commit([notice("a", "opened", session=7), notice("b")])
    with EventLog(tmp_path) as log:
        assert (log.instance, log.newest) == (instance, 2)
        assert log.sessions == {"a": 7, "b": 1}
        (frames,) = log.commit([notice("a")])
        assert protocol.decode_publication(frames) == replace(notice("a"), number=3, previous=1)
    assert len(instance) == 16
    with EventLog(tmp_path / "other") as other:
        assert other.instance != instance


def test_pages_are_bounded(log: EventLog) -> None:
    log.commit([notice("b")])
    log.commit([notice("a")] * (2 * PAGE_ROWS))
    log.commit([notice("b")])
    page, following = log.read(0)
    assert (len(page), following) == (PAGE_EVENTS, PAGE_EVENTS)
    # One stream is searched for in so many rows a page, whether they hold something or not.
    ways = [log.read(0, "b")]
    while ways[-1][1] < log.newest:
        ways.append(log.read(ways[-1][1], "b"))
    assert [[row.number for row in page] for page, _ in ways] == [[1], [], [2 * PAGE_ROWS + 2]]
    assert [following for _, following in ways] == [PAGE_ROWS, 2 * PAGE_ROWS, 2 * PAGE_ROWS + 2]
    assert log.read(1, "c") == ([], log.newest)
    assert numbers(everything(log)) == list(range(1, 2 * PAGE_ROWS + 3))


# ---- what is open, and states ------------------------------------------------------------------


def test_open_actions(tmp_path: Path) -> None:
    def seen(log: EventLog, stream: str | None = None) -> list[tuple[str, int, int, str]]:
        found = [protocol.decode_logged(each) for each in log.open_actions(stream)]
        return sorted((e.stream, e.session, e.id, e.kind) for e in found)  # type: ignore[union-attr]

    with EventLog(tmp_path) as log:
        log.commit([action("start", 0), action("start", 1), action("start", 2, "b")])
        log.commit([action("update", 1, revision=1), action("end", 0, revision=1)])
        log.commit([action("start", 3), action("retract", 3, revision=1)])
        expected = [("b", 1, 2, "start"), ("cam", 1, 1, "update")]
        assert seen(log) == expected
        assert seen(log, "b") == expected[:1]
        assert seen(log, "c") == []
    with EventLog(tmp_path) as log:
        assert seen(log) == expected
        # A session that was never ended: nothing is heard of its actions any more.
        log.commit([notice("cam", "opened", session=2), action("start", 0, session=2)])
        expected = [("b", 1, 2, "start"), ("cam", 2, 0, "start")]
        assert seen(log) == expected
    with EventLog(tmp_path) as log:
        assert seen(log) == expected


def test_states_are_in_the_transaction_of_their_events(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.commit([notice("a")], {"a": b"1", "b": b"2"})
        log.commit([], {"a": b"3"})
        log.commit([notice("b")], {"b": None})
        assert (dict(log.states()).get("a"), dict(log.states()).get("b")) == (b"3", None)
    with EventLog(tmp_path) as log:
        assert list(log.states()) == [("a", b"3")]
        limit_pages(log, 0)
        with pytest.raises(LogError, match="cannot be written: database or disk is full"):
            log.commit([notice("a")] * 1000, {"a": b"4"})
        assert (list(log.states()), log.newest) == ([("a", b"3")], 2)


def limit_pages(log: EventLog, more: int) -> None:
    """From here on the database grows by so many pages, then it is full."""
    (pages,) = log._row("PRAGMA page_count")
    log._row(f"PRAGMA max_page_count = {pages + more}")


def test_a_full_disk_changes_nothing_and_is_no_end(log: EventLog) -> None:
    log.commit([notice("a"), action("start")])
    before = log.open_actions()
    limit_pages(log, 2)
    many = [action("end"), *[notice("a")] * 1000]
    for _ in range(2):
        with pytest.raises(LogError, match="disk is full"):
            log.commit(many)
        assert (log.newest, log.open_actions(), numbers(everything(log))) == (2, before, [1, 2])
    limit_pages(log, 1_000)
    frames = log.commit(many)
    assert protocol.decode_publication(frames[0]).number == 3  # type: ignore[union-attr]
    assert (log.newest, log.open_actions()) == (1003, [])
    assert numbers(everything(log)) == list(range(1, 1004))


# ---- deaths and damage -------------------------------------------------------------------------

_WRITER = """
import sys
from pathlib import Path
from logged import notice
from hrpro.engine.event_log import EventLog

log = EventLog(Path(sys.argv[1]))
while True:
    log.commit([notice("a"), notice("b"), notice("c")])
    print(log.newest, flush=True)
"""


def test_what_was_committed_outlives_the_process(tmp_path: Path) -> None:
    path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as writer:
        assert writer.stdout is not None
        said = [int(writer.stdout.readline()) for _ in range(40)]
        writer.kill()
        said += [int(line) for line in writer.stdout if line.endswith("\n")]
    found = logged_in(tmp_path)
    assert len(found) >= said[-1] >= 120 and len(found) % 3 == 0
    assert numbers(found) == list(range(1, len(found) + 1))
    with EventLog(tmp_path) as log:
        assert log.newest == len(found)


def torn(folder: Path, tear: Callable[[bytes], bytes]) -> list[int | None]:
    """The numbers in a log of 20 transactions of 3 whose WAL is no longer what was written."""
    with EventLog(folder / "running") as log:
        for _ in range(20):
            log.commit([notice("a"), notice("b"), notice("c")])
        shutil.copytree(folder / "running", folder / "torn")
    wal = folder / "torn" / f"{FILE}-wal"
    wal.write_bytes(tear(wal.read_bytes()))
    with EventLog(folder / "torn") as log:
        found = numbers(everything(log))
        (frames,) = log.commit([notice("a")])
        following = protocol.decode_publication(frames)
        assert following.number == len(found) + 1  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize(
    ("tear", "transactions"),
    [
        (lambda wal: wal, 20),
        (lambda wal: wal + b"\0" * 5000, 20),
        (lambda wal: wal[:-1], 19),
        (lambda wal: wal[:-4000] + b"\xff" * 4000, 19),
    ],
)
def test_a_torn_tail_ends_at_the_last_whole_transaction(
    tmp_path: Path, tear: Callable[[bytes], bytes], transactions: int
) -> None:
    assert torn(tmp_path, tear) == list(range(1, 3 * transactions + 1))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_wherever_it_is_torn_the_log_is_a_beginning_of_what_was_written(
    tmp_path: Path, share: float
) -> None:
    found = torn(tmp_path, lambda wal: wal[: int(len(wal) * share)])
    assert 0 < len(found) < 60 and len(found) % 3 == 0
    assert found == list(range(1, len(found) + 1))


def test_a_damaged_log_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.commit([notice("a")] * 1000)
    file = tmp_path / FILE
    whole = file.read_bytes()
    half = len(whole) // 2
    for damaged in (b"no database" * 1000, whole[:half] + b"\x5a" * 9000 + whole[half + 9000 :]):
        file.write_bytes(damaged)
        with pytest.raises(
            LogError, match=r"is damaged: .*Move it, events.db-wal and events.db-shm away: "
        ):
            EventLog(tmp_path)
    with pytest.raises(LogError, match="is damaged: "):  # the half
        check_folder(tmp_path, {})
    file.unlink()
    with EventLog(tmp_path) as log:
        assert log.newest == 0


def test_a_log_of_another_version_is_refused(tmp_path: Path) -> None:
    EventLog(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as db:
        db.execute("PRAGMA user_version = 2")
    for opened in (lambda: EventLog(tmp_path), lambda: logged_in(tmp_path)):
        with pytest.raises(LogError, match="expected an event log of version 1, came 2"):
            opened()


def test_one_engine_a_folder(tmp_path: Path) -> None:
    with EventLog(tmp_path):
        expected = rf"state folder .*: the engine with process id {os.getpid()} has it"
        with pytest.raises(LogError, match=expected):
            EventLog(tmp_path)
    EventLog(tmp_path).close()


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/here")):
        with pytest.raises(LogError, match=rf"state folder {folder}: cannot be used: "):
            EventLog(folder)
    with pytest.raises(LogError, match=r"expected the event log events\.db, found none"):
        logged_in(tmp_path)


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Root may write everywhere; nobody may not."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_a_folder_that_is_read_only() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        EventLog(folder).close()
        for file in folder.iterdir():
            file.chmod(0o444)
        folder.chmod(0o555)
        with without_privileges(), pytest.raises(LogError, match="Permission denied"):
            EventLog(folder)
        (folder / "lock").chmod(0o666)
        with without_privileges(), pytest.raises(LogError, match="cannot be opened: attempt to wr"):
            EventLog(folder)
        folder.chmod(0o755)


def test_a_folder_is_checked_and_stays_as_it_is(tmp_path: Path) -> None:
    here, kind = tmp_path / "state", {"feature_dim": 8}
    check_folder(here, kind)
    assert not here.exists()
    with EventLog(here) as log:
        check_folder(here, kind)  # that nobody's streams are in yet, and which an engine has
        log.belong(kind)
        log.commit([notice("a")] * 1000)
        check_folder(here, kind)
    with pytest.raises(LogError, match=r"belongs to an engine with .*8}, this one has .*9}"):
        check_folder(here, {"feature_dim": 9})
    with pytest.raises(LogError, match=r"expected a folder, .*events\.db is none"):
        check_folder(here / FILE / "below", kind)
    (here / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(LogError, match=r"events\.db: is damaged: file is not a database. Move it"):
        check_folder(here, kind)
    here.chmod(0o700)
    with (
        without_privileges(),
        pytest.raises(LogError, match=r"cannot be used: .*Permission denied"),
    ):
        check_folder(here / "below", kind)
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o555)
        refused = pytest.raises(LogError, match=f"expected to be allowed to write in {made}")
        with without_privileges(), refused:
            check_folder(Path(made) / "state", kind)


# ---- what is kept ------------------------------------------------------------------------------


def test_the_oldest_go_when_the_log_is_too_large(tmp_path: Path) -> None:
    with EventLog(tmp_path, LogConfig(mb=1)) as log:
        for _ in range(10):
            log.commit([notice("a")] * 1000)
            log.trim()
        assert 1 < log.oldest < 10_000
        assert (tmp_path / FILE).stat().st_size < 2 * 2**20
        kept = numbers(everything(log))
        assert kept == list(range(log.oldest, 10_001))
        assert len(kept) > 2_000
    with EventLog(tmp_path, LogConfig(mb=1)) as log:
        log.commit([notice("a")], {"a": b"\0" * 2**21})  # so no events have room
        log.trim()
        assert numbers(everything(log)) == [10_001]  # but the newest stays, so numbers go on
    with EventLog(tmp_path) as log:
        assert (log.oldest, log.newest) == (10_001, 10_001)


def test_the_oldest_go_when_the_engine_has_run_for_so_long(tmp_path: Path) -> None:
    hour_s = 3600
    with EventLog(tmp_path, LogConfig(days=1)) as log:
        log.commit([notice("a")] * 1500)
        log._opened_s -= 23 * hour_s
        log.commit([notice("a")] * 10)
        log.trim()
        assert log.oldest == 1
    with EventLog(tmp_path, LogConfig(days=1)) as log:  # while it does not run, nothing ages
        log.trim()
        assert log.oldest == 1
        log._opened_s -= 2 * hour_s
        log.trim()
        assert (log.oldest, log.newest) == (1501, 1510)
        log._opened_s -= 100 * hour_s
        log.trim()
        assert (log.oldest, log.newest) == (1510, 1510)


def test_a_clock_that_jumps_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times_s = [0.0, 1.7e9, 4.1e9, 1.7e9, 1e6]
    for time_s in times_s:
        with EventLog(tmp_path, LogConfig(days=1)) as log:
            monkeypatch.setattr(event_log.time, "time", lambda time_s=time_s: time_s)
            log.commit([notice("a")])
            log.trim()
            monkeypatch.undo()
    with reading(tmp_path) as found:
        assert [row.logged_s for row in found.read(0)[0]] == times_s
        assert numbers(everything(found)) == [1, 2, 3, 4, 5]


def test_streams_that_were_silent_for_longest_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "STREAMS_REMEMBERED", 3)
    with EventLog(tmp_path) as log:
        log.commit([notice(f"cam{n}") for n in range(6)])
        log.trim()
        assert len(log.sessions) == 6
        log.commit([notice("cam1"), notice("cam6")])
        log.trim()
        assert log.sessions.keys() == {"cam1", "cam5", "cam6"}
    with EventLog(tmp_path) as log:
        assert log.sessions.keys() == {"cam1", "cam5", "cam6"}


def test_numbers_that_a_power_cut_may_have_lost_are_not_given_again(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.commit([notice("a")])
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as db, db:
        keys = db.execute("SELECT key FROM meta ORDER BY key").fetchall()
        assert keys == [("floor",), ("instance",)]
        # As it is where the machine went down under an engine.
        db.execute("INSERT INTO meta VALUES ('boot', 'the start before')")
    for _ in range(2):  # and is not forgotten where nothing was published then
        with EventLog(tmp_path) as log:
            assert log.newest == 1 + LOST_AT_MOST
    with EventLog(tmp_path) as log:
        (frames,) = log.commit([notice("a")])
        found = protocol.decode_publication(frames)
        assert found == replace(notice("a"), number=LOST_AT_MOST + 2, previous=1)
        assert numbers(everything(log)) == [1, LOST_AT_MOST + 2]
        assert log.read(1) == (log.read(LOST_AT_MOST)[0], log.newest)


def test_the_promise_of_fsync_is_what_the_database_is_told(tmp_path: Path) -> None:
    for fsync, synchronous in (("checkpoint", 1), ("commit", 2)):
        with EventLog(tmp_path, LogConfig(fsync=fsync)) as log:  # type: ignore[arg-type]
            assert log._row("PRAGMA synchronous") == (synchronous,)
            assert log._row("PRAGMA journal_mode") == ("wal",)


def test_a_log_can_be_read_whether_an_engine_has_it_or_not(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log, reading(tmp_path) as reader:
        log.commit([notice("a")])
        assert numbers(everything(reader)) == [1]
        log.commit([notice("b")])
        assert numbers(everything(reader)) == [1, 2]
        assert numbers(everything(reader, "b")) == [2]
    assert numbers(logged_in(tmp_path)) == [1, 2]
    with reading(tmp_path) as reader, pytest.raises(LogError, match="readonly"):
        reader._row("DELETE FROM events")
