"""What the async clients cost beside the sync ones, against one peer that answers at once.

    python benchmarks/clients.py

A process of its own stands in for the engine: it accepts each chunk and gives credit, and publishes
as fast as it can. Sync and async take turns, and what counts is the ratio of the CPU time of this
process; rates of a busy machine mean little. One feeder sends snippets one by one, then 100 feeders
in one loop beside 100 in one thread; one subscriber receives events.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, ExitStack
from multiprocessing.connection import Connection as Pipe

import numpy as np
import zmq

from hrpro.clients import (
    AsyncEventSubscriber,
    AsyncFeatureFeeder,
    EventSubscriber,
    FeatureFeeder,
)
from hrpro.clients.testing import action_event
from hrpro.engine import protocol
from hrpro.engine.protocol import Ack, Chunk, Hello, Subscribed, Welcome

Run = Callable[[str], None]

ROUNDS = 5
DIM, CREDIT = 2048, 256
SNIPPETS, STREAMS, EVENTS = 5_000, 100, 5_000
FEATURES = np.ones(DIM, np.float32)


def peer(pipe: Pipe) -> None:
    """In the place of an engine."""
    with zmq.Context() as context:
        feed, events = context.socket(zmq.ROUTER), context.socket(zmq.XPUB)
        events.set(zmq.XPUB_VERBOSE, 1)
        events.set(zmq.SNDHWM, 0)
        for socket in (feed, events):
            socket.bind("tcp://127.0.0.1:*")
        pipe.send([each.get_string(zmq.LAST_ENDPOINT) for each in (feed, events)])
        poller = zmq.Poller()
        for socket in (feed, events):
            poller.register(socket, zmq.POLLIN)
        event = protocol.encode(action_event("cam", "Jump", "start", start_s=1.0))
        while True:
            ready = dict(poller.poll())
            if feed in ready:
                name, *frames = feed.recv_multipart()
                reply = answer(protocol.decode_feed(frames))
                feed.send_multipart([name, *protocol.encode(reply)])
            if events in ready and (topic := events.recv()).startswith(b"\x01welcome/"):
                token = topic.split(b"/")[1].decode()
                events.send_multipart(protocol.encode(Subscribed(token, "0" * 16)))
                for _ in range(EVENTS):
                    events.send_multipart(event)


def answer(message: protocol.Message) -> Welcome | Ack:
    """All is accepted."""
    if isinstance(message, Hello):
        first, clock = message.first_index, (message.frames_per_s, message.snippet_frames)
        window = (1, 1, 0, 0, 0.0, "peer")
        return Welcome(message.stream, first, first + CREDIT, 16, DIM, *clock, ("a",), *window)
    assert isinstance(message, Chunk)
    stop = message.first_index + len(message.features)
    return Ack(message.stream, stop, stop + CREDIT, needed_from=stop)


def feed(address: str) -> None:
    """One by one."""
    with FeatureFeeder(address, "cam", DIM) as feeder:
        for _ in range(SNIPPETS):
            feeder.send(FEATURES)
        feeder.flush()


async def feed_async(address: str) -> None:
    """The same."""
    async with AsyncFeatureFeeder(address, "cam", DIM) as feeder:
        for _ in range(SNIPPETS):
            await feeder.send(FEATURES)
        await feeder.flush()


def feed_many(address: str) -> None:
    """In turns, in one thread."""
    with ExitStack() as stack:
        feeders = [
            stack.enter_context(FeatureFeeder(address, f"cam{n}", DIM)) for n in range(STREAMS)
        ]
        for _ in range(SNIPPETS // STREAMS):
            for feeder in feeders:
                feeder.send(FEATURES)
        for feeder in feeders:
            feeder.flush()


async def feed_many_async(address: str) -> None:
    """A task each, in one loop."""

    async def one(feeder: AsyncFeatureFeeder) -> None:
        for _ in range(SNIPPETS // STREAMS):
            await feeder.send(FEATURES)
            await asyncio.sleep(0)
        await feeder.flush()

    async with AsyncExitStack() as stack:
        feeders = [
            await stack.enter_async_context(AsyncFeatureFeeder(address, f"cam{n}", DIM))
            for n in range(STREAMS)
        ]
        await asyncio.gather(*(one(feeder) for feeder in feeders))


def receive(address: str) -> None:
    """All that is published."""
    with EventSubscriber(address) as subscriber:
        for _ in range(EVENTS):
            subscriber.receive()


async def receive_async(address: str) -> None:
    """The same."""
    async with AsyncEventSubscriber(address) as subscriber:
        for _ in range(EVENTS):
            await subscriber.receive()


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """How long it takes, and how much CPU time."""
    began_s, cpu_s = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began_s, time.process_time() - cpu_s


def compare(
    what: str, count: int, sync: Run, async_: Callable[[str], Coroutine[None, None, None]], at: str
) -> None:
    """Prints a line."""
    pairs = [
        (seconds(lambda: sync(at)), seconds(lambda: asyncio.run(async_(at)))) for _ in range(ROUNDS)
    ]
    rates = [count / min(wall_s for wall_s, _ in each) for each in zip(*pairs, strict=True)]
    cpu_us = [1e6 / count * statistics.median(cpu_s for _, cpu_s in each)
              for each in zip(*pairs, strict=True)]  # fmt: skip
    ratio = statistics.median(async_s / sync_s for (_, sync_s), (_, async_s) in pairs)
    print(
        f"{what}: {cpu_us[0]:.0f} us sync, {cpu_us[1]:.0f} us async, ratio {ratio:.2f};"
        f" at most {rates[0]:.0f}/s and {rates[1]:.0f}/s",
        flush=True,
    )


def main() -> None:
    """Prints a line for each comparison."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=peer, args=(theirs,), daemon=True)
    process.start()
    feed_at, events_at = ours.recv()
    compare("a snippet of one feeder", SNIPPETS, feed, feed_async, feed_at)
    compare(f"a snippet of {STREAMS} feeders", SNIPPETS, feed_many, feed_many_async, feed_at)
    compare("an event", EVENTS, receive, receive_async, events_at)
    process.kill()


if __name__ == "__main__":
    main()
