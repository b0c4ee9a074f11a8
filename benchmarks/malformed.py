"""Messages that an engine has to refuse, of all kinds, for benchmarks/hostile.py.

What can be wrong is derived from the messages that the protocol's decoders let pass and from the
checks of their fields, so that new ones are malformed, too. Each kind is a function from a random
generator, a target and a valid message's class to frames; none of them gives a message that the
engine would take.
"""

from __future__ import annotations

import functools
import math
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, get_args, get_type_hints

import msgpack
import numpy as np

from hrpro.engine import protocol
from hrpro.engine.protocol import (
    MAX_REQUEST_HEADER_BYTES,
    VERSION,
    Chunk,
    End,
    Gap,
    Hello,
    Message,
    ProtocolError,
)
from hrpro.engine.timebase import SnippetClock
from hrpro.engine.wire import MAX_COUNT, MAX_INDEX, checked

Frames = list[bytes]
Random = random.Random


@dataclass(frozen=True)
class Target:
    """What a hostile peer knows: of the engine, of a stream that it has opened itself, and of the
    good streams more than it should."""

    feature_dim: int
    clock: SnippetClock
    max_frame_bytes: int
    own_stream: str
    good_streams: tuple[str, ...]
    good_identities: tuple[bytes, ...]

    @property
    def hello(self) -> Hello:
        """Opens its own stream."""
        frames_per_s, frames = self.clock.frames_per_s, self.clock.snippet_frames
        return Hello(self.own_stream, self.feature_dim, frames_per_s, frames, 0)

    def chunk(self, stream: str, first_index: int = 0, value: float = 0.0) -> Chunk:
        """Two snippets."""
        features = np.full((2, self.feature_dim), value, dtype=np.float32)
        return Chunk(stream, first_index, features)


Malformed = Callable[[Random, Target, type[Message]], Frames]
NO_STREAM = "nobody-has-opened-this-one"

FEED_KINDS: tuple[type[Message], ...] = get_args(get_type_hints(protocol.decode_feed)["return"])
CONTROL_KINDS: tuple[type[Message], ...] = get_args(
    get_type_hints(protocol.decode_control)["return"]
)

# ---- valid messages ------------------------------------------------------------------------------

_GOOD_VALUES = (NO_STREAM, 1.5, False, (), {}, "0123456789abcdef", None)
_BAD_VALUES = (
    None, True, -1, -(2**63), 2**64 - 1, MAX_INDEX + 1, MAX_COUNT + 1, 0.5, math.nan, math.inf,
    -math.inf, "", "a/b", "a" * 2000, "\x00", b"\xff", [], [[]], [None], [-1], {}, {"a": {}},
    msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 2),
)  # fmt: skip


def _fits(field: Field[Any], value: object) -> bool:
    try:
        checked(field.name, field.metadata["check"], value)
    except ProtocolError:
        return False
    return True


@functools.cache
def _fields(kind: type[Message]) -> dict[str, Field[Any]]:
    """Those of the header."""
    return {each.name: each for each in fields(kind) if each.name != "features"}


@functools.cache
def _header(kind: type[Message]) -> Mapping[str, object]:
    """Of a valid message; integers ascend from field to field."""
    entries: dict[str, object] = {"v": VERSION, "type": kind.TYPE}
    for number, (name, field) in enumerate(_fields(kind).items()):
        values = (number, *_GOOD_VALUES) if field.default is MISSING else [field.default]
        entries[name] = next(value for value in values if _fits(field, value))
    return {**entries, "dtype": "float32", "shape": [2, 3]} if kind is Chunk else entries


@functools.cache
def _unfit(field: Field[Any]) -> list[object]:
    return [each for each in _BAD_VALUES if not _fits(field, each)]


def _framed(kind: type[Message], entries: Mapping[str, object]) -> Frames:
    frames = [msgpack.packb(entries)]
    return [*frames, struct.pack("<6f", *range(6))] if kind is Chunk else frames


# ---- of any kind of message, on feed and control -------------------------------------------------


def truncated(r: Random, _: Target, kind: type[Message]) -> Frames:
    """A frame ends too early."""
    frames = _framed(kind, _header(kind))
    at = r.randrange(len(frames))
    frames[at] = frames[at][: r.randrange(len(frames[at]))]
    return frames


def other_frames(r: Random, _: Target, kind: type[Message]) -> Frames:
    """Too few frames, or too many."""
    frames = _framed(kind, _header(kind))
    more = [[*frames, b""], [*frames, *frames], [b"x", *frames], [*frames, *[b"x"] * 100]]
    return r.choice([[b""], frames[1:] or [b""], *more])


def garbage(r: Random, *_: object) -> Frames:
    """Bytes."""
    return [r.randbytes(r.randrange(200)) for _ in range(r.randrange(1, 5))]


def nested(r: Random, *_: object) -> Frames:
    """Lists and maps in one another, or ones that claim to hold more than is there."""
    part = r.choice([b"\x91", b"\x90", b"\x80", b"\x81\xa1v", b"\xdc\x0f\xff", b"\xde\x04\x00"])
    head = r.choice([b"", b"\x81\xa1v", b"\x81\xa1v\xdd\x00\x00\x0f\xf0"])
    return [head + part * ((MAX_REQUEST_HEADER_BYTES - len(head)) // len(part))]


def negative(r: Random, _: Target, kind: type[Message]) -> Frames:
    """A negative number, an index or a size most often."""
    name = r.choice([*_fields(kind)] or ["v"])
    return _framed(kind, {**_header(kind), name: -r.randint(1, 2**63)})


def other_value(r: Random, _: Target, kind: type[Message]) -> Frames:
    """A value that a field cannot have, NaN and infinity among them."""
    if not _fields(kind):
        return _framed(kind, {**_header(kind), "v": None})
    field = r.choice([*_fields(kind).values()])
    return _framed(kind, {**_header(kind), field.name: r.choice(_unfit(field))})


def missing_field(r: Random, _: Target, kind: type[Message]) -> Frames:
    """A field is not there."""
    optional = {each.name for each in fields(kind) if each.default is not MISSING}
    missing = r.choice([each for each in _header(kind) if each not in optional])
    return _framed(kind, {n: value for n, value in _header(kind).items() if n != missing})


def other_version(r: Random, _: Target, kind: type[Message]) -> Frames:
    """A version that is none, or a later one."""
    version = r.choice([0, 2, 255, 2**63, -1, None, True, 1.0, "1", [1]])
    return _framed(kind, {**_header(kind), "v": version})


def other_type(r: Random, _: Target, kind: type[Message]) -> Frames:
    """A type that is none, or does not belong here."""
    here = FEED_KINDS if kind in FEED_KINDS else CONTROL_KINDS
    elsewhere = [each.TYPE for each in Message.__subclasses__() if each not in here]
    name = r.choice([*elsewhere, "helo", "", None, 1, ["hello"], b"hello"])
    return _framed(kind, {**_header(kind), "type": name})


# ---- on the feed alone ---------------------------------------------------------------------------


def long_header(r: Random, target: Target, kind: type[Message]) -> Frames:
    """Longer than headers may be, but no larger than frames may be."""
    pad = "a" * r.randint(MAX_REQUEST_HEADER_BYTES, target.max_frame_bytes - 1000)
    return _framed(kind, {**_header(kind), "pad": pad})


def other_dtype(r: Random, *_: object) -> Frames:
    """Features that are not float32."""
    dtype = r.choice(["float64", "float16", "int8", "O", ">f4", "", "float32 ", None, 4])
    return _framed(Chunk, {**_header(Chunk), "dtype": dtype})


def other_shape(r: Random, *_: object) -> Frames:
    """A shape that is huge, negative, or not that of the bytes."""
    huge = [[MAX_COUNT, MAX_COUNT], [MAX_COUNT, 1], [2**32, 2**32], [2**63, 2**63], [1] * 1000]
    other = [[-2, -3], [-1, 6], [0, 3], [6], [1, 2, 3], [2.0, 3.0], [], None, "23", [2, 4], [1, 3]]
    return _framed(Chunk, {**_header(Chunk), "shape": r.choice(huge + other)})


def not_finite(r: Random, target: Target, _: type[Message]) -> Frames:
    """NaN or infinity among the features, else in order."""
    value = r.choice([math.nan, math.inf, -math.inf])
    return protocol.encode(target.chunk(target.own_stream, 0, value))


def out_of_place(r: Random, target: Target, _: type[Message]) -> Frames:
    """In order, but for a stream that is not open, beyond the credit, or elsewhere in it."""
    return protocol.encode(
        r.choice(
            [
                target.chunk(NO_STREAM),
                target.chunk(target.own_stream, 2**40),
                target.chunk(target.own_stream, MAX_INDEX - 2),
                Gap(target.own_stream, 5, MAX_INDEX),
                End(target.own_stream, 5),
            ]
        )
    )


def of_another(r: Random, target: Target, _: type[Message]) -> Frames:
    """For a stream that another client feeds; or with that client's identity before it."""
    stream = r.choice(target.good_streams)
    message = r.choice([target.chunk(stream, r.randrange(1000)), Gap(stream, 0, 9), End(stream, 5)])
    envelope = r.choice([[], [r.choice(target.good_identities)]])
    return envelope + protocol.encode(message)


def changed_bytes(r: Random, *_: object) -> Frames:
    """A valid message for a stream that nobody has opened, with some other bytes."""
    kind = r.choice([Chunk, Gap, End])
    frames = [bytearray(each) for each in _framed(kind, _header(kind))]
    for _ in range(r.randint(1, 4)):
        frames[0][r.randrange(len(frames[0]))] = r.randrange(256)
    return [bytes(each) for each in frames]


ANYWHERE: tuple[Malformed, ...] = (
    truncated, other_frames, garbage, nested, negative, other_value, missing_field, other_version,
    other_type,
)  # fmt: skip
ON_FEED: tuple[Malformed, ...] = (
    *ANYWHERE, long_header, other_dtype, other_shape, not_finite, out_of_place, of_another,
    changed_bytes,
)  # fmt: skip


def on_feed(r: Random, target: Target) -> Frames:
    """Of some kind, for the feed."""
    return r.choice(ON_FEED)(r, target, r.choice(FEED_KINDS))


def on_control(r: Random, target: Target) -> Frames:
    """Of some kind, for control."""
    return r.choice(ANYWHERE)(r, target, r.choice(CONTROL_KINDS))


def on_events(r: Random, *_: object) -> Frames:
    """What is no subscription, or one to nothing. There are few topics: ZeroMQ keeps them."""
    kinds = [b"", b"\x00x", b"\x02x", b"\xff" * r.randrange(2000), b"\x01", b"\x01welcome/"]
    asked = [b"welcome/a b/", b"replay/a/-1/*/", b"replay/a/%d/*/" % 2**64, b"open/a/b/c/"]
    topic = r.choice([*asked, b"final/%d/" % r.randrange(100)])
    frame = r.choice([*kinds, b"\x01" + topic])
    return r.choice([[frame], [frame, b"x"], [frame] * 10])
