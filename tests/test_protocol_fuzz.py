"""Every decoder under whatever hypothesis thinks of: a valid message, or a ProtocolError."""

from __future__ import annotations

import contextlib
import functools
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from fuzzing import DECODERS, KINDS, decoded, split
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import SAMPLES, same

from hrpro.engine import protocol
from hrpro.engine.protocol import Chunk, Message, ProtocolError
from hrpro.engine.wire import MAX_INDEX

CORPUS = sorted((Path(__file__).parent / "corpus" / "protocol").iterdir())
# Modest, and the same on each machine; tests/fuzz_decoders.py is for more.
fuzz = settings(max_examples=300, deadline=None)


def test_every_message_has_its_decoder() -> None:
    assert {kind for kinds in KINDS.values() for kind in kinds} == set(Message.__subclasses__())


# ---- what is changed of valid messages ---------------------------------------------------------

Frames = list[bytes]
Change = Callable[[Frames], Frames]

samples = st.sampled_from(list(SAMPLES.values())).map(protocol.encode)
edges = st.sampled_from(
    [-(2**63), -(2**31), -1, 0, 1, 2**31 - 1, 2**31, MAX_INDEX, MAX_INDEX + 1, 2**63, 2**64 - 1]
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=70)
plain = st.none() | st.booleans() | edges | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts
plain |= st.binary(max_size=70) | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary())
fields = st.sampled_from(
    sorted(
        {"v", "type", "dtype", "shape"}
        | {name for message in SAMPLES.values() for name in vars(message)}
    )
)
# What msgpack can say; keys are not always texts.
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(fields | texts | edges, inner, max_size=4)
    ),
    max_leaves=8,
)


def packed(value: object) -> bytes:
    return msgpack.packb(value)


def header_of(frames: Frames) -> tuple[int, dict[Any, Any] | None]:
    """The first frame that is a map, and where it stands; None if none is."""
    for at, frame in enumerate(frames):
        try:
            header = msgpack.unpackb(frame, strict_map_key=False)
        except (ValueError, TypeError, msgpack.UnpackException):
            continue
        if isinstance(header, dict):
            return at, header
    return 0, None


taken = st.sampled_from(
    [
        pair
        for message in SAMPLES.values()
        for pair in (header_of(protocol.encode(message))[1] or {}).items()
    ]
)


@st.composite
def header_changes(draw: st.DrawFn) -> Change:
    """A field of the header is set, left out, or that of another message."""
    name, value = draw(st.tuples(fields, values | st.just(...)) | taken)

    def change(frames: Frames) -> Frames:
        at, header = header_of(frames)
        if header is None:
            return frames
        header[name] = value
        kept = {each: header[each] for each in header if header[each] is not ...}
        return [*frames[:at], packed(kept), *frames[at + 1 :]]

    return change


@st.composite
def byte_changes(draw: st.DrawFn) -> Change:
    """A stretch of a frame becomes other bytes: fewer, more, or the same number."""
    number, start = draw(st.integers(0, 2)), draw(st.integers(0, 300))
    length, new = draw(st.integers(0, 8)), draw(st.binary(max_size=8))

    def change(frames: Frames) -> Frames:
        if not frames:
            return [new]
        at = number % len(frames)
        frame = frames[at]
        first = start % (len(frame) + 1)
        return [*frames[:at], frame[:first] + new + frame[first + length :], *frames[at + 1 :]]

    return change


@st.composite
def frame_changes(draw: st.DrawFn) -> Change:
    """Some frames are left out, and others stand in their place."""
    start, stop = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    new = draw(st.lists(st.binary(max_size=64), max_size=2) | samples)
    return lambda frames: [*frames[:start], *new, *frames[stop:]]


changes = st.lists(header_changes() | byte_changes() | frame_changes(), min_size=1, max_size=3)


EDGES: list[Any] = [
    ..., None, True, False, -(2**63), -1, 0, 1, 2, 6, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**64 - 1,
    0.0, -1.5, 1e300, math.nan, math.inf, -math.inf, "", "a", "a/b", "a\n", "ä" * 64, "a" * 2000,
    b"", b"cam1", [], [1], ["a/b"], [""], [None], [[]], [6], [2, 3], [3, 2], [1, 6], [-2, -3],
    ["a"], [1, 2, 3], [2.0, 3.0], [2**31 - 1] * 2, [2**63] * 2, {}, {"a": 1}, {"a": []}, {"a": 1.5},
    [{}], [{"a": "b"}], [{"a": None}], msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 2),
]  # fmt: skip


@pytest.mark.parametrize("message", SAMPLES.values(), ids=SAMPLES)
def test_every_field_with_values_of_all_kinds(message: Message) -> None:
    frames = protocol.encode(message)
    at, header = header_of(frames)
    assert header is not None
    for field in header:
        for value in EDGES:
            changed = {**header, field: value}
            if value is ...:
                del changed[field]
            for name in DECODERS:
                decoded(name, [*frames[:at], packed(changed), *frames[at + 1 :]])


@fuzz
@given(samples, changes)
def test_a_changed_message_is_refused_or_valid(frames: Frames, changed: list[Change]) -> None:
    frames = functools.reduce(lambda left, change: change(left), changed, frames)
    for name in DECODERS:
        decoded(name, frames)


@fuzz
@given(
    st.sampled_from(list(SAMPLES.values())),
    st.dictionaries(fields, values, max_size=3),
    st.lists(st.binary(max_size=64), max_size=2),
)
def test_any_fields_are_refused_or_valid(
    message: Message, changed: dict[str, Any], more: Frames
) -> None:
    at, header = header_of(protocol.encode(message))
    frames = [*protocol.encode(message)[:at], packed({**(header or {}), **changed}), *more]
    for name in DECODERS:
        decoded(name, frames)


@fuzz
@given(st.lists(st.binary(max_size=4200), max_size=4))
def test_any_bytes_are_refused_or_valid(frames: Frames) -> None:
    for name in DECODERS:
        decoded(name, frames)


@fuzz
@given(st.sampled_from(list(SAMPLES.values())), st.data())
def test_what_is_valid_comes_back_the_same(message: Message, data: st.DataObject) -> None:
    """Of each field, whatever value a decoder takes for it."""
    name = next(each for each, kinds in KINDS.items() if type(message) in kinds)
    at, header = header_of(protocol.encode(message))
    assert header is not None
    field = data.draw(st.sampled_from(sorted(header)))
    header[field] = data.draw(values | st.lists(texts, max_size=3))
    frames = protocol.encode(message)
    again = decoded(name, [*frames[:at], packed(header), *frames[at + 1 :]])
    if again is not None:
        assert same(DECODERS[name](protocol.encode(again)), again)


# ---- memory ------------------------------------------------------------------------------------

# An empty map of one byte is one of 64 in memory, beside its place in a list; and a little for the
# rest.
BYTES_FOR_A_BYTE = 128
BYTES_FOR_ALL = 20_000


def most_bytes(name: str, frames: Frames) -> int:
    """Memory that decoding takes at once: the least of two times, for others' threads take some."""
    return min(most_bytes_once(name, frames) for _ in range(2))


def most_bytes_once(name: str, frames: Frames) -> int:
    tracemalloc.start()
    try:
        with contextlib.suppress(ProtocolError):
            DECODERS[name](frames)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


BOMBS = {
    "lists in lists, each as long as the header": b"\xdc\x0f\xff",
    "maps in maps of a thousand entries": b"\xde\x04\x00",
    "lists of a list and more": b"\xdc\x0f\xff\xc0",
    "lists in lists": b"\x91",
    "maps in maps": b"\x81\xa1v",
    "empty lists": b"\x90",
    "empty maps": b"\x80",
    "texts of 4 GiB": b"\xdb\xff\xff\xff\xff",
    "ones": b"\x01",
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_takes_memory_in_proportion_to_its_length(name: str, bomb: str) -> None:
    longest = 4096 if KINDS[name][0] in (*KINDS["decode_feed"], *KINDS["decode_control"]) else 2**16
    part = BOMBS[bomb]
    for head in (b"", b"\x81\xa1v", b"\x81\xa1v\xdd" + longest.to_bytes(4, "big")):
        filled = head + part * ((longest - len(head)) // len(part))
        for frames in ([filled], [b"topic", filled]):
            assert most_bytes(name, frames) < BYTES_FOR_ALL + BYTES_FOR_A_BYTE * len(filled)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(DECODERS)),
    st.lists(st.tuples(st.binary(min_size=1, max_size=5), st.integers(1, 1400)), max_size=3),
)
def test_repeated_bytes_take_memory_in_proportion(
    name: str, parts: list[tuple[bytes, int]]
) -> None:
    filled = b"\x81\xa1v" + b"".join(part * times for part, times in parts)
    bound = BYTES_FOR_ALL + BYTES_FOR_A_BYTE * len(filled)
    assert most_bytes(name, [b"topic", filled]) < bound
    assert most_bytes(name, [filled]) < bound


def test_a_shape_takes_no_memory_before_its_bytes_are_there() -> None:
    header = {"v": 1, "type": "chunk", "stream": "cam", "first_index": 0, "dtype": "float32"}
    for shape in ([2**31 - 1, 2**31 - 1], [2**31 - 1, 1], [1, 2**31 - 1], [2**16] * 2):
        frames = [packed({**header, "shape": shape}), bytes(64)]
        assert most_bytes("decode_feed", frames) < BYTES_FOR_ALL


def test_features_are_not_copied() -> None:
    """A chunk of 1 MiB."""
    header = {"v": 1, "type": "chunk", "stream": "cam", "first_index": 0, "dtype": "float32"}
    frames = [packed({**header, "shape": [128, 2048]}), bytes(2**20)]
    assert most_bytes("decode_feed", frames) < BYTES_FOR_ALL
    chunk = protocol.decode_feed(frames)
    assert isinstance(chunk, Chunk) and chunk.features.shape == (128, 2048)


# ---- what was found ----------------------------------------------------------------------------


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.name)
def test_the_corpus_is_refused_or_valid(file: Path) -> None:
    frames = split(file.read_bytes())
    for name in DECODERS:
        decoded(name, frames)
        assert most_bytes(name, frames) < BYTES_FOR_ALL + BYTES_FOR_A_BYTE * sum(map(len, frames))


def test_the_check_itself_sees_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: Exception) -> Callable[[Frames], Message]:
        def decode(frames: Frames) -> Message:
            raise error

        return decode

    for wrong in (KeyError("x"), MemoryError(), ProtocolError("x", "no_code_of_ours")):
        monkeypatch.setitem(DECODERS, "decode_feed", raising(wrong))  # type: ignore[arg-type]
        with pytest.raises((KeyError, MemoryError, AssertionError)):
            decoded("decode_feed", [b""])
    reply = protocol.encode(SAMPLES["ack"])
    monkeypatch.setitem(DECODERS, "decode_feed", protocol.decode_feed_reply)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        decoded("decode_feed", reply)
