"""Keys on real sockets: who gets in and may do what, and what revoked and hostile peers can do."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from serving import (
    DIM,
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
from zmq.utils.monitor import recv_monitor_message

from hrpro.clients import EventSubscriber, FeatureFeeder, StreamError, request_status
from hrpro.engine import protocol
from hrpro.engine.client_key import ClientKey, Role, read_client_key
from hrpro.engine.config import LimitsConfig, LogConfig
from hrpro.engine.event_log import EventLog
from hrpro.engine.keys import Keyring, new_client, revoke
from hrpro.engine.protocol import (
    Ack,
    End,
    Ended,
    Error,
    FinalProposal,
    Publication,
    SnippetScores,
    StreamNotice,
    Subscribed,
    Welcome,
)
from hrpro.engine.server import Server

PUBLICATIONS = (b"event/", b"final/", b"stream/")


pytestmark = pytest.mark.usefixtures("nothing_left_open")


class Keys:
    """A folder of keys, and the clients' files beside it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.folder = base / "keys"
        for name, role, *streams in (
            ("cams", "producer", "cam*"),
            ("feeds_all", "producer", "*"),
            ("sees_all", "subscriber", "*"),
            ("sees_cam1", "subscriber", "cam1"),
            ("operator", "operator"),
        ):
            self.make(name, role, *streams)  # type: ignore[arg-type]

    def make(self, name: str, role: Role, *streams: str) -> ClientKey:
        new_client(self.folder, name, role, streams, self.file(name))
        return self[name]

    def file(self, name: str) -> Path:
        return self.base / f"{name}.key"

    def __getitem__(self, name: str) -> ClientKey:
        return read_client_key(self.file(name))

    def revoke(self, name: str) -> None:
        revoke(self.folder, name)

    def serving(
        self, pipeline: TinyPipeline | None = None, limits: LimitsConfig | None = None
    ) -> contextlib.AbstractContextManager[Server]:
        return serving(pipeline, keyring=Keyring(self.folder), limits=limits)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def code(answer: object) -> str:
    assert isinstance(answer, Error), answer
    return answer.code


def subscriber(server: Server, key: ClientKey, *topics: bytes, token: str = "t") -> RawPeer:
    """A SUB that has subscribed, and whose subscription is confirmed."""
    peer = RawPeer(server.events_address, key=key, kind=zmq.XSUB)
    for topic in (*topics, f"welcome/{token}/".encode()):
        peer.socket.send(b"\1" + topic)
    while not isinstance(publication(peer), Subscribed):
        pass
    return peer


def publication(peer: RawPeer) -> Publication | Subscribed:
    while isinstance(message := protocol.decode_publication(peer.hear_frames()), SnippetScores):
        pass
    return message


def feed(server: Server, key: ClientKey, *streams: str) -> None:
    """One snippet of each stream, and its end; all is published on return."""
    for stream in streams:
        with RawPeer(server.feed_address, key=key) as peer:
            assert isinstance(peer.ask(hello(stream)), Welcome)
            peer.say(chunk(0, 1, stream), End(stream, 1))
            hear_until(peer, Ended(stream, 1, 1, 1))


def until_ended(peer: RawPeer, stream: str) -> list[Publication]:
    """What comes until the end of a stream is published."""
    heard: list[Publication] = []
    while True:
        each = publication(peer)
        if isinstance(each, Subscribed):
            continue
        heard.append(each)
        if isinstance(each, StreamNotice) and (each.stream, each.kind) == (stream, "ended"):
            return heard


# ---- who gets in -------------------------------------------------------------------------------


def nothing(socket: zmq.Socket[bytes], key: ClientKey) -> None:
    pass


def plain(socket: zmq.Socket[bytes], key: ClientKey) -> None:
    socket.set(zmq.PLAIN_USERNAME, b"admin")
    socket.set(zmq.PLAIN_PASSWORD, b"admin")


def curve(socket: zmq.Socket[bytes], pair: tuple[bytes, bytes], engine: bytes) -> None:
    socket.set(zmq.CURVE_PUBLICKEY, pair[0])
    socket.set(zmq.CURVE_SECRETKEY, pair[1])
    socket.set(zmq.CURVE_SERVERKEY, engine)


STRANGERS: dict[str, Callable[[zmq.Socket[bytes], ClientKey], None]] = {
    "no key": nothing,
    "a password": plain,
    "another engine's key": lambda socket, key: curve(
        socket, (key.public, key.secret), zmq.curve_keypair()[0]
    ),
    "an unknown key": lambda socket, key: curve(socket, zmq.curve_keypair(), key.engine),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_are_refused_on_all_sockets(keys: Keys, stranger: str) -> None:
    pipeline = TinyPipeline()
    with keys.serving(pipeline) as server:
        for address, kind, frames in (
            (server.feed_address, zmq.DEALER, protocol.encode(hello("cam1"))),
            (server.events_address, zmq.XSUB, [b"\1"]),
            (server.control_address, zmq.DEALER, protocol.encode(protocol.DrainRequest())),
        ):
            with zmq.Context() as context, context.socket(kind) as socket:
                socket.set(zmq.LINGER, 0)
                STRANGERS[stranger](socket, keys["cams"])
                with socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
                    socket.connect(address)
                    socket.send_multipart(frames, zmq.NOBLOCK)
                    assert monitor.poll(PATIENCE_S * 1000), "the connection was not cut"
                    recv_monitor_message(monitor)
                    # Others come in meanwhile, and the stranger hears nothing.
                    feed(server, keys["cams"], "cam1")
                    assert not socket.poll(50)
                socket.disable_monitor()
        counters = request_status(server.control_address, key=keys["operator"])["counters"]
        assert counters["ended_streams"] == 3  # and nobody has drained it
        assert counters["connections_refused"] == (3 if stranger == "an unknown key" else 0)
        assert counters["subscriptions_refused"] == counters["messages_refused"] == 0


def test_an_engine_without_keys_takes_no_part_in_curve(keys: Keys) -> None:
    with serving() as server, RawPeer(server.feed_address, key=keys["cams"]) as peer:
        with peer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
            assert monitor.poll(PATIENCE_S * 1000)
        peer.socket.disable_monitor()


# ---- who may do what ---------------------------------------------------------------------------


def test_a_producer_feeds_its_streams_alone(keys: Keys) -> None:
    pipeline = TinyPipeline()
    with keys.serving(pipeline) as server:
        with FeatureFeeder(server.feed_address, "cam1", DIM, key=keys.file("cams")) as feeder:
            feeder.send(rows(0, 4))
            feeder.end()
        with RawPeer(server.feed_address, key=keys["cams"]) as peer:
            error = peer.ask(hello("door"))
            assert error == Error(
                "door",
                "not_permitted",
                "stream 'door': expected the key of a producer of this stream, came key 'cams', of "
                "a producer",
                None,
            )
            for message in (chunk(0, 1, "door"), End("door", 0)):
                assert code(peer.ask(message)) == "not_permitted"
        with pytest.raises(StreamError) as caught:
            FeatureFeeder(server.feed_address, "door", DIM, key=keys["cams"]).__enter__()
        assert caught.value.code == "not_permitted"
    assert list(pipeline.received) == ["cam1"]


@pytest.mark.parametrize("name", ["sees_all", "operator"])
def test_who_is_no_producer_feeds_nothing(keys: Keys, name: str) -> None:
    pipeline = TinyPipeline()
    with keys.serving(pipeline) as server, RawPeer(server.feed_address, key=keys[name]) as peer:
        assert code(peer.ask(hello("cam1"))) == "not_permitted"
    assert pipeline.sessions == {}


@pytest.mark.parametrize("name", ["cams", "sees_all"])
def test_control_is_for_operators(keys: Keys, name: str) -> None:
    with keys.serving() as server:
        for request in (
            protocol.StatusRequest(),
            protocol.DrainRequest(),
            protocol.DeployRequest("/bundle", ()),
            protocol.RollBackRequest(),
        ):
            with RawPeer(server.control_address, key=keys[name]) as peer:
                peer.say(request)
                answer = protocol.decode_control_reply(peer.hear_frames())
                assert code(answer) == "not_permitted"
        status = request_status(server.control_address, key=keys["operator"])
        assert status["state"] == "serving"
        assert status["counters"]["refused_not_permitted"] == 4


@pytest.mark.parametrize("topic", [b"", b"e", b"event/", b"event/cam", b"event/cam1/high/"])
def test_a_subscriber_sees_its_streams_alone(keys: Keys, topic: bytes) -> None:
    with (
        keys.serving() as server,
        subscriber(server, keys["sees_cam1"], topic, b"stream/cam1/") as peer,
    ):
        feed(server, keys["feeds_all"], "cam10", "cam2", "cam", "door", "cam1")
        heard = until_ended(peer, "cam1")
        assert {each.stream for each in heard} == {"cam1"}
        assert [each.TYPE for each in heard].count("event") == 1
        while peer.socket.poll(0):  # curves of the last snippet, where the topic is all of it
            left = protocol.decode_publication(peer.hear_frames())
            assert isinstance(left, SnippetScores)
            assert left.stream == "cam1"


def test_whoever_may_see_all_sees_all(keys: Keys) -> None:
    with keys.serving() as server:
        for name in ("sees_all", "operator"):
            with EventSubscriber(server.events_address, key=keys.file(name)) as peer:
                peer.wait_connected(PATIENCE_S)
                feed(server, keys["feeds_all"], "cam1", "door")
                heard = {
                    each.stream for each in (peer.receive(PATIENCE_S) for _ in range(8)) if each
                }
                assert heard == {"cam1", "door"}


def test_subscriptions_outside_are_counted_and_logged(
    keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    with keys.serving() as server:
        with subscriber(
            server, keys["sees_cam1"], b"event/cam2/", b"replay/x/0/cam2/", b"welcome/"
        ):
            pass
        with RawPeer(server.events_address, key=keys["cams"], kind=zmq.XSUB) as producer:
            producer.socket.send(b"\1")
            # Its own topic gets no echo: it is no subscriber.
            producer.socket.send(b"\1welcome/t/")
            counters: dict[str, int] = {"subscriptions_refused": 0}
            while counters["subscriptions_refused"] < 5:
                counters = request_status(server.control_address, key=keys["operator"])["counters"]
            assert not producer.socket.poll(0)
    assert "subscription to b'event/cam2/' refused: key 'sees_cam1'" in caplog.messages
    assert "subscription to b'' refused: key 'cams'" in caplog.messages


def test_the_end_of_a_subscription_undoes_it_alone(keys: Keys) -> None:
    with (
        keys.serving() as server,
        subscriber(server, keys["sees_cam1"], b"", b"event/") as peer,
    ):
        for topic in (b"", b"final/", b"never", b"event/cam1/"):
            peer.socket.send(b"\0" + topic)
        for topic in (b"stream/cam1/", b"welcome/u/"):
            peer.socket.send(b"\1" + topic)
        assert isinstance(publication(peer), Subscribed)
        feed(server, keys["cams"], "cam1")
        assert [each.TYPE for each in until_ended(peer, "cam1")] == ["stream", "event", "stream"]


def test_connections_of_one_key_end_their_own_subscriptions(keys: Keys) -> None:
    with (
        keys.serving() as server,
        subscriber(server, keys["sees_cam1"], b"", token="a") as stays,
        subscriber(server, keys["sees_cam1"], b"", b"stream/", token="b") as ends,
    ):
        ends.socket.send(b"\0")
        ends.socket.send(b"\1welcome/c/")
        assert isinstance(publication(ends), Subscribed)
        feed(server, keys["cams"], "cam1")
        assert len(until_ended(stays, "cam1")) == 4
        assert {each.TYPE for each in until_ended(ends, "cam1")} == {"stream"}


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    with EventLog(tmp_path / "state", LogConfig()) as opened:
        yield opened


@pytest.mark.parametrize("stream", [None, "cam1"])
def test_the_log_answers_with_what_a_key_may_see(
    keys: Keys, log: EventLog, stream: str | None
) -> None:
    with serving(keyring=Keyring(keys.folder), log=log) as server:
        feed(server, keys["feeds_all"], "door", "cam1", "cam10", "cam1", "cam2")
        with EventSubscriber(
            server.events_address, stream=stream, since=0, key=keys["sees_cam1"]
        ) as peer:
            peer.wait_connected(PATIENCE_S)
            feed(server, keys["feeds_all"], "door", "cam1")
            heard = [peer.receive(PATIENCE_S) for _ in range(12)]
            assert {each.stream for each in heard if each is not None} == {"cam1"}
            assert [each.session for each in heard if each is not None] == [1] * 4 + [2] * 4 + [
                3
            ] * 4
            assert peer.receive(0.2) is None


def test_an_answer_of_the_log_is_for_one_key(keys: Keys, log: EventLog) -> None:
    topics = (b"replay/guessed/0/*/", b"open/guessed/*/")
    with (
        serving(keyring=Keyring(keys.folder), log=log) as server,
        subscriber(server, keys["sees_cam1"], token="a") as first,
        subscriber(server, keys["sees_all"], token="b") as second,
    ):
        feed(server, keys["feeds_all"], "door")
        for peer, token in ((second, b"c"), (first, b"d")):
            for topic in topics:
                peer.socket.send(b"\1" + topic)
            peer.socket.send(b"\1welcome/" + token + b"/")
            if peer is second:
                assert [second.hear_frames()[0] for _ in range(3)] == [*topics, b"welcome/c/"]
        assert first.hear_frames()[0] == b"welcome/d/"
        counters = request_status(server.control_address, key=keys["operator"])["counters"]
        assert counters["subscriptions_refused"] == 2
        assert not second.socket.poll(0)


# ---- revocation --------------------------------------------------------------------------------


def test_a_revoked_subscriber_hears_no_more_and_others_go_on(keys: Keys) -> None:
    with (
        keys.serving() as server,
        subscriber(server, keys["sees_cam1"], *PUBLICATIONS) as revoked,
        subscriber(server, keys["sees_all"], *PUBLICATIONS) as other,
    ):
        feed(server, keys["cams"], "cam1")
        assert until_ended(revoked, "cam1") == until_ended(other, "cam1")
        keys.revoke("sees_cam1")
        # The echo comes again once it has connected and subscribed again.
        assert isinstance(publication(other), Subscribed)
        feed(server, keys["cams"], "cam1")
        assert len(until_ended(other, "cam1")) == 4
        assert not revoked.socket.poll(300)  # longer than it takes to connect again


def test_a_revoked_producer_and_operator_are_refused(keys: Keys) -> None:
    with (
        keys.serving() as server,
        RawPeer(server.feed_address, key=keys["cams"]) as producer,
        RawPeer(server.control_address, key=keys["operator"]) as operator,
        RawPeer(server.feed_address, key=keys["feeds_all"]) as other,
    ):
        assert isinstance(producer.ask(hello("cam1")), Welcome)
        assert isinstance(other.ask(hello("door")), Welcome)
        for name in ("cams", "operator"):
            keys.revoke(name)
        while not isinstance(answer := producer.ask(chunk(0, 1, "cam1")), Error):
            pass  # the same one again, until it is noticed
        assert code(answer) == "not_permitted"
        for message in (chunk(0, 4, "cam1"), End("cam1", 0), [b"\xc1"]):
            assert code(producer.ask(message)) == "not_permitted"
        operator.say(protocol.DrainRequest())
        assert code(protocol.decode_control_reply(operator.hear_frames())) == "not_permitted"
        assert other.ask(chunk(0, 4, "door")) == Ack("door", 4, 20)


def test_a_key_works_as_soon_as_it_is_made_and_no_longer_than_its_file(keys: Keys) -> None:
    with keys.serving() as server:
        keys.make("later", "producer", "cam1")
        keys.revoke("cams")
        while True:  # a key that was refused once does not try again
            with contextlib.suppress(StreamError, protocol.NoReplyError):
                with FeatureFeeder(
                    server.feed_address, "cam1", DIM, timeout_s=0.5, key=keys["later"]
                ) as feeder:
                    feeder.send(rows(0, 4))
                break
        with RawPeer(server.feed_address, key=keys["cams"]) as peer:
            with peer.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH) as monitor:
                assert monitor.poll(PATIENCE_S * 1000)
            peer.socket.disable_monitor()


# ---- hostile peers -----------------------------------------------------------------------------


def test_another_key_does_not_inherit_a_routing_id(keys: Keys) -> None:
    thief_key = keys.make("thief", "producer", "evil*")
    with keys.serving() as server:
        with RawPeer(server.feed_address, b"name", key=keys["cams"]) as owner:
            assert isinstance(owner.ask(hello("cam1")), Welcome)
            assert owner.ask(chunk(0, 4, "cam1")) == Ack("cam1", 4, 20)
            with RawPeer(server.feed_address, b"name", key=thief_key) as thief:
                assert code(thief.ask(chunk(4, 8, "cam1"))) == "not_permitted"
            # A key that may feed the stream must say Hello all the same.
            with RawPeer(server.feed_address, b"name", key=keys["feeds_all"]) as second:
                assert code(second.ask(chunk(4, 8, "cam1"))) == "not_owner"
                assert isinstance(second.ask(hello("cam1")), Welcome)
                assert second.ask(chunk(4, 8, "cam1")) == Ack("cam1", 8, 24)
        with RawPeer(server.feed_address, b"name", key=keys["cams"]) as again:
            assert code(again.ask(chunk(8, 12, "cam1"))) == "not_owner"


def test_a_routing_id_on_control_gives_no_rights(keys: Keys) -> None:
    with (
        keys.serving() as server,
        RawPeer(server.control_address, b"name", key=keys["operator"]) as operator,
    ):
        operator.say(protocol.StatusRequest())
        operator.hear_frames()
        with RawPeer(server.control_address, b"name", key=keys["cams"]) as thief:
            thief.say(protocol.StatusRequest())
            answer = protocol.decode_control_reply(thief.hear_frames())
            assert code(answer) == "not_permitted"


def test_a_message_that_is_no_subscription_moves_no_subscription(keys: Keys) -> None:
    """libzmq 4.3.5 gives the next subscription that it reads to the connection after it."""
    with (
        new_server(TinyPipeline(), keyring=Keyring(keys.folder)) as server,
        RawPeer(server.events_address, key=keys["sees_cam1"], kind=zmq.XSUB) as hostile,
        RawPeer(server.events_address, key=keys["sees_all"], kind=zmq.XSUB) as good,
    ):
        for peer, token in ((hostile, b"h"), (good, b"g")):
            peer.socket.send(b"\1welcome/" + token + b"/")
            while not peer.socket.poll(10):
                server._turn({server._events})
            assert isinstance(publication(peer), Subscribed)
        # All three wait to be read, in this order.
        for peer, content in (
            (hostile, b"\2"),
            (good, b"\1final/cam2/"),
            (hostile, b"\1final/cam1/"),
        ):
            peer.socket.send(content)
            deliver(server)
        server._turn({server._events})
        final = FinalProposal("cam2", 1, 0, 0, "low", 0.0, 0.64, 0.5, 1, 1.28, None, "tiny")
        for _ in range(3):
            assert list(server._outbox.publish([final], lambda _: [])) == [final]
        assert not hostile.socket.poll(300)
        # The key is banned; the others come back by themselves.
        while not good.socket.poll(10):
            server._turn({server._events})
            assert list(server._outbox.publish([final], lambda _: [])) == [final]
        assert not hostile.socket.poll(0)


def deliver(server: Server) -> None:
    """Lets what was sent arrive, and ZeroMQ take it in, without reading it."""
    for _ in range(20):
        server._events.poll(0)
        zmq.select([], [], [], 0.005)


def test_subscriptions_without_end_leave_room_for_others(keys: Keys) -> None:
    with (
        keys.serving() as server,
        subscriber(server, keys["sees_cam1"], b"") as flood,
        subscriber(server, keys["sees_all"], b"") as other,
    ):
        for number in range(5000):
            flood.socket.send(b"%c%s" % (number % 2, b"event/cam1/%d" % (number // 2)))
            flood.socket.send(b"\0")
        feed(server, keys["cams"], "cam1")
        assert len(until_ended(other, "cam1")) == 4


# ---- limits ------------------------------------------------------------------------------------


def test_too_many_hellos_are_an_error_for_that_key_alone(
    keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    limits = LimitsConfig(hellos_per_s=1)
    with (
        keys.serving(TinyPipeline(max_streams=1), limits) as server,
        RawPeer(server.feed_address, key=keys["cams"]) as hasty,
        RawPeer(server.feed_address, key=keys["feeds_all"]) as other,
    ):
        answers = [hasty.ask(hello("cam1")) for _ in range(30)]
        assert sum(isinstance(each, Welcome) for each in answers) >= 10
        assert code(answers[-1]) == "too_fast"
        assert hasty.ask(chunk(0, 4, "cam1")) == Ack("cam1", 4, 20)  # which is no Hello
        hasty.say(End("cam1", 4))
        hear_until(hasty, Ended("cam1", 4, 4, 4))
        assert isinstance(other.ask(hello("door")), Welcome)
        counters = request_status(server.control_address, key=keys["operator"])["counters"]
        assert counters["refused_too_fast"] >= 10
    assert any("too many Hellos from key 'cams'" in message for message in caplog.messages)
    peers = {getattr(each, "fact", {}).get("peer") for each in caplog.records}
    assert "key 'cams'" in peers and "key 'feeds_all'" not in peers


def test_a_feeder_that_is_too_fast_tries_again(keys: Keys) -> None:
    limits = LimitsConfig(hellos_per_s=4)
    with keys.serving(TinyPipeline(), limits) as server:
        with RawPeer(server.feed_address, key=keys["cams"]) as hasty:
            while not isinstance(hasty.ask(hello("cam1")), Error):
                pass
        with FeatureFeeder(
            server.feed_address, "cam2", DIM, retry_s=0.1, key=keys["cams"]
        ) as feeder:
            feeder.send(rows(0, 4))
            assert feeder.end().next_index == 4


def test_too_many_requests_are_an_error_for_that_key_alone(keys: Keys) -> None:
    second = keys.make("second", "operator")
    with (
        keys.serving(limits=LimitsConfig(control_requests_per_s=1)) as server,
        RawPeer(server.control_address, key=keys["operator"]) as hasty,
    ):
        for _ in range(30):
            hasty.say(protocol.StatusRequest())
        answers = [protocol.decode_control_reply(hasty.hear_frames()) for _ in range(30)]
        assert code(answers[-1]) == "too_fast"
        assert sum(isinstance(each, Error) for each in answers) <= 20
        assert request_status(server.control_address, key=second)["state"] == "serving"
        # A client waits and asks again.
        assert request_status(server.control_address, key=keys["operator"])["state"] == "serving"


def test_one_key_does_not_take_all_streams(keys: Keys) -> None:
    pipeline = TinyPipeline(max_streams=4)
    with (
        keys.serving(pipeline) as server,
        RawPeer(server.feed_address, key=keys["cams"]) as first,
        RawPeer(server.feed_address, key=keys["cams"]) as more,
        RawPeer(server.feed_address, key=keys["feeds_all"]) as other,
    ):
        assert isinstance(first.ask(hello("cam1")), Welcome)
        assert isinstance(more.ask(hello("cam2")), Welcome)
        error = more.ask(hello("cam3"))
        assert isinstance(error, Error) and error.code == "too_many_streams"
        assert "2 streams of key 'cams' are open" in error.message
        assert "limits.streams_per_key" in error.message
        assert isinstance(more.ask(hello("cam1")), Welcome)  # its own, again
        assert isinstance(other.ask(hello("cam3")), Welcome)
        first.say(hello("cam1"), End("cam1", 0))
        hear_until(first, Ended("cam1", 0, 0, 0))
        assert isinstance(more.ask(hello("cam4")), Welcome)
        assert sorted(pipeline.streams) == ["cam2", "cam3", "cam4"]


def test_without_keys_an_address_is_what_a_limit_is_counted_by(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limits = LimitsConfig(streams_per_key=1)
    with (
        serving(limits=limits) as server,
        RawPeer(server.feed_address) as one,
        RawPeer(server.feed_address) as other,
    ):
        assert isinstance(one.ask(hello("a")), Welcome)
        assert code(other.ask(hello("b"))) == "too_many_streams"
    assert any("1 streams of address 127.0.0.1 are open" in each for each in caplog.messages)


# ---- ipc ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_keys", [False, True])
def test_ipc_sockets_are_for_their_owner_alone(keys: Keys, tmp_path: Path, with_keys: bool) -> None:
    before = os.umask(0)
    try:
        addresses = [f"ipc://{tmp_path}/{name}" for name in ("feed", "events", "control")]
        ring = Keyring(keys.folder) if with_keys else None
        with serving(None, *addresses, keyring=ring) as server:
            for name in ("feed", "events", "control"):
                found = (tmp_path / name).stat()
                assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
            key = keys["cams"] if with_keys else None
            with RawPeer(server.feed_address, key=key) as peer:
                assert isinstance(peer.ask(hello("cam1")), Welcome)
            if with_keys:
                with subscriber(server, keys["sees_all"], b"") as other:
                    keys.revoke("sees_cam1")
                    assert isinstance(publication(other), Subscribed)  # on the same path
                assert stat.S_IMODE((tmp_path / "events").stat().st_mode) == 0o600
    finally:
        assert os.umask(before) == 0


def test_the_log_names_who_was_refused(keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    stranger = zmq.curve_keypair()
    with keys.serving() as server, RawPeer(server.feed_address, key=keys["sees_all"]) as peer:
        assert code(peer.ask(hello("cam1"))) == "not_permitted"
        unknown = ClientKey(*stranger, keys["cams"].engine)
        with RawPeer(server.feed_address, key=unknown) as other:
            with other.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH) as monitor:
                assert monitor.poll(PATIENCE_S * 1000)
            other.socket.disable_monitor()
    assert any("came key 'sees_all', of a subscriber" in each for each in caplog.messages)
    (line,) = (each for each in caplog.messages if "unknown key" in each)
    assert (
        line == f"refused, a connection from 127.0.0.1 with the unknown key {stranger[0].decode()}"
    )
