"""An engine that has no room for another stream: who gives way, and who must wait or leave."""

from __future__ import annotations

import pytest
from serving import RawPeer, TinyPipeline, chunk, hello, serving

from hrpro.engine.config import EngineConfig
from hrpro.engine.feeds import Counters, Feeds
from hrpro.engine.protocol import Ack, End, Ended, Error, Message, StreamNotice, Welcome

IDLE_S = EngineConfig().idle_s


pytestmark = pytest.mark.usefixtures("nothing_left_open")


class FullEngine:
    """Feeds with room for two streams, a clock that stands still, and what its peers are told.

    The streams "a" and "b" are open, each owned by the peer of its name; "a" was opened first.
    """

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.pipeline = TinyPipeline(max_streams=2)
        self.told: list[tuple[bytes, Message]] = []
        self.feeds = Feeds(self.pipeline, Counters(), self._send, lambda: self.now_s)
        for name in ("a", "b"):
            self.say(name, hello(name))
            self.now_s += 1
        self.told.clear()

    def _send(self, identity: bytes, message: Message) -> bool:
        self.told.append((identity, message))
        return True

    def say(self, peer: str, message: Message) -> None:
        self.feeds.handle(peer.encode(), message)  # type: ignore[arg-type]

    def turn(self) -> None:
        while self.pipeline.pending():
            for publication in self.pipeline.step():
                if isinstance(publication, StreamNotice) and publication.kind == "ended":
                    self.feeds.on_ended(publication)
        self.feeds.admit_waiting()

    def answers(self, peer: str) -> list[Message]:
        return [message for identity, message in self.told if identity == peer.encode()]

    def codes(self, peer: str) -> list[str]:
        return [each.code for each in self.answers(peer) if isinstance(each, Error)]


def test_who_is_heard_of_keeps_its_place() -> None:
    engine = FullEngine()
    engine.now_s += IDLE_S - 2.5  # since the Hello of "a", 1.5 s less than that
    engine.say("c", hello("c"))
    assert engine.codes("c") == ["too_many_streams"]
    engine.turn()
    assert sorted(engine.pipeline.streams) == ["a", "b"]
    assert engine.answers("a") == engine.answers("b") == []


@pytest.mark.parametrize("sign", [hello("a"), chunk(0, 4, "a"), End("a", 7)])
def test_the_stream_that_is_silent_for_longest_gives_way(sign: Message) -> None:
    engine = FullEngine()
    engine.now_s += IDLE_S - 2
    engine.say("a", sign)  # even a refused End is a sign of life
    engine.told.clear()
    engine.now_s += 2
    engine.say("c", hello("c", first_index=5))
    assert engine.answers("c") == []  # it waits for the end of "b"
    engine.turn()
    assert engine.answers("b") == [Ended("b", 0, 0, 0)]
    (welcome,) = engine.answers("c")
    assert isinstance(welcome, Welcome) and (welcome.stream, welcome.next_index) == ("c", 5)
    assert sorted(engine.pipeline.streams) == ["a", "c"]


def test_a_message_of_another_peer_keeps_no_stream_alive() -> None:
    engine = FullEngine()
    engine.now_s += IDLE_S
    engine.say("b", hello("b"))
    engine.say("stranger", chunk(0, 1, "a"))
    engine.say("c", hello("c"))
    engine.turn()
    assert engine.codes("stranger") == ["not_owner"]
    assert sorted(engine.pipeline.streams) == ["b", "c"]


def test_no_more_wait_than_places_become_free() -> None:
    engine = FullEngine()
    engine.say("a", End("a", 0))
    for _ in range(2):
        engine.say("c", hello("c"))  # again, as a peer does that waits: it is one place
    engine.say("d", hello("d"))
    assert engine.answers("c") == []
    assert engine.codes("d") == ["too_many_streams"]
    engine.turn()
    assert isinstance(engine.answers("c")[0], Welcome)
    assert sorted(engine.pipeline.streams) == ["b", "c"]


def test_a_place_that_is_waited_for_is_not_given_away() -> None:
    engine = FullEngine()
    engine.say("a", End("a", 0))
    engine.say("a", hello("a"))  # its next session
    engine.say("c", hello("c"))
    assert engine.codes("c") == ["too_many_streams"]
    engine.turn()
    assert sorted(engine.pipeline.streams) == ["a", "b"]


def test_who_waits_for_a_place_is_refused_by_a_drain() -> None:
    engine = FullEngine()
    engine.say("a", End("a", 0))
    engine.say("c", hello("c"))
    engine.feeds.drain()
    assert engine.codes("c") == ["draining"]
    engine.turn()
    assert engine.pipeline.streams == {}


def test_a_full_engine_over_sockets() -> None:
    pipeline = TinyPipeline(max_streams=1, idle_s=0.5)
    with serving(pipeline) as server:
        with RawPeer(server.feed_address) as gone:
            assert isinstance(gone.ask(hello("old")), Welcome)
            assert gone.ask(chunk(0, 4, "old")) == Ack("old", 4, 20)
        with RawPeer(server.feed_address) as peer:
            error = peer.ask(hello("new"))
            assert isinstance(error, Error) and error.code == "too_many_streams"
            while isinstance(answer := peer.ask(hello("new")), Error):
                pass  # until "old" is idle
            assert isinstance(answer, Welcome)
            assert peer.ask(chunk(0, 4, "new")) == Ack("new", 4, 20)
    assert list(pipeline.streams) == ["new"]
