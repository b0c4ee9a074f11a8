"""How a stream is cut into windows, and which positions of a window count.

Windows are aligned to the snippet index: the window with hop number k gives the scores of the
snippets k * hop <= t < (k + 1) * hop, however the snippets arrived.

    snippet index      k*hop - context        k*hop        (k+1)*hop    + look-ahead
    window             |------ context ---------|--- counts ---|--- look-ahead ---|

Where a model attends within a band, the positions that count are exact: they see all that they
would see in the whole recording.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.config import EngineConfig
from hrpro.engine.settings import SettingsError
from hrpro.export.bundle import Manifest

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class WindowPlan:
    """Lengths in snippets. ``wait``: from the end of a run to its publication."""

    window: int
    hop: int
    context: int
    lookahead: int
    wait: int

    def stop(self, processed: int) -> int:
        """One past the last snippet that the window for snippet ``processed`` needs."""
        return (processed // self.hop + 1) * self.hop + self.lookahead

    def windows(self, first: int, until: int) -> int:
        """How many give the scores of the snippets ``first <= t < until``, of one at least."""
        return (until - 1) // self.hop - first // self.hop + 1

    def counts_until(self, processed: int) -> int:
        """One past the last snippet whose scores that window gives."""
        return self.stop(processed) - self.lookahead


def in_pieces(
    score: Callable[[Floats], tuple[Floats, ...]],
    features: Floats,
    context: int,
    lookahead: int,
    piece: int = 1024,
) -> tuple[Floats, ...]:
    """``score`` of a whole recording (T, D), computed in pieces where it is exact in windows.

    Attention over T snippets needs memory for T * T weights; pieces of 1024 snippets bound that.
    ``score`` takes (n, D) and returns arrays of n rows.
    """
    parts = []
    for first in range(0, len(features), piece):
        start = max(0, first - context)
        outputs = score(features[start : first + piece + lookahead])
        parts.append([each[first - start : first - start + piece] for each in outputs])
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))


def decision_lookahead_s(manifest: Manifest, config: EngineConfig) -> float:
    """From the end of a proposal to when it is final, in seconds: as configured, or the least."""
    if config.lookahead_s == "strict":
        return manifest.clock.seconds(least_lookahead(manifest, config))
    return config.lookahead_s


def least_lookahead(manifest: Manifest, config: EngineConfig) -> int:
    """The shortest look-ahead that model and hop allow, in snippets.

    The last snippet of a hop waits for none of its own, the first one for all of them. That a run
    is over shows in the score of the snippet behind it.
    """
    return manifest.lookahead_snippets + config.window.hop_snippets


def plan_windows(manifest: Manifest, config: EngineConfig) -> WindowPlan:
    """The windows for a bundle. Raises SettingsError if they are too short to be exact, or if the
    wished look-ahead is shorter than what the model itself needs."""
    hop = config.window.hop_snippets
    context, lookahead = manifest.context_snippets, manifest.lookahead_snippets
    complaints = []
    window = 0
    try:
        window = config.window.length(context, lookahead)
    except SettingsError as error:
        complaints.append(str(error))
    needed = least_lookahead(manifest, config)
    wished = int(manifest.clock.position(decision_lookahead_s(manifest, config)) + 1e-9)
    if wished < needed:
        complaints.append(
            f"lookahead_s: expected at least {manifest.clock.seconds(needed):.2f} (look-ahead "
            f"{lookahead} + hop {hop} snippets) or strict, got {config.lookahead_s}; "
            "a shorter hop allows less"
        )
    if complaints:
        raise SettingsError("\n  ".join(complaints))
    return WindowPlan(window, hop, window - hop - lookahead, lookahead, wished - needed + 1)
