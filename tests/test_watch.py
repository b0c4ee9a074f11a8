"""`hrpro watch`: JSON lines for programs, a live table for people."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import pytest
from commands import (
    PATIENCE_S,
    Engine,
    Screen,
    Trained,
    engine,
    environment,
    hrpro,
    published_in_process,
    read_json_lines,
    running,
    wait_for,
)
from driving import assert_same
from rich.console import Console
from serving import serving

from hrpro.clients import FeatureFeeder
from hrpro.clients.cli_shared import console
from hrpro.clients.feeding import Source, feed_sources
from hrpro.clients.watching import EventBoard, log_row, show_table
from hrpro.engine.event_log import EventLog
from hrpro.engine.keys import Keyring
from hrpro.engine.messages import ActionEvent, FinalProposal, Publication, StreamNotice
from hrpro.engine.timebase import SnippetClock

pytest_plugins = ("cli_fixtures",)

DIM = 96


@pytest.fixture(scope="module")
def served(trained: Trained) -> Iterator[Engine]:
    with engine(trained.bundle) as running_engine:
        yield running_engine


def open_and_end(served: Engine, stream: str) -> None:
    """A session without snippets: whoever is subscribed to the stream hears of it."""
    with FeatureFeeder(served.feed, stream, DIM) as feeder:
        feeder.end()


@contextlib.contextmanager
def watching(served: Engine, file: Path, stream: str, *options: object) -> Iterator[Popen[str]]:
    """A `hrpro watch` that is known to be subscribed, since it has heard of a stream."""
    with running("watch", "--from", served.events, "--jsonl", file, *options) as process:

        def heard() -> bool:
            assert process.poll() is None
            open_and_end(served, stream)
            return file.exists() and file.read_text() != ""

        wait_for(heard)
        yield process


def watch_the_test_split(
    trained: Trained, served: Engine, file: Path, stream: str, *options: object
) -> list[Publication]:
    """All that a watcher of `stream` writes of one session of seq5 and seq6."""
    with watching(served, file, stream, *options) as process:
        sources = [Source(name, features) for name, features in trained.recordings.items()]
        ended = feed_sources(sources, served.feed, SnippetClock(), speed=None, chunk_snippets=8)
        wanted = ended.keys() & {stream} if "--stream" in options else ended.keys()

        def complete() -> bool:
            last = {
                each.stream
                for each in read_json_lines(file)
                if isinstance(each, StreamNotice) and each.kind == "ended" and each.next_index
            }
            open_and_end(served, "other")  # passes the time, and the filter must hold it back
            return last >= wanted

        wait_for(complete)
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    return read_json_lines(file)


def sessions_with_snippets(published: Sequence[Publication]) -> dict[str, list[Publication]]:
    """By stream, those of the last session that had snippets, numbered as a first session."""
    found = {}
    for notice in published:
        if isinstance(notice, StreamNotice) and notice.kind == "ended" and notice.next_index:
            key = (notice.stream, notice.session)
            found[notice.stream] = [
                replace(each, session=1) for each in published if (each.stream, each.session) == key
            ]
    return found


# ---- JSON lines --------------------------------------------------------------------------------


def test_json_lines_are_all_that_is_published(
    trained: Trained, served: Engine, tmp_path: Path
) -> None:
    written = watch_the_test_split(trained, served, tmp_path / "all.jsonl", "seq5")
    expected = published_in_process(trained.bundle, trained.recordings)
    got = sessions_with_snippets(written)
    assert got.keys() == expected.keys()
    for name, published in expected.items():
        assert_same(got[name], published)


def test_one_stream(trained: Trained, served: Engine, tmp_path: Path) -> None:
    file = tmp_path / "seq6.jsonl"
    written = watch_the_test_split(trained, served, file, "seq6", "--stream", "seq6")
    assert {each.stream for each in written} == {"seq6"}
    (got,) = sessions_with_snippets(written).values()
    assert_same(got, published_in_process(trained.bundle, trained.recordings)["seq6"])


def test_one_label(trained: Trained, served: Engine, tmp_path: Path) -> None:
    expected = published_in_process(trained.bundle, trained.recordings)
    labels = [each.label for each in expected["seq5"] if isinstance(each, ActionEvent)]
    assert len(set(labels)) > 1
    written = watch_the_test_split(
        trained, served, tmp_path / "label.jsonl", "seq5", "--label", labels[0]
    )
    got = sessions_with_snippets(written)
    for name, published in expected.items():
        wanted = [
            each for each in published if isinstance(each, StreamNotice) or each.label == labels[0]
        ]
        assert_same(got[name], wanted)


def test_scores_and_final_proposals(tmp_path: Path) -> None:
    """Of a log, whose scores are those of the snippets: 0.25, 0.5, 0.75 and 1."""
    features = np.repeat(np.linspace(0.25, 1, 4, dtype=np.float32)[:, None], 2, axis=1)
    with EventLog(tmp_path / "state") as log, serving(log=log) as server:
        with FeatureFeeder(server.feed_address, "cam", 2) as feeder:
            feeder.send(features)
            feeder.end()
        said = {}
        for options in ((), ("--min-score", 0.5), ("--final",), ("--final", "--min-score", 0.75)):
            file = tmp_path / "written.jsonl"
            hrpro("watch", "--from", server.events_address, "--since", 0, "--jsonl", file,
                  "--until-idle", 0.5, *options)  # fmt: skip
            said[options] = [(each.TYPE, getattr(each, "score", None))
                             for each in read_json_lines(file)]  # fmt: skip
            file.unlink()
    pairs = [(kind, score) for score in (0.25, 0.5, 0.75, 1.0) for kind in ("event", "final")]
    notice = ("stream", None)
    assert list(said.values()) == [
        [notice, *pairs, notice],
        [notice, *pairs[2:], notice],
        pairs[1::2],
        pairs[5::2],
    ]


def test_until_idle(served: Engine, tmp_path: Path) -> None:
    file = tmp_path / "idle.jsonl"
    with watching(served, file, "cam1", "--until-idle", 0.5) as process:
        assert process.wait(PATIENCE_S) == 0
    written = read_json_lines(file)
    assert all(isinstance(each, StreamNotice) and each.stream == "cam1" for each in written)


# ---- the table ---------------------------------------------------------------------------------


def rows(board: EventBoard) -> list[list[str]]:
    """The cells of the table as it is printed, and its caption as the last row."""
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(board.table())
    lines = console.export_text().splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    return [*cells, [lines[-1].strip()]]


def action(kind: str, **fields: Any) -> ActionEvent:
    values = {
        "stream": "cam1", "session": 1, "sequence": 0, "id": 0, "revision": 0, "label": "jump",
        "start_s": 1.28, "end_s": None, "score": 0.75, "published_index": 5, "published_s": 3.84,
        "bundle_id": "tiny",
    }  # fmt: skip
    return ActionEvent(kind=kind, **{**values, **fields})  # type: ignore[arg-type]


def final(**fields: Any) -> FinalProposal:
    values = {
        "stream": "cam1", "session": 1, "sequence": 0, "id": 0, "label": "jump", "start_s": 1.28,
        "end_s": 3.2, "score": 0.9, "published_index": 9, "published_s": 6.4, "action_id": 0,
        "bundle_id": "tiny",
    }  # fmt: skip
    return FinalProposal(**{**values, **fields})


def test_a_board_without_anything() -> None:
    assert rows(EventBoard()) == [["0 live streams, 0 final proposals"]]


def test_the_board_shows_open_actions_first() -> None:
    board = EventBoard()
    for publication in (
        StreamNotice("cam1", 1, 0, "opened", 0, 0, 0, 0),
        StreamNotice("cam2", 1, 0, "opened", 0, 0, 0, 0),
        action("start"),
        action("update", revision=1, score=0.8),
        action("start", id=1, label="run", start_s=2.0),
        final(),
        action("start", id=2, label="climb", start_s=0.4),
        action("retract", id=2, revision=1, label="climb", start_s=0.4, end_s=1.1, score=0.2),
        action("start", id=3, label="swim", start_s=1.5),
        action("update", id=3, revision=1, label="swim", start_s=1.5, end_s=2.56, score=0.8),
        action("end", revision=2, end_s=3.2, score=0.9),
        action("end", stream="cam2", label="throw", start_s=0.64, end_s=1.28, score=0.6),
        final(id=1),
        StreamNotice("cam2", 1, 9, "ended", 0, 9, 1, 1),
    ):
        board.take(publication)
    assert rows(board) == [
        ["cam1", "swim", "1.5 s", "2.6 s", "0.80", "over"],
        ["cam1", "run", "2.0 s", "", "0.75", "● now"],
        ["cam2", "throw", "0.6 s", "1.3 s", "0.60", "ended"],
        ["cam1", "jump", "1.3 s", "3.2 s", "0.90", "ended"],
        ["cam1", "climb", "0.4 s", "1.1 s", "0.20", "retracted"],
        ["1 live streams, 2 final proposals"],
    ]


def test_the_board_of_final_proposals() -> None:
    board = EventBoard(finals=True)
    for at in range(30):
        board.take(final(id=at, start_s=float(at), end_s=at + 0.5))
    shown = rows(board)
    assert shown[0] == ["cam1", "jump", "29.0 s", "29.5 s", "0.90", "final"]
    assert [row[2] for row in shown[:-1]] == [f"{at}.0 s" for at in range(29, 5, -1)]
    assert shown[-1] == ["1 live streams, 30 final proposals"]


def test_the_board_keeps_the_newest_ended_actions_and_all_open_ones() -> None:
    board = EventBoard()
    board.take(action("start", id=1000, label="run"))
    for number in range(100):
        board.take(action("end", id=number, start_s=float(number), end_s=number + 1.0))
    shown = rows(board)[:-1]
    assert shown[0][1] == "run"
    assert [row[2] for row in shown[1:]] == [f"{number}.0 s" for number in range(99, 76, -1)]


def notice(kind: str, stream: str = "cam1", session: int = 1) -> StreamNotice:
    return StreamNotice(stream, session, 0, kind, 0, 9, 0, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("then", "caption"),
    [
        # The session is over, and the action's end was missed.
        (notice("ended"), "1 live streams, 0 final proposals"),
        # The next session: its notice, or what is heard of it first.
        (notice("opened", session=2), "2 live streams, 0 final proposals"),
        (final(session=2), "2 live streams, 1 final proposals"),
        # The first session of a restarted engine.
        (notice("opened"), "2 live streams, 0 final proposals"),
    ],
)
def test_open_actions_do_not_outlive_their_session(then: Publication, caption: str) -> None:
    board = EventBoard()
    for publication in (
        notice("opened"),
        action("end", id=0, label="run", end_s=2.0),
        action("start", id=1),
        action("start", stream="cam2"),  # of this one it was not heard that it was opened
        then,
    ):
        board.take(publication)
    assert rows(board) == [
        ["cam2", "jump", "1.3 s", "", "0.75", "● now"],
        ["cam1", "run", "1.3 s", "2.0 s", "0.75", "ended"],
        [caption],
    ]


def test_the_board_does_not_grow_with_the_streams_that_were() -> None:
    board = EventBoard()
    for number in range(1000):
        for kind in ("opened", "ended"):
            board.take(notice(kind, f"cam{number}"))
            board.take(action("start", stream=f"left{number}"))
            board.take(notice("ended", f"left{number}"))
    assert (len(board._sessions), len(board._actions)) == (0, 0)
    assert rows(board) == [["0 live streams, 0 final proposals"]]


class RestartedEngine:
    """A subscriber to an engine that is restarted in the midst of an action."""

    def __init__(self) -> None:
        self.instance: str | None = None
        self._script: list[tuple[str | None, Publication | None]] = [
            (None, action("start")),
            ("a" * 16, None),
            ("a" * 16, action("start", stream="cam2")),
            ("b" * 16, action("start", stream="cam3")),
        ]

    def receive(self, timeout_s: float) -> Publication | None:
        if not self._script:
            return None
        self.instance, publication = self._script.pop(0)
        return publication


def test_what_was_open_in_an_engine_before_is_not_now() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    subscriber: Any = RestartedEngine()
    show_table(subscriber, console, until_idle_s=0.05)
    shown = console.export_text()
    assert "cam3" in shown and "cam1" not in shown and "cam2" not in shown


def test_a_label_is_shown_as_it_is() -> None:
    board = EventBoard()
    board.take(action("start", label="jump [left]"))
    assert rows(board)[0][1] == "jump [left]"


def test_names_are_no_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    board = EventBoard()
    board.take(action("start", stream="site:key:3", label="a :cat: b"))
    screen = console()
    screen.width = 100
    screen.print(board.table())
    shown = capsys.readouterr().out
    assert "site:key:3" in shown and "a :cat: b" in shown


def test_a_row_of_the_log_is_as_it_was_published() -> None:
    started = replace(action("start", stream="site:key:3", label="jump [left]"), number=7)
    number, _, *others = log_row(0.0, started)
    assert number == "7"
    assert others == ["site:key:3", "start", "jump [left]", "1.28 s", "", "0.75", "1"]
    _, _, *others = log_row(0.0, replace(final(), number=8))
    assert others == ["cam1", "final", "jump", "1.28 s", "3.20 s", "0.90", "1"]


def test_who_may_not_subscribe_is_told_of_the_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    options = ("--role", "producer", "--streams", "*", "--out", tmp_path / "camera.key")
    hrpro("keys", "new", "camera", "--keys", keys, *options)
    with serving(keyring=Keyring(keys)) as server:
        key = ("--key", tmp_path / "camera.key")
        watch = ("watch", "--from", server.events_address, "--jsonl", "-", "--until-idle", 0.1)
        said = hrpro(*watch, *key).stderr
    assert said == (
        f"hrpro: no engine answers at {server.events_address} yet; waiting; does it know this "
        "key?\n"
    )


def test_the_table_is_live(trained: Trained, served: Engine) -> None:
    terminal, programs_end = pty.openpty()
    size = {"COLUMNS": "100", "LINES": "40", "TERM": "xterm-256color"}
    options = {"stdin": programs_end, "stdout": programs_end, "env": {**environment(), **size}}
    try:
        with running("watch", "--from", served.events, **options) as process:
            os.close(programs_end)
            screen = Screen(terminal)
            camera = Source("camera", trained.recordings["seq5"])

            def an_action_ended() -> bool:
                # Again until the table is subscribed: only what it then hears can be shown.
                feed_sources([camera], served.feed, SnippetClock(), None, chunk_snippets=8)
                return screen.shows("ended") and "camera" in screen.text

            wait_for(an_action_ended)
            process.send_signal(signal.SIGINT)

            def it_left() -> bool:
                # A terminal that nobody reads is full at some time, and who writes to it waits.
                screen.shows("")
                return process.poll() is not None

            wait_for(it_left)
            assert process.returncode == 0
            screen.shows("")
            assert screen.text.rstrip().endswith("\x1b[?25h")  # the cursor is back
    finally:
        os.close(terminal)
