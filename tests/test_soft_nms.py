"""Temporal IoU and soft-NMS: tiny cases by hand, and against a plain slow implementation."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hrpro.engine.soft_nms import soft_nms, subtract_published, temporal_iou, waits_for_better

Row = tuple[float, float, float]  # start, end, score

SIGMA = 0.3


def columns(rows: list[Row]) -> tuple[NDArray[np.float64], ...]:
    return tuple(np.array(rows, np.float64).reshape(-1, 3).T)


def suppressed(rows: list[Row], sigma: float = SIGMA) -> list[float]:
    return soft_nms(*columns(rows), sigma).tolist()


def plain_iou(a: Row, b: Row) -> float:
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (a[1] - a[0]) + (b[1] - b[0]) - shared
    return shared / union if union > 0 else 0.0


def plain_soft_nms(rows: list[Row], sigma: float) -> list[float]:
    """Pick the best, decay the others, until none is left; ties: earlier start, earlier end."""
    scores = [row[2] for row in rows]
    left = set(range(len(rows)))
    while left:
        best = min(left, key=lambda i: (-scores[i], rows[i][0], rows[i][1], i))
        left.remove(best)
        for i in left:
            scores[i] *= math.exp(-(plain_iou(rows[best], rows[i]) ** 2) / sigma)
    return scores


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 2), (0, 2), 1.0),  # the same
        ((0, 2), (2, 4), 0.0),  # touching
        ((0, 1), (5, 6), 0.0),  # apart
        ((0, 4), (1, 2), 0.25),  # nested: 1 of 4
        ((0, 2), (1, 3), 1 / 3),  # 1 of 2 + 2 - 1
        ((1, 1), (0, 2), 0.0),  # empty in another
        ((1, 1), (1, 1), 0.0),  # empty against empty
        ((-3, -1), (-2, 0), 1 / 3),  # before the stream: plain intervals
    ],
)
def test_temporal_iou(a: tuple[float, float], b: tuple[float, float], expected: float) -> None:
    args = [np.array([value], np.float64) for value in (*a, *b)]
    assert temporal_iou(*args).tolist() == [pytest.approx(expected)]
    assert temporal_iou(*args[2:], *args[:2]).tolist() == [pytest.approx(expected)]


def test_nothing_to_suppress() -> None:
    assert suppressed([]) == []
    assert suppressed([(0, 2, 0.7)]) == [0.7]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([(0, 2, 0.9), (2, 4, 0.8)], [0.9, 0.8], id="touching"),
        # tIoU 1/4: 0.8 * exp(-(1/16) / 0.3)
        pytest.param([(0, 4, 0.9), (1, 2, 0.8)], [0.9, 0.8 * math.exp(-0.0625 / 0.3)], id="nested"),
        # The inner one is better: it stays, the outer one decays by the same.
        pytest.param(
            [(0, 4, 0.8), (1, 2, 0.9)], [0.8 * math.exp(-0.0625 / 0.3), 0.9], id="nested-inner-best"
        ),
        # The same twice: 0.5 * exp(-1 / 0.3)
        pytest.param([(0, 4, 0.5), (0, 4, 0.5)], [0.5, 0.5 * math.exp(-1 / 0.3)], id="the-same"),
        # A tie: the earlier start stays, though it stands second. tIoU (1, 3), (0, 2) is 1/3.
        pytest.param(
            [(1, 3, 0.5), (0, 2, 0.5)], [0.5 * math.exp(-1 / 9 / 0.3), 0.5], id="tie-by-start"
        ),
        # A tie with the same start: the earlier end stays. tIoU 2/4.
        pytest.param(
            [(0, 4, 0.5), (0, 2, 0.5)], [0.5 * math.exp(-0.25 / 0.3), 0.5], id="tie-by-end"
        ),
        # Best (0, 4); (0, 2) has 1/2 with it: 0.8 e^(-0.25/0.3) = 0.348; (2, 4) has 1/2 too:
        # 0.6 e^(-0.25/0.3) = 0.261; these two only touch.
        pytest.param(
            [(0, 4, 0.9), (0, 2, 0.8), (2, 4, 0.6)],
            [0.9, 0.8 * math.exp(-0.25 / 0.3), 0.6 * math.exp(-0.25 / 0.3)],
            id="one-over-two",
        ),
        # After the first pick the order changes: (0, 3) falls to 0.8 e^(-(3/4)^2/0.3) = 0.12,
        # below (3, 6) with 0.7 * e^(-(1/6)^2/0.3) = 0.64; those two touch.
        pytest.param(
            [(0, 4, 0.9), (0, 3, 0.8), (3, 6, 0.7)],
            [0.9, 0.8 * math.exp(-0.5625 / 0.3), 0.7 * math.exp(-(1 / 36) / 0.3)],
            id="overtaken",
        ),
    ],
)
def test_soft_nms_by_hand(rows: list[Row], expected: list[float]) -> None:
    assert suppressed(rows) == pytest.approx(expected, rel=1e-12)


positions = st.integers(0, 12).map(float)
rows_of_segments = st.lists(
    st.tuples(positions, st.integers(1, 8), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])).map(
        lambda each: (each[0], each[0] + each[1], each[2])
    ),
    max_size=9,
)


@given(rows_of_segments, st.sampled_from([0.05, 0.3, 2.0]))
def test_soft_nms_is_the_plain_one(rows: list[Row], sigma: float) -> None:
    assert suppressed(rows, sigma) == pytest.approx(plain_soft_nms(rows, sigma), abs=1e-12)


@given(rows_of_segments, st.randoms())
def test_the_order_of_proposals_does_not_matter(rows: list[Row], random: Random) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    outcome = sorted((*row[:2], score) for row, score in zip(rows, suppressed(rows), strict=True))
    again = zip(shuffled, suppressed(shuffled), strict=True)
    assert outcome == sorted((*row[:2], score) for row, score in again)


def test_scores_given_are_left_alone() -> None:
    start, end, score = columns([(0, 4, 0.9), (1, 2, 0.8)])
    soft_nms(start, end, score, SIGMA)
    assert score.tolist() == [0.9, 0.8]


# --- what is published already -------------------------------------------------------------------


def added(rows: list[Row], published: list[Row]) -> list[float]:
    return subtract_published(*columns(rows), SIGMA, *columns(published)).tolist()


def test_where_nothing_is_published_nothing_changes() -> None:
    assert added([(0, 4, 0.9)], []) == [0.9]
    assert added([], [(0, 4, 0.9)]) == []


@pytest.mark.parametrize(
    ("row", "published", "expected"),
    [
        ((4, 6, 0.8), [(0, 4, 0.9)], 0.8),  # touching: all of it is new
        # tIoU 1/2: 0.8 - 0.4 * (1 - e^(-0.25 / 0.3))
        ((0, 4, 0.8), [(0, 2, 0.4)], 0.8 - 0.4 * (1 - math.exp(-0.25 / 0.3))),
        # the same borders: 0.8 - 0.4 * (1 - e^(-1 / 0.3))
        ((0, 4, 0.8), [(0, 4, 0.4)], 0.8 - 0.4 * (1 - math.exp(-1 / 0.3))),
        ((0, 4, 0.3), [(0, 4, 0.9)], 0.0),  # nothing is left, and never less than that
        # Two published: the one that takes more counts, not both. 0.8 - 0.4 (1 - e^(-1/0.3))
        ((0, 4, 0.8), [(0, 4, 0.4), (0, 2, 0.4)], 0.8 - 0.4 * (1 - math.exp(-1 / 0.3))),
    ],
)
def test_a_published_proposal_keeps_its_share(
    row: Row, published: list[Row], expected: float
) -> None:
    assert added([row], published) == [pytest.approx(expected, rel=1e-12)]


# --- what waits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("proposals", "waits"),
    [
        pytest.param([], [], id="none"),
        # (start, end, score, is it final)
        pytest.param([(0, 4, 0.5, True), (1, 5, 0.9, True)], [False, False], id="all-final"),
        pytest.param([(0, 4, 0.5, True), (1, 5, 0.9, False)], [True, False], id="a-better-one"),
        pytest.param([(0, 4, 0.5, True), (1, 5, 0.4, False)], [False, False], id="a-weaker-one"),
        pytest.param([(0, 4, 0.5, True), (1, 5, 0.5, False)], [False, False], id="as-good"),
        pytest.param([(0, 4, 0.5, True), (4, 5, 0.9, False)], [False, False], id="touching"),
        # The first waits for the second, which waits for the third.
        pytest.param(
            [(0, 4, 0.5, True), (3, 6, 0.6, True), (5, 9, 0.9, False)],
            [True, True, False],
            id="a-chain",
        ),
    ],
)
def test_what_waits_for_a_better_one(
    proposals: list[tuple[float, float, float, bool]], waits: list[bool]
) -> None:
    start, end, score = np.array([p[:3] for p in proposals], float).reshape(-1, 3).T
    is_final = np.array([p[3] for p in proposals], np.bool_)
    assert waits_for_better(start, end, score, is_final).tolist() == waits
