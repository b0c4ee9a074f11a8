"""What an engine will need, told from a bundle and its settings before anything is served."""

from __future__ import annotations

import time
from typing import Any, cast

import numpy as np

from hrpro.engine.config import EngineConfig
from hrpro.engine.deployment import Deployment
from hrpro.engine.inference import Backend
from hrpro.engine.stream import Stream
from hrpro.engine.windows import decision_lookahead_s
from hrpro.export.bundle import Manifest

# A window is computed so often, unless that takes longer than so many seconds.
_TIMED_WINDOWS = 5
_TIMED_S = 1.0


def stream_bytes(manifest: Manifest, config: EngineConfig) -> int:
    """Memory of one stream: that of a real one, which is made and dropped.

    It is allocated, but never written to: nothing of it becomes resident. Raises SettingsError for
    windows that do not fit the bundle.
    """
    no_backend = cast(Backend, None)  # nothing is computed
    deployment = Deployment(manifest, no_backend, config)
    own_bytes = Stream("footprint", 1, 0, deployment).buffer_bytes
    return own_bytes + (0 if deployment.steps is None else deployment.steps.stream_bytes)


def derived(deployment: Deployment) -> dict[str, Any]:
    """What follows from the settings; each name says its unit.

    ``stream_gflop_per_s`` is what stage 1 computes for a second of one stream, null where the
    bundle does not know; of a window that is longer or shorter than the bundle's, in proportion.
    ``window_ms`` is measured here, and ``streams_in_real_time`` are as many as inference alone, a
    window at a time, could keep up with.
    """
    manifest, config, plan = deployment.manifest, deployment.config, deployment.plan
    clock = manifest.clock
    own_bytes = stream_bytes(manifest, config)
    hop_s = clock.seconds(plan.hop)
    gflop = manifest.window_flops / 1e9 * plan.window / manifest.window_length
    window_ms = _window_ms(deployment)
    return {
        "bundle_id": manifest.bundle_id,
        "classes": len(manifest.classes),
        "feature_dim": manifest.feature_dim,
        "snippet_s": clock.snippet_s,
        "window_snippets": plan.window,
        "window_s": clock.seconds(plan.window),
        "hop_snippets": plan.hop,
        "hop_s": hop_s,
        "context_snippets": plan.context,
        "model_lookahead_snippets": plan.lookahead,
        "model_lookahead_s": clock.seconds(plan.lookahead),
        "lookahead_s": decision_lookahead_s(manifest, config),
        "stream_bytes": own_bytes,
        "max_streams": config.max_streams,
        "max_streams_bytes": config.max_streams * own_bytes,
        "batch_bytes": config.batch_limit * plan.window * (4 * manifest.feature_dim + 1),
        "window_gflop": gflop or None,
        "stream_gflop_per_s": gflop / hop_s or None,
        "window_ms": window_ms,
        "streams_in_real_time": int(1000 * hop_s / window_ms),
    }


def _window_ms(deployment: Deployment) -> float:
    """The median of some windows, one at a time; the backend is warm."""
    shape = (1, deployment.plan.window, deployment.manifest.feature_dim)
    features = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    valid = np.ones(shape[:2], dtype=np.bool_)
    times_s: list[float] = []
    while len(times_s) < _TIMED_WINDOWS and sum(times_s) < _TIMED_S:
        began_s = time.perf_counter()
        deployment.backend.score_snippets(features, valid)
        times_s.append(time.perf_counter() - began_s)
    return 1000 * float(np.median(times_s))
