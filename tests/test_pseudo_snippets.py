"""Algorithm 1: from points to pseudo-action and pseudo-background snippets."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hrpro.training.pseudo_snippets import PseudoSnippets, mine_pseudo_snippets

THETA_1, THETA_2 = 0.95, 0.1
Points = dict[int, set[int]]  # snippet -> classes


def mine(
    attention: list[float],
    points: Points,
    evidence: list[list[float]] | None = None,
    valid: int | None = None,
) -> PseudoSnippets:
    """One recording of two classes, of which `valid` snippets are there."""
    T = len(attention)
    A = torch.tensor(attention)[None]
    marked = torch.zeros(1, T, 2, dtype=torch.bool)
    for snippet, labels in points.items():
        marked[0, snippet, list(labels)] = True
    there = (torch.arange(T) < (T if valid is None else valid))[None]
    seen = A[..., None] if evidence is None else torch.tensor(evidence)[None]
    return mine_pseudo_snippets(seen, A, marked, there, THETA_1, THETA_2)


def as_sets(pseudo: PseudoSnippets) -> tuple[set[int], set[int], set[int], set[int]]:
    """Action of class 0 and 1, background, and the confident part of it."""
    columns = (
        pseudo.action[0, :, 0],
        pseudo.action[0, :, 1],
        pseudo.background[0],
        pseudo.confident_background[0],
    )
    first, second, background, confident = (
        set(column.nonzero()[:, 0].tolist()) for column in columns
    )
    return first, second, background, confident


@pytest.mark.parametrize(
    ("attention", "points", "expected"),
    [
        # From 3 back over 0.97 and 0.96, not over 0.2; ahead not over 0.94, whatever is behind it.
        # Lowest before the point is 0, after it 4.
        pytest.param(
            [0.2, 0.96, 0.97, 0.99, 0.94, 0.97],
            {3: {0}},
            ({1, 2, 3}, set(), {0, 4}, set()),
            id="walk",
        ),
        # 0.95 is not above 0.95. A of the point itself does not matter.
        pytest.param(
            [0.5, 0.95, 0.3, 0.96, 0.5],
            {2: {0}},
            ({2, 3}, set(), {0, 4}, set()),
            id="equal-is-not-above",
        ),
        # The walks end at the neighbour's point, and both take what lies between.
        pytest.param(
            [0.99] * 6,
            {1: {0}, 4: {1}},
            ({0, 1, 2, 3}, {2, 3, 4, 5}, set(), set()),
            id="neighbouring-points",
        ),
        # A neighbour of the same class ends it, too; together they cover everything.
        pytest.param(
            [0.99, 0.99, 0.5, 0.99, 0.99],
            {0: {0}, 4: {0}},
            ({0, 1, 3, 4}, set(), {2}, set()),
            id="same-class",
        ),
        # Below 0.1 is background with confidence; the lowest of each gap is background anyway.
        pytest.param(
            [0.05, 0.09, 0.1, 0.99, 0.3, 0.2, 0.99, 0.4],
            {3: {0}, 6: {1}},
            ({3}, {6}, {0, 1, 5, 7}, {0, 1}),
            id="background",
        ),
        # A point is action, however low its A.
        pytest.param(
            [0.5, 0.01, 0.5], {1: {1}}, (set(), {1}, {0, 2}, set()), id="point-is-no-background"
        ),
        # What is lowest may still be action.
        pytest.param(
            [0.99, 0.96, 0.99], {0: {0}, 2: {0}}, ({0, 1, 2}, set(), set(), set()), id="no-gap"
        ),
        # Ties count all.
        pytest.param(
            [0.3, 0.2, 0.4, 0.2, 0.3],
            {0: {0}, 4: {0}},
            ({0, 4}, set(), {1, 3}, set()),
            id="tie",
        ),
        # Two classes at one point share its walk.
        pytest.param(
            [0.99, 0.5, 0.99, 0.99],
            {2: {0, 1}},
            ({2, 3}, {2, 3}, {1}, set()),
            id="two-classes-at-a-point",
        ),
        # A crop without a point: one gap.
        pytest.param([0.5, 0.05, 0.3], {}, (set(), set(), {1}, {1}), id="no-point"),
    ],
)
def test_algorithm_1(
    attention: list[float], points: Points, expected: tuple[set[int], ...]
) -> None:
    assert as_sets(mine(attention, points)) == expected


def test_evidence_may_differ_by_class() -> None:
    evidence = [[0.99, 0.0], [0.99, 0.99], [0.99, 0.99], [0.0, 0.99]]
    first, second, background, _ = as_sets(mine([0.5] * 4, {1: {0}, 2: {1}}, evidence))
    # Class 0 from 1: back to 0, ahead up to the point 2. Class 1 from 2: ahead to 3, back to 1.
    assert (first, second, background) == ({0, 1}, {2, 3}, set())


def test_padding_is_neither_action_nor_background() -> None:
    got = as_sets(mine([0.5, 0.99, 0.99, 0.99, 0.0], {1: {0}}, valid=3))
    assert got == ({1, 2}, set(), {0}, set())


def test_a_crop_without_a_point() -> None:
    assert as_sets(mine([0.5, 0.3], {})) == (set(), set(), {1}, set())


def test_recordings_of_a_batch_are_apart() -> None:
    attention = torch.tensor([[0.99, 0.99, 0.3], [0.3, 0.99, 0.99]])
    points = torch.zeros(2, 3, 2, dtype=torch.bool)
    points[0, 0, 0] = points[1, 2, 1] = True
    pseudo = mine_pseudo_snippets(
        attention[..., None], attention, points, torch.ones(2, 3).bool(), THETA_1, THETA_2
    )
    assert pseudo.action[0].tolist() == [[True, False], [True, False], [False, False]]
    assert pseudo.action[1].tolist() == [[False, False], [False, True], [False, True]]
    assert pseudo.background.tolist() == [[False, False, True], [True, False, False]]


def plainly(
    attention: list[float], points: Points
) -> tuple[set[int], set[int], set[int], set[int]]:
    """The algorithm as it is told, step by step."""
    T = len(attention)
    action: tuple[set[int], set[int]] = (set(), set())
    for point, labels in points.items():
        for direction in (-1, 1):
            t = point + direction
            while 0 <= t < T and t not in points and attention[t] > THETA_1:
                for label in labels:
                    action[label].add(t)
                t += direction
        for label in labels:
            action[label].add(point)
    confident = {t for t in range(T) if attention[t] < THETA_2}
    lowest: set[int] = set()
    borders = [-1, *sorted(points), T]
    for left, right in pairwise(borders):
        between = range(left + 1, right)
        least = min((attention[t] for t in between), default=0.0)
        lowest |= {t for t in between if attention[t] == least}
    busy = action[0] | action[1]
    return action[0], action[1], (confident | lowest) - busy, confident - busy


@given(
    st.lists(st.sampled_from([0.0, 0.0625, 0.25, 0.5, 0.96875, 1.0]), min_size=1, max_size=14),
    st.dictionaries(st.integers(0, 13), st.sets(st.integers(0, 1), min_size=1), max_size=5),
)
def test_algorithm_1_is_the_plain_one(attention: list[float], points: Points) -> None:
    points = {t: labels for t, labels in points.items() if t < len(attention)}
    assert as_sets(mine(attention, points)) == plainly(attention, points)
