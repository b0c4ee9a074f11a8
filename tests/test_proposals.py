"""Runs above thresholds, their borders and contrast, the ring below them, and their refinement."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hrpro.engine.asking import alone
from hrpro.engine.config import LocalizationConfig
from hrpro.engine.proposals import Run, RunDetector
from hrpro.engine.refine import Proposal, refine_runs
from hrpro.engine.ring import Ring

HALF = LocalizationConfig(thresholds=(0.5,), peak_gate=0.0)


def detect(
    track: list[float], config: LocalizationConfig = HALF, first_index: int = 0
) -> tuple[RunDetector, list[Run]]:
    """The runs of one class, with those that the end of the track closes."""
    detector = RunDetector(1, config, first_index)
    runs = [run for score in track for run in detector.push(np.array([score], np.float32))]
    return detector, runs + detector.flush()


def contrasts(track: list[float], config: LocalizationConfig = HALF) -> list[float]:
    detector, runs = detect(track, config)
    return [detector.outer_inner_contrast(run) for run in runs]


# --- ring ----------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(0, 50), st.lists(st.integers(0, 9), max_size=12))
def test_a_ring_reads_as_a_list_of_the_newest_rows(
    capacity: int, first_index: int, sizes: list[int]
) -> None:
    ring = Ring(capacity, (2,), first_index)
    rows = np.zeros((0, 2), np.float32)
    for size in (min(size, capacity) for size in sizes):
        more = np.arange(size * 2, dtype=np.float32).reshape(size, 2) + 100 * len(rows)
        ring.append(more)
        rows = np.concatenate([rows, more])
        assert ring.next_index == first_index + len(rows)
        assert ring.oldest == first_index + max(0, len(rows) - capacity)
        for start in range(ring.oldest, ring.next_index + 1):
            for stop in range(start, ring.next_index + 1):
                expected = rows[start - first_index : stop - first_index]
                np.testing.assert_array_equal(ring.read(start, stop), expected)
        for index in range(ring.oldest, ring.next_index):
            np.testing.assert_array_equal(ring.row(index), rows[index - first_index])


def test_a_ring_refuses_what_it_does_not_hold() -> None:
    ring = Ring(3, (), first_index=5)
    ring.append(np.arange(3))
    ring.append(np.arange(1))  # 6, 7, 8 are there
    for start, stop in ((5, 7), (7, 10), (8, 7)):
        with pytest.raises(AssertionError):
            ring.read(start, stop)
    with pytest.raises(AssertionError):
        ring.row(9)
    with pytest.raises(AssertionError):
        ring.append(np.arange(4))


def test_what_is_read_from_a_ring_is_a_copy() -> None:
    ring = Ring(2, ())
    ring.append(np.ones(2))
    ring.read(0, 2)[:] = 7
    assert ring.read(0, 2).tolist() == [1, 1]
    out = np.zeros(2, np.float32)
    assert ring.read(0, 2, out=out) is out
    assert out.tolist() == [1, 1]


# --- runs ----------------------------------------------------------------------------------------

TWO = LocalizationConfig(thresholds=(0.25, 0.75), peak_gate=0.0)


@pytest.mark.parametrize(
    ("config", "track", "expected"),
    [
        pytest.param(HALF, [], [], id="empty"),
        # Above means above: 0.5 is not.
        pytest.param(HALF, [0.25, 0.5, 0.5], [], id="never-above"),
        # From border to border of the recording there is nothing to interpolate.
        pytest.param(HALF, [1.0, 1.0], [(0, 2, 0.0, 2.0)], id="whole-recording"),
        # Centres at 0.5, 1.5, 2.5; half-way between 0 and 1: 0.5 + 0.5 and 1.5 + 0.5.
        pytest.param(HALF, [0.0, 1.0, 0.0], [(1, 2, 1.0, 2.0)], id="one-snippet"),
        # 0.25 -> 1: 0.25 of 0.75, a third of the way; 0.75 -> 0: 0.25 of 0.75, a third.
        pytest.param(
            HALF, [0.25, 1.0, 0.75, 0.0], [(1, 3, 0.5 + 1 / 3, 2.5 + 1 / 3)], id="fractions"
        ),
        # The score touches the threshold at the centre 1.5: both runs end there, none overlaps.
        pytest.param(HALF, [1.0, 0.5, 1.0], [(0, 1, 0.0, 1.5), (2, 3, 1.5, 3.0)], id="touching"),
        # Over 0.75: 0.5 -> 1 is half-way at 2.0; over 0.25: 0 -> 0.5 is half-way at 1.0.
        pytest.param(
            TWO,
            [0.0, 0.5, 1.0, 0.5, 0.0],
            [(2, 3, 2.0, 3.0), (1, 4, 1.0, 4.0)],
            id="nested",
        ),
        # Two peaks over 0.75 within one run over 0.25; the last is open at the end.
        pytest.param(
            TWO,
            [1.0, 0.5, 1.0],
            [(0, 1, 0.0, 1.0), (0, 3, 0.0, 3.0), (2, 3, 2.0, 3.0)],
            id="nested-and-open-at-the-end",
        ),
    ],
)
def test_runs(
    config: LocalizationConfig, track: list[float], expected: list[tuple[int, int, float, float]]
) -> None:
    _, runs = detect(track, config)
    got = [(run.start, run.stop, run.start_position, run.stop_position) for run in runs]
    assert got == [pytest.approx(each, abs=1e-12) for each in expected]


def test_the_example_of_the_docstring() -> None:
    # 7 - 0.5 + (0.5 - 0.1) / 0.8 = 7.0; 9 - 0.5 + (0.8 - 0.5) / 0.8 = 8.875
    _, (run,) = detect([0.1, 0.9, 0.8, 0.0], first_index=6)
    assert (run.start, run.stop) == (7, 9)
    assert (run.start_position, run.stop_position) == pytest.approx((7.0, 8.875), abs=1e-6)


def test_a_run_closes_with_the_first_snippet_that_is_not_above() -> None:
    detector = RunDetector(2, HALF)
    above, below = np.array([1, 0], np.float32), np.array([0, 1], np.float32)
    assert detector.push(above) == []
    assert detector.earliest_open_start(0) == 0
    assert detector.earliest_open_start(1) == 1  # none is open: what comes next
    (run,) = detector.push(below)
    assert (run.label_index, run.start, run.stop) == (0, 0, 1)
    assert [run.label_index for run in detector.flush()] == [1]
    assert detector.flush() == []


@pytest.mark.parametrize(
    ("peak", "count"), [(0.5625, 0), (0.625, 0), (0.6875, 1)], ids=["below", "equal", "above"]
)
def test_a_run_must_exceed_the_peak_gate(peak: float, count: int) -> None:
    _, runs = detect([0.0, peak, 0.0], LocalizationConfig(thresholds=(0.5,), peak_gate=0.625))
    assert len(runs) == count


def test_a_peak_belongs_to_its_own_run() -> None:
    config = LocalizationConfig(thresholds=(0.5,), peak_gate=0.875)
    _, runs = detect([0.0, 1.0, 0.0, 0.75, 0.0, 0.75], config)
    assert [(run.start, run.stop) for run in runs] == [(1, 2)]


# --- contrast ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("track", "expected"),
    [
        # 4 snippets: border ceil(0.25 * 4) = 1; 1 - (0.25 + 0.0) / 2
        pytest.param([0.5, 0.25, 1, 1, 1, 1, 0.0, 0.5], 0.875, id="one-each-side"),
        # 5 snippets: border ceil(1.25) = 2; 1 - (0.5 + 0.25 + 0.0 + 0.25) / 4
        pytest.param([0.5, 0.25, 1, 1, 1, 1, 1, 0.0, 0.25], 0.75, id="rounded-up"),
        # 16 snippets: 4, limited to 3; left 0.25 + 0.25 + 0.25, right 0 + 0.25 + 0.5; 0.75 - 1.5/6
        pytest.param([0.5, 0.25, 0.25, 0.25, *[0.75] * 16, 0, 0.25, 0.5, 0.5], 0.5, id="limited"),
        # Nothing stands left of the recording: 1 - 0.25 / 1
        pytest.param([1, 1, 1, 1, 0.25, 0.0], 0.75, id="at-the-start"),
        # Nor right of it: 1 - 0.25 / 1
        pytest.param([0.0, 0.25, 1, 1, 1, 1], 0.75, id="at-the-end"),
        # Border 2, but one snippet left of the run and one right of it: 1 - (0.25 + 0.5) / 2
        pytest.param([0.25, 1, 1, 1, 1, 1, 0.5], 0.625, id="cut-off-on-both-sides"),
        # Mean inside (1 + 0.75) / 2; border 1: 0.875 - (0.0 + 0.5) / 2
        pytest.param([0.0, 1, 0.75, 0.5], 0.625, id="inner-mean"),
    ],
)
def test_outer_inner_contrast(track: list[float], expected: float) -> None:
    assert contrasts(track) == [pytest.approx(expected, abs=1e-12)]


def test_a_recording_that_is_action_throughout_has_nothing_to_take_off() -> None:
    assert contrasts([0.75, 0.75, 0.75]) == [0.75]


def test_contrast_counts_what_has_come_of_the_right_region() -> None:
    config = LocalizationConfig(thresholds=(0.5,), peak_gate=0.0, border_ratio=1.0)
    detector = RunDetector(1, config)
    closed: list[Run] = []
    for score in (0, 0, 0, 1, 1, 1, 0.5):
        closed += detector.push(np.array([score], np.float32))
    (run,) = closed
    assert (run.stop, run.border, run.evidence_stop) == (6, 3, 10)
    # 3 zeros left; right 0.5, then 0.5 + 0.5, then 0.5 + 0.5 + 0.5, and nothing beyond
    for expected in (0.5 / 4, 1.0 / 5, 1.5 / 6, 1.5 / 6):
        assert detector.outer_inner_contrast(run) == pytest.approx(1 - expected)
        assert detector.push(np.array([0.5], np.float32)) == []


def test_a_run_may_outlast_every_buffer() -> None:
    # left 0.125 and 2 * 0.25, right 3 * 0.0: 0.75 - 0.625 / 6
    track = [0.125, 0.25, 0.25] + [0.75] * 5000 + [0.0, 0.0, 0.0]
    detector, (run,) = detect(track)
    assert (run.start, run.stop) == (3, 5003)
    assert detector.outer_inner_contrast(run) == pytest.approx(0.75 - 0.625 / 6, abs=1e-9)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.625, 0.75, 1.0]), max_size=40))
def test_contrast_is_that_of_a_plain_sum(track: list[float]) -> None:
    config = LocalizationConfig(thresholds=(0.25, 0.5, 0.75), peak_gate=0.0)
    detector = RunDetector(1, config)
    waiting: list[Run] = []
    for score in track:
        waiting += detector.push(np.array([score], np.float32))
        for run in [run for run in waiting if run.evidence_stop == detector.next_index]:
            waiting.remove(run)
            outer = track[max(0, run.start - run.border) : run.start]
            outer += track[run.stop : run.stop + run.border]
            outer_mean = float(np.mean(outer))  # not empty: something ended the run
            expected = float(np.mean(track[run.start : run.stop])) - outer_mean
            assert detector.outer_inner_contrast(run) == pytest.approx(expected, abs=1e-12)


MANY = LocalizationConfig(thresholds=(0.125, 0.25, 0.5, 0.75), peak_gate=0.4)
levels = st.sampled_from([0.0, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.875, 1.0])


@given(st.lists(st.tuples(levels, levels), max_size=30), st.integers(0, 3))
def test_runs_are_the_stretches_above_each_threshold(
    track: list[tuple[float, float]], first_index: int
) -> None:
    detector = RunDetector(2, MANY, first_index)
    rows = np.array(track, np.float32).reshape(-1, 2)
    runs = [run for row in rows for run in detector.push(row)] + detector.flush()
    expected = []
    for label_index, threshold in itertools.product((0, 1), MANY.thresholds):
        scores = [0.0, *(row[label_index] for row in track), 0.0]

        def border(t: int, scores: list[float] = scores, threshold: float = threshold) -> float:
            before, after = scores[t : t + 2]
            inside = 0 < t < len(track)
            crossing = (threshold - before) / (after - before) if inside else 0.5
            return first_index + t - 0.5 + crossing

        edges = np.flatnonzero(np.diff(np.array(scores) > threshold)).reshape(-1, 2)
        for start, stop in edges.tolist():
            if max(scores[start + 1 : stop + 1]) > MANY.peak_gate:
                mean = pytest.approx(np.mean(scores[start + 1 : stop + 1]))
                borders = border(start), border(stop)
                expected.append((label_index, first_index + start, *borders, mean))
    found = [
        (r.label_index, r.start, r.start_position, r.stop_position, r.inner_mean) for r in runs
    ]
    assert sorted(found) == sorted(expected, key=lambda each: each[:4])


# --- refinement ----------------------------------------------------------------------------------

Arrays = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]


class Scorer:
    """Says what it is told, and keeps what it was asked."""

    def __init__(self, shift: tuple[float, float], completeness: float = 0.5) -> None:
        self.shift = np.array(shift, np.float32)
        self.completeness = completeness
        self.asked: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []

    def score_instances(
        self, embedding: NDArray[np.float32], proposals: NDArray[np.float32]
    ) -> Arrays:
        self.asked.append((embedding, proposals))
        N = len(proposals)
        # Class 0 has `completeness`, after refinement 0.25 more; other classes must not count.
        before = np.tile(np.array([self.completeness, 9], np.float32), (N, 1))
        return before, proposals + self.shift, before + np.float32(0.25)


def refined(
    scorer: Scorer | None, config: LocalizationConfig, history_snippets: int = 64
) -> list[Proposal]:
    """The run 4 <= t < 8 of class 0 with contrast 1, in a stream of the snippets 2 to 10."""
    detector, history = RunDetector(2, config, 2), Ring(history_snippets, (1,), 2)
    runs: list[Run] = []
    for t in range(2, 11):
        runs += detector.push(np.array([float(4 <= t < 8), 0], np.float32))
        history.append(np.array([[t]], np.float32))
    return alone(refine_runs(runs, detector, history, scorer, config))


def test_without_a_scorer_the_contrast_and_the_own_borders_stand() -> None:
    assert refined(None, HALF) == [Proposal(0, 4.0, 8.0, 1.0, 8)]


def test_refinement_moves_the_borders_and_scores_the_refined_ones() -> None:
    scorer = Scorer((-0.5, 0.25))
    # (contrast 1 + refined completeness 0.5 + 0.25) / 2
    assert refined(scorer, HALF) == [Proposal(0, 3.5, 8.25, 0.875, 8)]
    ((embedding, proposals),) = scorer.asked
    # From 4 - 3 - 1 = 0, but the stream begins at 2; up to the newest snippet, 10.
    assert embedding[:, 0].tolist() == list(range(2, 11))
    assert proposals.tolist() == [[2.0, 6.0]]


def test_the_stretch_begins_where_history_does() -> None:
    scorer = Scorer((0.0, 0.0))
    assert refined(scorer, HALF, history_snippets=5) == [Proposal(0, 4.0, 8.0, 0.875, 8)]
    ((embedding, proposals),) = scorer.asked
    assert embedding[:, 0].tolist() == [6, 7, 8, 9, 10]
    assert proposals.tolist() == [[-2.0, 2.0]]  # counted from its first row, 6


def test_both_borders_may_be_published() -> None:
    config = LocalizationConfig(thresholds=(0.5,), peak_gate=0.0, keep_unrefined=True)
    # Unrefined: (1 + 0.5) / 2
    assert refined(Scorer((-0.5, 0.25)), config) == [
        Proposal(0, 3.5, 8.25, 0.875, 8),
        Proposal(0, 4.0, 8.0, 0.75, 8),
    ]


def test_refined_borders_stay_within_the_stream() -> None:
    assert refined(Scorer((-100, 100)), HALF) == [Proposal(0, 2.0, 11.0, 0.875, 8)]


@pytest.mark.parametrize("shift", [(4.0, 0.0), (6.0, -6.0), (np.nan, 0.0)])
def test_borders_that_cross_leave_no_proposal(shift: tuple[float, float]) -> None:
    assert refined(Scorer(shift), HALF) == []
