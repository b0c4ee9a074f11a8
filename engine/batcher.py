"""Which windows go into the next inference call: micro-batches across streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hrpro.engine.stream import Stream
from hrpro.engine.windows import WindowPlan


@dataclass(frozen=True, slots=True)
class Job:
    """One window: it gives the scores of the snippets ``first <= t < until`` of a stream."""

    stream: Stream
    first: int
    until: int
    stop: int


class Batcher:
    """Takes ready windows from the streams in turn, so that no stream waits for a fast one."""

    def __init__(self, plan: WindowPlan, max_batch: int) -> None:
        self._plan = plan
        self._max_batch = max_batch
        self._last_served = ""

    def take(self, streams: Mapping[str, Stream]) -> list[Job]:
        """Up to ``max_batch`` windows: one a stream, then further ones of those that have more.

        Windows of one stream stand in the order of time.
        """
        waiting = [
            (stream, stream.asked)
            for stream in self._in_turn(streams)
            if stream.asked < stream.ready_until()
        ]
        jobs: list[Job] = []
        while waiting and len(jobs) < self._max_batch:
            room = self._max_batch - len(jobs)
            chosen, waiting = waiting[:room], waiting[room:]
            for stream, first in chosen:
                job = self._job(stream, first)
                jobs.append(job)
                if job.until < stream.ready_until():
                    waiting.append((stream, job.until))
            self._last_served = chosen[-1][0].stream
        return jobs

    def _in_turn(self, streams: Mapping[str, Stream]) -> list[Stream]:
        """The streams, beginning behind the one that was served last."""
        names = list(streams)
        after = names.index(self._last_served) + 1 if self._last_served in streams else 0
        return [streams[name] for name in names[after:] + names[:after]]

    def _job(self, stream: Stream, first: int) -> Job:
        until = min(self._plan.counts_until(first), stream.ready_until())
        return Job(stream, first, until, self._plan.stop(first))
