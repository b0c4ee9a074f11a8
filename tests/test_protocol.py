"""Messages <-> bytes: the bytes of docs/PROTOCOL.md, round trips, topics."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DECODERS, NOTICE, SAMPLES, decode, hexdump, same

from hrpro.engine import protocol
from hrpro.engine.messages import EventKind
from hrpro.engine.protocol import (
    Ack,
    ActionEvent,
    Chunk,
    DeployReply,
    DeployRequest,
    End,
    Ended,
    Error,
    FinalProposal,
    Hello,
    Mark,
    Message,
    Page,
    ProtocolError,
    RollBackRequest,
    StatusReply,
    StreamNotice,
    Subscribed,
    Welcome,
)

DOCUMENT = Path(__file__).parent.parent / "docs" / "PROTOCOL.md"

# ---- the bytes of the document -----------------------------------------------------------------


def frames_of(dump: str) -> list[bytes]:
    frames: list[bytes] = []
    for line in dump.splitlines():
        if line.startswith("frame "):
            frames.append(b"")
        else:
            frames[-1] += bytes.fromhex(line.split("|")[0])
    return frames


def documented() -> dict[str, str]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return dict(re.findall(r"^```hexdump (\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def test_every_message_is_documented_and_sampled() -> None:
    every = {kind.TYPE for kind in Message.__subclasses__()}
    assert every == set(SAMPLES) == set(documented()) == {kind.TYPE for kind in DECODERS}
    assert all(name == message.TYPE for name, message in SAMPLES.items())


@pytest.mark.parametrize("name", SAMPLES)
def test_encoding_gives_the_documented_bytes(name: str) -> None:
    assert hexdump(protocol.encode(SAMPLES[name])) == documented()[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_message_of_known_values_is_the_same(name: str) -> None:
    message = SAMPLES[name]
    known = type(message).known(*vars(message).values())
    assert same(known, message) and protocol.encode(known) == protocol.encode(message)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_documented_bytes_decode(name: str) -> None:
    assert same(decode(SAMPLES[name], frames_of(documented()[name])), SAMPLES[name])


def test_every_error_code_is_documented() -> None:
    section = DOCUMENT.read_text(encoding="utf-8").split("## 7. Errors")[1].split("## 8.")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE)
    assert dict(rows) == dict(protocol.ERROR_CODES)


# ---- round trips -------------------------------------------------------------------------------

stream_ids = st.from_regex(r"[A-Za-z0-9._:-]{1,64}", fullmatch=True)
labels = st.text(
    st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/"), min_size=1, max_size=64
)
indices = st.integers(0, 2**53)
sizes = st.integers(1, 2**31 - 1)
numbers = st.floats(allow_nan=False, allow_infinity=False)
positive_numbers = st.floats(min_value=1e-300, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)
instances = st.from_regex(r"[0-9a-f]{16}", fullmatch=True)
plain_maps = st.dictionaries(texts, st.booleans() | st.integers(-(2**63), 2**64 - 1) | texts)
chunks = st.builds(
    lambda stream, first, n, dim, seed: Chunk(
        stream, first, np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    ),
    stream_ids, st.integers(0, 2**53 - 9), st.integers(1, 9), st.integers(1, 9), sizes,
)  # fmt: skip
notices = st.builds(
    StreamNotice, stream_ids, indices, indices, st.sampled_from(["opened", "ended"]),
    indices, indices, indices, indices, st.none() | indices, st.none() | indices,
)  # fmt: skip
messages = st.one_of(
    chunks,
    st.builds(Hello, stream_ids, sizes, positive_numbers, sizes, indices),
    st.builds(End, stream_ids, indices),
    st.builds(
        Welcome, stream_ids, indices, indices, sizes, sizes, positive_numbers, sizes,
        st.lists(labels, max_size=5).map(tuple), sizes, sizes, indices, indices, numbers, texts,
    ),
    st.builds(Ack, stream_ids, indices, indices),
    st.builds(Ended, stream_ids, indices, indices, indices),
    st.builds(
        Error, st.none() | stream_ids, st.from_regex(r"[a-z_]{1,64}", fullmatch=True), texts,
        st.none() | indices,
    ),
    st.builds(
        ActionEvent, stream_ids, indices, indices, indices,
        st.sampled_from(get_args(EventKind)), indices, labels, numbers,
        st.none() | numbers, numbers, indices, numbers, texts,
    ),
    st.builds(
        FinalProposal, stream_ids, indices, indices, indices, labels, numbers, numbers, numbers,
        indices, numbers, st.none() | indices, texts,
    ),
    notices,
    st.builds(Subscribed, stream_ids, instances, st.none() | indices),
    st.builds(Mark, instances, st.none() | indices),
    st.builds(
        Page, stream_ids, st.none() | indices, st.none() | stream_ids, indices, indices, indices,
        st.lists(notices, max_size=2).map(tuple),
    ),
    st.builds(
        StatusReply, instances, texts, st.none() | texts, st.none() | texts,
        st.sampled_from(["serving", "draining"]), st.lists(plain_maps, max_size=3).map(tuple),
        plain_maps,
    ),
    st.builds(DeployRequest, texts, st.lists(stream_ids, max_size=3).map(tuple)),
    st.just(RollBackRequest()),
    st.builds(DeployReply, texts, st.none() | texts, st.none() | texts, indices),
)  # fmt: skip


@given(messages)
def test_round_trip(message: Message) -> None:
    frames = protocol.encode(message)
    assert same(decode(message, frames), message)
    assert protocol.encode(decode(message, frames)) == frames


@given(messages, st.data())
@settings(max_examples=200)
def test_a_changed_byte_is_refused_or_still_a_valid_message(
    message: Message, data: st.DataObject
) -> None:
    frames = protocol.encode(message)
    number = data.draw(st.integers(0, len(frames) - 1))
    place = data.draw(st.integers(0, len(frames[number]) - 1))
    changed = bytearray(frames[number])
    changed[place] ^= data.draw(st.integers(1, 255))
    frames[number] = bytes(changed)
    try:
        decoded = decode(message, frames)
    except ProtocolError:
        return
    assert decode(decoded, protocol.encode(decoded)) is not None


# ---- topics ------------------------------------------------------------------------------------


def test_topics() -> None:
    assert protocol.encode(SAMPLES["event"])[0] == b"event/cam1/Long Jump/"
    assert protocol.encode(SAMPLES["final"])[0] == b"final/cam1/Long Jump/"
    assert protocol.encode(SAMPLES["stream"])[0] == b"stream/cam1/"
    assert protocol.encode(SAMPLES["mark"])[0] == b"mark/"
    assert protocol.encode(SAMPLES["page"])[0] == b"replay/5a6b7c8d/40010/cam1/"
    assert protocol.replay_topic("t", 0) == b"replay/t/0/*/"
    assert protocol.open_topic("t") == b"open/t/*/"
    assert protocol.open_topic("t", "cam1") == b"open/t/cam1/"


def test_a_page_without_a_number_to_begin_at_is_one_of_open_actions() -> None:
    page = Page("t", None, None, 7, 1, 7, (NOTICE,))
    frames = protocol.encode(page)
    assert frames[0] == b"open/t/*/"
    assert decode(page, frames) == page
