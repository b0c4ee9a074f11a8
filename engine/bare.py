"""Stage 1 with nothing around it: for what a machine can do, and to hold the engine against.

Each of these computes the next hop of some streams again and again, on features that are noise, as
the engine would: by steps from states that are kept, or by windows.
"""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np

from hrpro.engine.config import EngineConfig
from hrpro.engine.incremental import StepScorer, cache_dtype, new_pool, runs_by_steps
from hrpro.engine.inference import Backend
from hrpro.engine.windows import plan_windows
from hrpro.export.bundle import Manifest


class Bare(Protocol):
    """The next hop of streams."""

    def run(self, streams: int) -> None:
        """Compute it for so many of them, in one call; at most as many as were said at first."""
        ...


def new_bare(manifest: Manifest, backend: Backend, config: EngineConfig, streams: int) -> Bare:
    """As an engine with these settings computes, for up to so many streams in a call."""
    plan = plan_windows(manifest, config)
    if runs_by_steps(manifest, config):
        return BareSteps(manifest, cast(StepScorer, backend), config, plan.hop, streams)
    return BareWindows(manifest, backend, plan.window, streams)


class BareWindows:
    """A window each, of ``window`` snippets."""

    def __init__(self, manifest: Manifest, backend: Backend, window: int, streams: int) -> None:
        shape = (streams, window, manifest.feature_dim)
        self._backend = backend
        self._features = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        self._valid = np.ones(shape[:2], dtype=np.bool_)

    def run(self, streams: int) -> None:
        """See `Bare`."""
        self._backend.score_snippets(self._features[:streams], self._valid[:streams])


class BareSteps:
    """A step of ``hop`` snippets, from the states of streams that lie side by side."""

    def __init__(
        self, manifest: Manifest, scorer: StepScorer, config: EngineConfig, hop: int, streams: int
    ) -> None:
        assert manifest.step is not None, "the bundle has no step graph"
        history = manifest.step.history
        self._pool = new_pool(scorer, manifest.step, streams, cache_dtype(config))
        self._slots = np.arange(streams)
        random = np.random.default_rng(0)
        shape = (streams, hop, manifest.feature_dim)
        self._features = random.standard_normal(shape, dtype=np.float32)
        # What was never written to is one page of zeros, and costs nothing to read.
        past = random.standard_normal((1, history, shape[2]), dtype=np.float32)
        self._arrival = np.full(streams, history)
        for slot in self._slots:
            there = np.ones((1, 2 * history), dtype=np.bool_)
            self._pool.step(past, there, np.array([slot]), np.zeros(1, dtype=np.int64))

    def run(self, streams: int) -> None:
        """See `Bare`; what comes of it is kept."""
        slots, arrival = self._slots[:streams], self._arrival[:streams]
        features = self._features[:streams]
        new_flags = np.ones(features.shape[:2], dtype=np.bool_)
        flags = np.concatenate([self._pool.flags(slots), new_flags], axis=1)
        self._pool.step(features, flags, slots, arrival)
        arrival += features.shape[1]
