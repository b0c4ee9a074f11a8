"""Whole recordings through a bundle: what the live engine is compared with."""

from __future__ import annotations

import numpy as np

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.inference import Backend
from hrpro.engine.localizer import localize
from hrpro.engine.refine import Proposal
from hrpro.engine.windows import Floats, in_pieces
from hrpro.export.bundle import Manifest


def localize_recording(
    backend: Backend, manifest: Manifest, features: Floats, config: LocalizationConfig
) -> list[Proposal]:
    """Final proposals of a recording, features (T, D), with all of it known."""

    def score(piece: Floats) -> tuple[Floats, ...]:
        valid = np.ones((1, len(piece)), dtype=np.bool_)
        return tuple(each[0] for each in backend.score_snippets(piece[None], valid)[:2])

    if manifest.exact:
        context, lookahead = manifest.context_snippets, manifest.lookahead_snippets
        scores, embedding = in_pieces(score, features, context, lookahead)
    else:
        scores, embedding = score(features)
    return localize(scores, embedding, config, backend)
