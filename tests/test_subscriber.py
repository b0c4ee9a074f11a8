"""The subscriber over real sockets: filters, gaps, and knowing that one is subscribed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zmq
from serving import ANY_PORT, PATIENCE_S, TinyPipeline, serving

from hrpro.clients import (
    ActionEvent,
    EventSubscriber,
    FeatureFeeder,
    FinalProposal,
    NoReplyError,
    ProtocolError,
    StreamNotice,
)
from hrpro.engine import protocol
from hrpro.engine.protocol import Publication, Subscribed
from hrpro.engine.server import Server

# One snippet each; TinyPipeline calls what is above 0 "high", with an event before the proposal.
HIGH, LOW = [1.0, 1.0], [-1.0, -1.0]


pytestmark = pytest.mark.usefixtures("nothing_left_open")


def subscribed(server: Server, **options: Any) -> EventSubscriber:
    subscriber = EventSubscriber(server.events_address, **options)
    subscriber.wait_connected(PATIENCE_S)
    return subscriber


def feed(server: Server, stream: str, *snippets: list[float]) -> None:
    with FeatureFeeder(server.feed_address, stream, 2, timeout_s=PATIENCE_S) as feeder:
        feeder.send(np.array(snippets, np.float32))
        feeder.end()


def publications(subscriber: EventSubscriber, count: int) -> list[Publication]:
    received = [subscriber.receive(PATIENCE_S) for _ in range(count)]
    assert None not in received
    return [each for each in received if each is not None]


def short(publication: Publication) -> tuple[str, ...]:
    if isinstance(publication, StreamNotice):
        return (publication.stream, publication.kind)
    return (publication.stream, publication.TYPE, publication.label)


def test_a_whole_stream() -> None:
    with serving() as server, subscribed(server) as subscriber:
        assert subscriber.instance == server.instance
        feed(server, "cam", HIGH, LOW)
        common = {"stream": "cam", "session": 1}
        assert publications(subscriber, 5) == [
            StreamNotice(
                sequence=0, kind="opened", first_index=0, next_index=0, proposals=0, events=0,
                **common,
            ),
            ActionEvent(
                sequence=1, id=0, kind="end", revision=0, label="high", start_s=0.0, end_s=0.64,
                score=1.0, published_index=0, published_s=0.64, bundle_id="tiny",
                **common,
            ),
            FinalProposal(
                sequence=2, id=0, label="high", start_s=0.0, end_s=0.64, score=1.0,
                published_index=0, published_s=0.64, action_id=None,
                bundle_id="tiny", **common,
            ),
            FinalProposal(
                sequence=3, id=1, label="low", start_s=0.64, end_s=1.28, score=-1.0,
                published_index=1, published_s=1.28, action_id=None,
                bundle_id="tiny", **common,
            ),
            StreamNotice(
                sequence=4, kind="ended", first_index=0, next_index=2, proposals=2, events=1,
                **common,
            ),
        ]  # fmt: skip
        assert (subscriber.gaps, subscriber.repeats) == (0, 0)
        assert subscriber.receive(timeout_s=0.0) is None


EVERYTHING = [
    ("cam1", "opened"),
    ("cam1", "event", "high"),
    ("cam1", "final", "high"),
    ("cam1", "final", "low"),
    ("cam1", "ended"),
    ("cam10", "opened"),
    ("cam10", "event", "high"),
    ("cam10", "final", "high"),
    ("cam10", "ended"),
]


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ({"stream": "cam1"}, [0, 1, 2, 3, 4]),  # and not cam10
        ({"stream": "cam"}, []),  # no prefix
        ({"label": "high"}, [0, 1, 2, 4, 5, 6, 7, 8]),
        ({"label": "hi"}, [0, 4, 5, 8]),
        ({"stream": "cam1", "label": "low"}, [0, 3, 4]),
        ({"final_only": True}, [2, 3, 7]),
        ({"final_only": True, "label": "low"}, [3]),
        ({"kinds": ["event", "final"], "stream": "cam10"}, [6, 7]),
        ({"kinds": ["stream"]}, [0, 4, 5, 8]),
    ],
)
def test_filters(options: dict[str, Any], places: list[int]) -> None:
    with serving() as server, subscribed(server, **options) as subscriber:
        with subscribed(server, kinds=["stream"]) as last:
            feed(server, "cam1", HIGH, LOW)
            feed(server, "cam10", HIGH)
            publications(last, 4)  # so everything is published
        received = [short(each) for each in publications(subscriber, len(places))]
        assert received == [EVERYTHING[place] for place in places]
        assert (subscriber.gaps, subscriber.repeats) == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": []}, "kinds: expected some of"),
        ({"kinds": ["finals"]}, "kinds: expected some of"),
        ({"stream": "a/b"}, "stream: expected a text that matches"),
        ({"label": "a/b"}, "label: expected a label"),
        ({"min_score": 7}, r"min_score: expected a score in \[0, 1\], came 7"),
        ({"min_score": -0.5}, r"min_score: expected a score in \[0, 1\], came -0.5"),
    ],
)
def test_filters_that_nothing_can_pass_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EventSubscriber("tcp://127.0.0.1:1", **options)


def test_iteration() -> None:
    with serving() as server, subscribed(server, final_only=True) as subscriber:
        feed(server, "cam", HIGH, HIGH, LOW)
        ids = []
        for publication in subscriber:
            assert isinstance(publication, FinalProposal)
            ids.append(publication.id)
            if len(ids) == 3:
                break
        assert ids == [0, 1, 2]


def test_without_an_engine_the_subscription_is_not_confirmed() -> None:
    with EventSubscriber("tcp://127.0.0.1:1") as subscriber:
        with pytest.raises(NoReplyError, match=r"expected the engine's confirmation within 0"):
            subscriber.wait_connected(timeout_s=0.05)
        assert subscriber.receive(timeout_s=0.05) is None
        assert subscriber.instance is None


def test_a_restarted_engine_is_another_instance_and_no_gap() -> None:
    with serving() as first:
        address = first.events_address
        subscriber = subscribed(first)
        feed(first, "cam", HIGH, HIGH, HIGH)
        publications(subscriber, 8)
    with serving(events=address) as second, subscriber:
        while subscriber.instance != second.instance:
            assert subscriber.receive(timeout_s=0.05) is None
        feed(second, "cam", HIGH)
        assert [each.sequence for each in publications(subscriber, 4)] == [0, 1, 2, 3]
        assert (subscriber.gaps, subscriber.repeats) == (0, 0)


def test_a_subscriber_that_does_not_read_holds_nobody_up() -> None:
    with serving() as server, subscribed(server) as asleep, subscribed(server) as awake:
        feed(server, "cam", *[LOW] * 2000)
        received = publications(awake, 2002)
        assert [each.sequence for each in received] == list(range(2002))
        assert publications(asleep, 2002) == received


# ---- against a publisher that sends what the test wants ----------------------------------------


class RawPublisher:
    """An XPUB that confirms one subscriber and then publishes what it is told."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.XPUB)
        self.socket.bind(ANY_PORT)
        self.address = self.socket.get_string(zmq.LAST_ENDPOINT)

    def __enter__(self) -> RawPublisher:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def confirm(self, instance: str = "0" * 16) -> None:
        while True:
            assert self.socket.poll(PATIENCE_S * 1000)
            topic = self.socket.recv()[1:]
            if topic.startswith(b"welcome/"):
                token = topic.split(b"/")[1].decode()
                self.socket.send_multipart(protocol.encode(Subscribed(token, instance)))
                return

    def publish(self, *places: tuple[int, int], stream: str = "cam") -> None:
        for session, sequence in places:
            message = StreamNotice(stream, session, sequence, "opened", 0, 0, 0, 0)
            self.socket.send_multipart(protocol.encode(message))


@pytest.mark.parametrize(
    ("places", "gaps", "repeats"),
    [
        ([(1, 0), (1, 1), (1, 2)], 0, 0),
        ([(1, 7), (1, 8)], 0, 0),  # a late joiner has missed nothing that it asked for
        ([(1, 0), (1, 2)], 1, 0),
        ([(1, 0), (1, 5), (1, 9)], 7, 0),
        ([(1, 0), (1, 1), (1, 1)], 0, 1),
        ([(1, 3), (1, 1), (1, 2)], 0, 1),  # goes on from what came again
        ([(1, 0), (1, 1), (2, 0), (2, 1)], 0, 0),
        ([(1, 0), (2, 3)], 3, 0),  # the new session has lost its first three
        ([(2, 0), (1, 5), (1, 6)], 0, 1),
    ],
)
def test_gaps_and_repeats(places: list[tuple[int, int]], gaps: int, repeats: int) -> None:
    with RawPublisher() as publisher, EventSubscriber(publisher.address) as subscriber:
        publisher.confirm()
        subscriber.wait_connected(PATIENCE_S)
        publisher.publish(*places)
        received = publications(subscriber, len(places))
        assert [(each.session, each.sequence) for each in received] == places
        assert (subscriber.gaps, subscriber.repeats) == (gaps, repeats)


def test_gaps_are_counted_for_each_stream() -> None:
    with RawPublisher() as publisher, EventSubscriber(publisher.address) as subscriber:
        publisher.confirm()
        subscriber.wait_connected(PATIENCE_S)
        for stream in ("a", "b"):
            publisher.publish((1, 0), (1, 2), stream=stream)
        publisher.publish((1, 3), stream="a")
        publications(subscriber, 5)
        assert (subscriber.gaps, subscriber.repeats) == (2, 0)


def test_what_comes_before_the_confirmation_is_not_lost() -> None:
    with RawPublisher() as publisher, EventSubscriber(publisher.address) as subscriber:
        assert publisher.socket.poll(PATIENCE_S * 1000)
        while not publisher.socket.recv().startswith(b"\x01stream/"):
            pass
        publisher.publish((1, 0), (1, 1))
        publisher.confirm()
        subscriber.wait_connected(PATIENCE_S)
        publisher.publish((1, 2))
        assert [each.sequence for each in publications(subscriber, 3)] == [0, 1, 2]
        assert (subscriber.gaps, subscriber.repeats) == (0, 0)


@pytest.mark.parametrize(
    "frames",
    [
        [b"stream/cam/"],
        [b"stream/cam/", b"\xc1"],
        [b"stream/cam/", *protocol.encode(StreamNotice("other", 1, 0, "opened", 0, 0, 0, 0))[1:]],
        [b"event/cam/x/", *protocol.encode(Subscribed("t", "0" * 16))[1:]],
    ],
)
def test_an_engine_that_publishes_nonsense_is_an_error(frames: list[bytes]) -> None:
    with RawPublisher() as publisher, EventSubscriber(publisher.address) as subscriber:
        publisher.confirm()
        subscriber.wait_connected(PATIENCE_S)
        publisher.socket.send_multipart(frames)
        with pytest.raises(ProtocolError):
            subscriber.receive(PATIENCE_S)
        publisher.publish((1, 0))
        assert [each.sequence for each in publications(subscriber, 1)] == [0]


@pytest.mark.parametrize(
    "subscription",
    [
        b"",
        b"\x01",
        b"\x05x",
        b"\x00welcome/a/",
        b"\x01welcome/",
        b"\x01welcome/a",
        b"\x01welcome/a/b/",
        b"\x01welcome/\xff/",
        b"\x01welcome/" + b"a" * 65 + b"/",
    ],
)
def test_strange_subscriptions_are_ignored(subscription: bytes) -> None:
    with (
        serving(TinyPipeline()) as server,
        zmq.Context() as context,
        context.socket(zmq.XSUB) as strange,
        subscribed(server) as subscriber,
    ):
        strange.linger = 0
        strange.connect(server.events_address)
        strange.send(subscription)
        strange.send(b"\x01welcome/after/")
        assert strange.poll(PATIENCE_S * 1000)
        assert strange.recv_multipart()[0] == b"welcome/after/"
        feed(server, "cam", LOW)
        assert len(publications(subscriber, 3)) == 3
