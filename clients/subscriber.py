"""Actions out of the engine: events while they happen, proposals once they are final.

Subscription      what is said, and what is wanted, without I/O      subscription.py
_Subscriber       reads, and notices a dead line                     here, for both:
EventSubscriber, AsyncEventSubscriber     how to wait (waiting.py)
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

import zmq

from hrpro.clients.connection import (
    Connection,
    Deadline,
    Key,
    Line,
    SharedConnection,
    open_line,
)
from hrpro.clients.subscription import KINDS, SILENT_S, ReplayError, Subscription
from hrpro.clients.waiting import BlockingClient, Client, LoopClient, Pause, Waiting
from hrpro.engine import protocol
from hrpro.engine.protocol import (
    ActionEvent,
    FinalProposal,
    NoReplyError,
    Publication,
    StreamNotice,
)

if TYPE_CHECKING:
    import asyncio

__all__ = ["KINDS", "AsyncEventSubscriber", "EventSubscriber", "ReplayError"]

T = TypeVar("T")

HIGH_WATER_MESSAGES = 10_000
LOOK_S = 1.0
RECONNECT_FIRST_MS = 100
RECONNECT_LONGEST_MS = 5_000


class _Subscriber(Client):
    """What the two kinds of subscriber share: all but how they wait."""

    _connection: ClassVar[type[Connection]] = Connection

    def __init__(
        self,
        address: str,
        stream: str | None = None,
        label: str | None = None,
        final_only: bool = False,
        kinds: Collection[str] = KINDS,
        since: int | None = None,
        key: Key = None,
        instance: str | None = None,
        min_score: float | None = None,
    ) -> None:
        kinds = (FinalProposal.TYPE,) if final_only else kinds
        self._talk = Subscription(address, stream, label, kinds, min_score, since, instance)
        self._address = address
        self._key = key
        self._stopped = False
        self._heard_s = time.monotonic()
        self._line = self._new_line()

    def _new_line(self) -> Line:
        first_ms = RECONNECT_FIRST_MS + random.randrange(RECONNECT_FIRST_MS)  # noqa: S311
        options: dict[int, int | bytes] = {
            zmq.LINGER: 0,
            zmq.RCVHWM: HIGH_WATER_MESSAGES,
            zmq.MAXMSGSIZE: protocol.MAX_REPLY_HEADER_BYTES,
            # From one attempt to the next, doubling; not the same for all who lost an engine.
            zmq.RECONNECT_IVL: first_ms,
            zmq.RECONNECT_IVL_MAX: RECONNECT_LONGEST_MS,
        }
        line = open_line(self._connection, zmq.SUB, self._address, options, self._key)
        for topic in self._talk.topics():
            line.subscribe(topic)
        self._looked_s, self._silent_s = time.monotonic(), 0.0
        return line

    # ---- how far it is -------------------------------------------------------------------------

    @property
    def last_number(self) -> int | None:
        """All that was asked for up to this number was given; None where nothing is numbered."""
        return self._talk.last_number

    @property
    def instance(self) -> str | None:
        """The instance of the engine's log, in which numbers count; None until it is known."""
        return self._talk.instance

    @property
    def is_snapshot(self) -> bool:
        """Whether the last publication that was given is of an action that was open before."""
        return self._talk.is_snapshot

    @property
    def gaps(self) -> int:
        """How many publications were missed, of an engine without a log."""
        return self._talk.gaps

    @property
    def repeats(self) -> int:
        """How many publications came again or late, and were not given again where they have
        numbers."""
        return self._talk.repeats

    @property
    def missed(self) -> int:
        """How many numbers were asked for and are no longer in the log."""
        return self._talk.missed

    @property
    def silent_s(self) -> float:
        """For how long nothing was heard of the engine, which gives a sign of life each second; it
        is heard only while something is received or waited for."""
        return time.monotonic() - self._heard_s

    # ---- what it does --------------------------------------------------------------------------

    def _connecting(self, timeout_s: float | None) -> Waiting[None]:
        deadline = Deadline(timeout_s)
        while not self._talk.is_ready:
            heard = yield from self._hearing(deadline)
            if not heard and deadline.passed():
                raise NoReplyError(
                    f"events at {self._address}: expected the engine's confirmation"
                    f" within {timeout_s} s, none came{self._line.doubt}"
                )

    def _receiving(
        self, timeout_s: float | None, is_run: bool = False
    ) -> Waiting[Publication | None]:
        deadline = Deadline(timeout_s)
        while not (is_run and self._stopped):
            publication = self._talk.next()
            if publication is not None:
                return publication
            heard = yield from self._hearing(deadline)
            if not heard and deadline.passed():
                return None
        return None

    def _hearing(self, deadline: Deadline) -> Waiting[bool]:
        """Takes in the next message; False at the deadline, and now and then before. A line that
        has been silent for too long is given up for a new one."""
        frames = self._line.receive()
        if frames is None:
            yield Pause(min(deadline.at_s, time.monotonic() + LOOK_S))
            frames = self._line.receive()
        # From one look to the next: while the process was stopped, the line was not silent.
        looked_s, self._looked_s = self._looked_s, time.monotonic()
        silent_s = self._silent_s + min(self._looked_s - looked_s, LOOK_S)
        self._silent_s = silent_s if frames is None else 0.0
        if self._silent_s >= SILENT_S:
            lost, self._line = self._line, self._new_line()
            lost.close()
        if frames is None:
            return False
        self._heard_s = self._looked_s
        try:
            self._talk.hear(frames, self._looked_s)
        finally:
            self._ask()
        return True

    def _ask(self) -> None:
        for is_new, topic in self._talk.asks:
            if is_new:
                self._line.subscribe(topic)
            else:
                self._line.unsubscribe(topic)
        self._talk.asks.clear()

    def stop(self) -> None:
        """Lets `run` return, once the callback that is being called has; from any thread or task,
        or a signal handler. A thread that waits for the engine notices it within a second."""
        self._stopped = True


class EventSubscriber(_Subscriber, BlockingClient):
    """Receives the publications of an engine, all of them or filtered.

        with EventSubscriber("tcp://127.0.0.1:5556", stream="cam1") as subscriber:
            subscriber.wait_connected(timeout_s=5.0)
            for publication in subscriber:
                ...

    `stream` and `label` take one stream and one class; `kinds` is any of "event" (ActionEvent),
    "final" (FinalProposal) and "stream" (StreamNotice, which has no label); `final_only` is short
    for kinds=("final",).

    `min_score`, in [0, 1], takes final proposals of that score or more, and of an action everything
    from its first event on that has it, whatever the scores after that: what was heard of once is
    heard of until its `end` or `retract`. A `retract` alone never comes; an `end` alone does, where
    only it has the score. Going on with `since`, all comes of the actions that were open then, as
    it is not known what was heard of them. Notices have no score, and come.

    With an engine that keeps a log, every publication comes once and in order, however often the
    line is cut: `last_number` is the number up to which all were given. Whoever keeps it can go on
    from there with `since`, which is 0 for all that the log has. Without `since`, the subscription
    begins when `wait_connected` returns, and first come the newest events of the actions that are
    open then; `is_snapshot` says whether the last publication that was given is one of them.
    `missed` counts the numbers that were asked for and are no longer in the log, which is logged as
    a warning; of one stream, fewer may be its own. A log of another instance is given from its
    beginning; `instance` says, to begin with, in which one `since` counts.

    With an engine that keeps none, `last_number` stays None, what is published while the line is
    down is missed, and `gaps` and `repeats` count the publications that were missed and those that
    came again or late, by their sequence numbers.

    `key` is the key of a subscriber or operator, or its file, for an engine that has keys; what it
    may not see does not come. Name the stream where it may see but one: otherwise the log is asked
    about each number that was another's.
    """

    def wait_connected(self, timeout_s: float | None = 5.0) -> None:
        """Returns once the engine has confirmed the subscription: nothing is missed from here on.

        Raises NoReplyError when no confirmation comes in time, and ReplayError where the engine has
        no log, or another one, for `since`.
        """
        self._run(self._connecting(timeout_s))

    def receive(self, timeout_s: float | None = None) -> Publication | None:
        """The next publication, or None when none comes in time (None: waits for ever).

        Raises ProtocolError when the engine sends something else, and ReplayError as
        `wait_connected`.
        """
        return self._run(self._receiving(timeout_s))

    def __iter__(self) -> Iterator[Publication]:
        """All publications, without an end."""
        while True:
            publication = self.receive()
            if publication is not None:
                yield publication

    def run(
        self,
        on_event: Callable[[ActionEvent], object] | None = None,
        on_final: Callable[[FinalProposal], object] | None = None,
        on_notice: Callable[[StreamNotice], object] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Calls a function for each publication, in order, one at a time; those of a kind without a
        function are passed over.

        Returns after `stop`, or when nothing came for `timeout_s` seconds. What a function raises
        is raised, and what it was called with counts as given; `run` may be called again. Raises as
        `receive` does.
        """
        self._stopped = False
        while (given := self._run(self._receiving(timeout_s, is_run=True))) is not None:
            _call(given, on_event, on_final, on_notice)


class AsyncEventSubscriber(_Subscriber, LoopClient):
    """Receives the publications of an engine in an event loop; what `EventSubscriber` says of
    itself is true here, too.

        async with AsyncEventSubscriber("tcp://127.0.0.1:5556", stream="cam1") as subscriber:
            await subscriber.wait_connected(timeout_s=5.0)
            async for publication in subscriber:
                ...

    Whatever is cancelled, by `asyncio.timeout` or otherwise, loses nothing: what was not given
    comes with the next call. Several tasks may use one subscriber; each publication is then given
    to one of them.
    """

    _connection = SharedConnection

    @functools.cached_property
    def _turn(self) -> asyncio.Lock:
        import asyncio  # it takes time to load, which is for those who have a loop

        return asyncio.Lock()

    async def wait_connected(self, timeout_s: float | None = 5.0) -> None:
        """Returns once the engine has confirmed the subscription; see
        `EventSubscriber.wait_connected`."""
        await self._in_turn(self._connecting(timeout_s))

    async def receive(self, timeout_s: float | None = None) -> Publication | None:
        """The next publication, or None when none comes in time; see `EventSubscriber.receive`."""
        return await self._in_turn(self._receiving(timeout_s))

    def __aiter__(self) -> Self:
        """All publications, without an end."""
        return self

    async def __anext__(self) -> Publication:
        publication = await self.receive()
        assert publication is not None  # it waits for ever
        return publication

    async def run(
        self,
        on_event: Callable[[ActionEvent], object] | None = None,
        on_final: Callable[[FinalProposal], object] | None = None,
        on_notice: Callable[[StreamNotice], object] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Calls a function, or awaits a coroutine function, for each publication; see
        `EventSubscriber.run`."""
        self._stopped = False
        while (given := await self._in_turn(self._receiving(timeout_s, is_run=True))) is not None:
            result = _call(given, on_event, on_final, on_notice)
            if isinstance(result, Awaitable):
                await result

    def stop(self) -> None:
        """Lets `run` return, once the callback that is being called has; from any task of the
        loop."""
        super().stop()
        self._line.wake()

    async def _in_turn(self, operation: Waiting[T]) -> T:
        async with self._turn:
            return await self._run_async(operation)


def _call(
    given: Publication,
    on_event: Callable[[ActionEvent], object] | None,
    on_final: Callable[[FinalProposal], object] | None,
    on_notice: Callable[[StreamNotice], object] | None,
) -> object:
    """What the function for this kind returns; None where there is none."""
    match given:
        case ActionEvent() if on_event is not None:
            return on_event(given)
        case FinalProposal() if on_final is not None:
            return on_final(given)
        case StreamNotice() if on_notice is not None:
            return on_notice(given)
    return None
