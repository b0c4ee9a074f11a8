"""What one message field and one msgpack header may hold, and the errors of the whole project.

    HrproError                  everything that HR-Pro Stream raises on purpose
    +-- ProtocolError           (here) bytes or a field break the protocol (also a ValueError)
    +-- StreamError             (here) the engine refuses what a stream's feeder asked for
    +-- NoReplyError            (here) the peer did not answer in time (also a TimeoutError)
    +-- KeyFileError            engine.client_key        a key file or a folder of keys
    +-- SettingsError           engine.settings          a setting or its file (also a ValueError)
    +-- DataError               training.data            a data set (also a ValueError)
    +-- TrainingError           training.instance_stage  training cannot go on
    +-- RunError                training.run             no finished run (also a ValueError)
    +-- BundleError             export.bundle            no usable bundle (also a ValueError)
    +-- ExportError             export.tracing           the export computes something else
    +-- WeightsError            export.i3d               other weights (also a ValueError)
    +-- ProviderError           engine.backends.onnxruntime   no GPU where one was asked for
    +-- LogError                engine.event_reader      the event log cannot be used
    +-- DeployError             engine.deployment        a bundle that cannot take over
    +-- ReplayError             clients.subscriber       the engine cannot send events again
    +-- RecordingError          clients.recording        no recording (also a ValueError)
    +-- FeatureFileError        clients.feeding          no feature array (also a ValueError)
    +-- ExtractorError          clients.cameras.manifest no feature extractor (also a ValueError)
    +-- EngineFailedError       clients.engine_process   an engine process that died

`ProtocolError` and `StreamError` carry a `code`, one of `ERROR_CODES`: what is sent to the peer
in an Error message. No I/O happens here, and nothing is trusted before it is checked.
"""

from __future__ import annotations

import math
import re
import reprlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import msgpack

VERSION = 1

# Indices stay exact in an IEEE double, so that any client language can hold them.
MAX_INDEX = 2**53
# Where a stream may begin at most: no stream that begins here lives to see MAX_INDEX.
MAX_FIRST_INDEX = 2**40
MAX_COUNT = 2**31 - 1
MAX_LIST = 65_536
# Room for what lists claim to hold, one in another, grows with the square of a header's length. Up
# to here, as headers usually are, it is not worth a look.
_SHORT_HEADER_BYTES = 256

ERROR_CODES: Mapping[str, str] = {
    "bad_message": "the frames or fields break the protocol",
    "version": "the message is of another protocol version",
    "wrong_dtype": "the features are not float32",
    "wrong_dimension": "the features do not have the engine's feature dimension",
    "wrong_clock": "the stream's frame rate or snippet length is not the engine's",
    "not_finite": "a feature is NaN or infinite",
    "out_of_order": "a gap or the end is not where the engine is, or the stream has ended",
    "too_large": "a chunk has more snippets or bytes than allowed",
    "too_many_streams": "the engine takes no further stream",
    "no_credit": "a snippet at or above send_until was sent",
    "unknown_stream": "no Hello came for this stream, or it has ended",
    "not_owner": "a later Hello has given the stream to another connection",
    "draining": "the engine is finishing and takes nothing new",
    "not_permitted": "the key is not one for this",
    "too_fast": "more Hellos or requests came than the limits allow; try again after a while",
    "deploy_refused": "the bundle cannot work here, or there is none to go back to",
}
# What is refused now and may be tried again after a while.
LATER_CODES = frozenset({"too_fast"})
# Those that only say that feeder and engine have lost sight of each other.
RECOVERABLE_CODES = frozenset({"unknown_stream", "out_of_order", "no_credit"})


class HrproError(Exception):
    """The root of all errors that HR-Pro Stream raises on purpose."""


class ProtocolError(HrproError, ValueError):
    """Bytes or a field break the protocol."""

    def __init__(self, message: str, code: str = "bad_message") -> None:
        super().__init__(message)
        self.code = code


class StreamError(HrproError):
    """The engine refuses what a stream's feeder asked for.

    `next_index` is the snippet that the engine expects next, where it knows.
    """

    def __init__(self, code: str, message: str, next_index: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.next_index = next_index


class NoReplyError(HrproError, TimeoutError):
    """The peer did not answer in time."""


# A check returns the value in its one normal form, or raises _Unfit with what it expected.
Check = Callable[[Any], Any]


class _Unfit(Exception):
    """Says what a check expected; `checked` turns it into a ProtocolError with the place."""


def checked(where: str, check: Check, value: object) -> Any:
    """The value in its normal form; raises ProtocolError naming the place, `where`."""
    try:
        return check(value)
    except _Unfit as unfit:
        raise ProtocolError(f"{where}: expected {unfit}, came {shown(value)}") from None


def check_fields(values: dict[str, Any], checks: Iterable[tuple[str, str, Check]]) -> None:
    """Bring values into their normal form, in place; of each its name, its place and its check.

    Raises ProtocolError naming the place.
    """
    for name, where, check in checks:
        try:
            values[name] = check(values[name])
        except _Unfit as unfit:
            raise ProtocolError(f"{where}: expected {unfit}, came {shown(values[name])}") from None


def shown(value: object) -> str:
    """A bounded text of any value, for messages: peers may send anything."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def integer(lowest: int, highest: int) -> Check:
    """An integer within the bounds; a bool is none."""

    def check(value: object) -> int:
        if type(value) is int and lowest <= value <= highest:  # all but all that come
            return value
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or not lowest <= int(value) <= highest:  # type: ignore[call-overload]
            raise _Unfit(f"an integer of {lowest}..{highest}")
        return int(value)  # type: ignore[call-overload]

    return check


def flag(value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise _Unfit("true or false")
    return value


def number(value: object) -> float:
    """A finite number. An integer passes: several msgpack libraries write 25.0 as 25."""
    if type(value) is float and math.isfinite(value):  # all but all that come
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _Unfit("a finite number")
    try:
        as_float = float(value)
    except OverflowError:
        as_float = math.inf
    if not math.isfinite(as_float):
        raise _Unfit("a finite number")
    return as_float


def positive_number(value: object) -> float:
    """A finite number above 0."""
    as_float = number(value)
    if as_float <= 0.0:
        raise _Unfit("a finite number above 0")
    return as_float


def text(longest: int) -> Check:
    """1..longest characters that can be written as UTF-8 (no lone surrogates)."""

    def check(value: object) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= longest:
            raise _Unfit(f"a text of 1..{longest} characters")
        if any(unicodedata.category(character) == "Cs" for character in value):
            raise _Unfit("a text without lone surrogates")
        return str(value)

    return check


def matching(pattern: str) -> Check:
    """A text that matches the regular expression as a whole."""
    compiled = re.compile(pattern)

    def check(value: object) -> str:
        if type(value) is str and compiled.fullmatch(value):  # all but all that come
            return value
        if not isinstance(value, str) or not compiled.fullmatch(value):
            raise _Unfit(f"a text that matches {pattern}")
        return str(value)

    return check


def label(value: object) -> str:
    """A class name: it is a part of topics, so it has no slash and no control characters."""
    if (
        not isinstance(value, str)
        or not 1 <= len(value) <= 64
        or any(c == "/" or unicodedata.category(c) in ("Cc", "Cs") for c in value)
    ):
        raise _Unfit("a label of 1..64 characters without '/' and control characters")
    return str(value)


def one_of(*choices: str) -> Check:
    """One of the given texts."""

    def check(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise _Unfit(f"one of {', '.join(choices)}")
        return str(value)

    return check


def optional(inner: Check) -> Check:
    """None (nil on the wire) or what `inner` takes."""

    def check(value: object) -> Any:
        return None if value is None else inner(value)

    return check


def listing(inner: Check) -> Check:
    """A list or tuple of what `inner` takes; becomes a tuple."""

    def check(value: object) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or len(value) > MAX_LIST:
            raise _Unfit(f"a list of at most {MAX_LIST} entries")
        return tuple([inner(entry) for entry in value])  # quicker than a generator

    return check


def plain_map(value: object) -> dict[str, int | str | bool]:
    """A flat map from text to integers, texts and bools."""
    if not isinstance(value, dict) or not all(
        isinstance(key, str) and isinstance(entry, (int, str, bool)) for key, entry in value.items()
    ):
        raise _Unfit("a map from text to integers, texts and bools")
    return dict(value)


stream_id = matching(r"[A-Za-z0-9._:-]{1,64}")
index = integer(0, MAX_INDEX)
count = integer(0, MAX_INDEX)
size = integer(1, MAX_COUNT)


def pack_header(header: Mapping[str, object]) -> bytes:
    """The header's msgpack bytes: fields in the given order, floats as 64 bits."""
    packed: bytes = msgpack.packb(header, use_bin_type=True)
    return packed


def unpack_header(frame: bytes, longest_bytes: int) -> dict[str, Any]:
    """The header map of a frame, its keys known to be distinct texts.

    Nothing is unpacked from a frame of more than `longest_bytes`, nor from one whose lists and maps
    are not there in full: what is unpacked is bounded by what was received. Raises ProtocolError.
    """
    if len(frame) > longest_bytes:
        raise ProtocolError(
            f"header: expected at most {longest_bytes} bytes, came {len(frame)}", "too_large"
        )
    try:
        if len(frame) > _SHORT_HEADER_BYTES:
            _pass_over(frame)
        header = msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_map_of_distinct_texts,
            max_str_len=longest_bytes,
            max_bin_len=longest_bytes,
            max_ext_len=longest_bytes,
            # An entry has a byte at least.
            max_array_len=min(MAX_LIST, len(frame)),
            max_map_len=1024,
        )
    except (ValueError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise ProtocolError(f"header: expected one msgpack map, came {reason[:200]}") from None
    if not isinstance(header, dict):
        raise ProtocolError(f"header: expected one msgpack map, came {shown(header)}")
    return header


def unsigned(frame: bytes, at: int) -> tuple[int, int] | None:
    """The unsigned msgpack integer that stands there, and where it ends; None where none does."""
    if at >= len(frame):
        return None
    first = frame[at]
    if first < 0x80:
        return first, at + 1
    size = 1 << first - 0xCC if 0xCC <= first <= 0xCF else 0
    end = at + 1 + size
    return (int.from_bytes(frame[at + 1 : end], "big"), end) if size and end <= len(frame) else None


def _pass_over(frame: bytes) -> None:
    """Raises as unpacking does where something is missing, without making room for it first."""
    unpacker = msgpack.Unpacker(max_buffer_size=len(frame))
    unpacker.feed(frame)
    unpacker.skip()


def _map_of_distinct_texts(pairs: list[tuple[object, object]]) -> dict[str, object]:
    entries: dict[str, object] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ValueError(f"the key {shown(key)}, which is no text")
        if key in entries:
            raise ValueError(f"the key {shown(key)} twice")
        entries[key] = value
    return entries
