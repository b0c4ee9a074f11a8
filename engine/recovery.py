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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack

from hrpro.engine.messages import Ended, Publication, StreamNotice
from hrpro.engine.stream import Stream

if TYPE_CHECKING:
    from hrpro.engine.pipeline import Pipeline

_VERSION = 1
# A stream of which nothing is published is written that often, so that its feeder keeps no more.
_SAVE_EVERY_SNIPPETS = 64


@dataclass(frozen=True, slots=True)
class SavedStream:
    """The state of a stream, to be written with the publications that came of it."""

    name: str
    data: bytes
    stream: Stream | None = None  # None once it has ended
    needed_from: int = 0
    processed: int = 0

    def settle(self) -> None:
        """It is written: the feeder may forget what is before."""
        if self.stream is not None:
            self.stream.needed_from = self.needed_from
            self.stream.saved_at = self.processed


def save(pipeline: Pipeline, publications: Iterable[Publication]) -> list[SavedStream]:
    """The streams that these, the newest publications, came of, and those that moved on far."""
    notices = {}
    names = dict.fromkeys(
        name
        for name in pipeline.moved
        if name in pipeline.streams and _is_far(pipeline.streams[name])
    )
    for publication in publications:
        names[publication.stream] = None
        if isinstance(publication, StreamNotice) and publication.kind == "ended":
            notices[publication.stream] = publication
    return [
        _live(name, pipeline.streams[name])
        if name in pipeline.streams
        else SavedStream(name, _packed({"ended": _ended(notices[name])}))
        for name in names
    ]


def restore(pipeline: Pipeline, states: Iterable[tuple[str, bytes]]) -> Iterator[Ended]:
    """Go on with the streams of an engine before; gives those that had ended."""
    for name, data in states:
        state = msgpack.unpackb(data)
        assert state["version"] == _VERSION, "the log's own schema has changed"
        if "ended" in state:
            ended = state["ended"]
            pipeline.remember_session(name, ended["session"])
            yield Ended(name, ended["next_index"], ended["proposals"], ended["events"])
        else:
            pipeline.restore(name, state)


def _is_far(stream: Stream) -> bool:
    return stream.processed - stream.saved_at >= _SAVE_EVERY_SNIPPETS


def _live(name: str, stream: Stream) -> SavedStream:
    state = stream.state()
    return SavedStream(name, _packed(state), stream, state["needed_from"], state["processed"])


def _ended(notice: StreamNotice) -> dict[str, int]:
    names: Sequence[str] = ("session", "next_index", "proposals", "events")
    return {name: getattr(notice, name) for name in names}


def _packed(state: Mapping[str, Any]) -> bytes:
    packed: bytes = msgpack.packb({"version": _VERSION, **state})
    return packed
