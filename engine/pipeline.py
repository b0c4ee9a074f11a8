"""The data path, top to bottom: `Pipeline.step` follows the snippets of all streams to events.

    append -> ring -> [ window -> batch -> infer -> stitch -> localize -> publish ]
                        a step

No I/O happens here; the server calls `append` with what came and sends what `step` returns. What
is computed beside the loop, or on another machine, is there in a later step: `wake` is called, in
any thread, when it is. That holds for both stages: streams that need stage 2 to decide wait for it,
and while they do, nothing else is taken of what stage 1 gave for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.asking import Asking, UnderWay, alone
from hrpro.engine.batcher import Job
from hrpro.engine.curves import Curves
from hrpro.engine.deployment import Deployment, Deployments
from hrpro.engine.inference import Scored
from hrpro.engine.messages import NoticeKind, Policy, Publication
from hrpro.engine.stream import Stream
from hrpro.engine.windows import decision_lookahead_s
from hrpro.engine.wire import StreamError

Rows = NDArray[np.float32]

# Stream ids whose sessions are counted on; the longest unused ones are forgotten first.
_SESSIONS_REMEMBERED = 65536


class Pipeline:
    """All streams of one engine, from features to publications."""

    def __init__(self, deployment: Deployment) -> None:
        manifest, config, plan = deployment.manifest, deployment.config, deployment.plan
        self.deployments = Deployments(deployment)
        self.wake: Callable[[], None] = lambda: None
        self._served = deployment  # the one that had the last batch
        self.max_streams = config.max_streams
        self._sessions: dict[str, int] = {}
        self._announcements: list[Publication] = []
        self._closing: dict[str, Stream] = {}  # to be flushed when they are processed
        self.streams: dict[str, Stream] = {}
        self.moved: set[str] = set()  # streams that were processed further; the server clears it
        self.is_held = False  # nothing that comes of it can be published now
        self.is_durable = False  # whether streams outlive the engine, see `hrpro.engine.recovery`
        self.curves = Curves()
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
        self.gap_wait_s = config.gap_wait_s
        self.idle_s = config.idle_s

    @property
    def bundle_id(self) -> str:
        """Of the bundle that works for all streams, but for those that another is tried on."""
        return self.deployments.current.bundle_id

    def step(self) -> Iterator[Publication]:
        """At most one micro-batch of inference a bundle; gives what is to be published as it is
        known, window after window. Has to be read to its end."""
        announcements, self._announcements = self._announcements, []
        yield from announcements
        # A stream is saved with what is published of it: it must not be under way again by then.
        if not any(self._has_asked(each.stream) for each in announcements):
            yield from self._take()
        deployment, jobs = self._next_batch()
        if jobs:
            deployment.ask(jobs, self.wake)
            if deployment.inference.is_at_once:
                yield from self._take()
        for stream in list(self._closing.values()):
            yield from self._close(stream)

    def pending(self) -> bool:
        """Whether a step has something to do."""
        return self.due_in_s() == 0

    def due_in_s(self) -> float | None:
        """When a step has something to do; None if something has to come first."""
        at_work = self.deployments.at_work()
        if (
            self._announcements
            or any(each.has_answer for each in at_work)
            or any(each.finished or each.flush_due for each in self._closing.values())
        ):
            return 0.0
        due = [each.batcher.due_in_s() for each in at_work if each.inference.has_room]
        return min((each for each in due if each is not None), default=None)

    @property
    def waits_for(self) -> str | None:
        """Why a backend on another machine does not answer, if it does not."""
        reasons = [each.inference.waits_for for each in self.deployments.at_work()]
        return next((each for each in reasons if each is not None), None)

    def open(self, stream: str, first_index: int, policy: Policy = "wait") -> Stream:
        """A new session of a stream, or the live one. Raises StreamError if there is no room."""
        if stream in self.streams:
            return self.streams[stream]
        if len(self.streams) >= self.max_streams:
            raise StreamError(
                "too_many_streams",
                f"stream {stream!r}: {self.max_streams} streams are open, "
                "which is the most that engine.max_streams allows",
            )
        session = self._sessions.pop(stream, 0) + 1
        self._sessions[stream] = session
        if len(self._sessions) > _SESSIONS_REMEMBERED:
            del self._sessions[next(iter(self._sessions))]
        opened = Stream(stream, session, first_index, self.deployments.of(stream), policy)
        opened.needed_from = first_index if self.is_durable else None
        self.streams[stream] = opened
        self._announce(opened, "opened")
        return opened

    def count_on(self, sessions: Mapping[str, int]) -> None:
        """The sessions of these streams count on from an earlier run of the engine."""
        self._sessions |= sessions

    def restore(self, stream: str, state: Mapping[str, Any]) -> None:
        """Go on with a stream of an earlier run of the engine, from its `Stream.state`."""
        self.streams[stream] = Stream.restored(stream, state, self.deployments.of(stream))

    def append(self, stream: str, first_index: int, features: NDArray[np.float32]) -> None:
        """Take a chunk (n, D). Raises StreamError and takes nothing if it does not fit."""
        live = self._live(stream)
        live.check(first_index, features)
        stop = first_index + len(features)
        if live.policy == "drop_oldest" and stop > live.send_until and not self.is_held:
            if live.is_under_way and live.asked == live.processed:  # what it passes over now
                self._finish_under_way()
            live.drop_oldest(stop)
            self._announcements += alone(self._passing_over(live))
        live.append(first_index, features)
        self._go_on(live)

    def give_up(self, stream: str, until: int) -> None:
        """The snippets below this index that have not come never will."""
        live = self._live(stream)
        live.give_up(until)
        self._go_on(live)

    def rest(self, stream: str) -> bool:
        """Process a silent stream as if it ended, but keep it; returns whether there was need."""
        live = self._live(stream)
        if live.rest():
            self._closing[stream] = live
        self._offer(live)
        return live.idle

    def end(self, stream: str, next_index: int) -> None:
        """The stream is over; what is left of it comes out of the next steps."""
        live = self._live(stream)
        live.end(next_index)
        self._closing[stream] = live
        self._offer(live)

    def deploy(self, deployment: Deployment, canary_streams: Collection[str] = ()) -> int:
        """Let a bundle work from the next batch on, for all streams or for those that are named.

        It agrees with the one before, see `hrpro.engine.deployment.check_agreement`. Returns how
        many open streams have another bundle now.
        """
        self._finish_under_way()
        self.deployments.deploy(deployment, canary_streams)
        return self._hand_over()

    def roll_back(self) -> int:
        """The reverse, at once. Raises DeployError where there is nothing to go back to."""
        self._finish_under_way()
        self.deployments.roll_back()
        return self._hand_over()

    def _hand_over(self) -> int:
        self._served = self.deployments.current  # the one before need not stay in memory
        streams = self.streams.values()
        changed = sum(self.deployments.of(each.stream).take_over(each) for each in streams)
        self._offer_all()
        return changed

    def _next_batch(self) -> tuple[Deployment, list[Job]]:
        """Windows of one bundle; where two have some, they take turns."""
        for deployment in sorted(self.deployments.at_work(), key=lambda each: each is self._served):
            if not deployment.inference.has_room:
                continue
            jobs = deployment.batcher.take()
            if jobs:
                self._served = deployment
                return deployment, jobs
        return self._served, []

    def _live(self, stream: str) -> Stream:
        if stream not in self.streams:
            raise StreamError("unknown_stream", f"stream {stream!r} is not open; say hello first")
        return self.streams[stream]

    def _has_asked(self, stream: str) -> bool:
        return (
            stream in self.streams and self.streams[stream].asked > self.streams[stream].processed
        )

    def _take(self) -> Iterator[Publication]:
        """What comes of the oldest batches of each bundle, as far as both stages have answered."""
        for deployment in self.deployments.at_work():
            if deployment.has_batch:
                scored = deployment.inference.take()
                if deployment.inference.waits_for is not None:
                    self._offer_all()  # what was in flight
                if scored:
                    self.batches += 1
                    refine = partial(deployment.inference.refine, wake=self.wake)
                    deployment.under_way.append(UnderWay(self._advancing(scored), refine))
            for under_way in deployment.under_way:
                for published in under_way.take():
                    yield from published
            deployment.under_way = [each for each in deployment.under_way if not each.is_over]

    def _finish_under_way(self) -> None:
        for deployment in self.deployments.at_work():
            for under_way in deployment.under_way:
                for published in under_way.finish():
                    self._announcements += published
            deployment.under_way = []

    def _advancing(self, scored: Scored) -> list[Asking[list[Publication]]]:
        """What stage 1 gave for each job, by stream; those of a stream are in order."""
        by_stream: dict[Stream, Scored] = {}
        for each in scored:
            by_stream.setdefault(each[0].stream, []).append(each)
        return [
            self._advance(stream, parts)
            for stream, parts in by_stream.items()
            if len(parts) > 1 or not self._advances_quietly(*parts[0])
        ]

    def _advances_quietly(self, job: Job, scores: Rows, embedding: Rows, attention: Rows) -> bool:
        """Take the next snippet of a stream, if nothing comes of it; most are such, and so they
        get by without a generator."""
        stream = job.stream
        assert job.first == stream.processed, "the jobs of a stream are taken in order"
        if (
            len(scores) > 1
            or not stream.is_whole_from(job.first)
            or not stream.localizer.takes_quietly(scores[0], embedding[0])
        ):
            return False
        if self._settle(stream, scores, attention):
            self._offer(stream)
        return True

    def _advance(self, stream: Stream, parts: Scored) -> Asking[list[Publication]]:
        """What comes of the next snippets of a stream, job by job."""
        published: list[Publication] = []
        stream.is_under_way = True
        for job, *rows in parts:
            assert job.first == stream.processed, "the jobs of a stream are taken in order"
            published += yield from self._advance_by(stream, *rows)
        stream.is_under_way = False
        return published

    def _advance_by(
        self, stream: Stream, scores: Rows, embedding: Rows, attention: Rows
    ) -> Asking[list[Publication]]:
        publisher, until = stream.deployment.publisher, stream.processed + len(scores)
        published: list[Publication] = [
            publisher.notice(stream, "gap", span) for span in stream.gaps_to(until)
        ]
        decisions = yield from stream.localizer.advancing(scores, embedding)
        waits = self._settle(stream, scores, attention)
        if decisions:
            published += publisher.publish(stream, decisions, stream.newest_used(until))
        if stream.skips:
            published += yield from self._passing_over(stream)
        if waits:  # for what these scores make room for
            self._offer(stream)
        return published

    def _settle(self, stream: Stream, scores: Rows, attention: Rows) -> bool:
        """What is decided by the next scores is known; returns whether more of the stream waits
        for that."""
        first_index = stream.processed
        waits = stream.skips or stream.known_until < stream.next_index
        stream.advance(attention)
        if self.curves.wanted(stream.stream):
            publisher = stream.deployment.publisher
            self.curves.add(publisher.scores(stream, first_index, scores, attention))
        self.snippets_scored += len(scores)
        self.moved.add(stream.stream)
        return waits

    def _passing_over(self, stream: Stream) -> Asking[list[Publication]]:
        """What comes of snippets that were dropped, if they are next."""
        rows = stream.pass_over()
        if rows is None:
            return []
        return (yield from self._advance_by(stream, *rows))

    def _close(self, stream: Stream) -> list[Publication]:
        """Flush a stream that is silent, or over, once its scores are final."""
        if not (stream.flush_due or stream.finished):
            return []
        newest = max(stream.newest_used(stream.processed), stream.first_index)
        publisher = stream.deployment.publisher
        published: list[Publication] = [
            publisher.notice(stream, "gap", span) for span in stream.last_gap()
        ]
        published += publisher.publish(stream, stream.localizer.flush(), newest)
        self.moved.add(stream.stream)
        if stream.flush_due:
            span = stream.first_index, stream.processed
            published.append(publisher.notice(stream, "idle", span))
            stream.restart()
            if stream.resume():  # at once: its state is saved with what is published now
                span = stream.first_index, stream.processed
                published.append(publisher.notice(stream, "resumed", span))
            self._offer(stream)
            if not stream.ended:
                del self._closing[stream.stream]
            return published
        del self.streams[stream.stream], self._closing[stream.stream]
        stream.deployment.leave(stream)
        return [*published, publisher.notice(stream, "ended")]

    def _announce(
        self, stream: Stream, kind: NoticeKind, span: tuple[int, int] | None = None
    ) -> None:
        self._announcements.append(stream.deployment.publisher.notice(stream, kind, span))

    def _go_on(self, stream: Stream) -> None:
        """Something of a stream has come, or will not."""
        if stream.resume():
            self._announce(stream, "resumed", (stream.first_index, stream.processed))
        self._offer(stream)

    def _offer(self, stream: Stream) -> None:
        """Let the bundle of a stream know what there is to compute."""
        stream.deployment.batcher.offer(stream)

    def _offer_all(self) -> None:
        for stream in self.streams.values():
            self._offer(stream)
