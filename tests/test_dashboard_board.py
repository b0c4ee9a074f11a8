"""What the dashboard knows of an engine: bounded, and told in increments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dashboards import ONE, SNIPPET_S, action

from hrpro.clients.dashboard import board as board_module
from hrpro.clients.dashboard.board import Board
from hrpro.engine.protocol import FinalProposal, SnippetScores, StreamNotice

OTHER = "1" * 16


def notice(
    kind: str,
    session: int = 1,
    first: int = 0,
    stop: int = 0,
    stream: str = "cam",
    sequence: int = 0,
) -> StreamNotice:
    return StreamNotice(stream, session, sequence, kind, first, stop, 0, 0)  # type: ignore[arg-type]


def status(*streams: dict[str, Any], instance: str = ONE) -> dict[str, Any]:
    entries = [{"session": 1, "idle": False, "next_index": 10, **each} for each in streams]
    return {"instance": instance, "state": "serving", "counters": {}, "streams": entries}


def row(board: Board, stream: str = "cam") -> dict[str, Any]:
    (found,) = [each for each in board.changes(0)["rows"] if each["stream"] == stream]
    return found


def states(board: Board) -> dict[tuple[int, int], str]:
    told = [each for each in board.changes(0)["events"] if each["type"] == "action"]
    return {(each["session"], each["id"]): each["state"] for each in told}


# ---- increments --------------------------------------------------------------------------------


def test_a_page_is_told_what_has_changed_and_no_more() -> None:
    board = Board()
    board.take(action("a"), ONE)
    board.take(action("b"), ONE)
    everything = board.changes(0)
    assert everything["is_snapshot"]
    assert everything["streams"] == ["a", "b"]
    assert [each["stream"] for each in everything["events"]] == ["a", "b"]
    assert everything["engine"]["snippet_s"] == pytest.approx(SNIPPET_S)

    nothing = board.changes(everything["revision"])
    assert (nothing["rows"], nothing["events"], nothing["is_snapshot"]) == ([], [], False)
    assert "streams" not in nothing
    assert "engine" not in nothing

    board.take(action("b", revision=1, index=12), ONE)
    changed = board.changes(everything["revision"])
    assert [each["stream"] for each in changed["rows"]] == ["b"]
    assert [each["change"] for each in changed["events"]] == [1]
    assert changed["events"][0]["n"] == everything["events"][1]["n"]


def test_what_came_while_a_page_was_slow_is_one_message() -> None:
    board = Board()
    board.take(action(), ONE)
    revision = board.revision
    for n in range(1, 50):
        board.take(action(revision=n, index=9 + n, kind="update"), ONE)
    changed = board.changes(revision)
    assert [each["change"] for each in changed["events"]] == [49]
    assert [each["head"] for each in changed["rows"]] == [59]


def test_what_comes_again_changes_nothing() -> None:
    board = Board()
    board.take(action(kind="end", revision=3, end_s=4.0), ONE)
    board.take(notice("gap", first=2, stop=4, sequence=1), ONE)
    revision = board.revision
    board.take(action(kind="update", revision=2), ONE)
    board.take(action(kind="end", revision=3, end_s=4.0), ONE)
    board.take(notice("gap", first=2, stop=4, sequence=1), ONE)
    assert board.revision == revision


# ---- what an action is -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "end_s", "state"),
    [
        ("start", None, "now"),
        ("update", None, "now"),
        ("update", 3.0, "over"),
        ("end", 3.0, "ended"),
        ("retract", 3.0, "retracted"),
    ],
)
def test_the_state_of_an_action(kind: str, end_s: float | None, state: str) -> None:
    board = Board()
    board.take(action(kind=kind, end_s=end_s), ONE)
    assert states(board) == {(1, 1): state}


def test_an_action_whose_session_is_over_has_lost_its_end() -> None:
    board = Board()
    board.take(action(), ONE)
    board.take(action(session=2, number=7), ONE)
    assert states(board) == {(1, 1): "lost", (2, 7): "now"}
    board.take(notice("ended", session=2, stop=20), ONE)
    assert states(board)[2, 7] == "lost"
    board.take(action(kind="end", revision=1, end_s=3.0), ONE)  # it was only late
    assert states(board)[1, 1] == "ended"
    assert row(board)["session"] == 2


# ---- streams -----------------------------------------------------------------------------------


def test_a_stream_is_live_idle_and_ended() -> None:
    board = Board()
    for kind, state in [
        ("opened", "live"), ("idle", "idle"), ("resumed", "live"), ("ended", "ended")
    ]:  # fmt: skip
        board.take(notice(kind, sequence=len(state), stop=10), ONE)
        assert row(board)["state"] == state
    board.take_status(status({"stream": "cam"}))  # it was asked before the end was heard of
    assert row(board)["state"] == "ended"


def test_a_stream_that_the_engine_does_not_have_any_more_is_gone() -> None:
    board = Board()
    board.take_status(status({"stream": "cam"}))
    board.take_status(status())
    assert row(board)["state"] == "live"  # once may be a matter of who was first
    board.take_status(status())
    assert row(board)["state"] == "gone"
    board.take_status(status({"stream": "cam"}))
    assert row(board)["state"] == "live"


@pytest.mark.parametrize(("first", "from_session"), [(0, 2), (50, 1)])
@pytest.mark.parametrize("status_first", [False, True])
def test_a_session_that_does_not_go_on_has_a_timeline_of_its_own(
    first: int, from_session: int, status_first: bool
) -> None:
    board = Board()
    board.take(notice("opened"), ONE)
    board.take(action(index=39), ONE)
    assert row(board)["head"] == 40
    if status_first:  # and it has come far already
        board.take_status(status({"stream": "cam", "session": 2, "next_index": 60}))
    board.take(notice("opened", session=2, first=first, stop=first), ONE)
    told = row(board)
    assert (told["session"], told["from_session"]) == (2, from_session)
    assert told["head"] == (60 if status_first else first)


def test_another_log_begins_anew() -> None:
    board = Board()
    board.take(action(session=5), ONE)
    board.take(action(session=1), OTHER)
    assert states(board) == {(5, 1): "lost", (1, 1): "now"}
    assert (row(board)["session"], row(board)["from_session"]) == (1, 1)
    assert board.changes(0)["engine"]["restarts"] == 1


def test_a_silent_engine_is_away_since_it_answered_last() -> None:
    board = Board()
    board.take_status(status())
    answered_at = board.changes(0)["engine"]["answered_at"]
    board.take_silence("no answer")
    board.take_silence("no answer")
    engine = board.changes(0)["engine"]
    assert engine["away_since"] == answered_at
    assert engine["problem"] == "no answer"
    board.take_refusal("not for this key")
    engine = board.changes(0)["engine"]
    assert (engine["away_since"], engine["problem"]) == (None, "not for this key")
    board.take_status(status())
    engine = board.changes(0)["engine"]
    assert (engine["away_since"], engine["problem"]) == (None, None)


# ---- scores ------------------------------------------------------------------------------------


def scores(first: int, curves: list[list[float]], session: int = 1) -> SnippetScores:
    """Of each snippet attention, then the classes."""
    labels = tuple(f"class {k}" for k in range(len(curves[0]) - 1))
    array = np.array(curves, np.float32)
    return SnippetScores("cam", session, first, 25.0, 16, labels, "b", array)


def test_scores_are_told_in_thousandths_without_what_is_next_to_nothing() -> None:
    board = Board()
    board.take_scores(scores(5, [[0.9, 0.5, 0.009], [1.0, 0.01, 0.9996]]))
    told = board.changes(0)
    assert told["scores"] == [
        {
            "stream": "cam",
            "first": 5,
            "attention": [900, 1000],
            "scores": [[[0, 500]], [[1, 1000], [0, 10]]],
        }
    ]
    assert (told["engine"]["classes"], told["engine"]["snippet_s"]) == (
        ["class 0", "class 1"],
        0.64,
    )
    assert row(board)["head"] == 7
    board.take_scores(scores(7, [[0.5, 0.0, 0.0]]))
    assert [each["first"] for each in board.changes(told["revision"])["scores"]] == [7]


def test_of_many_classes_the_highest_are_told() -> None:
    board = Board()
    board.take_scores(scores(0, [[1.0, *(k / 100 for k in range(1, 21))]]))
    (chunk,) = board.changes(0)["scores"]
    assert chunk["scores"] == [[[k, 10 * (k + 1)] for k in range(19, 11, -1)]]


def test_scores_that_are_computed_again_stand_in_the_place_of_the_former() -> None:
    board = Board()
    for first in (0, 2, 4):
        board.take_scores(scores(first, [[0.5, 0.1]] * 2))
    board.take_scores(scores(2, [[0.6, 0.2]] * 2))
    assert [each["first"] for each in board.changes(0)["scores"]] == [0, 2]
    assert row(board)["head"] == 6


def test_scores_of_a_former_session_are_left_out_and_old_ones_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(board_module, "HISTORY_S", 6.4)
    board = Board()
    for first in range(30):
        board.take_scores(scores(first, [[0.5, 0.1]], session=2))
    board.take_scores(scores(90, [[0.5, 0.1]], session=1))
    assert [each["first"] for each in board.changes(0)["scores"]] == list(range(20, 30))


# ---- bounds ------------------------------------------------------------------------------------


def test_of_many_events_the_oldest_that_are_over_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "EVENTS_KEPT", 4)
    board = Board()
    board.take(action(number=1), ONE)
    for n in range(2, 9):
        board.take(action(number=n, kind="end", end_s=2.0), ONE)
    assert states(board) == {(1, 1): "now", (1, 6): "ended", (1, 7): "ended", (1, 8): "ended"}


def test_of_many_streams_the_one_that_moved_longest_ago_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(board_module, "STREAMS_SHOWN", 2)
    board = Board()
    for n, stream in enumerate("abc"):
        board.take(action(stream), ONE)
        if stream == "b":
            board.take(action("a", revision=1, index=20 + n), ONE)
    assert board.changes(0)["streams"] == ["a", "c"]


def test_ended_streams_go_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()
    board.take(notice("ended", stop=10), ONE)
    for _ in range(3):
        board.take_status(status())
    assert board.changes(0)["streams"] == ["cam"]
    monkeypatch.setattr(board_module, "ENDED_SHOWN_S", 0.0)
    board.take_status(status())
    assert board.changes(0)["streams"] == []


def test_a_proposal_tells_the_clock() -> None:
    board = Board()
    board.take(FinalProposal("cam", 1, 1, 0, "run", 0.0, 1.0, 0.5, 4, 2.0, None, "b"), ONE)
    assert board.changes(0)["engine"]["snippet_s"] == pytest.approx(0.4)
