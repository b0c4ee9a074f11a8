"""What a client does, apart from how it waits.

A client's operation is a generator: it reads and sends what there is, yields a Pause whenever
nothing is left to do but to wait for its line, and returns its result. A thread waits by blocking,
and a task by letting its event loop go on; everything else is the same code. At each pause the
client's state is whole, so an operation that is given up there, by a timeout, an interrupt or a
cancelled task, has taken and given nothing in part.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from hrpro.clients.connection import Line

T = TypeVar("T")

# For so long a task may go on without a turn of its loop, however much there is to do.
_TURN_S = 0.01


class Pause(NamedTuple):
    """Until a message has come, or the monotonic time `until_s`; with `for_room` also until
    something can be sent."""

    until_s: float
    for_room: bool = False


Waiting = Generator[Pause, None, T]


class Client:
    """Has a line, which may be another one after each pause."""

    _line: Line
    _turned_s = 0.0  # when its loop has had a turn

    def _run(self, operation: Waiting[T]) -> T:
        """The result of an operation, in this thread."""
        try:
            while True:
                until_s, for_room = next(operation)
                self._line.wait(until_s, for_room)
        except StopIteration as over:
            result: T = over.value
            return result
        finally:
            operation.close()

    async def _run_async(self, operation: Waiting[T]) -> T:
        """The result of an operation, in the running event loop."""
        try:
            while True:
                # Not behind the end: who is cancelled here has lost nothing.
                if time.monotonic() > self._turned_s + _TURN_S:
                    import asyncio

                    await asyncio.sleep(0)
                    self._turned_s = time.monotonic()
                until_s, for_room = next(operation)
                await self._line.wait_async(until_s, for_room)
        except StopIteration as over:
            result: T = over.value
            return result
        finally:
            operation.close()


class BlockingClient(Client):
    """Waits in its thread, and is closed behind a `with`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._line.close()


class LoopClient(Client):
    """Waits in an event loop, and is closed behind an `async with`."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection."""
        await self._line.close_async()
