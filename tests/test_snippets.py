"""The ring of snippets that come in any order, against a dictionary that forgets nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrpro.engine.snippets import SnippetBuffer

DIM, CAPACITY, ROOM = 2, 12, 8


def rows(first: int, stop: int) -> np.ndarray:
    """Features that tell their index: (stop - first, DIM)."""
    return np.repeat(np.arange(first, stop, dtype=np.float32)[:, None], DIM, axis=1)


def read(buffer: SnippetBuffer, start: int, stop: int) -> tuple[list[float], list[bool]]:
    features = np.full((stop - start, DIM), -1.0, dtype=np.float32)
    here = np.zeros(stop - start, dtype=np.bool_)
    buffer.read(start, stop, features, here)
    assert (features[:, 0] == features[:, 1]).all()
    return features[:, 0].tolist(), here.tolist()


def test_what_is_missing_comes_later() -> None:
    buffer = SnippetBuffer(CAPACITY, DIM, first_index=5)
    assert buffer.write(5, rows(5, 7), 13) == 0
    assert buffer.write(9, rows(9, 11), 13) == 0
    assert (buffer.next_index, buffer.missing_until, buffer.came_until) == (7, 9, 11)
    assert buffer.write(6, rows(6, 9), 13) == 1  # 6 is there already
    assert (buffer.next_index, buffer.missing_until) == (11, None)
    assert read(buffer, 5, 11) == ([5.0, 6.0, 7.0, 8.0, 9.0, 10.0], [True] * 6)


def test_what_is_given_up_is_masked() -> None:
    buffer = SnippetBuffer(CAPACITY, DIM, first_index=0)
    buffer.write(0, rows(0, 2) + 1, 8)
    buffer.write(4, rows(4, 5), 8)
    buffer.give_up(4, 8)
    assert buffer.next_index == buffer.known_until == 5
    assert read(buffer, 0, 5) == ([1.0, 2.0, 0.0, 0.0, 4.0], [True, True, False, False, True])
    assert buffer.write(2, rows(2, 4), 8) == 2  # too late
    assert read(buffer, 2, 4)[1] == [False, False]


def test_a_gap_beyond_the_room_is_followed_as_room_comes() -> None:
    buffer = SnippetBuffer(CAPACITY, DIM, first_index=0)
    buffer.write(0, rows(0, 3), 8)
    buffer.give_up(11, 8)
    assert (buffer.next_index, buffer.known_until) == (11, 8)
    buffer.settle(13)
    assert buffer.known_until == 11
    assert read(buffer, 1, 11)[1] == [True, True] + [False] * 8


def test_places_of_old_snippets_are_not_taken_for_new_ones() -> None:
    buffer = SnippetBuffer(4, DIM, first_index=0)
    buffer.write(0, rows(0, 4), 4)  # the ring is full
    buffer.write(6, rows(6, 7), 8)  # 4 and 5 have the places of 0 and 1
    assert (buffer.next_index, buffer.missing_until) == (4, 6)
    buffer.give_up(6, 8)
    assert read(buffer, 3, 7) == ([3.0, 0.0, 0.0, 6.0], [True, False, False, True])


Deed = tuple[str, int, int]
kinds = st.sampled_from(["write", "give_up", "process"])
deeds = st.lists(st.tuples(kinds, st.integers(0, 9), st.integers(1, 5)))


@given(deeds=deeds, first_index=st.sampled_from([0, 7, 2**40]))
def test_it_agrees_with_a_dictionary(deeds: list[Deed], first_index: int) -> None:
    buffer = SnippetBuffer(CAPACITY, DIM, first_index)
    came: set[int] = set()
    given_up: set[int] = set()
    processed = next_index = first_index
    for deed, offset, n in deeds:
        limit = processed + ROOM
        if deed == "write":
            # From a little below what is next, as far as there is room.
            first = max(first_index, min(next_index - 2 + offset, limit - 1))
            stop = min(first + n, limit)
            new = {index for index in range(first, stop) if index not in came | given_up}
            assert buffer.write(first, rows(first, stop), limit) == stop - first - len(new)
            came |= new
        elif deed == "give_up":
            until = next_index + offset
            given_up |= {index for index in range(first_index, until) if index not in came}
            buffer.give_up(until, limit)
        else:
            processed = min(processed + n, buffer.known_until)
            buffer.settle(processed + ROOM)
        while next_index in came | given_up:
            next_index += 1
        assert buffer.next_index == next_index
        assert buffer.known_until == min(next_index, processed + ROOM)
        beyond = [index for index in came if index > next_index]
        assert buffer.missing_until == (min(beyond) if beyond else None)
        start = max(first_index, buffer.known_until - 4)
        features, here = read(buffer, start, buffer.known_until)
        expected = range(start, buffer.known_until)
        assert here == [index in came for index in expected]
        kept = rows(start, buffer.known_until)[:, 0].tolist()
        assert features == [at if is_here else 0.0 for at, is_here in zip(kept, here, strict=True)]


def test_more_than_there_is_room_for_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError):
        SnippetBuffer(CAPACITY, DIM, 0).write(0, rows(0, 9), 8)
