"""What the tests of the pipeline share: streams that are fed in turns, and what came of them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.asking import Asking, InstanceScorer
from hrpro.engine.config import EngineConfig, LocalizationConfig, WindowConfig
from hrpro.engine.deployment import Deployment
from hrpro.engine.inference import Backend
from hrpro.engine.localizer import Decision, Final, StreamLocalizer
from hrpro.engine.messages import ActionEvent, FinalProposal, Publication, StreamNotice
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.refine import Proposal
from hrpro.export.bundle import Manifest

Floats = NDArray[np.float32]

# Far more than any step of a test takes; it only bounds how long a failure takes to show.
PATIENCE_S = 60.0
# (stream, snippets to send, steps to make after that)
Turn = tuple[str, int, int]


def engine_config(
    manifest: Manifest,
    hop: int = 1,
    window: int | None = None,
    lookahead_s: float | Literal["strict"] = 5.12,
    max_batch: int = 4,
    backlog: int = 16,
    max_streams: int = 8,
) -> EngineConfig:
    return EngineConfig(
        window=WindowConfig(hop_snippets=hop, window_snippets=window),
        localization=manifest.localization,
        lookahead_s=lookahead_s,
        max_batch=max_batch,
        backlog_snippets=backlog,
        max_streams=max_streams,
        threads=1,
    )


@dataclass
class Recorder:
    """In the place of a stream's localizer: keeps what goes in and what comes out."""

    inner: StreamLocalizer
    scores: list[Floats] = field(default_factory=list)
    embedding: list[Floats] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    @property
    def open_actions(self) -> int:
        return self.inner.open_actions

    @property
    def next_action_id(self) -> int:
        return self.inner.next_action_id

    @property
    def decided_until(self) -> int:
        return self.inner.decided_until

    @property
    def newest(self) -> tuple[Floats, Floats]:
        return self.inner.newest

    def takes_quietly(self, scores: Floats, embedding: Floats) -> bool:
        is_taken = self.inner.takes_quietly(scores, embedding)
        if is_taken:
            self.scores.append(scores[None])
            self.embedding.append(embedding[None])
        return is_taken

    def advancing(self, scores: Floats, embedding: Floats) -> Asking[list[Decision]]:
        self.scores.append(scores)
        self.embedding.append(embedding)
        return self._keep((yield from self.inner.advancing(scores, embedding)))

    def use(
        self, config: LocalizationConfig, scorer: InstanceScorer | None, width: int | None
    ) -> None:
        self.inner.use(config, scorer, width)

    def flush(self) -> list[Decision]:
        return self._keep(self.inner.flush())

    def _keep(self, decisions: list[Decision]) -> list[Decision]:
        self.decisions += decisions
        return decisions

    @property
    def proposals(self) -> list[Proposal]:
        """The final ones, in order."""
        return [each.proposal for each in self.decisions if isinstance(each, Final)]


class Drive:
    """A pipeline and recordings on their way into it."""

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        config: EngineConfig,
        recordings: Mapping[str, Floats],
        first_index: int = 0,
    ) -> None:
        self.pipeline = Pipeline(Deployment(manifest, backend, config))
        self.woken = threading.Event()
        self.pipeline.wake = self.woken.set
        self.recordings = recordings
        self.first_index = first_index
        self.published: list[Publication] = []
        self.recorders: dict[str, Recorder] = {}
        for name in recordings:
            stream = self.pipeline.open(name, first_index)
            self.recorders[name] = Recorder(stream.localizer)
            stream.localizer = self.recorders[name]  # type: ignore[assignment]

    def step(self) -> None:
        self.published += self.pipeline.step()

    def settle(self) -> None:
        """Until nothing is left to do, nor in flight."""
        while True:
            self.woken.clear()
            if self.pipeline.pending():
                self.step()
            elif (due_in_s := self.pipeline.due_in_s()) is not None:
                self.woken.wait(due_in_s)  # a batch waits for others
            elif any(each.asked > each.processed for each in self.pipeline.streams.values()):
                assert self.woken.wait(PATIENCE_S), "no answer came"
            else:
                return

    def send(self, name: str, count: int) -> None:
        """The next snippets of a recording, as many as there are and as have room."""
        stream, features = self.pipeline.streams[name], self.recordings[name]
        start = stream.next_index - self.first_index
        stop = min(start + count, len(features), stream.send_until - self.first_index)
        self.pipeline.append(name, stream.next_index, features[start:stop])

    def take_turns(self, turns: Iterable[Turn]) -> None:
        for name, count, steps in turns:
            self.send(name, count)
            for _ in range(steps):
                self.step()

    def finish(self, chunk: int = 1000) -> list[Publication]:
        """Send all that is left, end every stream, and return what was published of all."""
        for name, features in self.recordings.items():
            stop = self.first_index + len(features)
            while (stream := self.pipeline.streams[name]).next_index < stop:
                self.send(name, chunk)
                self.settle()
            assert stream.next_index == stop
            self.pipeline.end(name, stop)
        self.settle()
        assert not self.pipeline.streams
        return self.published

    def scores(self, name: str) -> Floats:
        """What reached the localizer of a stream."""
        return np.concatenate(self.recorders[name].scores)


def last_stop(
    scores: Floats, config: LocalizationConfig, proposal: Proposal, first_index: int, known: int
) -> int:
    """When the last of what a proposal may wait for was over: its own run, other runs or actions of
    its class that it is a part of, and those that such a one is a part of, as far as the snippets
    below ``known`` tell. What goes on then is over there if the scores end, and does not count
    otherwise."""
    spans = _spans(scores, config, proposal, first_index, known)
    start, end, stops = proposal.start, proposal.end, [proposal.run_stop]
    reach = config.border_limit  # by which a border may have moved
    while True:
        met = [each for each in spans if each[0] - reach < end and each[1] + reach > start]
        if not met:
            return max(stops)
        spans = [each for each in spans if each not in met]
        stops += [stop for _, stop in met]
        start, end = min([start, *(each[0] for each in met)]), max([end, *stops])


def _spans(
    scores: Floats, config: LocalizationConfig, proposal: Proposal, first_index: int, known: int
) -> list[tuple[int, int]]:
    """Runs and actions of a proposal's class, from when to when."""
    track = scores[: known - first_index, proposal.label_index].astype(float).tolist()
    levels = [(threshold, threshold) for threshold in config.thresholds]
    spans = []
    for start, end in [*levels, (config.event_start, config.event_end)]:
        begun = None
        over_at_last = [None] if known == first_index + len(scores) else []
        for t, p in enumerate([*track, *over_at_last], first_index):
            # A run is over at its threshold, an action only below its end.
            over = p is None or p < end or (start == end and p <= end)
            if begun is not None and over:
                spans.append((begun, t))
                begun = None
            elif begun is None and p is not None and p > start:
                begun = t
    return spans


def of_stream(published: Iterable[Publication], name: str) -> list[Publication]:
    return [each for each in published if each.stream == name]


def finals(published: Iterable[Publication]) -> list[FinalProposal]:
    return [each for each in published if isinstance(each, FinalProposal)]


def renamed(published: Iterable[Publication], name: str) -> list[Publication]:
    return [replace(each, stream=name) for each in published]


def assert_same(got: list[Publication], expected: list[Publication]) -> None:
    """Equal in all fields, in the same order; numbers but for rounding."""
    assert [type(each) for each in got] == [type(each) for each in expected]
    for one, other in zip(got, expected, strict=True):
        assert _exact(one) == _exact(other)
        np.testing.assert_allclose(_measured(one), _measured(other), atol=1e-4)


def _exact(publication: Publication) -> Publication:
    match publication:
        case ActionEvent():
            end_s = None if publication.end_s is None else 0.0
            return replace(publication, start_s=0.0, end_s=end_s, score=0.0)
        case FinalProposal():
            return replace(publication, start_s=0.0, end_s=0.0, score=0.0)
    return publication


def _measured(publication: Publication) -> list[float]:
    if isinstance(publication, StreamNotice):
        return []
    return [publication.start_s, publication.end_s or 0.0, publication.score]
