"""The one clock: snippet positions, seconds, frames."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrpro.engine.timebase import SnippetClock

clocks = st.builds(
    SnippetClock,
    st.sampled_from([23.976, 24.0, 25.0, 29.97, 30.0, 50.0, 59.94, 60.0, 1e-3, 1e6]),
    st.integers(1, 1000),
)


@pytest.mark.parametrize(
    ("position", "seconds"),
    [
        (0, 0.0),  # the left border of the first snippet
        (0.5, 0.32),  # its middle
        (1, 0.64),
        (2, 1.28),
        (3, 1.92),
        (-1, -0.64),  # before the stream: plain arithmetic, no special case
        (5625, 3600.0),  # an hour, exactly
    ],
)
def test_position_and_seconds_at_25_frames_per_s(position: float, seconds: float) -> None:
    clock = SnippetClock(25.0, 16)
    assert clock.seconds(position) == seconds
    assert clock.position(seconds) == position


def test_snippet_length() -> None:
    assert SnippetClock(25.0, 16).snippet_s == 0.64
    assert SnippetClock(30.0, 15).snippet_s == 0.5


@pytest.mark.parametrize(
    ("frame", "snippet_index"),
    [(0, 0), (15, 0), (16, 1), (31, 1), (32, 2), (16 * 10**12, 10**12)],
)
def test_index_of_frame(frame: int, snippet_index: int) -> None:
    assert SnippetClock(25.0, 16).index_of_frame(frame) == snippet_index


def test_a_negative_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="frame: expected an integer of at least 0, came -1"):
        SnippetClock().index_of_frame(-1)


@given(clocks, st.integers(0, 10**9))
def test_round_trip_of_indices(clock: SnippetClock, index: int) -> None:
    assert math.isclose(clock.position(clock.seconds(index)), index, rel_tol=1e-15)
    assert round(clock.position(clock.seconds(index))) == index


@given(clocks, st.integers(0, 10**9))
def test_the_frames_of_a_snippet_are_its_own(clock: SnippetClock, index: int) -> None:
    first = index * clock.snippet_frames
    assert clock.index_of_frame(first) == index
    assert clock.index_of_frame(first + clock.snippet_frames - 1) == index


@given(clocks, st.integers(0, 10**9))
def test_seconds_grow_with_the_index(clock: SnippetClock, index: int) -> None:
    assert clock.seconds(index) < clock.seconds(index + 1)


@pytest.mark.parametrize(
    "frames_per_s", [0, -25.0, math.nan, math.inf, True, "25", None, pytest.param([25], id="list")]
)
def test_refused_frame_rates(frames_per_s: object) -> None:
    with pytest.raises(ValueError, match="frames_per_s: expected a finite number above 0, came"):
        SnippetClock(frames_per_s, 16)  # type: ignore[arg-type]


@pytest.mark.parametrize("snippet_frames", [0, -16, 16.0, True, "16", None])
def test_refused_snippet_lengths(snippet_frames: object) -> None:
    with pytest.raises(ValueError, match="snippet_frames: expected an integer of at least 1, came"):
        SnippetClock(25.0, snippet_frames)  # type: ignore[arg-type]


def test_clocks_are_equal_by_value_and_frozen() -> None:
    clock = SnippetClock(25, 16)
    assert clock == SnippetClock(25.0, 16) == SnippetClock()
    assert repr(clock) == "SnippetClock(frames_per_s=25.0, snippet_frames=16)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        clock.snippet_frames = 8  # type: ignore[misc]
