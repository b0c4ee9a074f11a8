"""Which frame stands at which position of the snippet clock, against a search through them all."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hrpro.clients.cameras.frames import (
    APART_S,
    FURTHEST_S,
    LONGEST_HOLD_S,
    Snippet,
    SnippetAssembler,
)
from hrpro.engine.timebase import SnippetClock

CLOCK = SnippetClock(25.0, 4)
ALL = (0, 1, 2, 3)
MS = Fraction(1, 1000)


def picture(number: int) -> NDArray[np.uint8]:
    """An image (1, 1, 3) with the number of its frame."""
    return np.array([[[number >> 16, number >> 8 & 255, number & 255]]], np.uint8)


def numbers(snippet: Snippet) -> list[int]:
    """The frames' numbers."""
    high, middle, low = (snippet.frames[:, 0, 0, n].astype(int) for n in range(3))
    return ((high << 16) + (middle << 8) + low).tolist()


def assembled(
    times_s: Sequence[Fraction],
    clock: SnippetClock = CLOCK,
    offsets: Sequence[int] = ALL,
    wall_s: Callable[[int], float | None] = lambda _: None,
    first_index: int = 0,
) -> dict[int, list[int]]:
    """The numbers of the frames of each snippet, by its index."""
    assembler = SnippetAssembler(clock, offsets, picture, first_index)
    snippets = [
        each
        for number, time_s in enumerate(times_s)
        for each in assembler.push(number, time_s, wall_s(number))
    ] + assembler.end()
    assert [each.index for each in snippets] == sorted({each.index for each in snippets})
    assert all(each.index < assembler.next_index for each in snippets)
    return {each.index: numbers(each) for each in snippets}


def at_rate(frames_per_s: Fraction | int, count: int, time_base: Fraction) -> list[Fraction]:
    """Time stamps of a source with a steady rate, rounded to its time base."""
    return [round(n / Fraction(frames_per_s) / time_base) * time_base for n in range(count)]


def searched(times_s: Sequence[Fraction], clock: SnippetClock) -> dict[int, list[int]]:
    """What `assembled` should say of rising time stamps, from the rule as it is written."""
    rate = Fraction(clock.frames_per_s)
    begin_s, end_s = times_s[0], times_s[-1] + 1 / rate
    shown: dict[int, int] = {}
    for position in range(math.ceil((end_s - begin_s) * rate)):
        look_s = begin_s + (position + Fraction(3, 8)) / rate
        newest = bisect.bisect_right(times_s, look_s) - 1
        until_s = times_s[newest] + 1 / rate
        if newest + 1 < len(times_s) and times_s[newest + 1] - times_s[newest] <= LONGEST_HOLD_S:
            until_s = times_s[newest + 1]
        if look_s < until_s:
            shown[position] = newest
    frames = clock.snippet_frames
    whole = range((max(shown) + 1) // frames)
    runs = {index: [shown.get(index * frames + n) for n in range(frames)] for index in whole}
    return {index: run for index, run in runs.items() if None not in run}  # type: ignore[misc]


# ---- steady sources ------------------------------------------------------------------------------


@pytest.mark.parametrize("time_base", [Fraction(1, 90_000), MS, Fraction(1, 25)])
def test_a_source_at_the_rate_of_the_clock_gives_each_frame_once(time_base: Fraction) -> None:
    snippets = assembled(at_rate(25, 43, time_base))
    assert snippets == {i: list(range(4 * i, 4 * i + 4)) for i in range(10)}


def test_two_frames_of_fifty_are_one_position() -> None:
    assert assembled(at_rate(50, 17, MS)) == {0: [0, 2, 4, 6], 1: [8, 10, 12, 14]}


def test_half_the_rate_repeats_each_frame() -> None:
    # The last frame is shown for a position; how long it would have been is not known.
    assert assembled(at_rate(Fraction(25, 2), 4, MS)) == {0: [0, 0, 1, 1]}
    assert assembled(at_rate(Fraction(25, 2), 5, MS)) == {0: [0, 0, 1, 1], 1: [2, 2, 3, 3]}


@pytest.mark.parametrize("clock_rate", [25.0, 30.0, 29.97])
@pytest.mark.parametrize("rate", [24, 25, 30, 50, Fraction(60_000, 1001), Fraction(24_000, 1001)])
@pytest.mark.parametrize("time_base", [Fraction(1, 90_000), MS])
def test_steady_sources_keep_to_the_time(
    rate: Fraction | int, clock_rate: float, time_base: Fraction
) -> None:
    clock = SnippetClock(clock_rate, 16)
    times_s = at_rate(rate, 2000, time_base)
    snippets = assembled(times_s, clock, range(16))
    assert snippets == searched(times_s, clock)
    for index, frames in snippets.items():
        shown_s = [float(times_s[n]) for n in frames]
        asked_s = [(index * 16 + n + 0.375) / clock_rate for n in range(16)]
        late_s = np.subtract(asked_s, shown_s)
        assert (late_s >= 0).all() and (late_s < 1 / float(rate) + 0.001).all()


@given(st.lists(st.integers(0, 300), min_size=6, max_size=80), st.integers(0, 2**33))
def test_jitter_decides_nothing(jitter: list[int], begin: int) -> None:
    """Up to 3/8 of a frame too late, counted from the first, which has none."""
    exact = [Fraction(begin + 800 * n, 20_000) for n in range(len(jitter))]
    late = [at + Fraction(each, 20_000) for at, each in zip(exact, [0, *jitter[1:]], strict=True)]
    assert assembled(late) == assembled(exact)
    assert assembled(exact) == {i: list(range(4 * i, 4 * i + 4)) for i in range(len(exact) // 4)}


# ---- any source ----------------------------------------------------------------------------------

steps_ms = st.lists(
    st.one_of(st.integers(1, 120), st.integers(900, 1100), st.sampled_from([40, 1000, 5000])),
    max_size=60,
)


def from_steps(steps: Sequence[int], begin: Fraction = Fraction(0)) -> list[Fraction]:
    """Time stamps so many milliseconds apart."""
    return [begin + MS * sum(steps[:n]) for n in range(len(steps) + 1)]


@given(steps_ms, st.sampled_from([25.0, 30.0, 12.5, 59.94]), st.integers(1, 7))
def test_frames_are_taken_by_their_time(
    steps: list[int], frames_per_s: float, snippet_frames: int
) -> None:
    clock = SnippetClock(frames_per_s, snippet_frames)
    times_s = from_steps(steps)
    assert assembled(times_s, clock, range(snippet_frames)) == searched(times_s, clock)


@given(steps_ms, st.integers(-(10**9), 10**9), st.integers(0, 10**6))
def test_where_time_stamps_begin_does_not_matter(
    steps: list[int], begin: int, first_index: int
) -> None:
    plain = assembled(from_steps(steps))
    shifted = assembled(from_steps(steps, begin * MS), first_index=first_index)
    assert shifted == {first_index + index: frames for index, frames in plain.items()}


@given(steps_ms, st.lists(st.integers(0, 3000), min_size=61, max_size=61))
def test_live_and_recorded_are_equal(steps: list[int], delays: list[int]) -> None:
    """Frames that come live, late by what the network makes of them."""
    times_s = from_steps(steps)

    def came_s(number: int) -> float:
        return float(times_s[number] + MS * delays[number]) - (float(MS * delays[0]))

    assert assembled(times_s, wall_s=came_s) == assembled(times_s)


@given(steps_ms)
def test_snippets_are_the_same_whenever_they_are_asked_for(steps: list[int]) -> None:
    """A snippet comes with the first frame behind it, not later."""
    times_s = from_steps(steps)
    assembler = SnippetAssembler(CLOCK, ALL, picture)
    for number, time_s in enumerate(times_s):
        came = assembler.push(number, time_s)
        look_s = (Fraction(4 * assembler.next_index + 3) + Fraction(3, 8)) / 25
        assert time_s <= look_s, "a snippet that is decided is due"
        assert all(max(numbers(each)) < number for each in came)


# ---- what sources do -----------------------------------------------------------------------------


def test_frames_that_come_again_or_late_are_left_out() -> None:
    times_ms = [0, 40, 40, 80, 20, 120, 160]
    assembler = SnippetAssembler(CLOCK, ALL, picture)
    snippets = [
        each for n, time_ms in enumerate(times_ms) for each in assembler.push(n, time_ms * MS)
    ]
    assert [numbers(each) for each in snippets] == [[0, 1, 3, 5]]
    assert (assembler.late, assembler.beginnings) == (2, 1)


def test_a_missing_frame_is_the_one_before_it() -> None:
    assert assembled([each * MS for each in (0, 40, 120, 160)]) == {0: [0, 1, 1, 2]}


def test_a_hole_of_a_second_is_filled_and_a_longer_one_is_a_gap() -> None:
    before, behind = [0, 40, 80], [n * 40 for n in range(9)]
    filled = assembled([each * MS for each in before + [1080 + n for n in behind]])
    assert filled[0] == [0, 1, 2, 2]
    assert filled[6] == [2, 2, 2, 3]  # positions 24 to 27, of which 27 is at 1080 ms
    assert sorted(filled) == list(range(9))
    gap = assembled([each * MS for each in before + [1120 + n for n in behind]])
    assert gap == {7: [3, 4, 5, 6], 8: [7, 8, 9, 10]}  # from position 28 on, at 1120 ms


def test_only_positions_that_the_model_looks_at_can_be_missing() -> None:
    times_s = [each * MS for each in (0, 40, 80, 2000, 2040, 2080)]
    assert assembled(times_s) == {}
    assert assembled(times_s, offsets=(0, 2)) == {0: [0, 2]}


def test_the_frame_before_a_snippet_or_its_first_where_there_is_none() -> None:
    offsets = (-1, 0, 3)
    assert assembled(at_rate(25, 8, MS), offsets=offsets) == {0: [0, 0, 3], 1: [3, 4, 7]}
    behind = [1280 * MS + each for each in at_rate(25, 4, MS)]
    assert assembled(at_rate(25, 4, MS) + behind, offsets=offsets) == {0: [0, 0, 3], 8: [4, 4, 7]}


def test_frames_that_nobody_looks_at_are_not_prepared() -> None:
    prepared: list[int] = []

    def prepare(number: int) -> NDArray[np.uint8]:
        prepared.append(number)
        return picture(number)

    assembler = SnippetAssembler(CLOCK, (1, 2), prepare)
    times_s = [each * MS for each in (0, 40, 120, 160, 200, 210, 220, 240, 280, 320)]
    for n, time_s in enumerate(times_s):
        assembler.push(n, time_s)
    assert prepared == [1, 5, 7]  # 1 at two positions; 4 and 6 at none


@pytest.mark.parametrize("back_ms", [1001, 100_000])
def test_a_recording_goes_on_where_its_time_stamps_begin_anew(back_ms: int) -> None:
    first = at_rate(25, 30, MS)
    times_s = first + [first[-1] - back_ms * MS + each for each in at_rate(25, 30, MS)]
    assert assembled(times_s) == {i: list(range(4 * i, 4 * i + 4)) for i in range(15)}


def test_time_stamps_that_nobody_can_mean_are_a_new_beginning() -> None:
    first = at_rate(25, 30, MS)
    near = assembled(first + [FURTHEST_S - 1 + each for each in first])
    far = assembled(first + [FURTHEST_S + 2 + each for each in first])
    assert max(near) == ((FURTHEST_S - 1) * 25 + 30) // 4 - 1
    assert far == {i: list(range(4 * i, 4 * i + 4)) for i in range(15)}


@pytest.mark.parametrize("begin_ms", [0, 1160, 10**8])
def test_behind_a_lost_connection_the_wall_has_the_index(begin_ms: int) -> None:
    """Whatever the time stamps are; 29 frames came from 0 s on, the others from 8 s on."""
    assembler = SnippetAssembler(CLOCK, ALL, picture)
    came = []
    for n, time_s in enumerate(at_rate(25, 29, MS)):
        came += assembler.push(n, time_s, n / 25)
    came += assembler.end()
    assert [each.index for each in came] == list(range(7))
    came = []
    for n, time_s in enumerate(at_rate(25, 29, MS)):
        came += assembler.push(100 + n, begin_ms * MS + time_s, 8.0 + n / 25)
    assert [each.index for each in came] == [50 + n for n in range(7)]
    assert numbers(came[0]) == [100, 101, 102, 103]
    assert assembler.beginnings == 2


def test_a_short_loss_is_a_small_hole() -> None:
    assembler = SnippetAssembler(CLOCK, ALL, picture)
    came = [*assembler.push(0, Fraction(0), 0.0), *assembler.push(1, 40 * MS, 0.04)]
    came += assembler.end()
    came += [*assembler.push(2, 7 * MS, 0.4), *assembler.push(3, 47 * MS, 0.44)]
    assert [numbers(each) for each in came] == [[0, 1, 1, 1], [1, 1, 1, 1]]


def test_a_camera_that_begins_anew_without_a_lost_connection() -> None:
    steady = at_rate(25, 25, MS)
    wall = [n / 25 for n in range(25)] + [5 + n / 25 for n in range(25)]
    for jump in (-900, 300):  # what was shown, and where it is now
        times_s = [1000 + each for each in steady] + [1000 + jump + each for each in steady]
        snippets = assembled(times_s, wall_s=wall.__getitem__)
        assert snippets[0] == [0, 1, 2, 3]
        # Position 125 is the first behind; snippet 31 begins before it.
        assert snippets[32] == [28, 29, 30, 31]
        assert set(range(6, 32)).isdisjoint(snippets)


@pytest.mark.parametrize("ppm", [-500, 500])
def test_a_clock_that_runs_wrong_is_put_right_by_the_wall(ppm: int) -> None:
    """A frame in each 2 s of the wall; the camera writes other times."""
    count = int(2.2 * APART_S / (abs(ppm) * 1e-6)) // 2
    times_s = [n * Fraction(2) * (1 + Fraction(ppm, 10**6)) for n in range(count)]
    assembler = SnippetAssembler(SnippetClock(0.5, 4), ALL, picture)
    apart_s = []
    for n, time_s in enumerate(times_s):
        assembler.push(n, time_s, 2.0 * n)
        apart_s.append(8.0 * assembler.next_index - 2.0 * n)
    assert max(map(abs, apart_s)) <= APART_S + 8
    assert assembler.beginnings == 3


@pytest.mark.parametrize("offsets", [(), (4,), (-1,), (0, 16)])
def test_offsets_that_no_snippet_has(offsets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="frame_offsets: expected positions below 4"):
        SnippetAssembler(CLOCK, offsets, picture)
