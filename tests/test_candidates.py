"""The proposals that stage 2 learns from: by hand, and as the engine finds them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.proposals import Run, RunDetector
from hrpro.training.candidates import find_candidates

TWO = LocalizationConfig(thresholds=(0.25, 0.75), peak_gate=0.0)


def test_by_hand() -> None:
    scores = np.array([[0, 0], [0.5, 0], [1, 1], [0.5, 1], [0, 0], [0, 0]], np.float32)
    found = find_candidates(scores, TWO)
    assert found.label_index.tolist() == [0, 0, 1, 1]
    # Class 0 over 0.25: half-way from 0 to 0.5; over 0.75: half-way from 0.5 to 1. Class 1: a
    # quarter of the way up and three quarters down, and the other way round.
    assert found.borders.tolist() == [[1.0, 4.0], [2.0, 3.0], [1.75, 4.25], [2.25, 3.75]]
    # Inside minus one snippet each side: 2 / 3 - 0; 1 - (0.5 + 0.5) / 2; class 1: 1 - 0.
    assert found.contrast == pytest.approx([2 / 3, 0.5, 1, 1])


@pytest.mark.parametrize("length", [0, 1])
def test_short_recordings(length: int) -> None:
    found = find_candidates(np.ones((length, 1), np.float32), TWO)
    assert found.borders.tolist() == [[0.0, 1.0]] * 2 * length
    assert found.contrast.tolist() == [1.0] * 2 * length  # nothing outside


def test_what_stays_below_the_gate_is_left_out() -> None:
    config = LocalizationConfig(thresholds=(0.25,), peak_gate=0.6)
    scores = np.array([[0.5], [0.0], [0.5], [0.7]], np.float32)
    assert find_candidates(scores, config).borders[:, 1].tolist() == [4.0]


levels = st.sampled_from([0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 0.875, 1.0])
configs = st.builds(
    LocalizationConfig,
    thresholds=st.sampled_from([(0.25,), (0.125, 0.25, 0.5, 0.75)]),
    peak_gate=st.sampled_from([0.0, 0.4]),
    border_ratio=st.sampled_from([0.25, 1.0]),
    border_limit=st.integers(1, 4),
)


Found = tuple[int, float, float, float]


def by_the_engine(scores: NDArray[np.float32], config: LocalizationConfig) -> list[Found]:
    """Runs with their contrast, which is asked for as soon as all evidence is there."""
    detector = RunDetector(scores.shape[1], config)
    waiting: list[Run] = []
    found: list[Found] = []
    for row in [*scores, None]:
        waiting += detector.flush() if row is None else detector.push(row)
        due = [r for r in waiting if row is None or r.evidence_stop <= detector.next_index]
        waiting = [run for run in waiting if run not in due]
        for run in due:
            contrast = max(0.0, detector.outer_inner_contrast(run))
            found.append((run.label_index, run.start_position, run.stop_position, contrast))
    return found


@given(st.lists(st.tuples(levels, levels), max_size=30), configs)
@settings(max_examples=300)
def test_they_are_the_runs_of_the_engine(
    track: list[tuple[float, float]], config: LocalizationConfig
) -> None:
    scores = np.array(track, np.float32).reshape(-1, 2)
    found = find_candidates(scores, config)
    got = zip(found.label_index, *found.borders.T, found.contrast, strict=True)
    expected = sorted(by_the_engine(scores, config))
    assert sorted(got) == [pytest.approx(each, abs=1e-12) for each in expected]
