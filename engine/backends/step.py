"""The step graph of a bundle as an ONNX Runtime session, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from hrpro.engine.incremental import Floats, Stepped
from hrpro.engine.inference import Outputs
from hrpro.export.bundle import Bundle


class StepSession:
    """Stage 1 a step at a time."""

    def __init__(
        self, bundle: Bundle, options: onnxruntime.SessionOptions, providers: Sequence[str]
    ) -> None:
        layout, graph = bundle.manifest.step, bundle.step_graph
        assert layout is not None, "the bundle has no step graph"
        self._layout = layout
        self._delay = bundle.manifest.lookahead_snippets
        self._session = onnxruntime.InferenceSession(
            # It takes longer than what it joins: 8 % of a step (D = 2048, 64 streams, int8).
            graph,
            options,
            providers,
            disabled_optimizers=["SkipLayerNormFusion", "MatMulScaleFusion"],
        )
        # A model without attention has no rings, and its graph no use for an arrival.
        self._has_arrival = any(each.name == "arrival" for each in self._session.get_inputs())
        self._outputs = [
            "scores",
            "embedding",
            "attention",
            *(f"new_{name}" for name in layout.state),
        ]

    def step(
        self,
        features: Floats,
        valid: NDArray[np.bool_],
        arrival: NDArray[np.int64],
        state: Sequence[Floats],
    ) -> Stepped:
        """See `hrpro.engine.incremental.StepScorer`."""
        inputs = {"features": features, "valid": valid, "arrival": arrival}
        inputs |= dict(zip(self._layout.state, state, strict=True))
        if not self._has_arrival:
            del inputs["arrival"]
        scores, embedding, attention, *new = self._session.run(self._outputs, inputs)
        return (scores, embedding, attention), new

    def whole(self, features: Floats, valid: NDArray[np.bool_]) -> Outputs:
        """Windows (B, T, D) and validity (B, T) -> P (B, T, C), embedding (B, T, W) and attention
        (B, T): each as a stream that begins with it, in one step."""
        B, delay = len(features), self._delay
        state = [np.zeros((B, *shape), dtype=np.float32) for shape in self._layout.state.values()]
        (scores, embedding, attention), _ = self.step(
            np.pad(features, ((0, 0), (0, delay), (0, 0))),
            np.pad(valid, ((0, 0), (self._layout.history, delay))),
            np.zeros(B, dtype=np.int64),
            state,
        )
        return scores[:, delay:], embedding[:, delay:], attention[:, delay:]
