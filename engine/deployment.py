"""A bundle at work in a running engine, and which of several works for which stream.

    current     all streams, but
    canary      those that were named, if a bundle is tried on some
    previous    none: it stays ready, so that going back takes no loading

Bundles change places between two batches. A stream keeps its snippets, its open actions and its
counts; that needs bundles whose features and windows agree.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hrpro.engine.asking import UnderWay
from hrpro.engine.batcher import Batcher, Job
from hrpro.engine.config import EngineConfig
from hrpro.engine.incremental import Steps, StepScorer, most_in_a_call, runs_by_steps
from hrpro.engine.inference import Backend, Inference, Windows
from hrpro.engine.localizer import StreamLocalizer
from hrpro.engine.messages import Publication
from hrpro.engine.publish import Publisher
from hrpro.engine.windows import plan_windows
from hrpro.engine.wire import HrproError
from hrpro.export.bundle import SNIPPET_GRAPH, Manifest

if TYPE_CHECKING:
    from hrpro.engine.stream import Stream

# Batches whose streams wait for stage 2, at most: what they hold is bounded by that.
_MOST_UNDER_WAY = 4


class DeployError(HrproError):
    """A bundle cannot take the place of another one in a running engine."""


class Deployment:
    """A bundle and all that works for it. Raises SettingsError for windows that do not fit it."""

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        config: EngineConfig,
        provider: str | None = None,
    ) -> None:
        self.manifest = manifest
        self.provider = provider or config.provider  # what computes stage 1
        self.bundle_id = manifest.bundle_id
        self.backend = backend
        self.config = config
        self.inference = Inference(config.batches_in_flight, config.inference_workers)
        self.under_way: list[UnderWay[list[Publication]]] = []  # of the batches that were taken
        self.plan = plan_windows(manifest, config)
        batch_limit = most_in_a_call(manifest, config)
        self.steps: Steps | None = None
        self._windows: Windows | None = None
        if runs_by_steps(manifest, config):
            self.steps = Steps(manifest, cast(StepScorer, backend), config)
        else:
            self._windows = Windows(backend, self.plan, manifest.feature_dim, batch_limit)
        self.batcher = Batcher(
            self.plan,
            batch_limit,
            config.batch_wait_s,
            place_of=None if self.steps is None else self.steps.place_of,
        )
        self.publisher = Publisher(manifest.clock, manifest.classes, manifest.bundle_id)

    def warm_up(self, backend: Backend) -> None:
        """Let a backend compute a batch of each size, so that the first snippets do not wait."""
        if self.steps is not None:
            self.steps.warm_up(cast(StepScorer, backend), self.batcher.sizes, self.plan.hop)
            return
        for size in reversed(self.batcher.sizes):
            shape = (size, self.plan.window, self.manifest.feature_dim)
            backend.score_snippets(
                np.zeros(shape, dtype=np.float32), np.zeros(shape[:2], dtype=np.bool_)
            )

    def new_localizer(self, first_index: int, next_action_id: int = 0) -> StreamLocalizer:
        """For a stream that begins, or goes on anew, with this snippet."""
        return StreamLocalizer(
            len(self.manifest.classes),
            self.manifest.embedding_width,
            self.config.localization,
            self.backend,
            self.plan.wait,
            first_index,
            next_action_id,
        )

    def restored_localizer(self, first_index: int, state: Mapping[str, Any]) -> StreamLocalizer:
        """One that goes on from the state of another, see `StreamLocalizer.restored`."""
        return StreamLocalizer.restored(
            len(self.manifest.classes),
            self.manifest.embedding_width,
            self.config.localization,
            self.backend,
            self.plan.wait,
            first_index,
            state,
        )

    def ask(self, jobs: Sequence[Job], wake: Callable[[], None]) -> None:
        """Begin to score jobs; ``wake`` is called when the answer comes later."""
        scorer = self.steps or self._windows
        assert scorer is not None
        self.inference.ask(jobs, scorer.prepare(jobs), wake)

    @property
    def has_answer(self) -> bool:
        """Whether streams can go on: by what stage 2 says, or by a batch of stage 1."""
        return self.has_batch or any(not each.waits for each in self.under_way)

    @property
    def has_batch(self) -> bool:
        """Whether the oldest batch of stage 1 is there, and none of its streams waits for what
        stage 2 says of an earlier one."""
        return (
            self.inference.has_answer
            and len(self.under_way) < _MOST_UNDER_WAY
            and not any(job.stream.is_under_way for job in self.inference.oldest)
        )

    def leave(self, stream: Stream) -> None:
        """A stream is over, or another bundle works for it."""
        self.batcher.withdraw(stream)
        if self.steps is not None:
            self.steps.leave(stream)

    def forget(self) -> None:
        """What is in flight will be asked for again."""
        streams = self.inference.forget()
        if self.steps is not None:
            self.steps.forget(streams)

    def take_over(self, stream: Stream) -> bool:
        """Work for a stream from its next window on; returns whether that is a change."""
        before, stream.deployment = stream.deployment, self
        if before is self:
            return False
        before.leave(stream)
        before.forget()  # stage 2 of this one cannot read what that one embeds
        embeds_alike = before.manifest.files[SNIPPET_GRAPH] == self.manifest.files[SNIPPET_GRAPH]
        stream.localizer.use(
            self.config.localization,
            self.backend,
            None if embeds_alike else self.manifest.embedding_width,
        )
        return True


def relied_on(manifest: Manifest, config: EngineConfig) -> dict[str, Any]:
    """What the streams of an engine rely on, of a bundle with these settings."""
    plan = plan_windows(manifest, config)
    return {
        "feature_dim": manifest.feature_dim,
        "frames_per_s": manifest.frames_per_s,
        "snippet_frames": manifest.snippet_frames,
        "classes": ", ".join(manifest.classes),
        "window": plan.window,
        "hop": plan.hop,
        "context": plan.context,
        "look-ahead": plan.lookahead,
    }


def check_agreement(expected: dict[str, Any], manifest: Manifest, config: EngineConfig) -> None:
    """Raise DeployError that says in what a bundle differs from what streams rely on."""
    new = relied_on(manifest, config)
    differing = [
        f"{name}: expected {value}, got {new[name]}"
        for name, value in expected.items()
        if new[name] != value
    ]
    if differing:
        raise DeployError(
            f"bundle {manifest.bundle_id} cannot take over the streams of this engine: "
            f"{'; '.join(differing)}; an engine of its own can serve it"
        )


@dataclass
class Deployments:
    """The bundles of an engine; all of them agree, see `check_agreement`."""

    current: Deployment
    previous: Deployment | None = None
    canary: Deployment | None = None
    canary_streams: frozenset[str] = field(default_factory=frozenset)

    @property
    def bundle_ids(self) -> tuple[str, str | None, str | None]:
        """Of the current, the previous and the canary."""
        previous, canary = (
            None if each is None else each.bundle_id for each in (self.previous, self.canary)
        )
        return self.current.bundle_id, previous, canary

    def of(self, stream: str) -> Deployment:
        """The one that works for a stream, whether it is open or will be."""
        if self.canary is not None and stream in self.canary_streams:
            return self.canary
        return self.current

    def deploy(self, deployment: Deployment, canary_streams: Collection[str] = ()) -> None:
        """Let a bundle work for all streams, or for some; for all ends what was tried on some."""
        if canary_streams:
            self.canary, self.canary_streams = deployment, frozenset(canary_streams)
            return
        if deployment.bundle_id != self.current.bundle_id:
            self.previous = self.current
        self.current = deployment
        self._end_canary()

    def roll_back(self) -> None:
        """End the trial on some streams; without one, change places with the previous bundle.

        Raises DeployError where there is neither.
        """
        if self.canary is not None:
            self._end_canary()
        elif self.previous is not None:
            self.current, self.previous = self.previous, self.current
        else:
            raise DeployError(
                f"roll back: expected a bundle before {self.current.bundle_id}, there was none"
            )

    def at_work(self) -> list[Deployment]:
        """Those that have streams."""
        return [self.current] if self.canary is None else [self.current, self.canary]

    def _end_canary(self) -> None:
        self.canary, self.canary_streams = None, frozenset()
