"""The data path, top to bottom: `Pipeline.step` follows the snippets of all streams to events.

    append -> ring -> [ window -> batch -> infer -> stitch -> localize -> publish ]
                        a step

No I/O happens here; the server calls `append` with what came and sends what `step` returns. A
backend on another machine answers in a later step: `wake` is called, in any thread, when it has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.batcher import Job
from hrpro.engine.deployment import Deployment, Deployments
from hrpro.engine.messages import Publication
from hrpro.engine.stitch import stitch
from hrpro.engine.stream import Stream
from hrpro.engine.windows import decision_lookahead_s
from hrpro.engine.wire import StreamError

# Stream ids whose sessions are counted on; the longest unused ones are forgotten first.
_SESSIONS_REMEMBERED = 65536


class Pipeline:
    """All streams of one engine, from features to publications."""

    def __init__(self, deployment: Deployment) -> None:
        manifest, config, plan = deployment.manifest, deployment.config, deployment.plan
        self.deployments = Deployments(deployment)
        self.wake: Callable[[], None] = lambda: None
        self._served = deployment  # the one that had the last batch
        self._max_streams = config.max_streams
        self._sessions: dict[str, int] = {}
        self._announcements: list[Publication] = []
        # Inference reads its batch from here: nothing is allocated a call.
        shape = (config.max_batch, plan.window, manifest.feature_dim)
        self._features = np.zeros(shape, dtype=np.float32)
        self._valid = np.zeros(shape[:2], dtype=np.bool_)
        self.streams: dict[str, Stream] = {}
        self.batches = 0  # inference calls
        self.snippets_scored = 0  # positions stitched, each of them once
        self.clock = manifest.clock
        self.classes = manifest.classes
        self.feature_dim = manifest.feature_dim
        self.max_chunk_snippets = config.max_chunk_snippets
        self.window_snippets = plan.window
        self.hop_snippets = plan.hop
        self.context_snippets = plan.context
        self.lookahead_snippets = plan.lookahead
        self.lookahead_s = decision_lookahead_s(manifest, config)

    @property
    def bundle_id(self) -> str:
        """Of the bundle that works for all streams, but for those that another is tried on."""
        return self.deployments.current.bundle_id

    def step(self) -> list[Publication]:
        """At most one micro-batch of inference a bundle; returns what is to be published."""
        published, self._announcements = self._announcements, []
        deployment, jobs = self._next_batch()
        if jobs:
            deployment.inference.ask(jobs, *self._fill_windows(jobs), self.wake)
        for deployment in self.deployments.at_work():
            scored = deployment.inference.take()
            self.batches += bool(scored)
            for job, scores, embedding in scored:
                stitched = stitch(job, scores, embedding)
                decisions = job.stream.localizer.advance(*stitched)
                job.stream.processed = job.until
                self.snippets_scored += len(stitched[0])
                newest = min(job.stop, job.stream.next_index) - 1
                published += deployment.publisher.publish(job.stream, decisions, newest)
        for stream in [each for each in self.streams.values() if each.finished]:
            published += self._finish(stream)
        return published

    def pending(self) -> bool:
        """Whether a step has something to do."""
        return (
            bool(self._announcements)
            or any(each.inference.has_answer for each in self.deployments.at_work())
            or any(
                stream.finished
                or (stream.deployment.inference.has_room and stream.asked < stream.ready_until())
                for stream in self.streams.values()
            )
        )

    @property
    def waits_for(self) -> str | None:
        """Why a backend on another machine does not answer, if it does not."""
        reasons = [each.inference.waits_for for each in self.deployments.at_work()]
        return next((each for each in reasons if each is not None), None)

    def open(self, stream: str, first_index: int) -> Stream:
        """A new session of a stream, or the live one. Raises StreamError if there is no room."""
        if stream in self.streams:
            return self.streams[stream]
        if len(self.streams) >= self._max_streams:
            raise StreamError(
                "too_many_streams",
                f"stream {stream!r}: {self._max_streams} streams are open, "
                "which is the most that engine.max_streams allows",
            )
        session = self._sessions.pop(stream, 0) + 1
        self._sessions[stream] = session
        if len(self._sessions) > _SESSIONS_REMEMBERED:
            del self._sessions[next(iter(self._sessions))]
        opened = Stream(stream, session, first_index, self.deployments.of(stream))
        self.streams[stream] = opened
        self._announcements.append(opened.deployment.publisher.notice(opened, "opened"))
        return opened

    def append(self, stream: str, first_index: int, features: NDArray[np.float32]) -> None:
        """Take a chunk (n, D). Raises StreamError and takes nothing if it does not fit."""
        self._live(stream).append(first_index, features)

    def end(self, stream: str, next_index: int) -> None:
        """The stream is over; what is left of it comes out of the next steps."""
        self._live(stream).end(next_index)

    def deploy(self, deployment: Deployment, canary_streams: Collection[str] = ()) -> int:
        """Let a bundle work from the next batch on, for all streams or for those that are named.

        It agrees with the one before, see `hrpro.engine.deployment.check_agreement`. Returns how
        many open streams have another bundle now.
        """
        self.deployments.deploy(deployment, canary_streams)
        return self._hand_over()

    def roll_back(self) -> int:
        """The reverse, at once. Raises DeployError where there is nothing to go back to."""
        self.deployments.roll_back()
        return self._hand_over()

    def _hand_over(self) -> int:
        self._served = self.deployments.current  # the one before need not stay in memory
        streams = self.streams.values()
        return sum(self.deployments.of(each.stream).take_over(each) for each in streams)

    def _next_batch(self) -> tuple[Deployment, list[Job]]:
        """Windows of one bundle; where two have some, they take turns."""
        for deployment in sorted(self.deployments.at_work(), key=lambda each: each is self._served):
            if not deployment.inference.has_room:
                continue
            of_it = {n: each for n, each in self.streams.items() if each.deployment is deployment}
            jobs = deployment.batcher.take(of_it)
            if jobs:
                self._served = deployment
                return deployment, jobs
        return self._served, []

    def _live(self, stream: str) -> Stream:
        if stream not in self.streams:
            raise StreamError("unknown_stream", f"stream {stream!r} is not open; say hello first")
        return self.streams[stream]

    def _fill_windows(self, jobs: list[Job]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        for row, job in enumerate(jobs):
            job.stream.read_window(job.stop, self._features[row], self._valid[row])
        return self._features[: len(jobs)], self._valid[: len(jobs)]

    def _finish(self, stream: Stream) -> list[Publication]:
        """Flush a stream whose scores are all final, and forget it."""
        newest = max(stream.next_index - 1, stream.first_index)
        publisher = stream.deployment.publisher
        published = publisher.publish(stream, stream.localizer.flush(), newest)
        del self.streams[stream.stream]
        return [*published, publisher.notice(stream, "ended")]
