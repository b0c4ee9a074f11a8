"""Any valid messages in any order, from any peers: each is answered, and a good stream goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import CLOCK, DIM, TinyPipeline, chunk, hello

from hrpro.engine import protocol
from hrpro.engine.feeds import Counters, Feeds
from hrpro.engine.protocol import (
    Chunk,
    End,
    Ended,
    Error,
    Gap,
    Hello,
    Message,
    Policy,
    ProtocolError,
    StreamNotice,
)
from hrpro.engine.wire import MAX_FIRST_INDEX, MAX_INDEX

MAX_STREAMS = 4
# More than it takes to process what all streams have room for.
MOST_TURNS = 40


class Engine:
    """Feeds and their pipeline without sockets; a clock that is set."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pipeline = TinyPipeline(max_streams=MAX_STREAMS, idle_s=60.0, gap_wait_s=5.0)
        self.told: list[tuple[bytes, Message]] = []
        self.counters = Counters()
        self.feeds = Feeds(self.pipeline, self.counters, self._send, lambda: self.now_s)

    def _send(self, identity: bytes, message: Message) -> bool:
        protocol.decode_feed_reply(protocol.encode(message))
        self.told.append((identity, message))
        return identity != b"gone"

    def say(self, peer: bytes, message: Message) -> None:
        """As it comes over the wire."""
        self.feeds.handle(peer, protocol.decode_feed(protocol.encode(message)))

    def turn(self) -> None:
        """As the server's."""
        if self.pipeline.pending():
            for publication in self.pipeline.step():
                protocol.decode_publication(protocol.encode(publication))
                if isinstance(publication, StreamNotice) and publication.kind == "ended":
                    self.feeds.on_ended(publication)
        self.feeds.admit_waiting()
        self.feeds.tend(self.now_s)
        self.feeds.acknowledge()
        assert len(self.pipeline.streams) <= MAX_STREAMS


# ---- what peers say ------------------------------------------------------------------------------

# A message of a stream, from a snippet on.
Build = Callable[[str, int], Message]
# (peer, stream, snippet, whether it counts from the stream's next one, message)
Said = tuple[bytes, str, int, bool, Build]


def hellos(policy: Policy) -> Build:
    return lambda stream, index: hello(stream, index, policy=policy)


def other_hellos(dim: int, rate: float) -> Build:
    return lambda stream, index: Hello(stream, dim, rate, CLOCK.snippet_frames, index)


def chunks(n: int, dim: int, value: float) -> Build:
    features = np.full((n, dim), value, dtype=np.float32)
    return lambda stream, index: Chunk(stream, index, features)


def gaps(snippets: int, dropped: bool) -> Build:
    return lambda stream, index: Gap(stream, index, min(index + snippets, MAX_INDEX), dropped)


def built(build: Build, stream: str, index: int) -> Message | None:
    """None where the index is none, or no index follows it."""
    try:
        return build(stream, index)
    except ProtocolError:
        return None


# Who feeds what, and those who should not.
usual = [(b"one", "a"), (b"one", "a"), (b"two", "b"), (b"gone", "c")]
unusual = [(b"two", "a"), (b"one", "b"), (b"one", "d"), (b"one", "good"), (b"two", "good")]
senders = st.sampled_from(usual) | st.sampled_from(usual) | st.sampled_from(unusual)
near = st.tuples(st.integers(-8, 24) | st.just(0), st.just(True))
edges = [0, 2**31, MAX_FIRST_INDEX, MAX_FIRST_INDEX + 1, MAX_INDEX - 4, MAX_INDEX]
far = st.tuples(st.sampled_from(edges), st.just(False))
builds = st.one_of(
    st.builds(hellos, st.sampled_from(get_args(Policy))),
    st.builds(chunks, st.integers(1, 9), st.just(DIM), st.sampled_from([0.5, -0.5])),
    st.builds(chunks, st.integers(1, 9), st.just(DIM), st.sampled_from([0.5, -0.5])),
    st.builds(chunks, st.just(4), st.sampled_from([DIM, 3]), st.sampled_from([np.nan, np.inf])),
    st.builds(gaps, st.integers(1, 30) | st.sampled_from([100, MAX_INDEX]), st.booleans()),
    st.just(End),
    st.builds(other_hellos, st.sampled_from([1, 3, 2**31 - 1]), st.sampled_from([25.0, 1e-300])),
)
said = st.builds(
    lambda sender, where, build: (*sender, *where, build),
    senders, near | near | near | far, builds,
)  # fmt: skip
waited_s = st.sampled_from([1.0, 6.0, 61.0])
deeds = st.lists(said | said | said | waited_s | st.just("good"), min_size=20, max_size=60)


@settings(max_examples=60, deadline=None)
@given(deeds)
def test_whatever_peers_say_a_good_stream_goes_on(done: list[Said | float | str]) -> None:
    engine = Engine()
    good = good_feeder(engine)
    for (peer, stream), policy in zip(usual[1:], get_args(Policy), strict=True):
        engine.say(peer, hello(stream, policy=policy))
    for deed in done:
        match deed:
            case "good":
                good()
            case float():
                engine.now_s += deed
                good()  # a stream that is silent for longer may lose its place
            case (peer, stream, index, counts_from_next, build):
                live = engine.pipeline.streams.get(stream)
                index += live.next_index if live is not None and counts_from_next else 0
                message = built(build, stream, index)
                # A Hello would take the stream over, as the protocol has it.
                if message is not None and not (stream == "good" and isinstance(message, Hello)):
                    engine.say(peer, message)
        engine.turn()
    sent = good()
    engine.say(b"good", End("good", sent))
    for _ in range(MOST_TURNS):
        engine.turn()
    heard = [message for identity, message in engine.told if identity == b"good"]
    assert not [each for each in heard if isinstance(each, Error)]
    (ended,) = [each for each in heard if isinstance(each, Ended)]
    assert (ended.next_index, ended.proposals) == (sent, sent)
    assert engine.pipeline.received["good"] == [(index, index + 1.0) for index in range(sent)]


def good_feeder(engine: Engine) -> Callable[[], int]:
    """Opens its stream; then sends four further snippets each time, and says how many there are.

    It lets the engine process them, as the credit of a stream asks for.
    """
    engine.say(b"good", hello("good"))
    sent = 0

    def send() -> int:
        nonlocal sent
        engine.say(b"good", chunk(sent, sent + 4, "good"))
        sent += 4
        for _ in range(MOST_TURNS):
            if engine.pipeline.streams["good"].lag:
                engine.turn()
        return sent

    return send
