"""The losses by hand on tiny tensors, mining, the memory of prototypes, and descent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hrpro.engine import soft_nms
from hrpro.engine.timebase import SnippetClock
from hrpro.training.config import (
    InstanceStageConfig,
    ModelConfig,
    SnippetStageConfig,
    TrainingConfig,
)
from hrpro.training.data import DataSet, Recording
from hrpro.training.losses import (
    BaseLoss,
    base_loss,
    contrastive_loss,
    focal_loss,
    instance_loss,
    regression_loss,
    score_loss,
    snippet_loss,
    temporal_iou,
)
from hrpro.training.memory import class_means, initial_prototypes, update_prototypes
from hrpro.training.model import SnippetOutput
from hrpro.training.optimisation import AveragedModel, Descent
from hrpro.training.pseudo_snippets import PseudoSnippets
from hrpro.training.snippet_stage import SnippetStage, _mine

LN_2 = math.log(2)


def pseudo(
    action: list[list[bool]], background: list[bool], confident: list[bool] | None = None
) -> PseudoSnippets:
    return PseudoSnippets(
        torch.tensor([action]),
        torch.tensor([background]),
        torch.tensor([background if confident is None else confident]),
    )


# --- eq. 1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probability", "target", "gamma", "expected"),
    [
        (0.5, 1.0, 2.0, 0.25 * LN_2),  # (1 - 0.5)^2 * ln 2
        (0.5, 0.0, 2.0, 0.25 * LN_2),
        (0.25, 1.0, 2.0, 0.5625 * 2 * LN_2),  # 0.75^2 * ln 4
        (0.25, 0.0, 2.0, 0.0625 * math.log(4 / 3)),  # 0.25^2 * -ln 0.75
        (0.25, 1.0, 0.0, 2 * LN_2),  # without focus: cross entropy
        (1.0, 1.0, 2.0, 0.0),
    ],
)
def test_focal_loss(probability: float, target: float, gamma: float, expected: float) -> None:
    loss = focal_loss(torch.tensor(probability), torch.tensor(target), gamma)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_focal_loss_is_finite_where_the_model_is_certain_and_wrong() -> None:
    probability = torch.tensor([0.0, 1.0], requires_grad=True)
    loss = focal_loss(probability, torch.tensor([1.0, 0.0]), 2.0)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([-math.log(1e-6)] * 2, rel=0.01)
    assert torch.isfinite(probability.grad).all()  # type: ignore[arg-type]


SCORES = torch.tensor([[[0.5, 0.25], [0.25, 0.5], [0.5, 0.5], [0.9, 0.9]]])
ATTENTION = torch.tensor([[0.9, 0.9, 0.5, 0.25]])
MINED = pseudo(
    [[True, False], [True, False], [False, False], [False, False]],
    [False, False, True, True],
    [False, False, False, True],
)


def test_base_loss() -> None:
    loss = base_loss(SCORES, ATTENTION, MINED, gamma=2.0)
    # Snippet 0: 0.5^2 ln 2 to 1, and 0.25^2 * -ln 0.75 to 0; snippet 1: 0.75^2 ln 4, 0.5^2 ln 2
    first = 0.25 * LN_2 + 0.0625 * math.log(4 / 3)
    second = 0.5625 * 2 * LN_2 + 0.25 * LN_2
    assert loss.action.item() == pytest.approx((first + second) / 2, abs=1e-6)
    # A of 0.5 and 0.25 to 0
    background = (0.25 * LN_2 + 0.0625 * math.log(4 / 3)) / 2
    assert loss.background.item() == pytest.approx(background, abs=1e-6)
    # P: twice 0.5, twice 0.9 to 0
    on_classes = (2 * 0.25 * LN_2 + 2 * 0.81 * math.log(10)) / 2
    assert loss.background_class.item() == pytest.approx(on_classes, abs=1e-5)


def test_what_is_only_the_lowest_may_count_less() -> None:
    loss = base_loss(SCORES, ATTENTION, MINED, gamma=2.0, lowest_weight=0.5)
    # Snippet 2 by a half; the mean is over both still.
    background = (0.5 * 0.25 * LN_2 + 0.0625 * math.log(4 / 3)) / 2
    assert loss.background.item() == pytest.approx(background, abs=1e-6)


def test_where_nothing_is_mined_nothing_is_lost() -> None:
    nothing = pseudo([[False, False]] * 4, [False] * 4)
    assert [term.item() for term in base_loss(SCORES, ATTENTION, nothing, 2.0)] == [0, 0, 0]
    assert contrastive_loss(SCORES, torch.eye(2), nothing, 0.1).item() == 0


# --- eq. 7 ---------------------------------------------------------------------------------------


def test_contrastive_loss() -> None:
    # Snippet 0 points to its own prototype: cosines 1 and 0; snippet 1, background, has 0 with m_0.
    embedding = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]])
    prototypes = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    mined = pseudo([[True, False], [False, False]], [False, True])
    # Both terms: -ln(e^(1/tau) / (e^(1/tau) + e^0)) = ln(1 + e^(-1/tau)), tau = 0.5
    expected = 2 * math.log(1 + math.exp(-2))
    loss = contrastive_loss(embedding, prototypes, mined, temperature=0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_mean_is_over_action_snippets_and_background_adds_up() -> None:
    embedding = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    mined = pseudo(
        [[True, False], [True, False], [False, False], [False, False], [False, False]],
        [False, False, True, True, True],
        [False, False, False, True, True],  # 2 is not confident: it does not count
    )
    # Snippet 0: ln(1 + e^-1) among classes; background 2 e^0 against e^1: ln(1 + 2 e^-1).
    # Snippet 1, on the wrong side: ln(1 + e^1); against e^0: ln(1 + 2).
    terms = [1 + math.exp(-1), 1 + 2 * math.exp(-1), 1 + math.e, 3.0]
    expected = sum(math.log(term) for term in terms) / 2
    loss = contrastive_loss(embedding, torch.eye(2), mined, temperature=1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_classes_of_a_snippet_do_not_hold_each_other_down() -> None:
    # Cosines 0.6, 0.8 and 0; the classes 0 and 1 are the snippet's, against 2 alone, with e^0.
    embedding = torch.tensor([[[0.6, 0.8, 0.0]]], requires_grad=True)
    nowhere = torch.zeros(1, 1, dtype=torch.bool)
    mined = PseudoSnippets(torch.tensor([[[True, True, False]]]), nowhere, nowhere)
    loss = contrastive_loss(embedding, torch.eye(3), mined, temperature=1.0)
    expected = (math.log(1 + math.exp(-0.6)) + math.log(1 + math.exp(-0.8))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    everything = PseudoSnippets(torch.ones(1, 1, 3, dtype=torch.bool), nowhere, nowhere)
    loss = contrastive_loss(embedding, torch.eye(3), everything, temperature=1.0)
    loss.backward()
    assert loss.item() == 0  # there is nothing to hold it against
    assert embedding.grad is not None and torch.isfinite(embedding.grad).all()


def test_background_is_that_of_the_own_recording() -> None:
    embedding = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    action = torch.zeros(2, 2, 2, dtype=torch.bool)
    action[0, 0, 0] = True
    background = torch.tensor([[False, False], [True, True]])
    mined = PseudoSnippets(action, background, background)
    loss = contrastive_loss(embedding, torch.eye(2), mined, temperature=1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-5)


def test_without_background_the_gradient_is_finite() -> None:
    embedding = torch.tensor([[[1.0, 0.5], [0.0, 0.0]]], requires_grad=True)
    mined = pseudo([[True, False], [False, False]], [False, False])
    contrastive_loss(embedding, torch.eye(2), mined, temperature=0.1).backward()
    assert embedding.grad is not None and torch.isfinite(embedding.grad).all()
    assert embedding.grad[0, 0].abs().sum() > 0


# --- eq. 8 and 14 --------------------------------------------------------------------------------


def test_snippet_loss_weighs_each_term() -> None:
    stage = SnippetStageConfig(
        action_weight=2, background_weight=3, background_class_weight=4, contrastive_weight=5
    )
    base = BaseLoss(torch.tensor(1.0), torch.tensor(10.0), torch.tensor(100.0))
    # 2 * 1 + 3 * 10 + 4 * 100 + 5 * 1000
    assert snippet_loss(base, torch.tensor(1000.0), stage).item() == 5432


def test_instance_loss_weighs_both_terms() -> None:
    stage = InstanceStageConfig(score_weight=2, regression_weight=3)
    # 2 * 1 + 3 * 10
    assert instance_loss(torch.tensor(1.0), torch.tensor(10.0), stage).item() == 32


# --- mining --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mining", "first", "second", "background"),
    [
        # From 1 the walk stops at 3, where A is low, and from 5 it stops there as well.
        ("attention", [0, 1, 2], [4, 5, 6], [3]),
        # P of the point's own class: that of class 0 is low at 2, that of class 1 at 4 and at the
        # point itself, which stays one. Background is still where A is lowest between the points.
        ("class", [0, 1], [5, 6], [3]),
        # Nothing but the points; A is lowest at 0 before them and at 6 behind.
        ("points", [1], [5], [0, 3, 6]),
    ],
)
def test_mining(mining: str, first: list[int], second: list[int], background: list[int]) -> None:
    high, low = 0.99, 0.5
    attention = torch.tensor([[high, high, high, low, high, high, high]])
    scores = torch.tensor(
        [
            [high, high, low, high, high, high, high],
            [high, high, high, high, low, low, high],
        ]
    ).T[None]
    points = torch.zeros(1, 7, 2, dtype=torch.bool)
    points[0, 1, 0] = points[0, 5, 1] = True
    found = _mine(
        SnippetOutput(scores, scores, attention, scores),
        points,
        torch.ones(1, 7, dtype=torch.bool),
        SnippetStageConfig.model_validate({"mining": mining}),
    )
    assert found.action[0, :, 0].nonzero()[:, 0].tolist() == first
    assert found.action[0, :, 1].nonzero()[:, 0].tolist() == second
    assert found.background[0].nonzero()[:, 0].tolist() == background


# --- eq. 10 and 13 -------------------------------------------------------------------------------


def test_score_loss() -> None:
    completeness = torch.tensor([[0.5, 0.0], [1.0, 0.25]])
    target = torch.tensor([[1.0, 0.0], [1.0, 0.3]])
    # SmoothL1 with beta 0.1: 0.5 - 0.05 for the 0.5, 0.05^2 / (2 * 0.1) for the 0.05
    expected = (0.45 + 0.0125) / 2
    assert score_loss(completeness, target, "smooth_l1").item() == pytest.approx(expected)
    # Cross entropy: ln 2 + 0; 0 - (0.3 ln 0.25 + 0.7 ln 0.75)
    expected = (LN_2 + 0.3 * math.log(4) + 0.7 * math.log(4 / 3)) / 2
    loss = score_loss(completeness, target, "cross_entropy")
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_regression_loss() -> None:
    refined = torch.tensor([[0.0, 4.0], [0.0, 2.0], [5.0, 6.0]])
    reliable = torch.tensor([[0.0, 4.0], [0.0, 4.0], [0.0, 4.0]])
    # IoU 1 and 1/2: 0 and 0.5 * 0.5^2; the third is not matched
    loss = regression_loss(refined, reliable, torch.tensor([True, True, False]))
    assert loss.item() == pytest.approx(0.125 / 2)
    assert regression_loss(refined, reliable, torch.zeros(3).bool()).item() == 0


segment = st.tuples(st.integers(-5, 5), st.integers(1, 6)).map(lambda s: (s[0], s[0] + s[1]))


@given(segment, segment)
def test_temporal_iou_is_that_of_the_engine(a: tuple[int, int], b: tuple[int, int]) -> None:
    left, right = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    columns = [each[i].numpy() for each in (left, right) for i in (0, 1)]
    assert temporal_iou(left, right).item() == pytest.approx(float(soft_nms.temporal_iou(*columns)))


# --- eq. 2 and 3 ---------------------------------------------------------------------------------

ROWS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]])
ACTION = torch.tensor([[True, False, False], [True, True, False], [False, False, False]])


def test_class_means() -> None:
    means, present = class_means(ROWS, ACTION)
    assert means.tolist() == [[2.0, 3.0], [3.0, 4.0], [0.0, 0.0]]
    assert present.tolist() == [True, True, False]


def test_initial_prototypes_are_the_means_at_the_points() -> None:
    assert initial_prototypes(ROWS, ACTION[:, :2]).tolist() == [[2.0, 3.0], [3.0, 4.0]]
    with pytest.raises(AssertionError):
        initial_prototypes(ROWS, ACTION)


def test_prototypes_move_by_one_minus_momentum() -> None:
    prototypes = torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    got = update_prototypes(prototypes, ROWS, ACTION, momentum=0.75)
    # 0.25 * (2, 3); 0.75 + 0.25 * (3, 4); class 2 does not occur
    assert got.tolist() == [[0.5, 0.75], [1.5, 1.75], [9.0, 9.0]]


def test_a_step_moves_both_memories() -> None:
    """Eq. 3 for what snippets attend to and, on the embedding, for what they are compared to."""
    rows = np.array([[1, 0], [3, 4], [5, 2], [7, 6]], np.float32)
    at = np.array([0], np.int64)
    data = DataSet("one", ("hop",), SnippetClock(), (Recording("x", rows, at, at),))
    config = TrainingConfig(
        model=ModelConfig(blocks=0, dropout=0),
        snippet_stage=SnippetStageConfig(
            steps=2,
            batch_size=2,
            action_threshold=0,  # the walk from the point goes over all four rows
            prototype_momentum=0.75,
            embedding_momentum=0.5,
        ),
    )
    stage = SnippetStage(config, data, torch.device("cpu"))
    assert stage._model.prototypes.tolist() == [[1, 0]]  # eq. 2
    with torch.no_grad():  # the embedding is the features
        stage._model.feature_mean.zero_()
        stage._model.feature_scale.fill_(1)
        stage._model.embed.weight.zero_()
        stage._model.embed.weight[:, :, 1] = torch.eye(2)
        stage._model.embed.bias.zero_()  # type: ignore[union-attr]
    stage._embedded = torch.tensor([[0.0, 1.0]])
    stage.step(1)
    # The mean row is (4, 3): 0.75 * (1, 0) + 0.25 * (4, 3), and 0.5 * (0, 1) + 0.5 * (4, 3)
    assert stage.result().prototypes.tolist() == [[1.75, 0.75]]
    assert stage.state_dict()["embedded"].tolist() == [[2.0, 2.0]]


# --- descent -------------------------------------------------------------------------------------


def test_gradients_are_clipped_to_a_norm_of_one() -> None:
    model = nn.Linear(2, 1, bias=False)
    descent = Descent(model, SnippetStageConfig(steps=3))
    # The gradient is the input: (3, 4) has the norm 5, (0.3, 0.4) that of 0.5 and stays.
    for x, expected in (([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])):
        descent.step(model(torch.tensor(x)).sum())
        assert model.weight.grad is not None
        assert model.weight.grad[0].tolist() == pytest.approx(expected)


def test_weights_are_averaged_and_buffers_are_the_newest() -> None:
    model = nn.BatchNorm1d(1)
    averaged = AveragedModel(model, decay=0.75)
    with torch.no_grad():
        for step, weight, expected in (
            (1, 11.0, 10.0),  # from 1; decay 1 / (1 + 9): 0.1 * 1 + 0.9 * 11
            (6, 20.0, 16.0),  # 6 / (6 + 9): 0.4 * 10 + 0.6 * 20
            (91, 32.0, 20.0),  # not 91 / 100 but 0.75: 0.75 * 16 + 0.25 * 32
        ):
            model.weight.fill_(weight)
            averaged.update(step)
            assert averaged.state_dict()["weight"].tolist() == pytest.approx([expected])
        assert model.running_mean is not None
        model.running_mean.fill_(7.0)
    result = averaged.result()
    assert result.weight.tolist() == pytest.approx([20.0])
    assert result.running_mean is not None and result.running_mean.tolist() == [7.0]
    assert not result.training and model.training
