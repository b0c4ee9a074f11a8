"""Feeders and subscribers in an event loop: as in a thread, and a cancelled call loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from commands import ANYWHERE, Engine, Floats, engine
from driving import assert_same, of_stream
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import PATIENCE_S, TinyPipeline, open_files, rows, serving
from tiny_model import tiny_recording

from hrpro.clients import (
    ActionEvent,
    AsyncEventSubscriber,
    AsyncFeatureFeeder,
    AsyncScoreSubscriber,
    FinalProposal,
    HrproError,
    NoReplyError,
    StreamError,
    StreamNotice,
    request_status,
)
from hrpro.clients.chaos_link import Link
from hrpro.clients.testing import MemoryEngine, stream_notice
from hrpro.engine.protocol import Ended, Publication

if TYPE_CHECKING:
    from hrpro.engine.serve import Addresses
    from hrpro.export.bundle import Bundle

RETRY_S = 0.1


pytestmark = pytest.mark.usefixtures("nothing_left_open")


def in_a_loop(program: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(program, 6 * PATIENCE_S))


def feeder_to(address: str, **options: Any) -> AsyncFeatureFeeder:
    given = {"stream": "cam", "feature_dim": 2, "timeout_s": PATIENCE_S, "retry_s": RETRY_S}
    return AsyncFeatureFeeder(address, **{**given, **options})


def expected(first: int, stop: int) -> list[tuple[int, float]]:
    return [(index, index + 1.0) for index in range(first, stop)]


# ---- the usual course --------------------------------------------------------------------------


def test_a_stream_in_and_its_events_out() -> None:
    pipeline = TinyPipeline()

    async def program() -> None:
        async with AsyncEventSubscriber(server.events_address) as subscriber:
            await subscriber.wait_connected(PATIENCE_S)
            feeder = await feeder_to(server.feed_address).__aenter__()
            assert feeder.welcome is not None and feeder.welcome.bundle_id == "tiny"
            for size in (1, 7, 22):
                await feeder.send(rows(feeder.next_index, feeder.next_index + size))
            assert await feeder.end() == Ended("cam", 30, proposals=30, events=30)
            assert (feeder.lag, feeder.lag_s, feeder.unsent) == (0, 0.0, 0)
            given: list[Publication] = []
            async for publication in subscriber:
                given.append(publication)
                if isinstance(publication, StreamNotice) and publication.kind == "ended":
                    break
            assert [each.sequence for each in given] == list(range(62))
            assert await subscriber.receive(timeout_s=0.0) is None
            await feeder.close()

    with serving(pipeline) as server:
        in_a_loop(program())
    assert pipeline.received["cam"] == expected(0, 30)


def test_the_loop_goes_on_while_a_feeder_waits_for_credit() -> None:
    pipeline = TinyPipeline()

    async def program() -> None:
        async with feeder_to(server.feed_address) as feeder:
            pipeline.paused = True
            sending = asyncio.create_task(feeder.send(rows(0, 40)))
            while feeder.unsent == 0:
                await asyncio.sleep(0)
            while feeder.lag != 8:  # the engine has accepted what it gave credit for
                await asyncio.sleep(0)
            assert (feeder.next_index, feeder.unsent) == (24, 8)
            assert feeder.lag_s == pytest.approx(8 * 0.64)
            assert not sending.done()
            pipeline.paused = False
            server._wake()
            await sending
            assert await feeder.end() == Ended("cam", 40, 40, 40)

    with serving(pipeline) as server:
        in_a_loop(program())
    assert pipeline.received["cam"] == expected(0, 40)


def test_tasks_take_turns_and_what_one_sends_stays_together() -> None:
    pipeline = TinyPipeline()

    async def program() -> None:
        async with feeder_to(server.feed_address) as feeder:
            await asyncio.gather(
                *(feeder.send(rows(first, first + 20)) for first in range(0, 200, 20))
            )
            one, other = await asyncio.gather(feeder.end(), feeder.end())
            assert one == other == Ended("cam", 200, 200, 200)

    with serving(pipeline) as server:
        in_a_loop(program())
    assert pipeline.received["cam"] == expected(0, 200)


def test_a_camera_does_not_wait_for_a_task_that_does() -> None:
    pipeline = TinyPipeline()

    async def program() -> None:
        async with feeder_to(server.feed_address, policy="drop_oldest", retry_s=60.0) as feeder:
            pipeline.paused = True
            await feeder.send(rows(0, 16))
            flushing = asyncio.create_task(feeder.flush())
            ending = asyncio.create_task(asyncio.sleep(0))
            await ending
            for at in range(16, 40):  # nobody gives credit for these
                await asyncio.wait_for(feeder.send(rows(at, at + 1)), 1.0)
            assert not flushing.done() and feeder.unsent > 0
            pipeline.paused = False
            server._wake()
            while not flushing.done():  # the feeder that sends reads what the other waits for
                await feeder.skip(0)
                await asyncio.sleep(0)
            assert (await feeder.end()).next_index == 40

    with serving(pipeline) as server:
        in_a_loop(program())


def test_a_line_that_is_given_up_under_a_task_that_waits() -> None:
    """By another task, which sends: the one that waits goes on with the new line."""
    pipeline = TinyPipeline()
    with serving() as first:
        address = first.feed_address  # where nobody is when `first` is closed

    async def program() -> None:
        feeder = feeder_to(address, policy="drop_oldest", retry_s=0.02)
        flushing = asyncio.create_task(feeder.flush())
        lines = {feeder._line}
        while len(lines) < 4:
            await feeder.send(rows(feeder.next_index, feeder.next_index + 1))
            await asyncio.sleep(0.005)
            lines.add(feeder._line)
        assert not flushing.done()
        with serving(pipeline, feed=address):
            await flushing
            assert feeder.lag == 0
            closing = asyncio.create_task(feeder.end())
            await feeder.close()  # under it
            with pytest.raises(HrproError, match="came one that was closed"):
                await closing

    in_a_loop(program())


def test_what_is_wrong_is_raised_as_in_a_thread() -> None:
    async def program() -> None:
        with pytest.raises(StreamError, match="expected") as caught:
            async with feeder_to(server.feed_address, feature_dim=3):
                pass
        assert caught.value.code == "wrong_dimension"
        async with feeder_to(server.feed_address) as feeder:
            with pytest.raises(StreamError, match="snippet 0: expected finite features"):
                await feeder.send(np.array([np.nan, 0], np.float32))
            with pytest.raises(ValueError, match="snippets: expected at least 0, came -1"):
                await feeder.skip(-1)
        nowhere = feeder_to("tcp://127.0.0.1:1")
        with pytest.raises(NoReplyError, match=r"expected a Welcome within 0\.05 s"):
            await nowhere.connect(timeout_s=0.05)
        await nowhere.close()
        await nowhere.close()
        async with AsyncEventSubscriber("tcp://127.0.0.1:1") as subscriber:
            with pytest.raises(NoReplyError, match="expected the engine's confirmation"):
                await subscriber.wait_connected(timeout_s=0.05)

    with serving() as server:
        in_a_loop(program())


def test_callbacks() -> None:
    given: list[str] = []

    async def on_event(event: ActionEvent) -> None:
        await asyncio.sleep(0)
        given.append(f"{event.kind} {event.id}")

    async def program() -> None:
        async with AsyncEventSubscriber(server.events_address) as subscriber:
            await subscriber.wait_connected(PATIENCE_S)

            def on_notice(notice: StreamNotice) -> None:
                given.append(notice.kind)
                if notice.kind == "ended":
                    subscriber.stop()

            async with feeder_to(server.feed_address) as feeder:
                await feeder.send(rows(0, 2))
                await feeder.end()
            await subscriber.run(
                on_event=on_event,
                on_final=lambda final: given.append(f"final {final.id}"),
                on_notice=on_notice,
            )
            await subscriber.run(timeout_s=0.0)  # there is no more
            waiting = asyncio.create_task(subscriber.run())
            await asyncio.sleep(0)
            subscriber.stop()
            await waiting

    with serving() as server:
        in_a_loop(program())
    assert given == ["opened", "end 0", "final 0", "end 1", "final 1", "ended"]


def test_scores_come_into_a_loop() -> None:
    values = []

    async def program() -> None:
        async with AsyncScoreSubscriber(server.events_address, ["cam"]) as subscriber:
            await subscriber.wait_connected(PATIENCE_S)
            assert await subscriber.receive(timeout_s=0) is None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(subscriber.receive(), 0.01)
            async with feeder_to(server.feed_address) as feeder:
                await feeder.send(rows(0, 9) / 10)
                await feeder.end()
            async for scores in subscriber:
                values.extend(scores.scores[:, 0].tolist())
                if len(values) == 9:
                    break

    with serving() as server:
        in_a_loop(program())
    assert values == pytest.approx([(at + 1) / 10 for at in range(9)])


def test_who_has_much_to_do_leaves_the_loop_its_turns() -> None:
    """Neither a feeder that always has credit nor a subscriber that is far behind."""
    engine, others = MemoryEngine(), 0

    async def count() -> None:
        nonlocal others
        while True:
            await asyncio.sleep(0)
            others += 1

    async def program() -> None:
        counting = asyncio.create_task(count())
        async with AsyncFeatureFeeder(engine.feed, "cam", 2) as feeder:
            await feeder.send(rows(0, 12_000))
            assert others > 3
        engine.publish(*[stream_notice("cam", "gap")] * 10_000)
        async with AsyncEventSubscriber(engine.events, since=0) as subscriber:
            before = others
            while subscriber.last_number != 10_001:
                await subscriber.receive()
            assert others > before + 3
        counting.cancel()

    in_a_loop(program())
    assert len(engine.indices("cam")) == 12_000


# ---- many in one loop --------------------------------------------------------------------------


def test_a_hundred_streams_in_one_loop(bundle: Bundle) -> None:
    """Against an engine as a process, with one thread and few files for all of them."""
    recording = tiny_recording(60, seed=3)
    threads = threading.active_count()
    before = open_files()
    ended: dict[str, Ended] = {}

    async def feed(name: str) -> None:
        async with AsyncFeatureFeeder(served.feed, name, recording.shape[1]) as feeder:
            await feeder.send(recording[:30])
            opened.release()
            await everybody.wait()
            await feeder.send(recording[30:])
            ended[name] = await feeder.end(timeout_s=6 * PATIENCE_S)

    async def watch() -> list[str]:
        names = []
        async with AsyncEventSubscriber(served.events, kinds=["stream"]) as subscriber:
            await subscriber.wait_connected(PATIENCE_S)
            connected.set()
            async for notice in subscriber:
                assert isinstance(notice, StreamNotice)
                names += [notice.stream] if notice.kind == "ended" else []
                if len(names) == 100:
                    break
        return names

    async def program() -> None:
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(watch())
            await connected.wait()
            for n in range(100):
                tasks.create_task(feed(f"cam{n}"))
            for _ in range(100):
                await opened.acquire()
            assert len(request_status(served.control)["streams"]) == 100
            assert (open_files() - before).total() < 2 * 100 + 30  # two each
            assert threading.active_count() - threads <= 1
            everybody.set()
        assert sorted(watching.result()) == sorted(ended)

    connected, everybody, opened = asyncio.Event(), asyncio.Event(), asyncio.Semaphore(0)
    with engine(bundle.folder, "--set", "max_streams=100") as served:
        in_a_loop(program())
    assert len(ended) == 100
    assert {(each.next_index, each.proposals, each.events) for each in ended.values()} == {
        (60, ended["cam0"].proposals, ended["cam0"].events)
    }


# ---- whatever is cancelled -----------------------------------------------------------------------


async def cancelled_after(operation: Coroutine[Any, Any, Any], turns: int) -> bool:
    """Cancels an operation when the loop has turned so often; whether it was over before."""
    task = asyncio.create_task(operation)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return False
    return True


class Interleaved:
    """A feeder and a subscriber, and what was given by and to them."""

    def __init__(self, road: Link, feeder: AsyncFeatureFeeder, by: AsyncEventSubscriber) -> None:
        self.road, self.feeder, self.subscriber = road, feeder, by
        self.received: list[Publication] = []
        self.skipped: set[int] = set()

    async def receive(self) -> None:
        publication = await self.subscriber.receive()
        assert publication is not None
        self.received.append(publication)

    async def do(self, what: str, snippets: int, turns: int | None) -> None:
        """One step; cancelled after so many turns, or not at all."""
        first = self.feeder.next_index
        if what == "cut":
            self.road.cut()
        elif what == "skip":
            await self.feeder.skip(snippets % 4)
            self.skipped.update(range(first, self.feeder.next_index))
        elif what == "receive":  # there may be nothing to come
            await cancelled_after(self.receive(), turns or 0)
        elif what == "flush":
            await cancelled_after(self.feeder.flush(), turns or 0)
        elif turns is None:
            await self.feeder.send(rows(first, first + snippets))
        elif await cancelled_after(self.feeder.send(rows(first, first + snippets)), turns):
            assert self.feeder.next_index == first + snippets

    async def finish(self) -> list[int]:
        """All the snippets that there are, once all that comes of them has come."""
        assert (await self.feeder.end()).next_index == self.feeder.next_index
        while not any(self._is_end(each) for each in self.received):
            await self.receive()
        return [at for at in range(self.feeder.next_index) if at not in self.skipped]

    def _is_end(self, publication: Publication) -> bool:
        is_notice = isinstance(publication, StreamNotice) and publication.kind == "ended"
        return is_notice and publication.next_index == self.feeder.next_index


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["send", "flush", "receive", "skip", "cut"]),
        st.integers(1, 30),  # snippets
        st.one_of(st.none(), st.integers(0, 12)),  # turns of the loop until it is cancelled
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_any_interleaving_of_send_and_cancel_gives_each_snippet_once(
    steps: list[tuple[str, int, int | None]],
) -> None:
    pipeline = TinyPipeline()

    async def program() -> None:
        async with AsyncEventSubscriber(server.events_address) as subscriber:
            await subscriber.wait_connected(PATIENCE_S)
            async with feeder_to(road.address) as feeder:
                both = Interleaved(road, feeder, subscriber)
                for step in steps:
                    await both.do(*step)
                wanted = await both.finish()
            received = sorted(pipeline.received.get("cam", []))
            assert received == [(at, at + 1.0) for at in wanted]
            finals = [each for each in both.received if isinstance(each, FinalProposal)]
            scores = {round(each.start_s / 0.64): each.score for each in finals}
            assert len(scores) == len(finals)  # each position once, those of gaps, too
            assert [scores[at] for at in wanted] == [at + 1.0 for at in wanted]
            assert subscriber.gaps == subscriber.repeats == 0

    with serving(pipeline) as server, Link(server.feed_address) as road:
        in_a_loop(program())


def test_a_timeout_loses_no_publication_and_no_socket() -> None:
    async def program() -> None:
        given = []
        async with AsyncEventSubscriber(server.events_address) as subscriber:
            await subscriber.wait_connected(PATIENCE_S)
            async with feeder_to(server.feed_address) as feeder:
                sending = asyncio.create_task(feeder.send(rows(0, 200)))
                while len(given) < 401:
                    try:
                        async with asyncio.timeout(random.choice([0, 1e-5, 1e-4, 1e-3])):
                            given.append(await subscriber.receive())
                    except TimeoutError:
                        pass
                await sending
        assert [each.sequence for each in given if each] == list(range(401))

        opening = asyncio.create_task(feeder_to("tcp://127.0.0.1:1").__aenter__())
        await asyncio.sleep(0.01)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    with serving() as server:
        in_a_loop(program())


def test_a_close_does_not_hold_the_loop_up() -> None:
    """What was sent to nobody is waited for, for a second, while others go on."""

    async def program() -> None:
        feeder = feeder_to("tcp://127.0.0.1:1")
        with pytest.raises(NoReplyError):
            await feeder.connect(timeout_s=0)
        longest_s, turned_s = 0.0, time.monotonic()
        closing = asyncio.create_task(feeder.close())
        while not closing.done():
            await asyncio.sleep(0.01)
            longest_s = max(longest_s, time.monotonic() - turned_s)
            turned_s = time.monotonic()
        assert longest_s < 0.7

    in_a_loop(program())


# ---- engines that die ----------------------------------------------------------------------------


async def feed_in_turns(address: str, name: str, recording: Floats, turns: asyncio.Barrier) -> None:
    """A third of it in each turn; all wait for each other in between."""
    dim = recording.shape[1]
    async with AsyncFeatureFeeder(
        address, name, dim, timeout_s=6 * PATIENCE_S, retry_s=0.2
    ) as feeder:
        for part in np.array_split(recording, 3):
            await feeder.send(part)
            await turns.wait()
        await feeder.end()


async def watch_until_ended(
    address: str, streams: int, connected: asyncio.Event
) -> list[Publication]:
    given: list[Publication] = []
    async with AsyncEventSubscriber(address, since=0) as subscriber:
        await subscriber.wait_connected(PATIENCE_S)
        connected.set()
        async for publication in subscriber:
            given.append(publication)
            streams -= isinstance(publication, StreamNotice) and publication.kind == "ended"
            if not streams:
                break
    assert [each.number for each in given] == list(range(1, len(given) + 1))
    return given


async def fed_and_watched(
    first: Engine, recordings: dict[str, Floats], between: Callable[[], None]
) -> list[Publication]:
    turns, connected = asyncio.Barrier(len(recordings) + 1), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch_until_ended(first.events, len(recordings), connected))
        await connected.wait()
        for name, recording in recordings.items():
            tasks.create_task(feed_in_turns(first.feed, name, recording, turns))
        for _ in range(3):
            await turns.wait()
            await asyncio.to_thread(between)
    return watching.result()


def test_an_engine_that_is_killed_under_feed_and_subscription_loses_nothing(
    bundle: Bundle, tmp_path: Path
) -> None:
    recordings = {f"cam{n}": tiny_recording(90, seed=n) for n in range(3)}
    with engine(bundle.folder, state=tmp_path / "calm") as served:
        calm = asyncio.run(fed_and_watched(served, recordings, lambda: None))
    with contextlib.ExitStack() as stack:

        def start(addresses: Addresses = ANYWHERE) -> Engine:
            again = engine(bundle.folder, addresses=addresses, state=tmp_path / "kill", quiet=False)
            running.append(stack.enter_context(again))
            return running[-1]

        def restart() -> None:
            running[-1].kill()
            start(running[0].addresses)

        running: list[Engine] = []
        stormy = asyncio.run(fed_and_watched(start(), recordings, restart))
    assert len(running) == 4
    assert len(calm) > 20
    for name in recordings:
        assert_same(unnumbered(stormy, name), unnumbered(calm, name))


def unnumbered(publications: list[Publication], name: str) -> list[Publication]:
    """Those of one stream; numbers depend on the others."""
    return [replace(each, number=None, previous=None) for each in of_stream(publications, name)]
