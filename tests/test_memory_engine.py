"""The engine in memory: the real clients, sync and async, with no socket and no wait."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from serving import PATIENCE_S, chunk, rows

from hrpro.clients import (
    ActionEvent,
    AsyncEventSubscriber,
    AsyncFeatureFeeder,
    EventSubscriber,
    FeatureFeeder,
    FinalProposal,
    HrproError,
    NoReplyError,
    ScoreSubscriber,
    SnippetClock,
    SnippetScores,
    StreamError,
    StreamNotice,
    subscription,
)
from hrpro.clients.testing import (
    MemoryEngine,
    action_event,
    connect,
    final_proposal,
    stream_notice,
)
from hrpro.engine import protocol
from hrpro.engine.protocol import Ended, Publication


@pytest.fixture(autouse=True)
def no_threads(nothing_left_open: None) -> Iterator[None]:
    threads = threading.active_count()
    yield
    assert threading.active_count() == threads


def feeder_to(engine: MemoryEngine, **options: Any) -> FeatureFeeder:
    return FeatureFeeder(engine.feed, "cam", 2, **{"timeout_s": PATIENCE_S, **options})


def drained(subscriber: EventSubscriber) -> list[Publication]:
    """All that is there now."""
    given = []
    while (publication := subscriber.receive(timeout_s=0)) is not None:
        given.append(publication)
    return given


# ---- snippets ----------------------------------------------------------------------------------


def test_snippets_go_in_and_are_seen() -> None:
    engine = MemoryEngine(feature_dim=2, classes=("Jump", "Throw"))
    with feeder_to(engine, first_index=5) as feeder:
        assert feeder.welcome is not None
        assert feeder.welcome.classes == ("Jump", "Throw")
        feeder.send(rows(5, 45))
        assert (feeder.lag, feeder.needed_from) == (8, 37)  # the last chunk's Ack is not read yet
        feeder.skip(3)
        feeder.send(rows(48, 49)[0])
        feeder.flush()
        assert (feeder.lag, len(feeder._talk.kept)) == (0, 0)
        assert feeder.end() == Ended("cam", 49, 0, events=0)
        assert feeder.end() == Ended("cam", 49, 0, events=0)
    assert engine.indices("cam") == [*range(5, 45), 48]
    np.testing.assert_array_equal(engine.features("cam")[:, 0], [*range(6, 46), 49])
    assert [each.kind for each in engine.published if isinstance(each, StreamNotice)] == [
        "opened", "gap", "ended",
    ]  # fmt: skip
    assert engine.indices("other") == []


def test_credit_ends_while_it_is_held() -> None:
    engine = MemoryEngine(credit_snippets=20)
    with feeder_to(engine) as feeder:
        engine.hold()
        with pytest.raises(NoReplyError, match=r"stream 'cam' at memory://\d+/feed: .* credit"):
            feeder.send(rows(0, 40), timeout_s=0)
        assert (feeder.next_index, feeder.unsent) == (32, 12)
        with pytest.raises(NoReplyError):
            feeder.flush(timeout_s=0)
        assert (feeder.lag, feeder.unsent) == (12, 12)
        assert feeder.lag_s == pytest.approx(12 * 0.64)
        engine.release()
        feeder.send(rows(32, 40))
        assert feeder.end().next_index == 40
    assert engine.indices("cam") == list(range(40))


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
def test_a_camera_drops_what_there_is_no_room_for(policy: Any) -> None:
    engine = MemoryEngine(credit_snippets=8)
    with feeder_to(engine, policy=policy, buffer_snippets=4) as feeder:
        engine.hold()
        for at in range(20):
            feeder.send(rows(at, at + 1))
        assert feeder.dropped == 8
        engine.release()
        assert feeder.end().next_index == 20
    left = range(8, 12) if policy == "drop_newest" else range(16, 20)
    assert engine.indices("cam") == [*range(8), *left]


def test_an_engine_that_stops_and_starts_gets_each_snippet_once() -> None:
    engine = MemoryEngine()
    with feeder_to(engine, retry_s=0.02) as feeder:
        for first in range(0, 100, 10):
            feeder.send(rows(first, first + 5))
            engine.stop()
            with pytest.raises(NoReplyError):
                feeder.send(rows(first + 5, first + 10), timeout_s=0)
            assert (feeder.next_index, feeder.unsent) == (first + 10, 5)
            engine.start()
            engine.cut()
        assert feeder.end().next_index == 100
    np.testing.assert_array_equal(engine.features("cam"), rows(0, 100))


@pytest.mark.parametrize(
    ("options", "code"),
    [({"feature_dim": 3}, "wrong_dimension"), ({"clock": SnippetClock(30.0, 16)}, "wrong_clock")],
)
def test_a_stream_that_does_not_fit_is_refused(options: dict[str, Any], code: str) -> None:
    engine = MemoryEngine(feature_dim=2)
    with pytest.raises(StreamError, match="stream 'cam': expected") as caught:
        FeatureFeeder(engine.feed, "cam", **{"feature_dim": 2, **options}).connect()
    assert caught.value.code == code


def test_what_is_against_the_protocol_is_an_error() -> None:
    engine = MemoryEngine(credit_snippets=8)
    line = connect(engine.feed)
    bad = chunk(4, 5)
    bad.features[:] = np.nan
    hello = protocol.Hello("cam", 2, 25.0, 16, 0)
    told = []
    for message in (
        chunk(0, 1), hello, chunk(0, 4), chunk(2, 4), chunk(5, 6), chunk(4, 9), bad,
        protocol.Gap("cam", 6, 7), protocol.End("cam", 9),
    ):  # fmt: skip
        line.try_send(protocol.encode(message))
        reply = protocol.decode_feed_reply(line.receive() or [])
        told.append(reply.code if isinstance(reply, protocol.Error) else reply.TYPE)
        assert line.receive() is None
    assert told == [
        "unknown_stream", "welcome", "ack", "ack", "out_of_order", "ack", "not_finite", "ack",
        "ended",
    ]  # fmt: skip
    other = connect(engine.feed)
    other.try_send(protocol.encode(hello))
    line.try_send(protocol.encode(chunk(9, 10)))
    refusal = protocol.decode_feed_reply(line.receive() or [])
    assert isinstance(refusal, protocol.Error) and refusal.code == "not_owner"
    other.close()
    line.close()


def test_a_client_that_was_closed() -> None:
    engine = MemoryEngine()
    feeder, subscriber = feeder_to(engine), EventSubscriber(engine.events)
    for client in (feeder, subscriber):
        client.close()
        client.close()
    with pytest.raises(HrproError, match="expected a client that is open"):
        feeder.flush()
    with pytest.raises(HrproError, match="expected a client that is open"):
        subscriber.receive()


def test_an_address_without_an_engine() -> None:
    address = MemoryEngine().feed
    with pytest.raises(HrproError, match="expected the address of a MemoryEngine"):
        FeatureFeeder(address, "cam", 2)


# ---- publications ------------------------------------------------------------------------------


def test_what_is_published_comes_as_it_was_said() -> None:
    engine = MemoryEngine()
    with EventSubscriber(engine.events) as subscriber:
        subscriber.wait_connected(timeout_s=0)
        sent = engine.publish(
            stream_notice("cam", "opened"),
            action_event("cam", "Jump", "start", start_s=2.0),
            action_event("cam", "Jump", "end", start_s=2.0, end_s=3.5, score=0.7),
            final_proposal("cam", "Jump", 2.0, 3.5, score=0.7, action_id=0),
            final_proposal("other", "Jump", 0.5, 1.0),
        )
        assert drained(subscriber) == sent == engine.published
        assert [each.number for each in sent] == [1, 2, 3, 4, 5]
        assert [each.previous for each in sent] == [0, 1, 2, 3, 0]
        assert [each.sequence for each in sent] == [0, 1, 2, 3, 0]
        end, final = sent[2], sent[3]
        assert isinstance(end, ActionEvent) and (end.revision, end.is_last) == (1, True)
        assert isinstance(final, FinalProposal)
        assert (final.published_index, final.published_s) == (5, pytest.approx(3.84))
        assert (subscriber.last_number, subscriber.gaps, subscriber.repeats) == (5, 0, 0)


def test_who_comes_late_or_goes_on() -> None:
    engine = MemoryEngine()
    over, is_open = (
        action_event("cam", "Jump", "retract", start_s=2.0, end_s=3.5, score=0.1),
        action_event("cam", "Throw", "update", start_s=4.0, id=1),
    )
    engine.publish(*[over] * 1001, is_open)
    with EventSubscriber(engine.events) as late:
        late.wait_connected(timeout_s=0)
        assert [each.number for each in drained(late)] == [1002]
    with EventSubscriber(engine.events, stream="cam", since=400) as later:
        assert [each.number for each in drained(later)] == list(range(401, 1003))
    with EventSubscriber(engine.events, stream="none", since=0) as nothing:
        assert drained(nothing) == []
        assert nothing.last_number == 1002


def test_a_subscriber_goes_on_after_cuts_and_restarts() -> None:
    engine = MemoryEngine()
    with EventSubscriber(engine.events) as subscriber:
        subscriber.wait_connected(timeout_s=0)
        numbers = []
        for number in range(1, 41, 4):
            engine.publish(*[stream_notice("cam", "gap")])
            engine.cut()  # what was just sent is lost
            engine.publish(*[stream_notice("cam", "gap")])
            numbers += [each.number for each in drained(subscriber)]
            engine.stop()
            engine.publish(*[stream_notice("cam", "gap")] * 2)
            assert drained(subscriber) == []
            engine.start()
            numbers += [each.number for each in drained(subscriber)]
            assert numbers == list(range(1, number + 4))
    assert subscriber.missed == 0


def test_a_silent_engine_keeps_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrpro.clients.memory_line.MARK_S", 0.05)
    monkeypatch.setattr("hrpro.clients.subscriber.SILENT_S", 0.2)
    monkeypatch.setattr("hrpro.clients.subscriber.LOOK_S", 0.05)
    engine = MemoryEngine()
    with EventSubscriber(engine.events) as subscriber:
        line = subscriber._line
        assert subscriber.receive(timeout_s=0.5) is None
        assert subscriber._line is line
        engine.stop()
        assert subscriber.receive(timeout_s=0.5) is None
        assert subscriber._line is not line
        engine.start()
        engine.publish(stream_notice("cam", "gap"))
        assert [each.number for each in drained(subscriber)] == [1]


def test_a_thread_that_waits_is_woken() -> None:
    engine = MemoryEngine()
    given: list[Publication | None] = []
    with EventSubscriber(engine.events, since=0) as subscriber:
        subscriber.wait_connected(timeout_s=0)
        waiting = threading.Thread(target=lambda: given.append(subscriber.receive(PATIENCE_S)))
        began_s = time.monotonic()
        waiting.start()
        sent = engine.publish(stream_notice("cam", "gap"))
        waiting.join()
        assert given == sent
        assert time.monotonic() - began_s < 0.9  # and not at its next look


def test_scores_go_to_who_looks_at_them() -> None:
    engine = MemoryEngine()
    curves = np.array([[0.5, 0.25], [0.75, 0.5]], np.float32)
    with (
        ScoreSubscriber(engine.events, ["cam"]) as looking,
        EventSubscriber(engine.events, since=0) as other,
    ):
        looking.wait_connected(timeout_s=0)
        for stream in ("door", "cam"):
            engine.show(SnippetScores(stream, 1, 7, 25.0, 16, ("Jump",), "memory", curves))
        scores = looking.receive(timeout_s=0)
        assert scores is not None and (scores.stream, scores.first_index) == ("cam", 7)
        np.testing.assert_array_equal(scores.curves, curves)
        assert looking.receive(timeout_s=0) is None
        assert drained(other) == []


# ---- callbacks -----------------------------------------------------------------------------------


def test_callbacks_are_called_by_kind_until_they_stop() -> None:
    engine = MemoryEngine()
    calls: list[tuple[str, float]] = []
    with EventSubscriber(engine.events, since=0) as subscriber:

        def on_event(event: ActionEvent) -> None:
            calls.append((event.kind, event.start_s))
            if event.kind == "end":
                subscriber.stop()

        engine.publish(
            action_event("cam", "Jump", "start", start_s=2.0),
            final_proposal("cam", "Jump", 2.0, 3.5),
            stream_notice("cam", "gap"),
            action_event("cam", "Jump", "end", start_s=2.1, end_s=3.5),
            action_event("cam", "Jump", "start", start_s=5.0, id=1),
        )
        subscriber.run(on_event=on_event)
        assert calls == [("start", 2.0), ("end", 2.1)]
        assert subscriber.last_number == 4
        subscriber.run(
            on_event=on_event,
            on_final=lambda final: calls.append(("final", final.start_s)),
            timeout_s=0,
        )
        assert calls[2:] == [("start", 5.0)]

        def fails(notice: StreamNotice) -> None:
            raise RuntimeError(notice.kind)

        engine.publish(stream_notice("cam", "idle"), stream_notice("cam", "resumed"))
        with pytest.raises(RuntimeError, match="idle"):
            subscriber.run(on_notice=fails)
        assert [each.kind for each in drained(subscriber) if isinstance(each, StreamNotice)] == [
            "resumed"
        ]


def test_a_thread_is_stopped_by_another() -> None:
    engine = MemoryEngine()
    with EventSubscriber(engine.events) as subscriber:
        running = threading.Thread(target=subscriber.run)
        running.start()
        while not subscriber._talk.is_ready:
            time.sleep(0.001)
        subscriber.stop()
        running.join(PATIENCE_S)
        assert not running.is_alive()


# ---- async ---------------------------------------------------------------------------------------


async def feed_60(engine: MemoryEngine, name: str) -> None:
    """With a stop of the engine in between."""
    async with AsyncFeatureFeeder(engine.feed, name, 2, retry_s=0.02) as feeder:
        for first in range(0, 60, 6):
            await feeder.send(rows(first, first + 6))
            if first == 30:
                engine.stop()
                sending = asyncio.create_task(feeder.send(rows(36, 36)))
                await asyncio.sleep(0)
                engine.start()
                await sending
        await feeder.flush()


async def watch_until(engine: MemoryEngine, last: str) -> list[Publication]:
    given = []
    async with AsyncEventSubscriber(engine.events) as subscriber:
        await subscriber.wait_connected()
        async for publication in subscriber:
            given.append(publication)
            if isinstance(publication, StreamNotice) and publication.kind == last:
                break
    return given


def test_the_async_clients_are_the_same() -> None:
    engine = MemoryEngine(feature_dim=2)

    async def program() -> list[Publication]:
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(watch_until(engine, "idle"))
            feeding = [tasks.create_task(feed_60(engine, f"cam{n}")) for n in range(20)]
            await asyncio.sleep(0)
            engine.hold()
            engine.cut()
            release = threading.Timer(0.05, engine.release)  # from another thread
            release.start()
            await asyncio.wait(feeding)
            release.join()
            engine.publish(stream_notice("cam0", "idle"))
        return watching.result()

    given = asyncio.run(asyncio.wait_for(program(), PATIENCE_S))
    for n in range(20):
        np.testing.assert_array_equal(engine.features(f"cam{n}"), rows(0, 60))
    assert given == engine.published


# ---- the minimum score ---------------------------------------------------------------------------


def event(kind: Any, score: float, action: int = 0, revision: int | None = None) -> ActionEvent:
    end_s = 3.0 if kind in ("end", "retract") else None
    return action_event("cam", "Jump", kind, 1.0, end_s, score, action, revision)


ENDED = stream_notice("cam", "ended")


@pytest.mark.parametrize(
    ("said", "given"),
    [
        # An action that was heard of is heard of to its end.
        ([("start", 0.6), ("update", 0.4), ("end", 0.2)], [0, 1, 2]),
        ([("start", 0.6), ("retract", 0.0)], [0, 1]),
        # From where it has the score on.
        ([("start", 0.4), ("update", 0.5), ("update", 0.3), ("retract", 0.0)], [1, 2, 3]),
        ([("start", 0.4), ("end", 0.8)], [1]),
        # One that never had it is not heard of, nor that it was none.
        ([("start", 0.4), ("end", 0.4)], []),
        ([("start", 0.4), ("retract", 0.9)], []),
        # A score of just the minimum has it; after its last event an id is new.
        ([("start", 0.5), ("end", 0.1), ("start", 0.4), ("end", 0.1)], [0, 1]),
    ],
)  # fmt: skip
def test_a_minimum_score_gives_an_action_whole_or_not_at_all(
    said: list[tuple[str, float]], given: list[int]
) -> None:
    engine = MemoryEngine()
    with EventSubscriber(engine.events, min_score=0.5, kinds=["event"]) as subscriber:
        subscriber.wait_connected(timeout_s=0)
        sent = engine.publish(*(event(*each) for each in said))
        assert drained(subscriber) == [sent[at] for at in given]
        assert subscriber.last_number == len(said)


def test_a_minimum_score_of_proposals_streams_and_other_actions() -> None:
    engine = MemoryEngine()
    with EventSubscriber(engine.events, min_score=0.5) as subscriber:
        subscriber.wait_connected(timeout_s=0)
        sent = engine.publish(
            final_proposal("cam", "Jump", 1.0, 2.0, score=0.49),
            final_proposal("cam", "Jump", 1.0, 2.0, score=0.5),
            event("start", 0.9, 7),
            event("start", 0.3, 8),
            event("end", 0.3, 8),
            event("end", 0.3, 7),
            event("start", 0.9, 9),
            ENDED,  # its last event was missed: it is another action then
            event("retract", 0.3, 9),
        )
        assert drained(subscriber) == [sent[at] for at in (1, 2, 5, 6, 7)]


def test_a_minimum_score_with_an_action_that_was_there_before() -> None:
    engine = MemoryEngine()
    engine.publish(event("start", 0.9, 1), event("start", 0.3, 2))
    # Who comes late begins with what is open now.
    with EventSubscriber(engine.events, min_score=0.5) as late:
        late.wait_connected(timeout_s=0)
        # Who goes on may have heard of both.
        with EventSubscriber(engine.events, min_score=0.5, since=2) as later:
            later.wait_connected(timeout_s=0)
            sent = engine.publish(
                event("end", 0.3, 1), event("retract", 0.0, 2), event("start", 0.3, 3),
                event("retract", 0.0, 3),
            )  # fmt: skip
            assert drained(later) == sent[:2]
        snapshot, *rest = drained(late)
        assert isinstance(snapshot, ActionEvent) and snapshot.id == 1
        assert rest == sent[:1]


def test_another_label_and_a_score_that_is_none() -> None:
    engine = MemoryEngine()
    for bad in (float("nan"), "high"):
        with pytest.raises(ValueError, match="min_score: expected a finite number"):
            EventSubscriber(engine.events, min_score=bad)  # type: ignore[arg-type]
    with EventSubscriber(engine.events, label="Throw", min_score=0.5, since=0) as subscriber:
        engine.publish(event("start", 0.9), event("end", 0.9))
        assert drained(subscriber) == []


def test_the_memory_of_the_filter_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrpro.clients.score_filter.STREAMS_REMEMBERED", 3)
    passes: Callable[[Publication], bool] = subscription.ScoreFilter(0.5, False).passes
    for n in range(5):
        assert passes(action_event(f"cam{n}", "Jump", "start", 1.0))
    assert not passes(action_event("cam1", "Jump", "retract", 1.0, 2.0, 0.0))  # forgotten
    assert passes(action_event("cam4", "Jump", "retract", 1.0, 2.0, 0.0))
