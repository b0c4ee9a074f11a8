"""A whole recording at once gives the proposals that the engine finds snippet by snippet."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_model import CLASSES, DIM, tiny_config, tiny_model, tiny_recording

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.localizer import localize
from hrpro.engine.timebase import SnippetClock
from hrpro.export.verify import torch_instances
from hrpro.training.localize import localize_recording
from hrpro.training.metrics import Segments, to_segments
from hrpro.training.snippet_stage import SnippetScores
from hrpro.training.train import TrainedModel

CLOCK = SnippetClock(25, 16)
Floats = NDArray[np.float32]


class Scorer:
    """Stage 2 as the engine asks for it."""

    def __init__(self, model: TrainedModel) -> None:
        self.model = model

    def score_instances(self, embedding: Floats, proposals: Floats) -> tuple[Floats, ...]:
        return torch_instances(self.model, embedding, proposals)


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    return tiny_model(tiny_config())


def output_of(length: int, seed: int) -> SnippetScores:
    """Scores that go up and down slowly, and an embedding."""
    scores = tiny_recording(length, seed)[:, : len(CLASSES)]
    embedding = np.abs(tiny_recording(length, seed + 1)[:, :DIM])
    scores = (1 / (1 + np.exp(2 - 3 * scores))).astype(np.float32)
    return SnippetScores(scores, scores, scores.max(axis=1), embedding)


def same(got: Segments, expected: Segments) -> None:
    """The same proposals in any order."""
    one, other = (
        np.stack([each.label_index, each.start_s, each.end_s, each.score], axis=1)
        for each in (got, expected)
    )
    assert len(one) == len(other)
    difference = np.abs(one[:, None] - other[None]).max(axis=2)  # (N, N)
    if len(one):
        assert difference.min(axis=0).max() < 2e-4 and difference.min(axis=1).max() < 2e-4


# The outer regions are as wide as the model was made for.
configs = st.builds(
    LocalizationConfig,
    thresholds=st.sampled_from([(0.3,), (0.1, 0.2, 0.4, 0.6)]),
    peak_gate=st.sampled_from([0.0, 0.3]),
    keep_unrefined=st.booleans(),
    # Shorter than some of the runs: what lies further back is forgotten, here as there.
    history_snippets=st.sampled_from([32, 512]),
)


@given(st.integers(0, 150), st.integers(0, 10_000), configs, st.booleans())
# Always the same examples: where soft-NMS meets a near tie, rounding decides which one comes first.
@settings(max_examples=120, deadline=None, derandomize=True)
def test_they_are_the_proposals_of_the_engine(
    model: TrainedModel, length: int, seed: int, config: LocalizationConfig, refined: bool
) -> None:
    output = output_of(length, seed)
    scorer, instance = (Scorer(model), model.instance) if refined else (None, None)
    expected = to_segments(localize(output.scores, output.embedding, config, scorer), CLOCK)
    got = localize_recording(output, config, CLOCK, instance)
    same(got, expected)


def test_the_best_of_a_class_comes_first(model: TrainedModel) -> None:
    found = localize_recording(output_of(150, 3), LocalizationConfig(), CLOCK, model.instance)
    assert len(found) > 20
    assert (np.diff(found.label_index) >= 0).all()
    for label in range(len(CLASSES)):
        assert (np.diff(found.of_class(label).score) <= 0).all()


def test_stage_2_has_the_say_that_it_is_trusted_with() -> None:
    model = tiny_model(tiny_config())
    model.instance.trust.fill_(0.4)
    output = output_of(150, 3)
    # In a bundle the share is in the weight; the borders have it in the graph.
    live = LocalizationConfig(completeness_weight=0.4 * 0.5)
    expected = to_segments(localize(output.scores, output.embedding, live, Scorer(model)), CLOCK)
    got = localize_recording(output, LocalizationConfig(), CLOCK, model.instance)
    same(got, expected)
    # Without any trust it is stage 1.
    model.instance.trust.zero_()
    got = localize_recording(output, LocalizationConfig(), CLOCK, model.instance)
    stage1 = localize_recording(output, LocalizationConfig(), CLOCK, None)
    same(got, stage1)
