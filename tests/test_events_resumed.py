"""Subscribers that were away: what follows their last number, once, in order, then what is live."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from commands import environment, wait_for
from logged import action, logged_in, notice, numbers
from serving import (
    ANY_PORT,
    PATIENCE_S,
    RawPeer,
    TinyPipeline,
    chunk,
    hello,
    new_server,
    rows,
    serving,
)

from hrpro.clients import EventSubscriber, FeatureFeeder, ReplayError, StreamNotice, subscriber
from hrpro.clients.chaos_link import Link
from hrpro.engine import protocol, sockets
from hrpro.engine.config import LogConfig
from hrpro.engine.event_log import EventLog
from hrpro.engine.protocol import Mark, Page, Publication, Subscribed
from hrpro.engine.server import Server

pytestmark = pytest.mark.usefixtures("nothing_left_open")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    with EventLog(tmp_path / "state") as opened:
        yield opened


def feed(server: Server, stream: str, snippets: int) -> None:
    with FeatureFeeder(server.feed_address, stream, 2, timeout_s=PATIENCE_S) as feeder:
        feeder.send(rows(0, snippets))
        feeder.end()


@contextlib.contextmanager
def subscribed(address: str | Server, **options: Any) -> Iterator[EventSubscriber]:
    address = address.events_address if isinstance(address, Server) else address
    with EventSubscriber(address, **options) as opened:
        opened.wait_connected(PATIENCE_S)
        yield opened


def heard(by: EventSubscriber, count: int) -> list[Publication]:
    found = [by.receive(PATIENCE_S) for _ in range(count)]
    assert None not in found, numbers(found)
    return [each for each in found if each is not None]


# ---- what the engine sends ---------------------------------------------------------------------


def test_everything_since_a_number_then_what_is_live(log: EventLog, tmp_path: Path) -> None:
    with serving(log=log) as server:
        feed(server, "a", 700)  # 1402 publications: some pages
        with subscribed(server, since=0) as by, subscribed(server, since=1390) as late:
            feed(server, "b", 3)
            found = heard(by, 1410)
            assert numbers(found) == list(range(1, 1411))
            assert numbers(heard(late, 20)) == list(range(1391, 1411))
            assert by.instance == late.instance == log.instance
            assert (by.last_number, late.last_number) == (1410, 1410)
            assert (by.missed, by.gaps, by.repeats) == (0, 0, 0)
            assert by.receive(timeout_s=0.1) is None
        assert logged_in(tmp_path / "state") == found


def test_the_last_number_is_that_of_what_was_given(log: EventLog) -> None:
    log.commit([notice("a"), notice("b"), notice("a"), notice("b")])
    with serving(log=log) as server, subscribed(server, since=1) as by:
        assert by.last_number == 1
        heard(by, 1)
        assert by.last_number == 2
        with subscribed(server, since=by.last_number) as other:
            assert numbers(heard(other, 2)) == [3, 4]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stream": "a"}, [1, 3, 5, 7, 9]),
        ({"stream": "a", "kinds": ["stream"]}, [1, 9]),
        ({"label": "low"}, [1, 2, 7, 8, 9, 10]),
        ({"stream": "b", "label": "high", "final_only": True}, [6]),
    ],
)
def test_filters_hold_for_what_comes_from_the_log(
    log: EventLog, options: dict[str, Any], expected: list[int]
) -> None:
    with serving() as server, subscribed(server) as by:
        for stream in ("a", "b"):
            with FeatureFeeder(server.feed_address, stream, 2, timeout_s=PATIENCE_S) as feeder:
                feeder.send(np.array([[1, 1], [-1, -1]], np.float32))
                feeder.end()
        of_a, of_b = heard(by, 5), heard(by, 5)
    # Of each: opened, event and final high, final low, ended.
    log.commit([each for pair in zip(of_a, of_b, strict=True) for each in pair])
    with serving(log=log) as server, subscribed(server, since=0, **options) as by:
        assert numbers(heard(by, len(expected))) == expected
        assert by.receive(timeout_s=0.1) is None
        assert by.last_number == 10


def test_who_comes_late_is_told_what_is_open_first(log: EventLog) -> None:
    log.commit([action("start", 0), action("start", 1), action("end", 0), action("start", 2, "b")])
    with serving(log=log) as server:
        with subscribed(server) as by:
            assert by.last_number == 4
            feed(server, "c", 1)
            found, given = [], []
            for _ in range(6):
                found += heard(by, 1)
                given.append(by.is_snapshot)
            assert given == [True, True, False, False, False, False]
            assert {(each.stream, each.number) for each in found[:2]} == {("cam", 2), ("b", 4)}
            assert numbers(found[2:]) == [5, 6, 7, 8]
        with subscribed(server, stream="b") as by:
            assert numbers(heard(by, 1)) == [4]
            assert by.receive(timeout_s=0.1) is None
        with subscribed(server, final_only=True) as by:
            assert by.receive(timeout_s=0.1) is None


def test_what_is_no_longer_in_the_log_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with EventLog(tmp_path, LogConfig(mb=1)) as log:
        for _ in range(10):
            log.commit([notice("a")] * 1000)
            log.trim()
        oldest = log.oldest
        assert oldest > 100
        with serving(log=log) as server:
            with subscribed(server, since=oldest - 1) as by:
                assert (by.missed, caplog.messages) == (0, [])
            with subscribed(server, since=oldest - 51) as by:
                assert by.missed == 50
                assert caplog.messages == ["50 of the numbers asked for are no longer in the log"]
                found = heard(by, 10_001 - oldest)
                assert numbers(found) == list(range(oldest, 10_001))
                assert by.missed == 50


def test_a_number_of_another_log_is_refused(log: EventLog) -> None:
    log.commit([notice("a")])
    ends = "a log with the number 2, came one that ends at 1"
    with (
        serving(log=log) as server,
        EventSubscriber(server.events_address, since=2) as by,
        pytest.raises(ReplayError, match=ends),
    ):
        by.wait_connected(PATIENCE_S)


def test_an_engine_without_a_log_says_that_it_cannot_go_back() -> None:
    with serving() as server:
        with (
            EventSubscriber(server.events_address, since=0) as by,
            pytest.raises(ReplayError, match="expected an engine that keeps a log"),
        ):
            by.wait_connected(PATIENCE_S)
        with subscribed(server) as by:
            feed(server, "a", 1)
            assert numbers(heard(by, 4)) == [None] * 4
            assert by.last_number is None


def test_an_engine_goes_on_with_its_log(log: EventLog) -> None:
    with serving(log=log) as first:
        address = first.events_address
        by = EventSubscriber(address)
        by.wait_connected(PATIENCE_S)
        feed(first, "a", 2)
        found = heard(by, 3)
    with serving(events=address, log=log) as second, by:
        assert second.instance == first.instance
        feed(second, "a", 1)
        found += heard(by, 7)
        assert numbers(found) == list(range(1, 11))
        assert {each.session for each in found[6:]} == {2}  # counts on


def test_after_another_log_has_come_all_of_it_is_given(tmp_path: Path, log: EventLog) -> None:
    log.commit([notice("a")] * 3)
    with serving(log=log) as first:
        address = first.events_address
        by = EventSubscriber(address, since=0)
        heard(by, 3)
    with EventLog(tmp_path / "other") as other:
        other.commit([notice("b")] * 2)
        with serving(events=address, log=other), by:
            assert [(each.stream, each.number) for each in heard(by, 2)] == [("b", 1), ("b", 2)]
            assert by.instance == other.instance


def test_a_line_that_is_cut_costs_nothing(log: EventLog) -> None:
    with (
        serving(log=log) as server,
        Link(server.events_address) as road,
        subscribed(road.address) as by,
        subscribed(road.address, stream="b") as of_b,
    ):
        found = []
        for turn in range(5):
            feed(server, "ab"[turn % 2], 20)
            found += heard(by, 11)
            road.cut()
        found += heard(by, 5 * 42 - 55)
        assert numbers(found) == list(range(1, 5 * 42 + 1))
        assert numbers(heard(of_b, 84)) == [*range(43, 85), *range(127, 169)]
        assert (by.missed, of_b.missed) == (0, 0)


def test_an_engine_that_cannot_log_does_not_spin(log: EventLog) -> None:
    with new_server(TinyPipeline(), log=log) as server, RawPeer(server.feed_address) as peer:
        peer.say(hello())

        def took_it() -> bool:
            server._turn({server._feed})
            return bool(server.counters.snippets_in)

        log._rows("PRAGMA query_only = 1")  # whatever it is that does not let it write
        peer.say(chunk(0, 4), chunk(4, 8), chunk(8, 12))
        wait_for(took_it)
        until_s = time.monotonic() + 0.7  # an Ack waits for 0.5 s at most
        while time.monotonic() < until_s:
            server._turn({server._feed})
        assert server.state == "waiting"

        def may_wait() -> bool:  # not at the very moment when something is due
            server._turn({server._feed})
            return server._idle_ms() > 0

        assert any(may_wait() for _ in range(10))
        log._rows("PRAGMA query_only = 0")

        def logged_it() -> bool:
            server._turn({server._feed})
            return log.newest == 1 + 2 * 12  # opened, and of each snippet an event and a final

        wait_for(logged_it)
        assert server.state == "serving"


# ---- a subscriber that is killed, and one that is stopped ---------------------------------------

_SUBSCRIBER = """
import sys
from hrpro.clients import EventSubscriber
from hrpro.clients.connection import Connection

asked = 0

class Counted(Connection):
    def subscribe(self, topic):
        global asked
        asked += topic.startswith((b"open/", b"replay/"))
        super().subscribe(topic)

EventSubscriber._connection = Counted
address, since, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with EventSubscriber(address, since=since) as subscriber:
    subscriber.wait_connected(60.0)
    for publication in subscriber:
        print(publication.number, asked, flush=True)
        if publication.number == last:
            break
"""


@contextlib.contextmanager
def in_a_process(server: Server, since: int, last: int) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", _SUBSCRIBER, server.events_address, str(since), str(last)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_subscriber_that_is_killed_goes_on(log: EventLog) -> None:
    given: list[int] = []
    with serving(log=log) as server:
        for last in (300, 602):
            with in_a_process(server, given[-1] if given else 0, last) as process:
                feed(server, "a", 150)
                assert process.stdout is not None
                while not given or given[-1] < last - 150:
                    given.append(int(process.stdout.readline().split()[0]))
                if last == 300:
                    process.kill()
                # What it has said is what it has been given, and kept.
                given += [int(line.split()[0]) for line in process.stdout if line.endswith("\n")]
    assert given[-1] in (604, 602)
    assert given == list(range(1, given[-1] + 1))


class Talkative(TinyPipeline):
    """Publishes what it is told to, so many at once."""

    def say(self, count: int) -> None:
        self._announcements += [notice("a")] * count
        self.wake()


def test_a_subscriber_that_stalls_is_cut_off_and_goes_on(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "EVENTS_TO_SEND", 2000)
    pipeline, total = Talkative(), 60_000  # what the kernel keeps for a connection, and more
    with (
        serving(pipeline, log=log) as server,
        subscribed(server) as awake,
        in_a_process(server, 0, total) as stalled,
    ):
        assert stalled.stdout is not None
        pipeline.say(1)
        said = [stalled.stdout.readline().split()]
        stalled.send_signal(signal.SIGSTOP)
        assert numbers(heard(awake, 1)) == [1]
        for first in range(1, total, 1000):
            count = min(1000, total - first)
            pipeline.say(count)
            # Nobody else waits for it, and nobody else loses anything.
            assert numbers(heard(awake, count)) == list(range(first + 1, first + count + 1))
        asked_before = int(said[0][1])
        stalled.send_signal(signal.SIGCONT)
        said += [line.split() for line in stalled.stdout]
    assert [int(number) for number, _ in said] == list(range(1, total + 1))
    assert int(said[-1][1]) > asked_before, "it should have lost something"


# ---- against an engine that says what the test wants ---------------------------------------------

INSTANCE = "0123456789abcdef"


class RawEngine:
    """An XPUB that answers as it is told; `topics` has what was asked for."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.XPUB)
        self.socket.set(zmq.XPUB_VERBOSE, 1)
        self.socket.bind(ANY_PORT)
        self.address = self.socket.get_string(zmq.LAST_ENDPOINT)

    def __enter__(self) -> RawEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def asked(self, kind: str) -> list[str]:
        """The parts of the next subscription of a kind."""
        while True:
            assert self.socket.poll(PATIENCE_S * 1000), f"no {kind} was asked for"
            said = self.socket.recv()
            parts = said[1:].decode().split("/")
            if said[0] == 1 and parts[0] == kind:
                return parts[1:-1]

    def confirm(self, number: int | None) -> None:
        (token,) = self.asked("welcome")
        self.send(Subscribed(token, INSTANCE, number))

    def answer(self, since: int | None, *found: Publication, newest: int, oldest: int = 1) -> None:
        if since is None:
            token, stream = self.asked("open")
        else:
            token, asked_since, stream = self.asked("replay")
            assert int(asked_since) == since
        only = None if stream == "*" else stream
        following = found[-1].number if found and found[-1].number else newest
        self.send(Page(token, since, only, following, oldest, newest, found))

    def send(self, *messages: protocol.Message) -> None:
        for message in messages:
            self.socket.send_multipart(protocol.encode(message))


def numbered(number: int, previous: int, stream: str = "a") -> StreamNotice:
    return StreamNotice(stream, 1, 0, "gap", 0, 9, 0, 0, number, previous)


def told(by: EventSubscriber) -> list[int | None]:
    """All that it gives now, until it waits."""
    found = []
    while (publication := by.receive(timeout_s=0.2)) is not None:
        found.append(publication.number)
    return found


@pytest.fixture
def engine() -> Iterator[RawEngine]:
    with RawEngine() as opened:
        yield opened


@pytest.fixture
def by(engine: RawEngine) -> Iterator[EventSubscriber]:
    """Subscribed to all, from number 10 on."""
    with EventSubscriber(engine.address) as opened:
        engine.confirm(10)
        assert told(opened) == []
        engine.answer(None, newest=10)
        opened.wait_connected(PATIENCE_S)
        yield opened


def test_a_number_that_is_missing_is_asked_for(engine: RawEngine, by: EventSubscriber) -> None:
    engine.send(numbered(11, 0), numbered(13, 12), numbered(14, 13))
    assert told(by) == [11]
    # What is live meanwhile is on its pages, too.
    engine.answer(11, numbered(12, 11), numbered(13, 12), newest=14)
    assert told(by) == [12, 13]
    engine.send(numbered(15, 14))
    engine.answer(13, numbered(14, 13), numbered(15, 14), newest=15)
    engine.send(numbered(16, 15))
    assert told(by) == [14, 15, 16]
    assert (by.last_number, by.missed, by.gaps, by.repeats) == (16, 0, 0, 0)


def test_a_mark_tells_that_the_last_ones_are_missing(
    engine: RawEngine, by: EventSubscriber
) -> None:
    engine.send(numbered(11, 0), Mark(INSTANCE, 11), Mark(INSTANCE, 12))
    assert told(by) == [11]
    engine.answer(11, numbered(12, 11), newest=12)
    assert told(by) == [12]
    engine.send(Mark(INSTANCE, 12), numbered(12, 11), numbered(13, 12))
    assert told(by) == [13]
    assert by.repeats == 1


def test_numbers_that_were_skipped_are_no_loss(engine: RawEngine, by: EventSubscriber) -> None:
    engine.send(numbered(1011, 10))
    assert told(by) == []
    engine.answer(10, numbered(1011, 10), newest=1011)
    engine.send(numbered(1012, 1011))
    assert told(by) == [1011, 1012]
    assert by.missed == 0


def test_of_one_stream_previous_tells_what_is_missing(engine: RawEngine) -> None:
    with EventSubscriber(engine.address, stream="a") as by:
        engine.confirm(10)
        assert told(by) == []
        engine.answer(None, newest=10)
        engine.send(numbered(12, 7), numbered(15, 12), numbered(20, 18))
        assert told(by) == [12, 15]
        engine.answer(15, numbered(18, 15), numbered(20, 18), newest=21)
        assert told(by) == [18, 20]
        # The page went up to 20 of 21: there may be more.
        engine.answer(20, newest=21)
        engine.send(Mark(INSTANCE, 30))
        assert told(by) == []
        # Nothing of it in the last second: was there nothing, or was it lost?
        engine.send(Mark(INSTANCE, 31))
        assert told(by) == []
        engine.answer(21, numbered(31, 20), newest=31)
        assert told(by) == [31]


def test_a_line_that_is_silent_is_made_anew(
    engine: RawEngine, by: EventSubscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber, "SILENT_S", 0.5)
    engine.send(numbered(11, 0))
    assert told(by) == [11]
    tokens: list[str] = []

    def subscribed_again() -> bool:
        assert by.receive(timeout_s=0.1) is None
        while not tokens and engine.socket.poll(0):
            kind, *rest = engine.socket.recv().decode().split("/")
            tokens.extend(rest[:1] if kind == "\x01welcome" else [])
        return bool(tokens)

    wait_for(subscribed_again)
    monkeypatch.undo()
    engine.send(Subscribed(tokens[0], INSTANCE, 12))
    assert told(by) == []
    engine.answer(11, numbered(12, 11), newest=12)
    assert told(by) == [12]


def test_signs_of_life_keep_a_line(
    engine: RawEngine, by: EventSubscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber, "SILENT_S", 0.5)
    until_s = time.monotonic() + 1.5
    while time.monotonic() < until_s:
        engine.send(Mark(INSTANCE, 10))
        assert by.receive(timeout_s=0.1) is None
    while engine.socket.poll(0):
        assert not engine.socket.recv().startswith(b"\x01welcome/")


def test_a_page_that_does_not_come_is_asked_for_again(
    engine: RawEngine, by: EventSubscriber
) -> None:
    engine.send(numbered(12, 11))
    assert told(by) == []
    engine.asked("replay")
    engine.send(Mark(INSTANCE, 12))
    assert told(by) == []
    assert not engine.socket.poll(0)  # not yet
    by._talk._asked_s -= subscriber.SILENT_S
    engine.send(Mark(INSTANCE, 12))
    assert told(by) == []
    engine.answer(10, numbered(11, 10), numbered(12, 11), newest=12)
    assert told(by) == [11, 12]


def test_an_engine_gives_signs_of_life(log: EventLog) -> None:
    log.commit([notice("a")])
    for its_log, number in ((log, 1), (None, None)):
        with (
            serving(log=its_log) as server,
            zmq.Context() as context,
            context.socket(zmq.SUB) as listening,
        ):
            listening.linger = 0
            listening.subscribe(b"mark/")
            listening.connect(server.events_address)
            for _ in range(2):
                assert listening.poll(PATIENCE_S * 1000)
                said = protocol.decode_publication(listening.recv_multipart())
                assert said == Mark(server.instance, number)


@pytest.mark.parametrize(
    "topic",
    [b"replay/t/-1/*/", b"replay/t/1/", b"replay/t/1/a/b/", b"replay/t/1e3/*/", b"open/t/",
     b"replay/t/" + b"9" * 16 + b"/*/", b"open/t/\xff/", b"open//*/", b"replay/t/1/a"],
)  # fmt: skip
def test_strange_questions_are_ignored(log: EventLog, topic: bytes) -> None:
    with (
        serving(log=log) as server,
        zmq.Context() as context,
        context.socket(zmq.SUB) as asking,
    ):
        asking.linger = 0
        asking.connect(server.events_address)
        asking.subscribe(topic)
        asking.subscribe(b"open/after/*/")
        assert asking.poll(PATIENCE_S * 1000)
        assert asking.recv_multipart()[0] == b"open/after/*/"
