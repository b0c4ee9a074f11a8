"""Messages <-> frames, without I/O: what docs/PROTOCOL.md specifies, shared with the clients.

`encode` gives the frames to send; each `decode_...` takes the frames that came on one kind of
socket and lets only those messages pass that belong there:

    feed      feeder -> engine   Hello  Chunk  Gap  End
              engine -> feeder   Welcome  Ack  Ended  Error
    events    engine -> all      ActionEvent  FinalProposal  StreamNotice  Mark  SnippetScores
              engine -> one      Subscribed  Page
    control   client -> engine   StatusRequest  DrainRequest  DeployRequest  RollBackRequest
              engine -> client   StatusReply  DrainReply  DeployReply  Error
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar

import msgpack
import numpy as np
from numpy.typing import NDArray

from hrpro.engine import wire
from hrpro.engine.messages import (
    MAX_ERROR_CHARACTERS,
    Ack,
    ActionEvent,
    Chunk,
    DeployReply,
    DeployRequest,
    DrainReply,
    DrainRequest,
    End,
    Ended,
    Error,
    FinalProposal,
    Gap,
    Hello,
    Mark,
    Message,
    Page,
    Policy,
    Publication,
    RollBackRequest,
    SnippetScores,
    StatusReply,
    StatusRequest,
    StreamNotice,
    Subscribed,
    Welcome,
)
from hrpro.engine.wire import (
    ERROR_CODES,
    LATER_CODES,
    RECOVERABLE_CODES,
    VERSION,
    HrproError,
    NoReplyError,
    ProtocolError,
    StreamError,
)

__all__ = [
    "ERROR_CODES",
    "LATER_CODES",
    "MAX_ERROR_CHARACTERS",
    "MAX_REQUEST_HEADER_BYTES",
    "RECOVERABLE_CODES",
    "VERSION",
    "Ack",
    "ActionEvent",
    "Chunk",
    "ControlReply",
    "ControlRequest",
    "DeployReply",
    "DeployRequest",
    "DrainReply",
    "DrainRequest",
    "End",
    "Ended",
    "Error",
    "FinalProposal",
    "Gap",
    "Hello",
    "HrproError",
    "Mark",
    "Message",
    "NoReplyError",
    "Page",
    "Policy",
    "ProtocolError",
    "Publication",
    "RollBackRequest",
    "SnippetScores",
    "StatusReply",
    "StatusRequest",
    "StreamError",
    "StreamNotice",
    "Subscribed",
    "Welcome",
    "decode_control",
    "decode_control_reply",
    "decode_feed",
    "decode_feed_reply",
    "decode_logged",
    "decode_publication",
    "encode",
    "max_frame_bytes",
    "open_topic",
    "replay_topic",
    "topic_prefix",
]

# What the engine reads from strangers is tiny; what it writes may list classes or streams.
MAX_REQUEST_HEADER_BYTES = 4096
MAX_REPLY_HEADER_BYTES = 4 * 2**20

ControlRequest = StatusRequest | DrainRequest | DeployRequest | RollBackRequest
ControlReply = StatusReply | DrainReply | DeployReply | Error

M = TypeVar("M", bound=Message)

_FEED: tuple[type[Hello | Chunk | Gap | End], ...] = (Hello, Chunk, Gap, End)
_FEED_REPLY: tuple[type[Welcome | Ack | Ended | Error], ...] = (Welcome, Ack, Ended, Error)
_PUBLICATIONS: tuple[type[Publication], ...] = (ActionEvent, FinalProposal, StreamNotice)
_EVENTS: tuple[type[Publication | Subscribed | Mark | Page | SnippetScores], ...] = (
    *_PUBLICATIONS,
    Subscribed,
    Mark,
    Page,
    SnippetScores,
)
_CONTROL: tuple[type[ControlRequest], ...] = (
    StatusRequest,
    DrainRequest,
    DeployRequest,
    RollBackRequest,
)
_CONTROL_REPLY: tuple[type[ControlReply], ...] = (StatusReply, DrainReply, DeployReply, Error)


_SHAPE = wire.listing(wire.size)
_LITTLE_ENDIAN = np.dtype("<f4")
# Almost all that comes are chunks, and those of a stream have headers that differ in the index
# alone: so many headers are remembered, of those that are no longer than that.
_HEADERS_REMEMBERED = 16_384
_LONGEST_REMEMBERED_BYTES = 256
_FIRST_INDEX = msgpack.packb("first_index")
# What of a message are frames of their own.
_IN_FRAMES = {"features", "curves", "publications"}
# Messages whose second frame is an array, and its name.
_ARRAYS: dict[type[Message], str] = {Chunk: "features", SnippetScores: "curves"}
# The fields in the header of each kind of message, and whether a peer has to give them.
_FIELDS = {
    kind.TYPE: tuple(
        (each.name, each.default is MISSING) for each in fields(kind) if each.name not in _IN_FRAMES
    )
    for kind in {*_FEED, *_FEED_REPLY, *_EVENTS, *_CONTROL, *_CONTROL_REPLY}
}


def encode(message: Message, **given: object) -> list[bytes]:
    """The frames of a message; what is published begins with its topic.

    Fields that are ``given`` take the place of the message's own, and are not checked.
    """
    header: dict[str, object] = {"v": VERSION, "type": message.TYPE, **vars(message), **given}
    behind: list[bytes] = []
    if (array_name := _ARRAYS.get(type(message))) is not None:
        array: NDArray[np.float32] = header.pop(array_name)  # type: ignore[assignment]
        header |= {"dtype": "float32", "shape": array.shape}
        behind = [array.astype("<f4", copy=False).tobytes()]
    elif isinstance(message, Page):
        del header["publications"]
        behind = [encode(publication)[1] for publication in message.publications]
    topic = _topic(message) if type(message) in _EVENTS else None
    frames = [wire.pack_header(header)] if topic is None else [topic, wire.pack_header(header)]
    return frames + behind


def _topic(message: Message) -> bytes | None:
    match message:
        case ActionEvent() | FinalProposal():
            return topic_prefix(message.TYPE, message.stream, message.label)
        case StreamNotice() | SnippetScores():
            return topic_prefix(message.TYPE, message.stream)
        case Subscribed():
            return topic_prefix("welcome", message.token)
        case Mark():
            return topic_prefix("mark")
        case Page(since=None):
            return open_topic(message.token, message.stream)
        case Page(since=int(since)):
            return replay_topic(message.token, since, message.stream)
        case _:
            return None


def topic_prefix(*parts: str) -> bytes:
    """The topic of these parts, with its trailing slash: nothing else begins like it.

    >>> topic_prefix("final", "cam1")
    b'final/cam1/'
    """
    return "".join(f"{part}/" for part in parts).encode()


def replay_topic(token: str, since: int, stream: str | None = None) -> bytes:
    """A subscription to it asks for a Page of what follows a number, of one stream or of all.

    >>> replay_topic("1f2e", 1841, "cam1")
    b'replay/1f2e/1841/cam1/'
    """
    return topic_prefix("replay", token, str(since), stream or "*")


def open_topic(token: str, stream: str | None = None) -> bytes:
    """A subscription to it asks for a Page of the actions that are open."""
    return topic_prefix("open", token, stream or "*")


def decode_feed(frames: Sequence[bytes]) -> Hello | Chunk | Gap | End:
    """What came from a feeder. Raises ProtocolError, as the other decoders do."""
    chunk = _like_another(*frames) if len(frames) == 2 else None
    return chunk or _decode(frames, _FEED, MAX_REQUEST_HEADER_BYTES)


def _like_another(header: bytes, array: bytes) -> Chunk | None:
    """A chunk whose header is that of another one, but for the index; None for one that has to be
    looked at in full."""
    key = header.find(_FIRST_INDEX)
    if key < 0 or len(header) > _LONGEST_REMEMBERED_BYTES:
        return None
    at = key + len(_FIRST_INDEX)
    if (found := wire.unsigned(header, at)) is None:
        return None
    index, end = found
    if (fields := _of_chunks(header[:at], header[end:])) is None:
        return None
    stream, shape = fields
    if len(array) != 4 * shape[0] * shape[1] or index + shape[0] > wire.MAX_INDEX:
        return None
    return Chunk.known(stream, index, _as_array(shape, array))


@functools.lru_cache(_HEADERS_REMEMBERED)
def _of_chunks(before: bytes, behind: bytes) -> tuple[str, tuple[int, int]] | None:
    """Stream and shape of the chunks whose headers have these bytes around the index; None where
    those are no such headers, or what is between them is something else."""
    try:
        (kind, zero), (_, one) = (
            _header(before + bytes([index]) + behind, _FEED, MAX_REQUEST_HEADER_BYTES)
            for index in (0, 1)
        )
        if kind is not Chunk or (zero.pop("first_index"), one.pop("first_index")) != (0, 1):
            return None
        if zero != one:
            return None
        return wire.checked("stream", wire.stream_id, zero.get("stream")), _shape("chunk", zero)
    except (ProtocolError, KeyError):
        return None


def decode_feed_reply(frames: Sequence[bytes]) -> Welcome | Ack | Ended | Error:
    """What came to a feeder."""
    return _decode(frames, _FEED_REPLY, MAX_REPLY_HEADER_BYTES)


def decode_control(frames: Sequence[bytes]) -> ControlRequest:
    """What came from a control client."""
    return _decode(frames, _CONTROL, MAX_REQUEST_HEADER_BYTES)


def decode_control_reply(frames: Sequence[bytes]) -> ControlReply:
    """What came to a control client."""
    return _decode(frames, _CONTROL_REPLY, MAX_REPLY_HEADER_BYTES)


def decode_publication(
    frames: Sequence[bytes],
) -> Publication | Subscribed | Mark | Page | SnippetScores:
    """What came to a subscriber: a topic and a header that agree."""
    message = _decode(frames[1:], _EVENTS, MAX_REPLY_HEADER_BYTES)
    if frames[0] != _topic(message):
        raise ProtocolError(
            f"topic: expected {_topic(message)!r}, came {wire.shown(bytes(frames[0]))}"
        )
    return message


def decode_logged(header: bytes) -> Publication:
    """A publication out of the log, where its header is kept."""
    return _decode([header], _PUBLICATIONS, MAX_REPLY_HEADER_BYTES)


@functools.cache
def _by_type(allowed: tuple[type[M], ...]) -> dict[object, type[M]]:
    return {kind.TYPE: kind for kind in allowed}


def _decode(frames: Sequence[bytes], allowed: tuple[type[M], ...], longest_header_bytes: int) -> M:
    if not frames:
        raise ProtocolError("message: expected a header frame, came none")
    kind, header = _header(frames[0], allowed, longest_header_bytes)
    name = kind.TYPE
    body: dict[str, Any] = {}
    if kind is Page:
        body["publications"] = tuple(decode_logged(frame) for frame in frames[1:])
    elif len(frames) != (frame_count := 2 if kind in _ARRAYS else 1):
        raise ProtocolError(f"{name}: expected {frame_count} frames, came {len(frames)}")
    elif kind in _ARRAYS:
        body[_ARRAYS[kind]] = _array(name, header, frames[1])
    for field_name, is_required in _FIELDS[name]:
        if field_name in header:
            body[field_name] = header[field_name]
        elif is_required:
            raise _missing(field_name, name)
    return kind(**body)


def _header(
    frame: bytes, allowed: tuple[type[M], ...], longest_bytes: int
) -> tuple[type[M], dict[str, Any]]:
    """The kind of a message, which is allowed, and its header."""
    header = wire.unpack_header(frame, longest_bytes)
    # `True == 1`, and a version of another type would not be ours either way.
    if type(header.get("v")) is not int or header["v"] != VERSION:
        raise ProtocolError(
            f"version: expected {VERSION}, came {wire.shown(header.get('v'))}", "version"
        )
    kinds, name = _by_type(allowed), header.get("type")
    if not isinstance(name, str) or name not in kinds:
        expected = ", ".join(kind.TYPE for kind in allowed)
        raise ProtocolError(f"type: expected one of {expected}, came {wire.shown(name)}")
    return kinds[name], header


def _missing(field_name: str, message_name: str) -> ProtocolError:
    return ProtocolError(f"{message_name}: expected a field {field_name!r}, came none")


def _array(name: str, header: dict[str, Any], frame: bytes) -> NDArray[np.float32]:
    """The (n, D) values of a message's second frame, looked at only once its length fits."""
    shape = _shape(name, header)
    expected_bytes = shape[0] * shape[1] * 4
    if len(frame) != expected_bytes:
        raise ProtocolError(
            f"{name}: expected {expected_bytes} bytes for the shape {shape}, came {len(frame)}"
        )
    return _as_array(shape, frame)


def _as_array(shape: tuple[int, int], frame: bytes) -> NDArray[np.float32]:
    return np.ndarray(shape, _LITTLE_ENDIAN, frame).astype(np.float32, copy=False)


def _shape(name: str, header: dict[str, Any]) -> tuple[int, int]:
    """Of a message's second frame, whose type fits."""
    for each in ("dtype", "shape"):
        if each not in header:
            raise _missing(each, name)
    dtype = header["dtype"]
    if dtype != "float32":
        raise ProtocolError(
            f"{name}.dtype: expected 'float32', came {wire.shown(dtype)}", "wrong_dtype"
        )
    shape = wire.checked(f"{name}.shape", _SHAPE, header["shape"])
    if len(shape) != 2:
        raise ProtocolError(f"{name}.shape: expected [n, D], came {wire.shown(shape)}")
    return shape[0], shape[1]


def max_frame_bytes(max_chunk_snippets: int, feature_dim: int) -> int:
    """The largest frame an engine reads: twice its largest chunk.

    A chunk that is a little too large thus gets an Error; beyond it the connection is cut.
    """
    return max(2 * max_chunk_snippets * feature_dim * 4, MAX_REQUEST_HEADER_BYTES)
