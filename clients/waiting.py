"""What a client does, apart from how it waits.

A client's operation is a generator: it reads and sends what there is, yields a Pause whenever
nothing is left to do but to wait for its line, and returns its result. `run` waits by blocking,
`run_async` by letting the event loop go on; everything else is the same code. At each pause the
client's state is whole, so an operation that is given up there, by a timeout, an interrupt or a
cancelled task, has taken and given nothing in part.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, Protocol, TypeVar

from hrpro.clients.connection import Line

T = TypeVar("T")


class Pause(NamedTuple):
    """Until a message has come, or the monotonic time `until_s`; with `for_room` also until
    something can be sent."""

    until_s: float
    for_room: bool = False


Waiting = Generator[Pause, None, T]


class HasLine(Protocol):
    """A client; its line may be another one after each pause."""

    _line: Line


def run(operation: Waiting[T], client: HasLine) -> T:
    """The result of an operation, in this thread."""
    try:
        while True:
            until_s, for_room = next(operation)
            client._line.wait(until_s, for_room)  # noqa: SLF001 - a part of the client
    except StopIteration as over:
        result: T = over.value
        return result
    finally:
        operation.close()


async def run_async(operation: Waiting[T], client: HasLine) -> T:
    """The result of an operation, in the running event loop."""
    try:
        while True:
            until_s, for_room = next(operation)
            await client._line.wait_async(until_s, for_room)  # noqa: SLF001
    except StopIteration as over:
        result: T = over.value
        return result
    finally:
        operation.close()
