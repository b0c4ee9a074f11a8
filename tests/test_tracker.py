"""Actions with an identity: how they start, grow, are over, and end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.proposals import RunDetector
from hrpro.engine.refine import Proposal
from hrpro.engine.tracker import ActionChange, ActionTracker

CONFIG = LocalizationConfig(
    event_start=0.5,
    event_end=0.25,
    event_update_snippets=4,
    event_update_score=0.2,
    event_confirm=0.5,
)


def track(
    scores: list[float], config: LocalizationConfig = CONFIG, first_index: int = 0
) -> tuple[ActionTracker, list[ActionChange]]:
    """One class, without any end: that is for `conclude`."""
    tracker = ActionTracker(1, config, first_index)
    changes = [change for score in scores for change in tracker.push(np.array([score], np.float32))]
    return tracker, changes


def good(start: float, end: float, score: float = 1.0) -> Proposal:
    return Proposal(0, start, end, score, int(end))


def test_an_action_by_hand() -> None:
    tracker, changes = track([0.0, 0.25, 0.75, 1.0, 0.75, 0.5, 0.5, 0.5, 0.125])
    assert changes == [
        # Between the centres 1.5 and 2.5, half-way from 0.25 to 0.75
        ActionChange("start", 0, 0, 0, 2.0, None, 0.75),
        # 4 snippets later, with 6: (0.75 + 1 + 0.75 + 0.5 + 0.5) / 5
        ActionChange("update", 0, 0, 1, 2.0, None, pytest.approx(0.7)),
    ]
    # Over at 8, the first snippet below 0.25, but not final before; that it is over is told once,
    # with (0.75 + 1 + 0.75 + 0.5 + 0.5 + 0.5) / 6.
    assert tracker.open_count == 1
    over = ActionChange("update", 0, 0, 2, 2.0, 8.0, pytest.approx(4 / 6))
    assert tracker.conclude(6) == [over]
    assert tracker.conclude(7) == []
    assert tracker.assign(good(2.25, 7.75, 0.875)) == 0
    assert tracker.conclude(8) == [ActionChange("end", 0, 0, 3, 2.25, 7.75, 0.875)]
    assert tracker.open_count == 0
    assert tracker.conclude(100) == []


@pytest.mark.parametrize(
    ("scores", "starts"),
    [
        pytest.param([], [], id="empty"),
        pytest.param([0.5, 0.5], [], id="not-above"),
        pytest.param([1.0], [0.0], id="at-the-start"),
        # 0.25 is not below 0.25, and rising again is no second start.
        pytest.param([1.0, 0.25, 1.0], [0.0], id="hysteresis"),
        # 0.125 -> 1: 0.375 of 0.875 from the centre 1.5
        pytest.param([1.0, 0.125, 1.0], [0.0, 1.5 + 0.375 / 0.875], id="two"),
        # 0 -> 0.625: 0.5 of 0.625 from the centre 0.5; a score of exactly 0 is a score, too
        pytest.param([0.0, 0.625], [0.5 + 0.8], id="from-zero"),
    ],
)
def test_starts(scores: list[float], starts: list[float]) -> None:
    tracker, changes = track(scores)
    started = [change for change in changes if change.kind == "start"]
    assert [change.start for change in started] == pytest.approx(starts)
    assert [change.id for change in started] == list(range(len(starts)))
    tracker.flush()
    last = tracker.conclude(len(scores))
    assert [(change.kind, change.id) for change in last] == [
        ("retract", each) for each in range(len(starts))
    ]


@pytest.mark.parametrize("now", [0.75, 0.625, 0.5625])
def test_an_action_that_another_bundle_sees_starts_where_it_is_seen(now: float) -> None:
    # The score has crossed the lower threshold before: there is no crossing to be found.
    tracker = ActionTracker(1, LocalizationConfig(event_start=0.875), 0)
    for score in (0.625, 0.625):
        assert tracker.push(np.array([score])) == []
    tracker.config = LocalizationConfig(event_start=0.5)
    (start,) = tracker.push(np.array([now]))
    assert (start.kind, start.start, start.score) == ("start", 2.0, now)


grid = st.sampled_from([0.0, 0.125, 0.375, 0.625, 0.75, 1.0])


@given(st.lists(grid, max_size=30), st.integers(0, 5))
def test_actions_start_and_stop_with_the_runs_of_their_threshold(
    scores: list[float], first_index: int
) -> None:
    config = LocalizationConfig(
        thresholds=(0.5,), peak_gate=0.0, event_start=0.5, event_end=0.5, event_update_snippets=99
    )
    tracker, changes = track(scores, config, first_index)
    detector = RunDetector(1, config, first_index)
    runs = [run for score in scores for run in detector.push(np.array([score], np.float32))]
    runs += detector.flush()
    starts = [change.start for change in changes if change.kind == "start"]
    assert starts == [run.start_position for run in runs]
    tracker.flush()
    assert [end.end for end in tracker.conclude(99)] == [run.stop for run in runs]


def test_updates_come_with_growth() -> None:
    _, changes = track([1.0] * 13)
    # At 0, then at 4, 8 and 12
    assert [(change.kind, change.revision) for change in changes] == [
        ("start", 0),
        ("update", 1),
        ("update", 2),
        ("update", 3),
    ]


def test_updates_come_with_a_change_of_score() -> None:
    _, changes = track([0.0, 1.0, 0.75, 0.5, 0.25])
    # The mean of P: 1, 0.875, 0.75, which is more than 0.2 from 1, and 0.625, which is not from it.
    assert [(change.kind, change.score) for change in changes] == [("start", 1.0), ("update", 0.75)]


def test_classes_have_their_own_actions() -> None:
    tracker = ActionTracker(2, CONFIG, 0)
    first = tracker.push(np.array([1.0, 0.0], np.float32))
    second = tracker.push(np.array([1.0, 1.0], np.float32))
    assert [(change.id, change.label_index) for change in first + second] == [(0, 0), (1, 1)]
    tracker.push(np.array([0.0, 1.0], np.float32))
    assert [change.id for change in tracker.conclude(2)] == [0]
    assert tracker.open_count == 1


def test_an_action_may_start_while_the_last_one_is_not_final() -> None:
    tracker, changes = track([1.0, 0.0, 1.0, 0.0])
    assert [change.id for change in changes] == [0, 1]
    assert tracker.open_count == 2
    last = [[c.id for c in tracker.conclude(t) if c.kind == "retract"] for t in (1, 3)]
    assert last == [[0], [1]]


# --- proposals -----------------------------------------------------------------------------------


def test_an_end_takes_the_borders_of_its_best_proposal() -> None:
    tracker, _ = track([0.0, 1.0, 1.0, 0.0])
    assert [change.kind for change in tracker.conclude(2)] == ["update"]
    for proposal in (
        Proposal(0, 1.0, 2.0, 0.5, 2),
        Proposal(0, 0.75, 3.25, 0.875, 3),
        Proposal(0, 1.25, 3.0, 0.625, 3),
    ):
        assert tracker.assign(proposal) == 0
    assert tracker.conclude(3) == [ActionChange("end", 0, 0, 2, 0.75, 3.25, 0.875)]


@pytest.mark.parametrize(
    ("scores", "last"),
    [
        # From 0.5 of the way between 0 and 1, over at 3; its score is that of its best proposal.
        pytest.param([], ActionChange("retract", 0, 0, 1, 1.0, 3.0, 0.0), id="none"),
        pytest.param([0.375, 0.25], ActionChange("retract", 0, 0, 1, 1.0, 3.0, 0.375), id="weak"),
        pytest.param([0.25, 0.5], ActionChange("end", 0, 0, 1, 0.75, 3.25, 0.5), id="one-is-good"),
    ],
)
def test_an_action_that_no_proposal_confirms_is_retracted(
    scores: list[float], last: ActionChange
) -> None:
    tracker, _ = track([0.0, 1.0, 1.0, 0.0])
    for score in scores:
        assert tracker.assign(good(0.75, 3.25, score)) == 0
    assert tracker.conclude(3) == [last]
    assert tracker.open_count == 0
    # What comes late belongs to an action that has ended, but not to one that is none.
    assert tracker.assign(good(1.0, 3.0)) == (0 if last.kind == "end" else None)


def test_an_action_waits_for_a_better_proposal_that_is_not_final() -> None:
    tracker, _ = track([0.0, 1.0, 1.0, 0.0, 0.0, 1.0])  # 1..3 is over, from 5 on it goes on
    tracker.assign(good(1.0, 3.0, 0.625))
    over = tracker.conclude(4, [[good(1.0, 4.5, 0.75)]])
    assert [(change.kind, change.end) for change in over] == [("update", 3.0)]
    # One that is no better, or another action's, is not waited for.
    pending = [good(1.0, 2.0, 0.625), good(2.5, 6.0, 0.875)]
    assert [change.kind for change in tracker.conclude(4, [pending])] == ["end"]


@pytest.mark.parametrize("waits", [True, False])
def test_a_retraction_waits_for_a_proposal_that_is_not_final(waits: bool) -> None:
    tracker, _ = track([0.0, 1.0, 1.0, 0.0])
    pending = [[good(1.0, 3.5, 0.25)]] if waits else [[]]
    assert [c.kind for c in tracker.conclude(9, pending)] == ["update" if waits else "retract"]
    assert tracker.open_count == int(waits)


@pytest.mark.parametrize(
    ("proposal", "action_id"),
    [
        pytest.param(Proposal(0, 0.0, 1.0, 1, 1), None, id="touching-from-before"),
        pytest.param(Proposal(0, 3.0, 5.0, 1, 5), None, id="touching-between"),
        pytest.param(Proposal(0, 0.0, 1.25, 1, 1), 0, id="overlapping"),
        # 1..3 shares 3 - 1 = 2 with the first, 5..8 shares 7.5 - 5 = 2.5 with the second.
        pytest.param(Proposal(0, 1.0, 7.5, 1, 8), 1, id="over-both-more-of-the-second"),
        pytest.param(Proposal(0, 1.0, 6.0, 1, 6), 0, id="over-both-more-of-the-first"),
        pytest.param(Proposal(1, 1.0, 3.0, 1, 3), None, id="another-class"),
    ],
)
def test_a_proposal_belongs_to_the_action_it_shares_most_with(
    proposal: Proposal, action_id: int | None
) -> None:
    tracker = ActionTracker(2, CONFIG, 0)
    for score in (0, 1, 1, 0, 0, 1, 1, 1):  # 1..3 is over, from 5 on it goes on
        tracker.push(np.array([score, 0], np.float32))
    assert tracker.assign(proposal) == action_id


def test_a_late_proposal_finds_the_action_that_has_ended() -> None:
    tracker, _ = track([0.0, 1.0, 0.0])
    tracker.assign(good(0.5, 2.0))
    ended = tracker.conclude(2)
    assert tracker.assign(Proposal(0, 0.5, 2.5, 1.0, 3)) == 0
    assert [change.kind for change in ended] == ["end"]
    assert tracker.conclude(99) == []  # it is not told again


def test_flush_ends_what_is_open_at_the_last_snippet() -> None:
    tracker, _ = track([0.0, 1.0, 1.0], first_index=10)
    tracker.flush()
    tracker.assign(good(11.5, 13.0, 0.75))
    assert tracker.conclude(13) == [ActionChange("end", 0, 0, 1, 11.5, 13.0, 0.75)]
    tracker.flush()
    assert tracker.conclude(13) == []
