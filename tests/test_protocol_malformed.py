"""Everything that is no message is refused, with a ProtocolError that says why."""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import DECODERS, NOTICE, SAMPLES, Decoder, decode, same

from hrpro.engine import protocol
from hrpro.engine.protocol import Chunk, FinalProposal, Hello, ProtocolError

# ---- frames ------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=200), max_size=4), st.sampled_from(list(DECODERS.values())))
def test_random_frames_are_refused(frames: list[bytes], decoder: Decoder) -> None:
    with pytest.raises(ProtocolError):
        decoder(frames)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_truncation_is_refused(name: str) -> None:
    frames = protocol.encode(SAMPLES[name])
    for number, frame in enumerate(frames):
        for length in range(len(frame)):
            cut = [*frames[:number], frame[:length], *frames[number + 1 :]]
            with pytest.raises(ProtocolError):
                decode(SAMPLES[name], cut)


@pytest.mark.parametrize("name", SAMPLES)
def test_missing_and_additional_frames_are_refused(name: str) -> None:
    frames = protocol.encode(SAMPLES[name])
    fewer = frames[:1] if name == "page" else frames[:-1]  # a page may have any number
    for wrong in ([], fewer, [*frames, b""], [*frames, frames[0]], [b"", *frames]):
        with pytest.raises(ProtocolError):
            decode(SAMPLES[name], wrong)


# ---- headers like one that came before ----------------------------------------------------------

KEY = msgpack.packb("first_index")
# As msgpack writes them, longer than need be, signed, too large, and no integers.
INDICES = [
    *(msgpack.packb(n) for n in (0, 1, 5, 127, 128, 2**16, 2**32, 2**53 - 1, 2**53, 2**64 - 1, -1)),
    b"\xcc\x07", b"\xcf" + bytes(8), b"\xd3" + bytes(7) + b"\x09", b"\xcd\x01", b"\xc3", KEY,
]  # fmt: skip
entries = st.sampled_from(
    [
        *(msgpack.packb("stream") + msgpack.packb(name) for name in ("cam1", "first_index", "a b")),
        *(KEY + each for each in INDICES),
        *(msgpack.packb("x") + msgpack.packb(each) for each in ("first_index", 1, math.nan)),
        msgpack.packb("xfirst_index") + b"\x01",
        *(msgpack.packb("shape") + msgpack.packb(each) for each in ([1, 2], [2, 1], [0, 2], [2])),
        *(msgpack.packb("dtype") + msgpack.packb(each) for each in ("float32", "float64")),
        *(msgpack.packb("type") + msgpack.packb(each) for each in ("chunk", "gap")),
        *(msgpack.packb("v") + msgpack.packb(each) for each in (1, 2)),
    ]
)
COMPLETE = [
    msgpack.packb(key) + msgpack.packb(value)
    for key, value in (("v", 1), ("type", "chunk"), ("dtype", "float32"), ("shape", [1, 2]))
]


def outcome(frames: list[bytes], in_full: bool) -> object:
    try:
        kinds, longest = protocol._FEED, protocol.MAX_REQUEST_HEADER_BYTES
        chunk = (
            protocol._decode(frames, kinds, longest) if in_full else protocol.decode_feed(frames)
        )
    except ProtocolError as error:
        return error.code, str(error)
    assert isinstance(chunk, Chunk)
    return chunk.stream, chunk.first_index, chunk.features.tolist()


@given(
    st.permutations([*COMPLETE, msgpack.packb("stream") + msgpack.packb("cam1"), KEY + b"\x05"]),
    st.lists(st.tuples(st.integers(0, 6), entries), max_size=3),
    st.sampled_from([4, 8, 12]),
    st.binary(max_size=2),
)
def test_what_a_header_says_does_not_depend_on_those_before_it(
    complete: list[bytes], changes: list[tuple[int, bytes]], size: int, behind: bytes
) -> None:
    """A map of which some entries are others, or one more, by itself and after one like it."""
    fields = list(complete)
    for at, entry in changes:
        fields[at : at + (at < 5)] = [entry]
    array = np.arange(size // 4, dtype="<f4").tobytes()
    for index in (b"\x05", *INDICES):
        others = [KEY + index if each == KEY + b"\x05" else each for each in fields]
        frames = [bytes([0x80 + len(others)]) + b"".join(others) + behind, array]
        assert outcome(frames, in_full=False) == outcome(frames, in_full=True)


def test_chunks_of_many_indices_come_out_as_they_went_in() -> None:
    features = np.arange(6, dtype=np.float32).reshape(2, 3)
    for index in (0, 1, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**53 - 2):
        decoded = protocol.decode_feed(protocol.encode(Chunk("cam1", index, features)))
        assert isinstance(decoded, Chunk)
        assert (decoded.stream, decoded.first_index) == ("cam1", index)
        np.testing.assert_array_equal(decoded.features, features)


# ---- fields ------------------------------------------------------------------------------------


def changed_header(name: str, **changes: Any) -> list[bytes]:
    """The frames of a sample with some header fields changed; `...` leaves one out."""
    frames = protocol.encode(SAMPLES[name])
    at = 1 if DECODERS[type(SAMPLES[name])] is protocol.decode_publication else 0
    header = {**msgpack.unpackb(frames[at]), **changes}
    header = {key: value for key, value in header.items() if value is not ...}
    return [*frames[:at], msgpack.packb(header), *frames[at + 1 :]]


def test_each_missing_field_is_named() -> None:
    for name, message in SAMPLES.items():
        for field in dataclasses.fields(message):
            wire_name = "shape" if field.name in ("features", "curves") else field.name
            if field.default is not dataclasses.MISSING or field.name == "publications":
                continue
            with pytest.raises(ProtocolError, match=f"expected a field '{wire_name}', came none"):
                decode(message, changed_header(name, **{wire_name: ...}))


def test_optional_fields_may_be_left_out() -> None:
    older = changed_header("hello", policy=...)
    assert decode(SAMPLES["hello"], older) == SAMPLES["hello"]
    older = changed_header("ack", missing_until=..., dropped=...)
    assert decode(SAMPLES["ack"], older) == SAMPLES["ack"]
    without_log = dataclasses.replace(NOTICE, number=None, previous=None)
    assert decode(NOTICE, changed_header("stream", number=..., previous=...)) == without_log


def test_unknown_fields_are_ignored() -> None:
    for name, message in SAMPLES.items():
        later = changed_header(name, later={"a": [1, None, 2.5]}, features=b"x")
        assert same(decode(message, later), message)


BAD_FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no version": ("hello", {"v": ...}, r"version: expected 1, came None \(NoneType\)"),
    "later version": ("hello", {"v": 2}, r"version: expected 1, came 2 \(int\)"),
    "version as bool": ("hello", {"v": True}, r"version: expected 1, came True \(bool\)"),
    "version as float": ("hello", {"v": 1.0}, r"version: expected 1, came 1.0 \(float\)"),
    "no type": ("hello", {"type": ...}, "type: expected one of hello, chunk, gap, end, came None"),
    "unknown type": ("hello", {"type": "helo"}, "type: expected one of hello, chunk, gap, end"),
    "type as list": ("hello", {"type": ["hello"]}, r"came \['hello'\] \(list\)"),
    "other direction": ("hello", {"type": "welcome"}, "came 'welcome'"),
    "stream empty": ("hello", {"stream": ""}, "hello.stream: expected a text that matches"),
    "stream too long": ("hello", {"stream": "a" * 65}, "hello.stream: expected"),
    "stream with slash": ("hello", {"stream": "a/b"}, "hello.stream: expected"),
    "stream with newline": ("hello", {"stream": "a\n"}, "hello.stream: expected"),
    "stream as bytes": ("hello", {"stream": b"cam1"}, "hello.stream: expected"),
    "stream nil": ("hello", {"stream": None}, "hello.stream: expected"),
    "index negative": ("hello", {"first_index": -1}, r"expected an integer of 0\.\.\d+, came -1"),
    "index as bool": ("hello", {"first_index": True}, r"came True \(bool\)"),
    "index as float": ("hello", {"first_index": 0.0}, r"came 0.0 \(float\)"),
    "index as text": ("hello", {"first_index": "0"}, r"came '0' \(str\)"),
    "index too large": ("hello", {"first_index": 2**53 + 1}, "hello.first_index: expected"),
    "index of 64 bits": ("ack", {"next_index": 2**64 - 1}, "ack.next_index: expected"),
    "dimension zero": ("hello", {"feature_dim": 0}, r"expected an integer of 1\.\.2147483647"),
    "dimension as bool": ("hello", {"feature_dim": True}, "hello.feature_dim: expected"),
    "rate NaN": ("hello", {"frames_per_s": math.nan}, "expected a finite number"),
    "rate infinite": ("hello", {"frames_per_s": math.inf}, "expected a finite number"),
    "rate zero": ("hello", {"frames_per_s": 0.0}, "expected a finite number above 0"),
    "rate as bool": ("hello", {"frames_per_s": True}, "expected a finite number"),
    "rate as text": ("hello", {"frames_per_s": "25"}, "expected a finite number"),
    "score NaN": ("final", {"score": math.nan}, "final.score: expected a finite number"),
    "score infinite": ("event", {"score": -math.inf}, "event.score: expected a finite number"),
    "end nil in final": ("final", {"end_s": None}, "final.end_s: expected a finite number"),
    "kind unknown": ("event", {"kind": "stop"}, "expected one of start, update, end"),
    "policy": ("hello", {"policy": "drop"}, "expected one of wait, drop_oldest, drop_newest"),
    "empty gap": ("gap", {"next_index": 1843}, "expected a gap that ends behind it"),
    "dropped as number": ("gap", {"dropped": 1}, "gap.dropped: expected true or false"),
    "missing as text": ("ack", {"missing_until": "9"}, "ack.missing_until: expected an integer"),
    "notice kind": ("stream", {"kind": "start"}, "one of opened, gap, idle, resumed, ended"),
    "code with spaces": ("error", {"code": "a b"}, "error.code: expected"),
    "message empty": ("error", {"message": ""}, "error.message: expected a text of 1..1024"),
    "message too long": ("error", {"message": "a" * 1025}, "error.message: expected"),
    "classes as text": ("welcome", {"classes": "ab"}, "welcome.classes: expected a list"),
    "class with slash": ("welcome", {"classes": ["a/b"]}, "welcome.classes: expected a label"),
    "class with tab": ("welcome", {"classes": ["a\tb"]}, "welcome.classes: expected a label"),
    "class too long": ("welcome", {"classes": ["a" * 65]}, "welcome.classes: expected a label"),
    "too many classes": ("welcome", {"classes": ["a"] * 65537}, "came"),
    "streams not maps": ("status_reply", {"streams": [1]}, "expected a map from text"),
    "counters nested": ("status_reply", {"counters": {"a": []}}, "expected a map from text"),
    "topic of another label": ("final", {"label": "High Jump"}, "topic: expected b'final/cam1/H"),
    "topic of another stream": ("stream", {"stream": "cam2"}, "topic: expected b'stream/cam2/'"),
    "dtype missing": ("chunk", {"dtype": ...}, "expected a field 'dtype', came none"),
    "dtype double": ("chunk", {"dtype": "float64"}, "expected 'float32', came 'float64'"),
    "dtype big endian": ("chunk", {"dtype": ">f4"}, "expected 'float32', came '>f4'"),
    "dtype of objects": ("chunk", {"dtype": "O"}, "expected 'float32', came 'O'"),
    "shape missing": ("chunk", {"shape": ...}, "expected a field 'shape', came none"),
    "shape flat": ("chunk", {"shape": [6]}, r"chunk.shape: expected \[n, D\]"),
    "shape deep": ("chunk", {"shape": [1, 2, 3]}, r"chunk.shape: expected \[n, D\]"),
    "shape too small": ("chunk", {"shape": [1, 3]}, r"expected 12 bytes for the shape \(1, 3\)"),
    "shape too large": ("chunk", {"shape": [3, 3]}, "expected 36 bytes .* came 24"),
    "shape huge": ("chunk", {"shape": [2**31 - 1, 2**31 - 1]}, "expected 18446744056529682436 by"),
    "shape beyond": ("chunk", {"shape": [2**32, 2**32]}, "chunk.shape: expected an integer"),
    "shape negative": ("chunk", {"shape": [-2, -3]}, "chunk.shape: expected an integer"),
    "shape one negative": ("chunk", {"shape": [-1, 3]}, "chunk.shape: expected an integer"),
    "shape zero": ("chunk", {"shape": [0, 3]}, "chunk.shape: expected an integer"),
    "shape of bools": ("chunk", {"shape": [True, 6]}, "chunk.shape: expected an integer"),
    "shape of floats": ("chunk", {"shape": [2.0, 3.0]}, "chunk.shape: expected an integer"),
    "shape as text": ("chunk", {"shape": "23"}, "chunk.shape: expected a list"),
    "shape as map": ("chunk", {"shape": {"2": 3}}, "chunk.shape: expected a list"),
    "last index beyond": ("chunk", {"first_index": 2**53}, "expected indices up to"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_bad_field_is_refused(case: str) -> None:
    name, changes, message = BAD_FIELDS[case]
    with pytest.raises(ProtocolError, match=message):
        decode(SAMPLES[name], changed_header(name, **changes))


def test_codes_of_protocol_errors() -> None:
    def code(name: str, **changes: Any) -> str:
        with pytest.raises(ProtocolError) as caught:
            decode(SAMPLES[name], changed_header(name, **changes))
        assert caught.value.code in protocol.ERROR_CODES
        return caught.value.code

    assert code("hello", v=2) == "version"
    assert code("chunk", dtype="float64") == "wrong_dtype"
    assert code("hello", padding="a" * 4096) == "too_large"
    assert code("hello", stream="") == "bad_message"


def test_an_integer_stands_for_a_number() -> None:
    decoded = protocol.decode_feed(changed_header("hello", frames_per_s=25))
    assert decoded == SAMPLES["hello"]
    assert isinstance(decoded, Hello) and type(decoded.frames_per_s) is float


# ---- headers -----------------------------------------------------------------------------------

GOOD_ACK = {"v": 1, "type": "end", "stream": "a", "next_index": 1}
BAD_HEADERS: dict[str, bytes] = {
    "empty": b"",
    "nil": b"\xc0",
    "never used byte": b"\xc1",
    "a list": msgpack.packb(["v", 1]),
    "a text": msgpack.packb("hello"),
    "an integer": msgpack.packb(1),
    "an ext": msgpack.packb(msgpack.ExtType(5, b"x")),
    "a timestamp": msgpack.packb(msgpack.Timestamp(1, 2)),
    "JSON": b'{"v": 1, "type": "end"}',
    "pickle": b"\x80\x04N.",
    "two maps": msgpack.packb(GOOD_ACK) * 2,
    "a byte more": msgpack.packb(GOOD_ACK) + b"\x00",
    "integer keys": msgpack.packb({**GOOD_ACK, 1: 2}),
    "bytes keys": msgpack.packb({**GOOD_ACK, b"k": 2}),
    "nil key": b"\x81\xc0\x01",
    "list as key": b"\x81\x90\x01",
    "a key twice": b"\x85" + msgpack.packb(GOOD_ACK)[1:] + b"\xa1v\x01",
    "a nested key twice": b"\x85" + msgpack.packb(GOOD_ACK)[1:] + b"\xa1x\x82\xa1a\x01\xa1a\x01",
    "invalid UTF-8": b"\x81\xa1\xff\x01",
    "surrogate in UTF-8": b"\x81\xa3\xed\xa0\x80\x01",
    "map length of 4 GiB": b"\xdf\xff\xff\xff\xff",
    "list length of 4 GiB": b"\x81\xa1v\xdd\xff\xff\xff\xff",
    "text length of 4 GiB": b"\x81\xa1v\xdb\xff\xff\xff\xff",
    "bytes length of 4 GiB": b"\x81\xa1v\xc6\xff\xff\xff\xff",
    "ext length of 4 GiB": b"\x81\xa1v\xc9\xff\xff\xff\xff\x05",
    "nested lists": b"\x81\xa1v" + b"\x91" * 4000 + b"\xc0",
    "nested maps": b"\x81\xa1v" * 1300 + b"\xc0",
    "bomb of empty lists": b"\x81\xa1v\xdc\x0f\xf0" + b"\x90" * 4080,
    "too long": msgpack.packb({**GOOD_ACK, "pad": "a" * 4096}),
    "a mebibyte of empty lists": b"\x81\xa1v\xdd\x00\x10\x00\x00" + b"\x90" * 2**20,
}


@pytest.mark.parametrize("case", BAD_HEADERS)
@pytest.mark.parametrize("decoder", [protocol.decode_feed, protocol.decode_control])
def test_a_bad_header_is_refused(case: str, decoder: Decoder) -> None:
    with pytest.raises(ProtocolError) as caught:
        decoder([BAD_HEADERS[case]])
    assert len(str(caught.value)) <= protocol.MAX_ERROR_CHARACTERS


# ---- messages made from values -----------------------------------------------------------------


def test_numpy_values_become_plain_ones() -> None:
    final = FinalProposal(
        "cam1", np.int64(1), np.int32(9), np.uint8(2), "x", np.float32(0.5), np.float64(1.5),
        np.float16(0.25), np.int64(31), 20, np.int64(3), "b", np.int64(7), np.int64(6),
    )  # fmt: skip
    values = [getattr(final, field.name) for field in dataclasses.fields(final)]
    assert {type(value) for value in values} == {int, float, str}
    assert protocol.decode_publication(protocol.encode(final)) == final


@pytest.mark.parametrize(
    ("features", "code"),
    [
        (np.zeros((2, 3)), "wrong_dtype"),
        (np.zeros((2, 3), np.float16), "wrong_dtype"),
        ([[0.0]], "wrong_dtype"),
        (None, "wrong_dtype"),
        (np.zeros(3, np.float32), "bad_message"),
        (np.zeros((0, 3), np.float32), "bad_message"),
        (np.zeros((2, 0), np.float32), "bad_message"),
        (np.zeros((1, 2, 3), np.float32), "bad_message"),
    ],
)
def test_a_chunk_takes_float32_of_n_by_dim_alone(features: Any, code: str) -> None:
    with pytest.raises(ProtocolError, match="stream 'cam1', snippet 7: expected") as caught:
        Chunk("cam1", 7, features)
    assert caught.value.code == code


def test_features_of_any_memory_layout_are_sent_in_c_order() -> None:
    features = np.arange(6, dtype=np.float32).reshape(2, 3)
    for same_values in (np.asfortranarray(features), features[::-1][::-1]):
        assert protocol.encode(Chunk("a", 0, same_values))[1] == struct.pack("<6f", *range(6))


@pytest.mark.parametrize("value", [10**400, -(10**400), "\ud800", object(), [[]] * 1000])
def test_any_value_is_refused_with_a_short_message(value: object) -> None:
    with pytest.raises(ProtocolError) as caught:
        FinalProposal("a", 1, 0, 0, "x", value, 1.0, 1.0, 0, 1.0, None, "b")  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200
    for label in (value, "a\ud800"):
        with pytest.raises(ProtocolError):
            FinalProposal("a", 1, 0, 0, label, 0.0, 1.0, 1.0, 0, 1.0, None, "b")  # type: ignore[arg-type]
