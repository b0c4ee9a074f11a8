"""Golden windows: inputs with the outputs that a bundle gave where it was made.

An engine runs them when it loads the bundle: what a driver, a library or a processor computes
otherwise is found before the first snippet comes.

    golden.npz    features (B, T, D), valid (B, T) -> scores (B, T, C), embedding (B, T, W)
                  stretch (T, W), proposals (N, 2) -> completeness (N, C), refined (N, 2),
                  refined_completeness (N, C)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hrpro.export.bundle import Bundle, BundleError

if TYPE_CHECKING:
    from hrpro.engine.inference import Backend

Floats = NDArray[np.float32]

_PROPOSALS = 5


def write_golden(path: Path, backend: Backend, features: Floats) -> None:
    """Write what ``backend`` makes of two windows, features (2, T, D); the first begins later."""
    B, T, _ = features.shape
    valid = np.ones((B, T), dtype=np.bool_)
    valid[0, : T // 3] = False
    scores, embedding, _ = backend.score_snippets(features, valid)
    random = np.random.default_rng(0)
    start = random.uniform(0, T, _PROPOSALS)
    borders = np.stack([start, start + random.uniform(0.5, 20, _PROPOSALS)], axis=1)
    proposals = borders.astype(np.float32)
    completeness, refined, again = backend.score_instances(embedding[1], proposals)
    np.savez(
        path, features=features, valid=valid, scores=scores, embedding=embedding,
        stretch=embedding[1], proposals=proposals, completeness=completeness, refined=refined,
        refined_completeness=again,
    )  # fmt: skip


def check_golden(bundle: Bundle, backend: Backend) -> dict[str, float]:
    """The largest difference by kind; nothing for a bundle without golden windows.

    Raises BundleError for one above the bundle's tolerance.
    """
    if bundle.golden is None:
        return {}
    with np.load(bundle.golden, allow_pickle=False) as golden:
        scores, embedding, _ = backend.score_snippets(golden["features"], golden["valid"])
        completeness, refined, again = backend.score_instances(
            golden["stretch"], golden["proposals"]
        )
        valid = golden["valid"]  # what is not there has outputs, but nobody reads them
        pairs = (
            ("scores", scores[valid], golden["scores"][valid]),
            ("embedding", embedding[valid], golden["embedding"][valid]),
            ("completeness", completeness, golden["completeness"]),
            ("borders", refined, golden["refined"]),
            ("completeness", again, golden["refined_completeness"]),
        )
        worst = dict.fromkeys(bundle.manifest.tolerances, 0.0)
        for name, got, expected in pairs:
            worst[name] = float(np.maximum(worst[name], np.abs(got - expected).max()))
    for name, tolerance in bundle.manifest.tolerances.items():
        if not worst[name] <= tolerance:  # NaN does not pass
            raise BundleError(
                f"{bundle.folder}: golden windows: {name} differ by {worst[name]:.3g} from those "
                f"of the export, expected at most {tolerance:g}: this machine computes otherwise"
            )
    return worst
