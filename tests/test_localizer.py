"""Scores of a stream -> decisions: by hand, and as properties of any track."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from driving import last_stop
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.localizer import Decision, Final, StreamLocalizer, localize
from hrpro.engine.proposals import RunDetector
from hrpro.engine.refine import Proposal
from hrpro.engine.tracker import ActionChange

Floats = NDArray[np.float32]

PLAIN = LocalizationConfig(thresholds=(0.5,), peak_gate=0.0)
TWO = LocalizationConfig(thresholds=(0.25, 0.75), peak_gate=0.0)


class MeanScorer:
    """A stage 2 that looks at what is there: the mean embedding in and around a proposal."""

    def score_instances(
        self, embedding: Floats, proposals: Floats
    ) -> tuple[Floats, Floats, Floats]:
        means = []
        for start, end in proposals:
            first = max(0, int(np.floor(start)) - 2)
            means.append(float(embedding[first : max(first + 1, int(np.ceil(end)) + 2)].mean()))
        mean = np.array(means, np.float32)[:, None]
        completeness = np.tile(mean, (1, 2))
        return (
            completeness,
            proposals + mean * np.array([-0.5, 0.5], np.float32),
            completeness * 0.5,
        )


def new_localizer(
    config: LocalizationConfig,
    wait: int | None,
    first_index: int = 0,
    scorer: MeanScorer | None = None,
    class_count: int = 1,
) -> StreamLocalizer:
    return StreamLocalizer(class_count, class_count, config, scorer, wait, first_index)


def rows(track: list[float]) -> Floats:
    """One class."""
    return np.array(track, np.float32).reshape(-1, 1)


def by_snippet(localizer: StreamLocalizer, scores: Floats) -> list[list[Decision]]:
    """The decisions at each snippet, and last those at the end; the scores are the embedding."""
    decisions = [localizer.advance(row[None], row[None]) for row in scores]
    return [*decisions, localizer.flush()]


def finals(decisions: list[Decision]) -> list[Proposal]:
    return [each.proposal for each in decisions if isinstance(each, Final)]


def run_all(localizer: StreamLocalizer, scores: Floats) -> list[Decision]:
    return [each for decisions in by_snippet(localizer, scores) for each in decisions]


# --- by hand -------------------------------------------------------------------------------------


def test_nothing_comes_of_nothing() -> None:
    assert run_all(new_localizer(PLAIN, 2), rows([])) == []
    assert run_all(new_localizer(PLAIN, 2), rows([0.0] * 9)) == []
    assert localize(rows([]), rows([]), PLAIN, None) == []


@pytest.mark.parametrize("wait", [1, 2, 4])
def test_one_action(wait: int) -> None:
    track = rows([0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0])
    decisions = by_snippet(new_localizer(PLAIN, wait), track)
    # The run 2 <= t < 6, its contrast 1 - 0; final once the snippets below 6 + wait are known.
    proposal = Proposal(0, 2.0, 6.0, 1.0, 6)
    expected: list[list[Decision]] = [[] for _ in range(12)]
    expected[2] = [ActionChange("start", 0, 0, 0, 2.0, None, 1.0)]
    if wait > 1:  # that it is over is known before it is final
        expected[6] = [ActionChange("update", 0, 0, 1, 2.0, 6.0, 1.0)]
    expected[6 + wait - 1] = [
        Final(proposal, 0),
        ActionChange("end", 0, 0, 1 if wait == 1 else 2, 2.0, 6.0, 1.0),
    ]
    assert decisions == expected


def test_a_run_that_is_open_at_the_end_is_published_by_flush() -> None:
    decisions = by_snippet(new_localizer(PLAIN, 2, first_index=7), rows([0.25, 1, 1, 1, 1]))
    # From 7.5, a third of the way from 0.25 to 1; left 0.25, nothing right: 1 - 0.25
    start = 7.5 + 1 / 3
    assert decisions[:-1] == [[], [ActionChange("start", 0, 0, 0, start, None, 1.0)], [], [], []]
    assert decisions[-1] == [
        Final(Proposal(0, start, 12.0, 0.75, 12), 0),
        ActionChange("end", 0, 0, 1, start, 12.0, 0.75),
    ]


NESTED = rows([0, 0.5, 1, 0.5, 0, 0, 0, 0])
# Over 0.75: 2.0 to 3.0 with 1 - (0.5 + 0.5) / 2; over 0.25: 1.0 to 4.0 with 2/3 - 0. tIoU 1/3.
OVERLAP = 1 - float(np.exp(-1 / 9 / 0.3))


def test_offline_the_better_of_two_nested_runs_decays_the_other() -> None:
    got = localize(NESTED, NESTED, TWO, None)
    assert [(each.start, each.end) for each in got] == [(1.0, 4.0), (2.0, 3.0)]
    assert [each.score for each in got] == pytest.approx([2 / 3, 0.5 * (1 - OVERLAP)])


def test_what_is_a_part_of_an_action_waits_for_its_end() -> None:
    # The inner run is due with snippet 3, but P is above event_end until snippet 4.
    decisions = by_snippet(new_localizer(TWO, 1), NESTED)
    assert [finals(each) for each in decisions[:4]] == [[]] * 4
    assert finals(decisions[4]) == [
        Proposal(0, 1.0, 4.0, pytest.approx(2 / 3), 4),
        Proposal(0, 2.0, 3.0, pytest.approx(0.5 * (1 - OVERLAP)), 3),
    ]
    assert sum(len(finals(each)) for each in decisions) == 2


def test_an_action_is_not_waited_for_longer_than_it_is_remembered() -> None:
    config = TWO.model_copy(update={"history_snippets": 32})
    track = rows([0, 0.5, 1, *[0.5] * 60, 0, 0, 0])
    decisions = by_snippet(new_localizer(config, 1), track)
    # The run above 0.75 ends with snippet 3, and is due one snippet later.
    assert [t for t, each in enumerate(decisions) if finals(each)] == [3 + 32, 63]


def test_live_a_published_proposal_keeps_its_share() -> None:
    # The action is over with snippet 3, the run above 0.25 goes on.
    config = TWO.model_copy(update={"event_start": 0.7, "event_end": 0.6})
    decisions = by_snippet(new_localizer(config, 1), NESTED)
    inner, outer = finals(decisions[3]), finals(decisions[4])
    assert inner == [Proposal(0, 2.0, 3.0, pytest.approx(0.5), 3)]
    assert outer == [Proposal(0, 1.0, 4.0, pytest.approx(2 / 3 - 0.5 * OVERLAP), 4)]
    assert sum(len(finals(each)) for each in decisions) == 2


def test_with_more_lookahead_the_better_one_is_known_and_waited_for() -> None:
    # The inner run is due with snippet 5. All that counts for the outer run, 1 <= t < 4, is known
    # by then: it is better, and final with snippet 6.
    decisions = by_snippet(new_localizer(TWO, 3), NESTED)
    assert [finals(each) for each in decisions[:6]] == [[]] * 6
    assert finals(decisions[6]) == localize(NESTED, NESTED, TWO, None)


def test_other_classes_suppress_nothing() -> None:
    scores = np.repeat(rows([0, 1, 1, 0, 0, 0]), 2, axis=1)
    got = localize(scores, scores, PLAIN, None)
    assert got == [Proposal(label, 1.0, 3.0, 1.0, 3) for label in (0, 1)]


def test_what_soft_nms_leaves_at_the_floor_is_dropped() -> None:
    config = LocalizationConfig(thresholds=(0.25, 0.75), peak_gate=0.0, score_floor=0.5)
    got = localize(NESTED, NESTED, config, None)
    assert [(each.start, each.end) for each in got] == [(1.0, 4.0)]


# --- properties ----------------------------------------------------------------------------------

MANY = LocalizationConfig(
    thresholds=(0.125, 0.25, 0.5, 0.75), peak_gate=0.2, event_update_snippets=2, history_snippets=64
)
levels = st.sampled_from([0.0, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.875, 1.0])
tracks = st.lists(st.tuples(levels, levels), max_size=40).map(
    lambda track: np.array(track, np.float32).reshape(-1, 2)
)
scorers = st.sampled_from([None, MeanScorer()])


def new_pair(wait: int | None, scorer: MeanScorer | None, first_index: int = 0) -> StreamLocalizer:
    return new_localizer(MANY, wait, first_index, scorer, class_count=2)


@given(tracks, st.data(), st.sampled_from([None, 1, 3, 8]), scorers)
def test_any_chunking_gives_the_same_decisions(
    track: Floats, data: st.DataObject, wait: int | None, scorer: MeanScorer | None
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(track)), max_size=5)))
    chunked = new_pair(wait, scorer)
    decisions: list[Decision] = []
    for part in np.split(track, cuts):
        decisions += chunked.advance(part, part)
    assert decisions + chunked.flush() == run_all(new_pair(wait, scorer), track)


def test_a_quiet_stretch_may_be_longer_than_any_buffer() -> None:
    config = MANY.model_copy(update={"history_snippets": 32})
    track = np.zeros((5000, 1), np.float32)
    track[4000:4002] = 1.0
    localizer = StreamLocalizer(1, 1, config, None, 2)
    got = finals(localizer.advance(track, track))
    assert {(each.start, each.end) for each in got} >= {(4000.0, 4002.0)}
    assert localizer._scores.next_index == localizer._detector.next_index == 5000


@given(tracks, st.sampled_from([None, 1, 3]), scorers)
def test_what_is_taken_quietly_could_as_well_be_decided_on(
    track: Floats, wait: int | None, scorer: MeanScorer | None
) -> None:
    localizer, deciding = new_pair(wait, scorer), new_pair(wait, scorer)
    deciding.takes_quietly = lambda *_: False  # type: ignore[method-assign]
    assert localizer.advance(track, track) == deciding.advance(track, track)
    assert localizer.state() == deciding.state()
    assert localizer.flush() == deciding.flush()


def test_nothing_is_taken_quietly_while_something_goes_on_or_waits() -> None:
    config = PLAIN.model_copy(update={"thresholds": (0.25,), "event_start": 0.75, "event_end": 0.5})
    localizer = new_localizer(config, wait=2)
    quiet, taken = np.zeros(1, np.float32), []
    for score in (0.0, 0.25, 0.3, 0.2, 0.0, 0.0, 0.0, 0.9, 0.9, 0.0, 0.0, 0.0, 0.0):
        row = np.full(1, score, np.float32)
        before = localizer.state()
        taken.append(localizer.takes_quietly(row, row))
        if not taken[-1]:
            assert localizer.state() == before
            localizer.advance(row[None], row[None])
    # A run of snippet 2, and one of 7 and 8 with an action, each published 2 snippets later.
    assert [n for n, is_quiet in enumerate(taken) if not is_quiet] == [2, 3, 4, 7, 8, 9, 10]
    np.testing.assert_array_equal(localizer.newest, [quiet, quiet])


@given(tracks, st.sampled_from([None, 41, 1000]), scorers)
def test_with_an_endless_lookahead_live_is_offline(
    track: Floats, wait: int | None, scorer: MeanScorer | None
) -> None:
    assert finals(run_all(new_pair(wait, scorer), track)) == localize(track, track, MANY, scorer)


@given(tracks, st.integers(0, 9), st.integers(0, 12), scorers)
def test_a_proposal_is_published_when_it_is_due(
    track: Floats, wait: int, first_index: int, scorer: MeanScorer | None
) -> None:
    *live, last = by_snippet(new_pair(wait, scorer, first_index), track)
    for newest, decisions in enumerate(live, start=first_index):
        for proposal in finals(decisions):
            # That a run is over shows in the snippet behind it, even if nothing is waited for. A
            # proposal that ends before its run goes out earlier, once there is enough evidence.
            assert proposal.due_from + wait <= newest + 1
            stop = last_stop(track, MANY, proposal, first_index, newest + 1)
            assert newest + 1 <= stop + max(wait, 1)
    end = first_index + len(track)
    for proposal in finals(last):
        assert last_stop(track, MANY, proposal, first_index, end) + max(wait, 1) > end


@given(tracks, st.integers(1, 9))
def test_each_run_is_published_at_most_once(track: Floats, wait: int) -> None:
    detector = RunDetector(2, MANY)
    runs = [run for row in track for run in detector.push(row)] + detector.flush()
    allowed = Counter((r.label_index, r.start_position, r.stop_position, r.stop) for r in runs)
    published = Counter(
        (p.label_index, p.start, p.end, p.run_stop)
        for p in finals(run_all(new_pair(wait, None), track))
    )
    assert published <= allowed


def assert_one_story(first: ActionChange, changes: list[ActionChange]) -> None:
    """A start, updates, one end or retraction: revisions count up, and nothing is taken back."""
    assert (first.kind, first.revision, first.end) == ("start", 0, None)
    assert [each.revision for each in changes] == list(range(1, len(changes) + 1))
    assert {each.label_index for each in changes} == {first.label_index}
    *updates, last = changes
    assert {each.kind for each in updates} <= {"update"}
    assert {each.start for each in updates} <= {first.start}
    # That it is over is said once, after all else.
    assert all(each.end is None for each in updates[:-1])
    assert last.end is not None
    assert last.kind in ("end", "retract")
    if last.kind == "end":
        assert last.score >= MANY.event_confirm
        assert last.end > last.start
    else:
        assert last.score < MANY.event_confirm
        assert last.start == first.start


@given(tracks, st.integers(0, 9), scorers)
def test_events_of_an_action_tell_one_story(
    track: Floats, wait: int, scorer: MeanScorer | None
) -> None:
    localizer = new_pair(wait, scorer)
    decisions = run_all(localizer, track)
    by_action: dict[int, list[ActionChange]] = {}
    for change in decisions:
        if isinstance(change, ActionChange):
            by_action.setdefault(change.id, []).append(change)
        elif change.action_id is not None:
            told = by_action[change.action_id]
            assert told[0].label_index == change.proposal.label_index
            assert told[-1].kind != "retract"
    assert list(by_action) == list(range(len(by_action)))  # ids count up
    for first, *changes in by_action.values():
        assert_one_story(first, changes)
    assert localizer.open_actions == 0


OTHER = MANY.model_copy(
    update={
        "thresholds": (0.25, 0.625),
        "event_start": 0.75,
        "event_end": 0.5,
        "event_confirm": 0.75,
        "history_snippets": 32,
        "score_floor": 0.25,
    }
)


@given(
    tracks,
    st.integers(0, 9),
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([MANY, OTHER]), scorers), max_size=4),
    st.booleans(),
)
def test_each_start_has_one_last_event_whatever_bundles_take_over(
    track: Floats,
    wait: int,
    swaps: list[tuple[int, LocalizationConfig, MeanScorer | None]],
    embeds_alike: bool,
) -> None:
    localizer = new_pair(wait, None)
    decisions: list[Decision] = []
    for t, row in enumerate(track):
        for at, config, scorer in swaps:
            if at == t:
                localizer.use(config, scorer, None if embeds_alike else 2)
        decisions += localizer.advance(row[None], row[None])
    decisions += localizer.flush()
    changes = [each for each in decisions if isinstance(each, ActionChange)]
    started = [each.id for each in changes if each.kind == "start"]
    assert started == list(range(len(started)))
    for action in started:
        first, *others = [each for each in changes if each.id == action]
        assert first.kind == "start"
        assert [each.kind in ("end", "retract") for each in others] == [False] * (
            len(others) - 1
        ) + [True]
        assert [each.revision for each in others] == list(range(1, len(others) + 1))
    assert localizer.open_actions == 0


@given(tracks, tracks, st.integers(1, 5), scorers)
def test_localizers_share_no_state(
    track: Floats, other: Floats, wait: int, scorer: MeanScorer | None
) -> None:
    one, two = new_pair(wait, scorer), new_pair(wait, scorer)
    decisions: list[Decision] = []
    for position in range(max(len(track), len(other))):
        decisions += one.advance(track[position : position + 1], track[position : position + 1])
        two.advance(other[position : position + 1], other[position : position + 1])
    two.flush()
    assert decisions + one.flush() == run_all(new_pair(wait, scorer), track)


def test_a_bundle_that_comes_at_once_is_not_undone_by_what_was_due_before() -> None:
    # Nothing has to come again: the settings of the restart are due, and those of the bundle hold.
    settings = {"peak_gate": 0.0, "event_start": 0.95, "event_end": 0.9}
    of_life, of_restart, of_bundle = (
        LocalizationConfig(thresholds=(each,), **settings) for each in (0.25, 0.375, 0.75)
    )
    before = new_localizer(of_life, wait=3)
    before.advance(rows([0.0] * 40), rows([0.0] * 40))
    restored = StreamLocalizer.restored(1, 1, of_restart, None, 3, 40, before.state())
    restored.use(of_bundle, None, None)
    found = run_all(restored, rows([0.0, 0.5, 0.5, 0.0, 0.0, 0.875, 0.875, 0.0]))
    assert [(each.start > 44, each.end > 46) for each in finals(found)] == [(True, True)]


# --- endless streams -----------------------------------------------------------------------------


@pytest.mark.parametrize("low", [0.0, 0.2], ids=["apart", "one-run-never-ends"])
def test_an_endless_alternation_takes_bounded_memory(low: float) -> None:
    config = LocalizationConfig(thresholds=(0.125, 0.5), history_snippets=32)
    localizer = new_localizer(config, 3)
    published = 0
    for _ in range(100):
        part = rows([low, 0.9] * 100)
        published += len(finals(localizer.advance(part, part)))
        # Two runs end in two snippets; three snippets are waited for.
        assert len(localizer._pool[0]) <= 4 and len(localizer._closed) <= 4
        assert len(localizer._published[0]) <= (256 if low else 8)
        assert localizer.open_actions <= 3
    # Each peak ends runs over both thresholds, or over 0.5 alone, but for the last two.
    assert published >= 10_000 - 2


def test_of_a_noisy_action_few_proposals_wait() -> None:
    localizer = new_localizer(LocalizationConfig(), wait=6)
    random = np.random.default_rng(0)
    highest, published = 0, 0
    for t in range(300):
        score = random.uniform(0.3, 0.35) if t % 2 else random.uniform(0.85, 0.95)
        part = rows([score])
        published += len(finals(localizer.advance(part, part)))
        highest = max(highest, len(localizer._pool[0]))
    assert localizer.open_actions == 1
    # A run ends over each of several thresholds in two snippets: without a limit, 900 would wait.
    assert 150 < highest <= 192
    assert published > 300


def test_an_endless_action_has_its_borders_and_contrast_at_its_end() -> None:
    config = LocalizationConfig(thresholds=(0.25, 0.5), peak_gate=0.0, history_snippets=32)
    localizer = new_localizer(config, 6, scorer=None)
    high = rows([0.75] * 1000)
    start = rows([0.0, 0.0, 0.25])
    decisions = localizer.advance(start, start)
    for _ in range(20):
        decisions += localizer.advance(high, high)
        assert localizer.open_actions == 1
        assert not finals(decisions)
    assert [each.kind for each in decisions if isinstance(each, ActionChange)].count("start") == 1
    end = rows([0.125, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    got = finals(localizer.advance(end, end))
    # Left 0 + 0 + 0.25, right 0.125 + 0 + 0: 0.75 - 0.375 / 6, for both thresholds.
    # From 2.5, half-way from 0.25 to 0.75 for 0.5; at the centre 2.5 itself for 0.25.
    # To 20002.5 + 0.25 / 0.625 for 0.5, + 0.5 / 0.625 for 0.25. The former ends in snippet 20002
    # and goes out first, decayed by the latter, which is known already and starts earlier:
    # exp(-tiou ** 2 / 0.3) = 0.0357, tiou 0.99996. The latter then has 0.6875 - 0.02453 * 0.9643.
    weaker = pytest.approx(0.6875 * 0.0357, rel=1e-2)
    assert got == [
        Proposal(0, 3.0, pytest.approx(20002.9), weaker, 20003),
        Proposal(0, 2.5, pytest.approx(20003.3), pytest.approx(0.66384, rel=1e-3), 20003),
    ]


def test_the_middle_of_a_long_action_is_not_forgotten() -> None:
    # 40 times as long as what is remembered; P is lower in the middle, of which nothing is left.
    config = LocalizationConfig(thresholds=(0.25,), peak_gate=0.0, history_snippets=32)
    track = rows([0.0, 0.0, 0.0, *[1.0] * 100, *[0.5] * 1000, *[1.0] * 180, 0.0, 0.0, 0.0, 0.0])
    localizer = new_localizer(config, 4)
    decisions: list[Decision] = []
    for first in range(0, len(track), 7):
        decisions += localizer.advance(track[first : first + 7], track[first : first + 7])
    decisions += localizer.flush()
    # Mean of P inside 780 / 1280, nothing outside; borders a quarter of the way from 0 to 1.
    proposal = Proposal(0, 2.75, 1283.25, pytest.approx(780 / 1280), 1283)
    assert finals(decisions) == [proposal] == localize(track, track, config, None)
    changes = [each for each in decisions if isinstance(each, ActionChange)]
    assert {each.id for each in changes} == {0}
    assert changes[-1] == ActionChange(
        "end", 0, 0, len(changes) - 1, 2.75, 1283.25, pytest.approx(780 / 1280)
    )
    # From half-way between 0 and 1; the mean of P with the last snippet of the middle.
    in_the_middle = [each for each in changes if each.revision and each.score < 0.546]
    assert {each.start for each in changes[:-1]} == {3.0}
    assert min(each.score for each in changes) == pytest.approx(600 / 1100, abs=0.003)
    assert in_the_middle


def test_the_score_weighs_contrast_and_completeness() -> None:
    # 1 inside and 0 outside: p_OIC 1. MeanScorer gives completeness half the mean embedding around
    # it, here 0.5 (0, 0, 1, 1, 1, 0, 0 from two snippets before to two behind): 0.5 * 3 / 7.
    track = rows([0, 0, 0, 1, 1, 1, 0, 0, 0])
    embedding = rows([0, 0, 0, 1, 1, 1, 0, 0, 0])
    for weight in (0.0, 0.25, 1.0):
        config = LocalizationConfig(
            thresholds=(0.5,), peak_gate=0.0, completeness_weight=weight, score_floor=0.0
        )
        (found,) = localize(track, embedding, config, MeanScorer())
        assert found.score == pytest.approx((1 - weight) + weight * 0.5 * 3 / 7)
