"""Bare inference computes what an engine would: each step goes on from the one before."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from driving import engine_config
from numpy.typing import NDArray
from tiny_model import CONTEXT, DIM, LOOKAHEAD

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.bare import BareSteps, BareWindows, new_bare
from hrpro.engine.incremental import Floats, Stepped
from hrpro.engine.inference import Outputs
from hrpro.export.bundle import Bundle


class Remembering:
    """A backend that remembers its last call."""

    def __init__(self, inner: OnnxRuntimeBackend) -> None:
        self.score_instances = inner.score_instances
        self.features = self.scores = np.zeros(0, np.float32)
        self._inner = inner

    def score_snippets(self, features: Floats, valid: NDArray[np.bool_]) -> Outputs:
        self.features = features.copy()
        outputs = self._inner.score_snippets(features, valid)
        self.scores = outputs[0]
        return outputs

    def score_step(
        self,
        features: Floats,
        valid: NDArray[np.bool_],
        arrival: NDArray[np.int64],
        state: Sequence[Floats],
    ) -> Stepped:
        self.features = features.copy()
        stepped = self._inner.score_step(features, valid, arrival, state)
        self.scores = stepped[0][0]
        return stepped


@pytest.mark.parametrize("hop", [1, 4, 20])
def test_steps_go_on_from_what_was_kept(
    bundle: Bundle, backend: OnnxRuntimeBackend, hop: int
) -> None:
    """The same hop again and again: in the end the scores are those of a window full of it."""
    remembering = Remembering(backend)
    config = engine_config(bundle.manifest, hop=hop, lookahead_s="strict")
    bare = new_bare(bundle.manifest, remembering, config, streams=5)
    assert isinstance(bare, BareSteps)
    steps = math.ceil((CONTEXT + LOOKAHEAD) / hop) + 1
    for _ in range(steps):
        bare.run(3)
    assert remembering.features.shape == (3, hop, DIM)
    window = np.tile(remembering.features, (1, steps, 1))
    scores, _, _ = backend.score_snippets(window, np.ones(window.shape[:2], np.bool_))
    final = slice(scores.shape[1] - LOOKAHEAD - hop, scores.shape[1] - LOOKAHEAD)
    np.testing.assert_allclose(remembering.scores, scores[:, final], atol=1e-5)
    assert len(np.unique(remembering.scores)) > 1


def test_windows_where_they_are_asked_for(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    config = engine_config(bundle.manifest, hop=2, window=40).model_copy(
        update={"inference": "window"}
    )
    remembering = Remembering(backend)
    bare = new_bare(bundle.manifest, remembering, config, streams=5)
    assert isinstance(bare, BareWindows)
    bare.run(3)
    assert remembering.features.shape == (3, 40, DIM)
