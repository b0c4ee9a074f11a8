"""The snippet model's band, the regions of proposals, the instance heads, and the ranking."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_model import BLOCKS, CONTEXT, DIM, FUTURE, LOOKAHEAD, PAST, tiny_config, tiny_model
from torch import Tensor, nn

from hrpro.training.config import ModelConfig
from hrpro.training.instance import (
    InstanceHeads,
    InstanceModel,
    border_features,
    refined_borders,
)
from hrpro.training.model import SnippetModel, SnippetOutput
from hrpro.training.ranking import Candidates, ReliableRule, rank_proposals, reliable_proposals
from hrpro.training.roi import RegionPooling, Regions

T = 40
MODEL = tiny_model(tiny_config()).snippet
FEATURES = torch.from_numpy(np.random.default_rng(1).standard_normal((1, T, DIM))).float()
ALL = torch.ones(1, T, dtype=torch.bool)


def run(features: Tensor = FEATURES, valid: Tensor = ALL) -> SnippetOutput:
    with torch.no_grad():
        output: SnippetOutput = MODEL(features, valid)
    return output


# --- snippet model -------------------------------------------------------------------------------


def test_scores_are_cas_times_attention() -> None:
    output = run()
    assert output.scores.shape == output.cas.shape == (1, T, 3)
    assert output.attention.shape == (1, T)
    assert output.embedding.shape == (1, T, DIM)
    assert torch.equal(output.scores, output.cas * output.attention[..., None])
    assert (output.embedding >= 0).all()


@pytest.mark.parametrize("at", [0, 17, T - 1])
def test_a_snippet_reaches_no_further_than_the_band(at: int) -> None:
    changed = FEATURES.clone()
    changed[0, at] += 3.0
    for before, after in zip(run(), run(changed), strict=True):
        moved = (before != after)[0].reshape(T, -1).any(dim=1).nonzero()[:, 0]
        # It is looked back upon from CONTEXT later, and ahead to from LOOKAHEAD earlier.
        assert moved.min() >= at - LOOKAHEAD
        assert moved.max() <= at + CONTEXT


def test_a_snippet_reaches_as_far_as_the_band() -> None:
    at = 17
    changed = FEATURES.clone()
    changed[0, at] += 3.0
    moved = (run().embedding - run(changed).embedding)[0].abs().amax(dim=1) > 1e-7
    assert moved[at - LOOKAHEAD] and moved[at + CONTEXT]
    assert (CONTEXT, LOOKAHEAD) == (BLOCKS * PAST + 1, BLOCKS * FUTURE + 1) == (13, 3)


def test_full_attention_reaches_everywhere() -> None:
    torch.manual_seed(0)
    config = ModelConfig(blocks=1, attention_heads=2, attention_past=None)
    model = SnippetModel(DIM, 3, config).eval()
    for at in (0, T - 1):
        changed = FEATURES.clone()
        changed[0, at] += 3.0
        with torch.no_grad():
            moved = (model(FEATURES, ALL).cas - model(changed, ALL).cas)[0].abs().amax(dim=1)
        assert moved[T - 1 - at] > 0 and moved[T // 2] > 0


def test_what_is_not_valid_does_not_matter() -> None:
    valid = ALL.clone()
    valid[0, :5] = valid[0, 30:] = False
    changed = FEATURES.clone()
    changed[~valid] = 7.0
    for got, expected in zip(
        run(changed, valid), run(FEATURES[:, 5:30], ALL[:, 5:30]), strict=True
    ):
        torch.testing.assert_close(got[:, 5:30], expected, atol=1e-5, rtol=0)


def test_recordings_of_a_batch_are_apart() -> None:
    other = FEATURES.flip(1)
    both = run(torch.cat([FEATURES, other]), ALL.expand(2, T))
    torch.testing.assert_close(both.scores[:1], run().scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(both.scores[1:], run(other).scores, atol=1e-5, rtol=0)


def test_every_prototype_is_in_the_memory() -> None:
    prototypes = MODEL.prototypes
    with torch.no_grad():
        same = MODEL.attend_to(FEATURES, ALL, prototypes).scores
        assert torch.equal(same, run().scores)
        for index in range(len(prototypes)):
            changed = prototypes.clone()
            changed[index] += 2.0
            moved = MODEL.attend_to(FEATURES, ALL, changed).scores - same
            assert (moved.abs().amax(dim=-1) > 0).all()  # whatever the band, all look at it


def test_features_and_prototypes_are_normalised_alike() -> None:
    torch.manual_seed(0)
    model = SnippetModel(DIM, 3, ModelConfig(attention_heads=2)).eval()
    model.prototypes.normal_()
    with torch.no_grad():
        expected = model(FEATURES, ALL).scores
        model.feature_mean.fill_(5.0)
        model.feature_scale.fill_(0.5)
        model.prototypes.mul_(2).add_(5)
        torch.testing.assert_close(model(FEATURES * 2 + 5, ALL).scores, expected)


def test_a_lean_model_has_a_quarter_of_the_width() -> None:
    assert SnippetModel(DIM, 3, ModelConfig(size="lean")).width == DIM // 4
    assert SnippetModel(DIM, 3, ModelConfig(size="lean", width=12)).width == 12
    assert SnippetModel(3, 3, ModelConfig(size="lean")).width == 1
    assert isinstance(SnippetModel(DIM, 3, ModelConfig()).project, torch.nn.Identity)


def test_a_width_of_its_own_is_projected_to() -> None:
    model = SnippetModel(DIM, 3, ModelConfig(width=12, attention_heads=3)).eval()
    assert model(FEATURES, ALL).embedding.shape == (1, T, 12)
    # Heads share the width evenly: of 8 heads, 4 divide a width of 12.
    assert SnippetModel(DIM, 3, ModelConfig(width=12, attention_heads=8)).blocks[0].heads == 4


# --- regions -------------------------------------------------------------------------------------

RAMP = torch.arange(8.0)[:, None]  # at position p it is p - 0.5


def regions(
    proposal: list[float], pooling: RegionPooling, lowest: int = 0, highest: int = 7
) -> list[list[float]]:
    bounds = torch.tensor([[lowest]]), torch.tensor([[highest]])
    got = pooling(RAMP, torch.tensor([proposal]), *bounds)
    return [region[0, :, 0].tolist() for region in got]


def test_regions_are_sampled_at_the_middles_of_their_bins() -> None:
    # 2 to 6: the border is 1 wide. Start 1..2 in 4 bins, centre 2..6 in 16, end 6..7 in 4.
    start, centre, end = regions([2.0, 6.0], RegionPooling(0.25, 3.0))
    assert start == pytest.approx([1.125 - 0.5, 1.375 - 0.5, 1.625 - 0.5, 1.875 - 0.5])
    assert centre == pytest.approx([2 + 0.25 * (i + 0.5) - 0.5 for i in range(16)])
    assert end == pytest.approx([6.125 - 0.5, 6.375 - 0.5, 6.625 - 0.5, 6.875 - 0.5])


def test_borders_have_a_limit() -> None:
    pooling = RegionPooling(0.25, 0.5)
    assert pooling.border(torch.tensor([[2.0, 6.0], [2.0, 3.0]])).tolist() == [[0.5], [0.25]]
    start, _, _ = regions([2.0, 6.0], pooling)
    assert start == pytest.approx([1.5 + 0.125 * (i + 0.5) - 0.5 for i in range(4)])


def test_beyond_the_recording_the_nearest_snippet_stands() -> None:
    # Start -2..0 lies before snippet 1; end 8..10 behind snippet 5
    start, centre, end = regions([0.0, 8.0], RegionPooling(0.25, 3.0), lowest=1, highest=5)
    assert start == [1.0] * 4 and end == [5.0] * 4
    expected = [min(max(0.5 * (i + 0.5) - 0.5, 1.0), 5.0) for i in range(16)]
    assert centre == pytest.approx(expected)


# --- instance heads ------------------------------------------------------------------------------


def hand_made_heads() -> InstanceModel:
    """Completeness: sigmoid(0.1 * (c - s) + 0.01 * c + 0.001 * (c - e)) of the pooled regions."""
    heads = InstanceHeads(1, 1, 3, dropout=0.5)
    model = InstanceModel(heads, RegionPooling(0.25, 3.0)).eval()
    with torch.no_grad():
        for head in (heads.score, heads.regress):
            for layer in (each for each in head if isinstance(each, nn.Linear)):
                layer.weight.zero_()
                layer.bias.zero_()
        heads.score[0].weight.copy_(torch.eye(3))
        heads.score[3].weight.copy_(torch.tensor([[0.1, 0.01, 0.001]]))
        heads.regress[3].bias.copy_(torch.tensor([0.5, -1.0]))
    return model


def test_heads_by_hand() -> None:
    peaks = [torch.tensor([[[0.0], [peak]]]) for peak in (1.0, 3.0, 2.0)]
    start, centre, end = (
        region.repeat(1, bins // 2, 1) for region, bins in zip(peaks, (4, 16, 4), strict=True)
    )
    completeness, offset = hand_made_heads().heads(Regions(start, centre, end))
    # Maxima 1, 3, 2: 0.1 * 2 + 0.01 * 3 + 0.001 * 1
    assert completeness.item() == pytest.approx(1 / (1 + math.exp(-0.231)))
    assert offset.tolist() == [pytest.approx([math.tanh(0.5), math.tanh(-1.0)])]


AROUND = Regions(  # of one proposal, one number a bin
    torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]),
    torch.full((1, 16, 1), 99.0),
    torch.tensor([[[5.0], [6.0], [7.0], [8.0]]]),
)


def test_border_features_are_the_start_and_the_end_region() -> None:
    assert border_features(AROUND).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    wide = Regions(*(torch.cat([region, -region], dim=2) for region in AROUND))
    expected = [1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8, -8]
    assert border_features(wide).tolist() == [expected]


def test_the_regression_head_by_hand() -> None:
    heads = InstanceHeads(1, 1, 2, dropout=0.5).eval()
    with torch.no_grad():
        for layer in (heads.regress[0], heads.regress[3]):
            layer.bias.zero_()
        heads.regress[0].weight.copy_(
            torch.tensor([[0.1, 0, 0, 0.2, 0, 0, 0, 0], [0, 0, 0, 0, 0.3, 0, 0, 0.05]])
        )
        heads.regress[3].weight.copy_(torch.tensor([[0.5, 0.0], [0.0, -0.25]]))
        _, offset = heads(AROUND)
    # Start: 0.1 * 1 + 0.2 * 4 = 0.9, by 0.5; end: 0.3 * 5 + 0.05 * 8 = 1.9, by -0.25
    assert offset.tolist() == [pytest.approx([math.tanh(0.45), math.tanh(-0.475)])]


def test_refined_borders() -> None:
    # s - ds w = 2 - 0.5 * 3, e - de w = 6 + 1 * 3
    refined = refined_borders(
        torch.tensor([[2.0, 6.0]]), torch.tensor([[0.5, -1.0]]), torch.tensor([[3.0]])
    )
    assert refined.tolist() == [[0.5, 9.0]]


def test_heads_that_were_not_trained_do_not_speak() -> None:
    proposals = torch.tensor([[2.0, 6.0]])
    heads = hand_made_heads()
    silent = InstanceModel(heads.heads, heads.pooling, scores=False, moves=False)(RAMP, proposals)
    assert silent.completeness.tolist() == silent.refined_completeness.tolist() == [[0.0]]
    assert torch.equal(silent.refined, proposals)


def test_refined_proposals_are_scored_where_they_are() -> None:
    model = hand_made_heads()
    proposals = torch.tensor([[2.0, 6.0], [3.0, 5.0]])
    with torch.no_grad():
        output = model(RAMP, proposals)
        again = model(RAMP, output.refined)
    assert torch.equal(output.refined_completeness, again.completeness)
    assert not torch.equal(output.refined_completeness, output.completeness)


def test_no_proposals() -> None:
    output = hand_made_heads()(RAMP, torch.zeros(0, 2))
    assert [each.shape for each in output] == [(0, 1), (0, 2), (0, 1)]


# --- ranking -------------------------------------------------------------------------------------

FOUND = Candidates(
    borders=np.array([[0.0, 4], [1, 3], [2, 6], [5, 9]]),
    label_index=np.array([0, 0, 0, 1]),
    contrast=np.array([0.5, 0.8, 0.9, 0.4]),
    evidence_stop=np.array([6, 5, 8, 11]),
)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], []),
        ([(1, 0)], [1]),  # centre 1.5: 0 and 1 hold it, 1 has the higher contrast
        ([(2, 0)], [2]),  # centre 2.5: 0, 1 and 2 hold it
        ([(2, 0), (3, 0)], [2]),  # two points in one proposal
        ([(0, 0), (7, 1)], [0, 3]),
        ([(7, 0)], []),  # of another class
        ([(8, 1)], [3]),  # the last snippet of 5 to 9
        ([(9, 1)], []),  # the one behind it
    ],
)
def test_reliable_proposals(points: list[tuple[int, int]], expected: list[int]) -> None:
    table = np.array(points, np.int64).reshape(-1, 2)
    assert reliable_proposals(FOUND, table[:, 0], table[:, 1]).tolist() == expected


@pytest.mark.parametrize(
    ("rule", "points", "expected"),
    [
        # Centre 2.5: 0, 1 and 2 hold it, 2 with the highest contrast; it holds 5.5 too.
        ("contrast", [(2, 0), (5, 0)], [2]),
        # 0 and 1 hold 2.5 alone, 1 with the higher contrast. Nothing holds 5.5 alone: 2 again.
        ("between_points", [(2, 0), (5, 0)], [1, 2]),
        # A point of another class is one as well; 5.5 is held by 3 of its own class.
        ("contrast", [(2, 0), (5, 1)], [2, 3]),
        ("between_points", [(2, 0), (5, 1)], [1, 3]),
        ("between_points", [(2, 0)], [2]),  # alone are all three
        ("none", [(2, 0)], [0, 1, 2]),
        ("none", [(1, 0), (8, 1)], [0, 1, 3]),
        ("none", [(7, 0)], []),
    ],
)
def test_rules_of_reliable_proposals(
    rule: ReliableRule, points: list[tuple[int, int]], expected: list[int]
) -> None:
    table = np.array(points, np.int64)
    assert reliable_proposals(FOUND, table[:, 0], table[:, 1], rule).tolist() == expected
    # What is reliable has itself to regress to.
    ranked = rank_proposals(FOUND, table[:, 0], table[:, 1], ATTENTION, (), 2, rule)
    assert np.flatnonzero(ranked.own_iou == 1).tolist() == expected


ATTENTION = np.array([0.01, 0.01, 0.9, 0.05, 0.9, 0.01], np.float32)


def test_targets_of_proposals() -> None:
    ranked = rank_proposals(FOUND, np.array([1, 7]), np.array([0, 1]), ATTENTION, (0.02, 0.1), 2)
    # RP are 1 and 3. Below 0.02: 0..2 and 5..6; below 0.1: 3..4 too.
    negatives = [[0, 2], [5, 6], [0, 2], [3, 4], [5, 6]]
    assert ranked.borders.tolist() == [*FOUND.borders.tolist(), *negatives]
    assert ranked.negative.tolist() == [False] * 4 + [True] * 5
    np.testing.assert_allclose(
        ranked.completeness,
        [
            [2 / 4, 0],  # 0..4 with 1..3
            [1, 0],
            [1 / 5, 1 / 7],  # 2..6 with 1..3, and with 5..9
            [0, 1],
            *[[0, 0]] * 5,
        ],
    )
    np.testing.assert_allclose(ranked.own_iou, [2 / 4, 1, 1 / 5, 1, 0, 0, 0, 0, 0])
    assert ranked.reliable[:4].tolist() == [[1, 3], [1, 3], [1, 3], [5, 9]]


def test_without_reliable_proposals_nothing_is_complete() -> None:
    none = np.zeros(0, np.int64)
    ranked = rank_proposals(FOUND, none, none, ATTENTION, (), 2)
    assert ranked.completeness.tolist() == [[0, 0]] * 4
    assert ranked.own_iou.tolist() == [0] * 4
    empty = Candidates(np.zeros((0, 2)), none, np.zeros(0), none)
    ranked = rank_proposals(empty, np.array([1]), np.array([0]), ATTENTION, (0.02,), 2)
    assert ranked.borders.tolist() == [[0, 2], [5, 6]]
