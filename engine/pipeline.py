"""The data path, top to bottom: `Pipeline.step` follows the snippets of all streams to events.

    append -> ring -> [ window -> batch -> infer -> stitch -> localize -> publish ]
                        a step

No I/O happens here; the server calls `append` with what came and sends what `step` returns.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.batcher import Batcher, Job
from hrpro.engine.config import EngineConfig
from hrpro.engine.localizer import StreamLocalizer
from hrpro.engine.messages import Publication
from hrpro.engine.publish import Publisher
from hrpro.engine.refine import InstanceScorer
from hrpro.engine.stitch import stitch
from hrpro.engine.stream import Stream
from hrpro.engine.windows import plan_windows
from hrpro.engine.wire import StreamError
from hrpro.export.bundle import Manifest

# Stream ids whose sessions are counted on; the longest unused ones are forgotten first.
_SESSIONS_REMEMBERED = 65536


class Backend(InstanceScorer, Protocol):
    """Where inference runs: both stages of a bundle."""

    def score_snippets(
        self, features: NDArray[np.float32], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Windows (B, T, D) and validity (B, T) -> P (B, T, C) and embedding (B, T, W)."""
        ...


class Pipeline:
    """All streams of one engine, from features to publications."""

    def __init__(self, manifest: Manifest, backend: Backend, config: EngineConfig) -> None:
        self._plan = plan_windows(manifest, config)
        self._manifest = manifest
        self._backend = backend
        self._config = config
        self._batcher = Batcher(self._plan, config.max_batch)
        self._publisher = Publisher(manifest.clock, manifest.classes, manifest.bundle_id)
        self._sessions: dict[str, int] = {}
        self._announcements: list[Publication] = []
        # Inference reads its batch from here: nothing is allocated a call.
        shape = (config.max_batch, self._plan.window, manifest.feature_dim)
        self._features = np.zeros(shape, dtype=np.float32)
        self._valid = np.zeros(shape[:2], dtype=np.bool_)
        self.streams: dict[str, Stream] = {}
        self.batches = 0  # inference calls
        self.snippets_scored = 0  # positions stitched, each of them once
        self.clock = manifest.clock
        self.classes = manifest.classes
        self.feature_dim = manifest.feature_dim
        self.bundle_id = manifest.bundle_id
        self.max_chunk_snippets = config.max_chunk_snippets
        self.window_snippets = self._plan.window
        self.hop_snippets = self._plan.hop
        self.context_snippets = self._plan.context
        self.lookahead_snippets = self._plan.lookahead
        self.lookahead_s = config.lookahead_s

    def warm_up(self) -> None:
        """Run inference once, so that the first snippets do not wait for it."""
        self._backend.score_snippets(self._features, self._valid)

    def step(self) -> list[Publication]:
        """At most one micro-batch of inference; returns what is to be published, in order."""
        published, self._announcements = self._announcements, []
        jobs = self._batcher.take(self.streams)
        if jobs:
            features, valid = self._fill_windows(jobs)
            scores, embedding = self._backend.score_snippets(features, valid)
            self.batches += 1
            for row, job in enumerate(jobs):
                stitched = stitch(job, scores[row], embedding[row])
                decisions = job.stream.localizer.advance(*stitched)
                job.stream.processed = job.until
                self.snippets_scored += len(stitched[0])
                newest = min(job.stop, job.stream.next_index) - 1
                published += self._publisher.publish(job.stream, decisions, newest)
        for stream in [each for each in self.streams.values() if each.finished]:
            published += self._finish(stream)
        return published

    def pending(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._announcements) or any(
            stream.finished or stream.processed < stream.ready_until()
            for stream in self.streams.values()
        )

    def open(self, stream: str, first_index: int) -> Stream:
        """A new session of a stream, or the live one. Raises StreamError if there is no room."""
        if stream in self.streams:
            return self.streams[stream]
        if len(self.streams) >= self._config.max_streams:
            raise StreamError(
                "too_many_streams",
                f"stream {stream!r}: {self._config.max_streams} streams are open, "
                "which is the most that engine.max_streams allows",
            )
        session = self._sessions.pop(stream, 0) + 1
        self._sessions[stream] = session
        if len(self._sessions) > _SESSIONS_REMEMBERED:
            del self._sessions[next(iter(self._sessions))]
        manifest = self._manifest
        localizer = StreamLocalizer(
            len(manifest.classes),
            manifest.embedding_width,
            self._config.localization,
            self._backend,
            self._plan.wait,
            first_index,
        )
        opened = Stream(
            stream,
            session,
            first_index,
            manifest.feature_dim,
            self._plan,
            self._config.backlog_snippets,
            localizer,
        )
        self.streams[stream] = opened
        self._announcements.append(self._publisher.notice(opened, "opened"))
        return opened

    def append(self, stream: str, first_index: int, features: NDArray[np.float32]) -> None:
        """Take a chunk (n, D). Raises StreamError and takes nothing if it does not fit."""
        self._live(stream).append(first_index, features)

    def end(self, stream: str, next_index: int) -> None:
        """The stream is over; what is left of it comes out of the next steps."""
        self._live(stream).end(next_index)

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
        published = self._publisher.publish(stream, stream.localizer.flush(), newest)
        del self.streams[stream.stream]
        return [*published, self._publisher.notice(stream, "ended")]
