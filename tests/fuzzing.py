"""What a decoder may make of any frames; shared by the tests and by the coverage-guided fuzzer.

Decoders, and the kinds of messages that each lets pass, are those of the protocol module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import get_args, get_type_hints

import numpy as np

from hrpro.engine import protocol
from hrpro.engine.feeds import error_message
from hrpro.engine.protocol import ERROR_CODES, Message, ProtocolError

Decoder = Callable[[list[bytes]], Message]

_HINTS = {
    name: get_type_hints(getattr(protocol, name))
    for name in protocol.__all__
    if name.startswith("decode_")
}
KINDS: Mapping[str, tuple[type[Message], ...]] = {
    name: get_args(hints["return"]) for name, hints in _HINTS.items()
}


def _of_frames(name: str) -> Decoder:
    """A decoder; one that takes a header alone takes the last frame."""
    decoder = getattr(protocol, name)
    if "frames" in _HINTS[name]:
        return decoder
    return lambda frames: decoder(b"".join(frames[-1:]))


DECODERS: Mapping[str, Decoder] = {name: _of_frames(name) for name in _HINTS}
# Between the frames of a message in a file of the corpus.
SEPARATOR = b"\n--\n"


def decoded(name: str, frames: list[bytes]) -> Message | None:
    """What a decoder makes of the frames; None where it refuses them, as it should.

    Fails where it raises anything but a ProtocolError that a peer can be told, and where it gives a
    message that does not belong there or does not survive being sent.
    """
    decode = DECODERS[name]
    try:
        message = decode(frames)
    except ProtocolError as error:
        refusal = error_message(error)
    else:
        assert type(message) in KINDS[name], message
        assert_valid(message)
        again = protocol.encode(message)
        assert protocol.encode(decode(again)) == again, message
        return message
    assert refusal.code in ERROR_CODES and protocol.encode(refusal), refusal
    return None


def assert_valid(message: Message) -> None:
    """What holds of the fields of every message, said once more and otherwise than in its class."""
    for name, value in vars(message).items():
        values = value if isinstance(value, tuple) else (value,)
        for each in values:
            if isinstance(each, float):
                assert math.isfinite(each), message
            elif isinstance(each, int):
                assert 0 <= each <= 2**53, message
            elif isinstance(each, str):
                assert 0 < len(each.encode()) <= 4096, message
                if name in ("label", "classes", "stream", "token", "canary_streams"):
                    assert len(each) <= 64 and "/" not in each and min(each) >= " ", message
            elif isinstance(each, Message):
                assert_valid(each)
            else:
                assert each is None or isinstance(each, dict | np.ndarray), message


def joined(frames: list[bytes]) -> bytes:
    """A message as a file of the corpus."""
    return SEPARATOR.join(frames)


def split(data: bytes) -> list[bytes]:
    """The frames of a file of the corpus."""
    return data.split(SEPARATOR)
