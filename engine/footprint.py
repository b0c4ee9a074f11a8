"""What an engine will need, told from a bundle and its settings before anything is served."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from hrpro.engine.bare import Bare, new_bare
from hrpro.engine.config import EngineConfig
from hrpro.engine.deployment import Deployment
from hrpro.engine.inference import Backend
from hrpro.engine.stream import Stream
from hrpro.engine.windows import decision_lookahead_s
from hrpro.export.bundle import Manifest

# A call is made so often, unless that takes longer than so many seconds.
_TIMED_CALLS = 5
_TIMED_S = 1.0


@dataclass(frozen=True)
class StreamBytes:
    """Memory of one stream: its rings, and what is kept of its past where steps are computed."""

    buffers: int
    state: int

    @property
    def all(self) -> int:
        """Both."""
        return self.buffers + self.state


def stream_bytes(manifest: Manifest, config: EngineConfig) -> StreamBytes:
    """Memory of one stream: that of a real one, which is made and dropped.

    It is allocated, but never written to: nothing of it becomes resident. Raises SettingsError for
    windows that do not fit the bundle.
    """
    no_backend = cast(Backend, None)  # nothing is computed
    deployment = Deployment(manifest, no_backend, config)
    return StreamBytes(
        buffers=Stream("footprint", 1, 0, deployment).buffer_bytes,
        state=0 if deployment.steps is None else deployment.steps.stream_bytes,
    )


def derived(deployment: Deployment) -> dict[str, Any]:
    """What follows from the settings; each name says its unit.

    ``hop_gflop`` is what stage 1 computes for a hop of one stream, null where the bundle does not
    know: a step, or a window, one that is longer or shorter than the bundle's in proportion.
    ``hop_ms`` and ``batch_ms`` are measured here: the hop of one stream, and of ``batch_hops``
    streams together. At the cost of the latter inference alone could keep up with
    ``streams_in_real_time``.
    """
    manifest, config, plan = deployment.manifest, deployment.config, deployment.plan
    clock = manifest.clock
    own = stream_bytes(manifest, config)
    hop_s = clock.seconds(plan.hop)
    gflop = _hop_gflop(deployment)
    batch = min(deployment.batcher.sizes[-1], config.max_streams)
    bare = new_bare(manifest, deployment.backend, config, batch)
    hop_ms, batch_ms = (1000 * _median_s(bare, streams) for streams in (1, batch))
    return {
        "bundle_id": manifest.bundle_id,
        "classes": len(manifest.classes),
        "feature_dim": manifest.feature_dim,
        "snippet_s": clock.snippet_s,
        "inference": "window" if deployment.steps is None else "incremental",
        "window_snippets": plan.window,
        "window_s": clock.seconds(plan.window),
        "hop_snippets": plan.hop,
        "hop_s": hop_s,
        "context_snippets": plan.context,
        "model_lookahead_snippets": plan.lookahead,
        "model_lookahead_s": clock.seconds(plan.lookahead),
        "lookahead_s": decision_lookahead_s(manifest, config),
        "buffer_bytes": own.buffers,
        "state_bytes": own.state,
        "stream_bytes": own.all,
        "max_streams": config.max_streams,
        "max_streams_bytes": config.max_streams * own.all,
        "batch_bytes": batch * _row_bytes(deployment),
        "hop_gflop": gflop or None,
        "stream_gflop_per_s": gflop / hop_s or None,
        "hop_ms": hop_ms,
        "batch_hops": batch,
        "batch_ms": batch_ms,
        "streams_in_real_time": int(1000 * hop_s * batch / batch_ms),
    }


def _hop_gflop(deployment: Deployment) -> float:
    manifest, plan = deployment.manifest, deployment.plan
    if deployment.steps is not None:
        assert manifest.step is not None
        return manifest.step.snippet_flops / 1e9 * plan.hop
    return manifest.window_flops / 1e9 * plan.window / manifest.window_length


def _row_bytes(deployment: Deployment) -> int:
    """What inference reads for a hop of one stream: features and flags, and by steps a copy of its
    state, which is made where the streams of a batch do not lie side by side."""
    manifest, plan = deployment.manifest, deployment.plan
    if manifest.step is None or deployment.steps is None:
        return plan.window * (4 * manifest.feature_dim + 1)
    state = sum(int(np.prod(shape)) for shape in manifest.step.state.values())
    return 4 * (plan.hop * manifest.feature_dim + state) + manifest.step.history + plan.hop


def _median_s(bare: Bare, streams: int) -> float:
    """Of some calls; the backend is warm."""
    times_s: list[float] = []
    while len(times_s) < _TIMED_CALLS and sum(times_s) < _TIMED_S:
        began_s = time.perf_counter()
        bare.run(streams)
        times_s.append(time.perf_counter() - began_s)
    return float(np.median(times_s))
