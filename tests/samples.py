"""One message of every type, its decoder, and its bytes as docs/PROTOCOL.md shows them.

`python tests/samples.py` prints the blocks of bytes for the document.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

from hrpro.engine import protocol
from hrpro.engine.protocol import (
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
    RollBackRequest,
    SnippetScores,
    StatusReply,
    StatusRequest,
    StreamNotice,
    Subscribed,
    Welcome,
)

Decoder = Callable[[list[bytes]], Message]

FEATURES = np.array([[0.0, 1.0, -2.5], [0.25, 3.0, 1e-3]], np.float32)
CURVES = np.array([[0.75, 0.5, 0.0], [1.0, 0.875, 0.125]], np.float32)
NOTICE = StreamNotice("cam1", 1, 69, "ended", 0, 1843, 17, 51, 40_013, 40_012)
SAMPLES: dict[str, Message] = {
    "hello": Hello("cam1", 2048, 25.0, 16, 0),
    "chunk": Chunk("cam1", 1841, FEATURES),
    "gap": Gap("cam1", 1843, 1850, dropped=True),
    "end": End("cam1", 1843),
    "welcome": Welcome(
        stream="cam1",
        next_index=0,
        send_until=64,
        max_chunk_snippets=16,
        feature_dim=2048,
        frames_per_s=25.0,
        snippet_frames=16,
        classes=("Long Jump", "Tränen"),
        window_snippets=128,
        hop_snippets=16,
        context_snippets=32,
        lookahead_snippets=8,
        lookahead_s=5.12,
        bundle_id="thumos-1f3a",
        needed_from=0,
    ),
    "ack": Ack("cam1", 1843, 1907, needed_from=1795),
    "ended": Ended("cam1", 1843, 17, 51),
    "error": Error(
        "cam1", "wrong_dimension", "snippet 1841: expected shape (_, 2048), got (16, 1024)", 1841
    ),
    "event": ActionEvent(
        "cam1",
        1,
        7,
        3,
        "start",
        0,
        "Long Jump",
        10.24,
        None,
        0.75,
        24,
        16.0,
        "thumos-1f3a",
        40_007,
        39_998,
    ),
    "final": FinalProposal(
        "cam1",
        1,
        9,
        2,
        "Long Jump",
        10.24,
        14.72,
        0.875,
        31,
        20.48,
        3,
        "thumos-1f3a",
        40_012,
        40_009,
    ),
    "stream": NOTICE,
    "scores": SnippetScores(
        "cam1", 1, 1841, 25.0, 16, ("Long Jump", "Pole Vault"), "thumos-1f3a", CURVES
    ),
    "subscribed": Subscribed("1f2e3d4c", "00112233aabbccdd", 40_012),
    "mark": Mark("00112233aabbccdd", 40_012),
    "page": Page("5a6b7c8d", 40_010, "cam1", 40_013, 17_001, 40_013, (NOTICE,)),
    "status": StatusRequest(),
    "status_reply": StatusReply(
        "00112233aabbccdd",
        "thumos-1f3a",
        "thumos-0c2b",
        None,
        "serving",
        ({"stream": "cam1", "session": 1, "next_index": 1843, "fed_by": True},),
        {"snippets_in": 1843, "proposals": 17},
        None,
        "cpu",
    ),
    "deploy": DeployRequest("/bundles/thumos-1f3a", ("cam1",)),
    "roll_back": RollBackRequest(),
    "deploy_reply": DeployReply("thumos-0c2b", None, "thumos-1f3a", 1),
    "drain": DrainRequest(),
    "drain_reply": DrainReply(),
}
DECODERS: dict[type[Message], Decoder] = {
    Hello: protocol.decode_feed,
    Chunk: protocol.decode_feed,
    Gap: protocol.decode_feed,
    End: protocol.decode_feed,
    Welcome: protocol.decode_feed_reply,
    Ack: protocol.decode_feed_reply,
    Ended: protocol.decode_feed_reply,
    Error: protocol.decode_feed_reply,
    ActionEvent: protocol.decode_publication,
    FinalProposal: protocol.decode_publication,
    StreamNotice: protocol.decode_publication,
    Subscribed: protocol.decode_publication,
    Mark: protocol.decode_publication,
    Page: protocol.decode_publication,
    SnippetScores: protocol.decode_publication,
    StatusRequest: protocol.decode_control,
    DrainRequest: protocol.decode_control,
    DeployRequest: protocol.decode_control,
    RollBackRequest: protocol.decode_control,
    DeployReply: protocol.decode_control_reply,
    StatusReply: protocol.decode_control_reply,
    DrainReply: protocol.decode_control_reply,
}


def decode(message: Message, frames: list[bytes]) -> Message:
    return DECODERS[type(message)](frames)


def same(left: Message, right: Message) -> bool:
    if isinstance(left, Chunk) and isinstance(right, Chunk):
        place = (left.stream, left.first_index) == (right.stream, right.first_index)
        return place and np.array_equal(left.features, right.features, equal_nan=True)
    if isinstance(left, SnippetScores) and isinstance(right, SnippetScores):
        place = (left.stream, left.first_index) == (right.stream, right.first_index)
        return place and np.array_equal(left.curves, right.curves, equal_nan=True)
    return left == right


def hexdump(frames: list[bytes]) -> str:
    """As docs/PROTOCOL.md shows frames."""
    lines = []
    for number, frame in enumerate(frames):
        lines.append(f"frame {number}, {len(frame)} bytes")
        for start in range(0, len(frame), 16):
            part = frame[start : start + 16]
            text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
            lines.append(f"  {part.hex(' '):47}  |{text}|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for sample_name, sample in SAMPLES.items():
        sys.stdout.write(f"```hexdump {sample_name}\n{hexdump(protocol.encode(sample))}```\n\n")
