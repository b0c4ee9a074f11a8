"""Gaps, silence and drops as feeders and subscribers see them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from serving import (
    PATIENCE_S,
    RawPeer,
    TinyPipeline,
    chunk,
    hear_until,
    hello,
    new_server,
    rows,
    serving,
)

from hrpro.clients import EventSubscriber, FeatureFeeder, StreamError
from hrpro.clients.chaos_link import Link
from hrpro.clients.feed_talk import FeedTalk
from hrpro.clients.kept_snippets import KeptSnippets
from hrpro.engine import protocol
from hrpro.engine.config import WindowConfig
from hrpro.engine.feeds import Counters, Feeds
from hrpro.engine.protocol import (
    Ack,
    End,
    Ended,
    Error,
    Gap,
    Hello,
    Message,
    Publication,
    StreamNotice,
    Welcome,
)
from hrpro.engine.server import MESSAGES_PER_TURN

WINDOW = 4
WELCOME = Welcome(
    stream="cam",
    next_index=0,
    send_until=64,
    max_chunk_snippets=8,
    feature_dim=2,
    frames_per_s=25.0,
    snippet_frames=16,
    classes=("high", "low"),
    window_snippets=WINDOW,
    hop_snippets=1,
    context_snippets=3,
    lookahead_snippets=0,
    lookahead_s=0.0,
    bundle_id="tiny",
)


pytestmark = pytest.mark.usefixtures("nothing_left_open")


class Engine:
    """Feeds and a pipeline with a clock that stands still, and what "cam"'s feeder is told."""

    def __init__(self, **config: Any) -> None:
        self.now_s = 1000.0
        self.pipeline = TinyPipeline(**config)
        self.counters = Counters()
        self.told: list[Message] = []
        self.reachable = True
        self.notices: list[StreamNotice] = []
        self.feeds = Feeds(self.pipeline, self.counters, self._send, lambda: self.now_s)
        self.say(hello())

    def _send(self, identity: bytes, message: Message) -> bool:
        self.told.append(message)
        return self.reachable

    def say(self, *messages: Message) -> list[Message]:
        """What the feeder is told in a turn with these messages."""
        self.told.clear()
        for message in messages:
            self.feeds.handle(b"cam", message)  # type: ignore[arg-type]
        while self.pipeline.pending():
            for publication in self.pipeline.step():
                if isinstance(publication, StreamNotice):
                    self.notices.append(publication)
                    if publication.kind == "ended":
                        self.feeds.on_ended(publication)
        self.feeds.admit_waiting()
        self.feeds.tend(self.now_s)
        self.feeds.acknowledge()
        return list(self.told)

    def seen(self) -> list[tuple[str, int, int]]:
        return [(each.kind, each.first_index, each.next_index) for each in self.notices]


# ---- missing snippets --------------------------------------------------------------------------


def test_what_is_missing_is_told_and_waited_for() -> None:
    engine = Engine(gap_wait_s=5.0)
    assert engine.say(chunk(0, 4), chunk(6, 8)) == [Ack("cam", 4, 20, 6, 0)]
    engine.now_s += 4.9
    assert engine.say() == []
    assert engine.say(chunk(4, 6)) == [Ack("cam", 8, 24, None, 0)]
    engine.now_s += 10
    assert engine.say() == [] and engine.counters.gaps == 0
    assert sorted(engine.pipeline.received["cam"]) == [(at, at + 1.0) for at in range(8)]


def test_what_is_missing_for_too_long_is_a_gap() -> None:
    engine = Engine(gap_wait_s=5.0)
    engine.say(chunk(0, 4), chunk(6, 8), chunk(11, 13))
    engine.now_s += 5
    engine.say()
    assert engine.say() == [Ack("cam", 8, 24, 11, 0)]  # 8 to 10 are waited for from now on
    engine.now_s += 4.9
    assert engine.say() == []
    engine.now_s += 0.1
    engine.say()
    assert engine.say() == [Ack("cam", 13, 29, None, 0)]
    assert engine.seen() == [("opened", 0, 0), ("gap", 4, 6), ("gap", 8, 11)]
    assert engine.say(chunk(4, 6)) == [Ack("cam", 13, 29, None, 0)]  # too late
    assert engine.counters.snippets_duplicate == 2


def test_a_gap_that_is_known_is_one_at_once() -> None:
    engine = Engine()
    assert engine.say(chunk(0, 4), Gap("cam", 4, 7)) == [Ack("cam", 7, 23, None, 0)]
    assert engine.say(chunk(7, 8)) == [Ack("cam", 8, 24, None, 0)]
    assert engine.seen() == [("opened", 0, 0), ("gap", 4, 7)]
    assert engine.say(Gap("cam", 4, 7)) == [Ack("cam", 8, 24, None, 0)]  # said again


def test_a_gap_behind_what_is_missing_is_refused() -> None:
    (error,) = Engine().say(chunk(0, 4), Gap("cam", 5, 7))[:1]
    assert isinstance(error, Error) and (error.code, error.next_index) == ("out_of_order", 4)
    assert error.message == (
        "stream 'cam': expected snippet 4 or a gap from there, came a gap from 5"
    )


def test_a_gap_longer_than_a_window_begins_another_session() -> None:
    engine = Engine()
    engine.say(chunk(0, 4))
    engine.say(Gap("cam", 4, 4 + WINDOW))
    assert engine.seen() == [("opened", 0, 0)]  # as long as a window is a gap, told at its end
    told = engine.say(Gap("cam", 4 + WINDOW, 5 + WINDOW))  # all of it is what counts
    assert isinstance(told[0], Welcome) and told[0].next_index == 5 + WINDOW
    engine.say()
    assert engine.seen() == [("opened", 0, 0), ("gap", 4, 8), ("ended", 0, 8), ("opened", 9, 9)]
    assert [each.session for each in engine.notices] == [1, 1, 1, 2]


@pytest.mark.parametrize("by", ["gap", "hello"])
def test_a_session_that_a_gap_ends_is_over_when_that_is_published(by: str) -> None:
    engine = Engine()
    engine.say(chunk(0, 4))
    engine.told.clear()
    far = 4 + 2 * WINDOW
    ends = Gap("cam", 4, far) if by == "gap" else hello(first_index=far)
    engine.feeds.handle(b"cam", ends)  # type: ignore[arg-type]
    published = [each for each in drained(engine.pipeline) if isinstance(each, StreamNotice)]
    assert [(each.session, each.kind) for each in published] == [(1, "ended")]
    # It is not published, as on a full disk.
    for _ in range(3):
        engine.feeds.admit_waiting()
        engine.feeds.tend(engine.now_s)
        engine.feeds.acknowledge()
    assert engine.told == [] and engine.pipeline.streams == {}
    engine.feeds.on_ended(published[0])
    (welcome,) = engine.say()
    assert isinstance(welcome, Welcome) and welcome.next_index == far
    assert engine.say(hello(first_index=far + 9 * WINDOW))[-1:] != []
    assert engine.pipeline.streams.keys() == engine.feeds.live.keys() == {"cam"}


def drained(pipeline: TinyPipeline) -> list[Publication]:
    published: list[Publication] = []
    while pipeline.pending():
        published += pipeline.step()
    return published


def test_what_is_known_to_be_missing_only_now_is_waited_for() -> None:
    # The engine stood still: what came by `now_s` is handled, and that is long ago.
    engine = Engine(gap_wait_s=5.0)
    engine.say(chunk(1, 2))
    began_s = engine.now_s
    engine.now_s += 6
    for first in (0, 4):
        engine.feeds.handle(b"cam", chunk(first, first + 1))  # type: ignore[arg-type]
    engine.feeds.tend(began_s)
    engine.now_s += 4
    engine.say()
    assert engine.seen() == [("opened", 0, 0)]
    engine.now_s += 2
    engine.say()
    assert engine.pipeline.streams["cam"].next_index == 5


def test_a_hello_behind_the_stream_is_a_gap() -> None:
    engine = Engine()
    engine.say(chunk(0, 4))
    told = engine.say(hello(first_index=6))
    assert isinstance(told[0], Welcome) and told[0].next_index == 6
    assert engine.say(chunk(6, 7)) == [Ack("cam", 7, 23, None, 0)]
    assert engine.seen() == [("opened", 0, 0), ("gap", 4, 6)]


# ---- silence -----------------------------------------------------------------------------------


def test_a_silent_stream_is_idle_until_something_comes() -> None:
    engine = Engine(idle_s=10.0)
    engine.say(chunk(0, 4))
    engine.now_s += 9.9
    engine.say()
    assert engine.seen() == [("opened", 0, 0)]
    engine.now_s += 1.1  # it is looked once a second
    engine.say()
    engine.say()
    assert engine.seen() == [("opened", 0, 0), ("idle", 0, 4)]
    assert engine.pipeline.streams["cam"].idle
    engine.say(chunk(0, 4))  # nothing new
    assert engine.pipeline.streams["cam"].idle
    assert engine.say(chunk(4, 6)) == [Ack("cam", 6, 22, None, 0)]
    assert engine.seen()[2:] == [("resumed", 0, 4)]
    assert engine.say(End("cam", 6)) == [Ended("cam", 6, 6, 6)]


def test_silence_over_sockets() -> None:
    pipeline = TinyPipeline(idle_s=0.2)
    with (
        serving(pipeline) as server,
        EventSubscriber(server.events_address) as subscriber,
        RawPeer(server.feed_address) as peer,
    ):
        subscriber.wait_connected()
        peer.ask(hello())
        peer.say(chunk(0, 4))
        heard = []
        while heard[-1:] != ["idle"]:
            message = subscriber.receive(timeout_s=PATIENCE_S)
            assert message is not None
            heard.append(message.kind if isinstance(message, StreamNotice) else "")
        assert heard[0] == "opened"


def test_what_waits_in_the_socket_was_not_silent() -> None:
    # The loop stands still for longer than a stream may be silent, as on a disk that does: more
    # chunks have come then than a turn reads.
    names = [f"cam{n}" for n in range(MESSAGES_PER_TURN + 60)]
    stands_still, goes_on = threading.Event(), threading.Event()
    told: Counter[str] = Counter()

    class Still(TinyPipeline):
        def step(self) -> Iterator[Publication]:
            if stands_still.is_set():
                assert goes_on.wait(PATIENCE_S)
            for each in super().step():
                if isinstance(each, StreamNotice):
                    told[each.kind] += 1
                yield each

    pipeline = Still(idle_s=2.0, max_streams=len(names))
    with serving(pipeline) as server, RawPeer(server.feed_address) as peer:
        for name in names:
            assert isinstance(peer.ask(hello(name)), Welcome)
        stands_still.set()
        peer.say(chunk(0, 1, names[0]))
        time.sleep(2.2)
        peer.say(*(chunk(0, 1, name) for name in names[1:]))
        time.sleep(0.2)  # they have come
        stands_still.clear()
        goes_on.set()
        waiting = set(names)
        while waiting:
            ack = peer.hear()
            assert isinstance(ack, Ack) and ack.next_index == 1
            waiting.discard(ack.stream)
    assert told == {"opened": len(names)}


def test_what_cannot_be_logged_is_not_passed_over() -> None:
    pipeline = TinyPipeline()
    stream = pipeline.open("cam", 0, "drop_oldest")
    list(pipeline.step())
    pipeline.append("cam", 0, rows(0, 8))
    pipeline.append("cam", 8, rows(8, 16))
    pipeline.is_held = True  # nothing is computed
    for first in range(16, 96, 8):
        pipeline.append("cam", first, rows(first, first + 8))
    assert pipeline._announcements == []
    assert (stream.dropped, stream.processed, stream.next_index) == (80, 0, 96)
    pipeline.is_held = False
    pipeline.append("cam", 96, rows(96, 104))
    while pipeline.pending():
        list(pipeline.step())
    assert stream.processed == 104


def test_a_feeder_that_cannot_be_told_keeps_no_stream_awake() -> None:
    engine = Engine(idle_s=10.0)
    engine.reachable = False
    engine.say(chunk(0, 4))
    for _ in range(3):
        engine.now_s += 5.5
        engine.say()
    assert engine.seen()[-1] == ("idle", 0, 4)


def test_a_feeder_that_cannot_be_told_is_tried_once_a_second() -> None:
    engine = Engine()
    engine.reachable = False
    assert engine.say(chunk(0, 4)) == [Ack("cam", 4, 20)]
    assert engine.say() == engine.say() == []
    engine.now_s += 1.0
    assert engine.say() == [Ack("cam", 4, 20)]
    engine.reachable = True
    engine.now_s += 1.0
    assert engine.say() == [Ack("cam", 4, 20)]
    engine.now_s += 1.0
    assert engine.say() == []


def test_what_comes_while_a_silence_is_processed_comes_after_it() -> None:
    engine = Engine(idle_s=10.0)
    engine.say(chunk(0, 4))
    engine.now_s += 11
    engine.pipeline.paused = True
    engine.say()
    engine.say(chunk(4, 6))
    engine.pipeline.paused = False
    engine.say()
    assert engine.seen() == [("opened", 0, 0), ("idle", 0, 4), ("resumed", 0, 4)]
    assert [each.sequence for each in engine.notices] == [0, 9, 10]
    assert not engine.pipeline.streams["cam"].idle
    engine.now_s += 11
    engine.say()
    engine.say()
    assert engine.seen()[3:] == [("idle", 0, 6)]


def test_a_gap_ends_a_silence_too() -> None:
    engine = Engine(idle_s=10.0)
    engine.say(chunk(0, 4))
    engine.now_s += 11
    engine.say()
    engine.say()
    engine.say(Gap("cam", 4, 6))
    assert engine.seen()[1:] == [("idle", 0, 4), ("resumed", 0, 4)]
    engine.now_s += 11
    engine.say()
    engine.say()
    assert engine.seen()[3:] == [("gap", 4, 6), ("idle", 0, 6)]


def test_a_hello_far_behind_the_stream_begins_another_session() -> None:
    engine = Engine()
    engine.say(chunk(0, 4))
    told = engine.say(hello(first_index=50))
    assert [type(each) for each in told] == [Welcome] and told[0].next_index == 50  # type: ignore
    assert engine.say(chunk(50, 51)) == [Ack("cam", 51, 67)]


def test_a_feeder_that_loses_its_stream_to_another_is_told() -> None:
    engine = Engine()
    engine.say(chunk(0, 4))
    engine.told.clear()
    engine.feeds.handle(b"later", hello(first_index=50))
    told = engine.say()
    assert [type(each) for each in told] == [Ended, Welcome]


def test_what_is_there_of_a_session_that_a_gap_ends_is_processed() -> None:
    engine = Engine()
    engine.say(chunk(0, 4), chunk(6, 8))
    engine.say(Gap("cam", 4, 50))
    engine.say()
    assert engine.seen() == [
        ("opened", 0, 0), ("gap", 4, 6), ("ended", 0, 8), ("opened", 50, 50),
    ]  # fmt: skip
    assert engine.notices[2].proposals == 8


# ---- acknowledgements --------------------------------------------------------------------------


def test_an_ack_tells_of_snippets_and_their_scores_at_once() -> None:
    engine = Engine()
    engine.pipeline.paused = True
    assert engine.say(chunk(0, 8)) == []  # hop 4: scores can be computed
    assert engine.feeds.due_in_s() == pytest.approx(0.5)
    engine.now_s += 0.49
    assert engine.say() == []
    engine.now_s += 0.01
    assert engine.say() == [Ack("cam", 8, 16, None, 0)]  # they do not come
    assert engine.say(chunk(8, 16)) == []
    engine.pipeline.paused = False
    processed = engine.say()
    assert processed == [Ack("cam", 16, engine.pipeline.streams["cam"].send_until, None, 0)]
    assert engine.pipeline.streams["cam"].processed > 0
    engine.now_s += 0.6
    assert engine.say() == []  # nothing is told twice


# ---- drops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
def test_drops_are_told_and_counted(policy: str) -> None:
    engine = Engine()
    engine.say(hello(policy=policy))
    engine.pipeline.paused = True
    for first in range(0, 40, 8):
        told = engine.say(chunk(first, first + 8))
        engine.now_s += 0.5  # scores that do not come are waited for so long
        told = told or engine.say()
        assert isinstance(told[0], Ack) and told[0].next_index == first + 8
    # 16 of 40 find room; where the oldest give way, it moves on.
    room = 16 if policy == "drop_newest" else 40
    assert told == [Ack("cam", 40, room, None, 24)]
    counted = engine.counters
    assert (counted.snippets_dropped_newest, counted.snippets_dropped_oldest) == (
        (24, 0) if policy == "drop_newest" else (0, 24)
    )
    engine.pipeline.paused = False
    engine.say()
    engine.say(chunk(40, 41))
    span = (16, 40) if policy == "drop_newest" else (0, 24)
    assert ("gap", *span) in engine.seen()
    engine.say(Gap("cam", 41, 43, dropped=True))
    assert engine.pipeline.streams["cam"].dropped == 26


# ---- FeatureFeeder -----------------------------------------------------------------------------


def test_a_feeder_skips_what_its_source_leaves_out() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, FeatureFeeder(server.feed_address, "cam", 2) as feeder:
        feeder.send(rows(0, 4))
        feeder.skip(3)
        assert feeder.next_index == 7
        feeder.send(rows(7, 9))
        feeder.skip(1)
        assert feeder.end() == Ended("cam", 10, 10, 6)
        with pytest.raises(ValueError, match="snippets: expected at least 0, came -1"):
            feeder.skip(-1)
    assert pipeline.received["cam"] == [(at, at + 1.0) for at in (0, 1, 2, 3, 7, 8)]
    assert server.counters.gaps == 2 and server.counters.snippets_missing == 4


def test_a_feeder_goes_on_behind_a_gap_that_begins_another_session() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, FeatureFeeder(server.feed_address, "cam", 2) as feeder:
        feeder.send(rows(0, 4))
        feeder.skip(100)
        feeder.send(rows(104, 110))
        assert feeder.end().next_index == 110
    assert pipeline.sessions == {"cam": 2}
    assert [at for at, _ in pipeline.received["cam"]] == [*range(4), *range(104, 110)]


def test_the_credit_of_a_session_ends_with_it() -> None:
    class Roomy(TinyPipeline):
        room_snippets = 64

    pipeline = Roomy()
    with serving(pipeline) as server, FeatureFeeder(server.feed_address, "cam", 2) as feeder:
        for first in range(0, 200, 20):
            feeder.send(rows(first, first + 4))
            feeder.skip(16)  # more than a window, and within the credit
        assert feeder.end().next_index == 200
    expected = [at for first in range(0, 200, 20) for at in range(first, first + 4)]
    assert [at for at, _ in pipeline.received["cam"]] == expected  # each of them once
    assert pipeline.sessions == {"cam": 11}  # the last one is empty
    assert server.refused == {}


def test_a_feeder_waits_for_the_session_behind_a_gap() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, FeatureFeeder(server.feed_address, "cam", 2) as feeder:
        for first in range(0, 400, 40):
            feeder.send(rows(first, first + 4))
            feeder.skip(20)
            feeder.skip(16)  # said apart, it would find no session
        assert feeder.end().next_index == 400
        assert server.refused == {}
    assert len(pipeline.received["cam"]) == 40


def test_what_is_before_a_gap_that_ended_the_session_is_not_processed_again() -> None:
    engine = Engine()
    engine.say(chunk(0, 4))
    engine.feeds.handle(b"cam", Gap("cam", 4, 50))
    told = engine.say(hello(first_index=0))  # before the next session is there
    welcomes = [each for each in told if isinstance(each, Welcome)]
    assert [each.next_index for each in welcomes] == [50]


def test_another_feeder_of_a_session_that_has_to_begin_says_where() -> None:
    engine = Engine()
    engine.say(chunk(0, 4))
    engine.feeds.handle(b"cam", Gap("cam", 4, 50))
    engine.feeds.handle(b"later", hello(first_index=2))
    told = engine.say()
    assert [each.next_index for each in told if isinstance(each, Welcome)] == [2]


def test_nothing_comes_behind_the_end() -> None:
    engine = Engine()
    engine.say(chunk(0, 4))
    engine.pipeline.paused = True
    assert engine.say(End("cam", 4), Gap("cam", 4, 6)) == [Ack("cam", 4, 20)]
    engine.pipeline.paused = False
    assert engine.say() == [Ended("cam", 4, 4, 4)]


def test_a_drain_does_not_wait_for_what_is_missing() -> None:
    engine = Engine(gap_wait_s=5.0)
    engine.say(chunk(0, 4), chunk(6, 8))
    engine.pipeline.paused = True
    engine.feeds.drain()
    engine.now_s += 5
    engine.say()
    engine.pipeline.paused = False
    assert Ended("cam", 4, 4, 4) in engine.say()


def test_a_restarted_engine_gets_the_gaps_too() -> None:
    first, second = TinyPipeline(), TinyPipeline()
    with serving(first) as server:
        road = Link(server.feed_address)
        feeder = FeatureFeeder(road.address, "cam", 2, retry_s=0.2)
        feeder.send(rows(0, 4))
        feeder.skip(2)
        feeder.send(rows(6, 8))
        feeder.flush()
    with road, feeder, serving(second) as server:
        road.target = server.feed_address
        road.cut()
        feeder.send(rows(8, 10))
        assert feeder.end().next_index == 10
    assert [at for at, _ in second.received["cam"]] == [0, 1, 2, 3, 6, 7, 8, 9]
    assert server.counters.snippets_missing == 2


def test_what_is_lost_on_the_way_is_sent_again_when_the_engine_says_so() -> None:
    pipeline = TinyPipeline(gap_wait_s=PATIENCE_S * 10)
    with serving(pipeline) as server, FeatureFeeder(server.feed_address, "cam", 2) as feeder:
        feeder.send(rows(0, 4))
        feeder.flush()
        feeder._talk.give(rows(4, 5))
        feeder._talk.sent = 5  # as if it had been lost with a connection
        feeder.send(rows(5, 8))
        assert feeder.end() == Ended("cam", 8, 8, 8)
    assert sorted(pipeline.received["cam"]) == [(at, at + 1.0) for at in range(8)]
    assert pipeline.sessions == {"cam": 1}


def test_what_is_missing_is_sent_again_once() -> None:
    with serving() as server, FeatureFeeder(server.feed_address, "cam", 2) as feeder:
        feeder.send(rows(0, 8))
        feeder.flush()
        feeder._talk.give(rows(8, 10))
        feeder._talk.sent = 10
        for expected in (8, 10):
            feeder._talk._on_ack(Ack("cam", 8, 24, 9))
            assert feeder._talk.sent == expected
            feeder._talk.sent = 10


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
def test_a_camera_never_waits(policy: Any) -> None:
    pipeline = TinyPipeline(window=WindowConfig(window_snippets=64))
    with (
        serving(pipeline) as server,
        FeatureFeeder(server.feed_address, "cam", 2, policy=policy, buffer_snippets=10) as feeder,
    ):
        pipeline.paused = True
        for first in range(0, 40, 4):
            feeder.send(rows(first, first + 4))
        assert feeder.next_index == 40
        assert feeder.dropped == 40 - 16 - 10  # the engine has room for 16, the feeder keeps 10
        pipeline.paused = False
        server._wake()
        ended = feeder.end()
    assert ended.next_index == 40 and server.counters.snippets_missing == 14
    status = server.counters
    assert status.snippets_dropped_oldest + status.snippets_dropped_newest == 14
    kept = range(26) if policy == "drop_newest" else [*range(16), *range(30, 40)]
    assert pipeline.received["cam"] == [(at, at + 1.0) for at in kept]


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
def test_while_the_engine_is_away_a_camera_keeps_no_more_than_its_buffer(policy: Any) -> None:
    pipeline, again = TinyPipeline(), TinyPipeline()
    with serving(pipeline) as server:
        address = server.feed_address
        feeder = FeatureFeeder(
            address, "cam", 2, policy=policy, buffer_snippets=5, history_snippets=0, retry_s=0.2
        )
        feeder.connect()
        feeder.send(rows(0, 2))
        feeder.flush()
    with feeder:
        for at in range(2, 60):
            feeder.send(rows(at, at + 1))
            assert len(feeder._talk.kept) <= 16 + 5  # the credit that it had, and its buffer
            assert len(feeder._talk.kept._dropped) <= 1
        with serving(again, feed=address):
            assert feeder.end().next_index == 60
    assert len(again.received["cam"]) == 60 - 2 - feeder.dropped
    newest = again.received["cam"][-1]
    assert (newest == (59, 60.0)) == (policy == "drop_oldest")


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
def test_what_is_left_out_while_the_engine_is_away_is_one_gap_with_what_is_dropped(
    policy: Any,
) -> None:
    """A source that leaves out every second snippet must not cost memory for each."""
    pipeline = TinyPipeline(window=WindowConfig(window_snippets=512))
    with new_server(pipeline) as server:
        feeder = FeatureFeeder(server.feed_address, "cam", 2, policy=policy, buffer_snippets=5)
        for at in range(0, 200, 2):
            feeder.send(rows(at, at + 1))
            feeder.skip(1)
            assert len(feeder._talk.kept._dropped) <= 1
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            with feeder:
                assert feeder.end().next_index == 200
        finally:
            server.stop()
            thread.join(PATIENCE_S)
    kept = range(0, 10, 2) if policy == "drop_newest" else range(190, 200, 2)
    assert [at for at, _ in pipeline.received["cam"]] == list(kept)
    assert feeder.dropped == 95


def test_a_camera_that_is_there_before_its_engine_goes_on_with_what_it_has_kept() -> None:
    pipeline = TinyPipeline(window=WindowConfig(window_snippets=64))
    with new_server(pipeline) as server:
        feeder = FeatureFeeder(
            server.feed_address, "cam", 2, policy="drop_oldest", buffer_snippets=5
        )
        for at in range(20):  # its Hello, which nobody reads yet, says that it has snippet 0
            feeder.send(rows(at, at + 1))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            with feeder:
                assert feeder.end() == Ended("cam", 20, 20, 5)
        finally:
            server.stop()
            thread.join(PATIENCE_S)
    assert [at for at, _ in pipeline.received["cam"]] == [15, 16, 17, 18, 19]
    assert server.counters.snippets_dropped_oldest == feeder.dropped == 15


def test_a_buffer_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="buffer_snippets: expected at least 1, came 0"):
        FeatureFeeder("tcp://127.0.0.1:9", "cam", 2, buffer_snippets=0)


def test_one_peer_that_sends_holes_disturbs_nobody() -> None:
    pipeline = TinyPipeline(gap_wait_s=PATIENCE_S * 10)
    with (
        serving(pipeline) as server,
        RawPeer(server.feed_address) as odd,
        RawPeer(server.feed_address) as even,
    ):
        odd.ask(hello("odd"))
        even.ask(hello("even"))
        for at in range(1, 16, 2):
            odd.say(chunk(at, at + 1, "odd"))
            even.say(chunk(at - 1, at + 1, "even"))
        hear_until(even, Ack("even", 16, 32))
        even.say(End("even", 16))
        assert even.hear() == Ended("even", 16, 16, 16)
        odd.say(End("odd", 16))
        error = odd.hear()
        while isinstance(error, Ack):
            assert (error.next_index, error.missing_until) == (0, 1)
            error = odd.hear()
        assert isinstance(error, Error) and error.code == "out_of_order"


def test_what_is_skipped_before_a_welcome_comes_is_a_gap() -> None:
    """It is nothing that the feeder had, and has let go of."""
    talk = FeedTalk(Hello("cam", 2, 25.0, 16, 5), KeptSnippets(5, "wait", 64, None))
    said = talk.due()
    assert isinstance(said, Hello)
    talk.note_sent(said)
    talk.kept.skip(3)
    talk.hear(protocol.encode(replace(WELCOME, next_index=5, send_until=64)))
    assert talk.due() == Gap("cam", 5, 8)


def test_what_a_feeder_has_let_go_of_cannot_be_asked_for_again() -> None:
    talk = FeedTalk(Hello("cam", 2, 25.0, 16, 0), KeptSnippets(0, "wait", 64, 0))
    for next_index in (0, 4):
        said = talk.due()
        assert isinstance(said, Hello)
        talk.note_sent(said)
        talk.hear(protocol.encode(replace(WELCOME, next_index=next_index, send_until=64)))
        talk.give(rows(next_index, next_index + 4))
        talk.say_again()
    said = talk.due()
    assert isinstance(said, Hello)
    talk.note_sent(said)
    with pytest.raises(StreamError, match="expected a Welcome to snippet 4, the oldest one"):
        talk.hear(protocol.encode(replace(WELCOME, next_index=3, send_until=64)))
