"""Streams across a restart: what of them is written with the events, and how they go on from it.

What is published and the state of the streams that it came from are written in one transaction. So
an engine that was killed at any instant goes on from just behind what it has published, and nothing
is decided twice:

    snippets     ... | needed_from        remembered_from | decided | ...
                       context of stage 1   what decisions          not decided yet
                                            may look at again
                     |<------ come again, are remembered ->|<------ come again, and are decided

What decisions go on from is small: open runs and actions, what waits and what was published. Rings
of features and embedding are not written: a feeder keeps the snippets from `needed_from` on, which
each Ack tells it, and sends them again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgpack

from hrpro.engine.event_reader import LogError
from hrpro.engine.messages import Publication
from hrpro.engine.settings import SettingsError
from hrpro.engine.stream import Stream

if TYPE_CHECKING:
    from hrpro.engine.pipeline import Pipeline

# What comes of numbers and bytes that are no state.
_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    msgpack.UnpackException,
)
# A stream of which nothing is published is written that often, so that its feeder keeps no more.
_SAVE_EVERY_SNIPPETS = 64


@dataclass(frozen=True, slots=True)
class SavedStream:
    """The state of a stream, to be written with the publications that came of it."""

    name: str
    data: bytes | None = None  # None once it has ended
    stream: Stream | None = None
    needed_from: int = 0
    processed: int = 0

    def settle(self) -> None:
        """It is written: the feeder may forget what is before."""
        if self.stream is not None:
            self.stream.needed_from = self.needed_from
            self.stream.saved_at = self.processed


def save(pipeline: Pipeline, publications: Iterable[Publication]) -> list[SavedStream]:
    """The streams that these, the newest publications, came of, and those that moved on far."""
    streams = pipeline.streams
    far = [name for name in pipeline.moved if name in streams and _is_far(streams[name])]
    names = dict.fromkeys([*(each.stream for each in publications), *far])
    return [_saved(name, streams[name]) if name in streams else SavedStream(name) for name in names]


def restore(pipeline: Pipeline, states: Iterable[tuple[str, bytes]]) -> None:
    """Go on with the streams of an earlier run of the engine.

    Raises LogError for a state that cannot be read, and SettingsError for too many of them.
    """
    pipeline.is_durable = True
    for name, data in states:
        try:
            pipeline.restore(name, msgpack.unpackb(data))
        except _UNREADABLE as error:
            raise LogError(
                f"stream {name!r}: its state in the event log cannot be read: {error!r}. Move the "
                "log away: the engine then begins a new one, without what the streams of before "
                "have left"
            ) from error
    if len(pipeline.streams) > pipeline.max_streams:
        raise SettingsError(
            f"max_streams: expected at least {len(pipeline.streams)}, as many streams as the event "
            f"log has open, got {pipeline.max_streams}; start with so many, and drain"
        )


def _is_far(stream: Stream) -> bool:
    return not stream.is_under_way and stream.processed - stream.saved_at >= _SAVE_EVERY_SNIPPETS


def _saved(name: str, stream: Stream) -> SavedStream:
    state = stream.state()
    return SavedStream(name, msgpack.packb(state), stream, state["needed_from"], state["processed"])
