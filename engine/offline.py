"""Whole recordings through a bundle: what the live engine is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.localizer import localize
from hrpro.engine.pipeline import Backend
from hrpro.engine.refine import Proposal


def localize_recording(
    backend: Backend, features: NDArray[np.float32], config: LocalizationConfig
) -> list[Proposal]:
    """Final proposals of a recording, features (T, D), with all of it known."""
    valid = np.ones((1, len(features)), dtype=np.bool_)
    scores, embedding = backend.score_snippets(features[None], valid)
    return localize(scores[0], embedding[0], config, backend)
