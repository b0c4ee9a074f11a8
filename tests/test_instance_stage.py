"""Stage 2 on the proposals of recordings whose scores and embedding are given by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.timebase import SnippetClock
from hrpro.training.checkpoint import Checkpoints
from hrpro.training.config import InstanceStageConfig, ModelConfig, TrainingConfig
from hrpro.training.data import DataSet, Recording
from hrpro.training.instance_stage import InstanceStage, _draw_proposals, new_instance_model
from hrpro.training.model import SnippetModel
from hrpro.training.ranking import ReliableRule
from hrpro.training.roi import RegionPooling, Regions

LOGIT_SHIFT = 20.0  # features are not negative: so that they pass the ReLU of the embedding


def recording(scores: list[float], point: int, first: float) -> Recording:
    """P of the only class, a point of it, and an embedding that counts up from ``first``."""
    P = np.array(scores)
    features = [first + np.arange(len(P)), np.log(P / (1 - P)) + LOGIT_SHIFT]
    return Recording(
        str(first),
        np.stack(features, axis=1).astype(np.float32),
        np.array([point], np.int64),
        np.zeros(1, np.int64),
    )


def snippet_model() -> SnippetModel:
    """The embedding is the features, and P the second one as `recording` has it."""
    model = SnippetModel(2, 1, ModelConfig(blocks=0))
    with torch.no_grad():
        for layer in (model.embed, model.classify, model.attend):
            layer.weight.zero_()
            layer.bias.zero_()  # type: ignore[union-attr]
        model.embed.weight[:, :, 1] = torch.eye(2)
        model.classify.weight[0, 1] = 1.0
        model.classify.bias.fill_(-LOGIT_SHIFT)
        model.attend.bias.fill_(30.0)  # A is 1 everywhere: there are no negative proposals
    return model.eval()


def stage_of(
    recordings: list[Recording], thresholds: tuple[float, ...], **settings: Any
) -> InstanceStage:
    config = TrainingConfig(
        precision="float32",  # that of the figures by hand
        localization=LocalizationConfig(thresholds=thresholds),
        instance_stage=InstanceStageConfig(steps=10, **settings),
    )
    data = DataSet("by hand", ("hop",), SnippetClock(), tuple(recordings))
    return InstanceStage(config, data, snippet_model(), torch.device("cpu"), None, Checkpoints())


def fix_offset(stage: InstanceStage, start: float, end: float) -> None:
    """Have the regression head say the same of every proposal."""
    last = stage._model.heads.regress[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([math.atanh(start), math.atanh(end)]))


# --- two recordings ------------------------------------------------------------------------------

# At the threshold 0.5, half way from 0.1 to 0.9, the first has the proposal 3 to 5, up to its end,
# and the second one 0 to 3, from its beginning.
TWO = [
    recording([0.1, 0.1, 0.1, 0.9, 0.9], point=4, first=100.0),
    recording([0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1], point=1, first=200.0),
]
PROPOSALS = [[3.0, 5.0], [0.0, 3.0]]


def test_regions_are_of_the_own_recording() -> None:
    stage = stage_of(TWO, (0.5,), batch_size=32)
    seen: list[Regions] = []
    run = stage._run

    def noted(regions: Regions) -> tuple[Tensor, Tensor]:
        seen.append(regions)
        return run(regions)

    stage._run = noted
    stage.step(1)
    (regions,) = seen
    # The first number of the embedding says where it is from.
    of_second = regions.centre[:, 0, 0] >= 200
    assert 0 < of_second.sum() < 32
    pooling = RegionPooling(0.25, 3.0)
    for number, rows in enumerate((~of_second, of_second)):
        embedding = torch.from_numpy(TWO[number].features)
        alone = pooling(
            embedding,
            torch.tensor([PROPOSALS[number]]),
            torch.tensor([[0]]),
            torch.tensor([[len(embedding) - 1]]),
        )
        for got, expected in zip(regions, alone, strict=True):
            torch.testing.assert_close(got[rows], expected.expand_as(got[rows]), atol=1e-3, rtol=0)
    # By hand: behind the end of the first there is its last row, before the second its first one.
    assert regions.end[~of_second][..., 0].unique().tolist() == [104.0]
    assert regions.start[of_second][..., 0].unique().tolist() == [200.0]


def test_targets_are_of_the_own_recording() -> None:
    stage = stage_of(TWO, (0.5,), batch_size=32)
    fix_offset(stage, 0.5, -0.5)
    losses = stage.step(1)
    # A quarter of the length is w; both borders move out by w / 2. IoU with what was the proposal
    # itself: L / (L + L / 4) = 0.8, and SmoothL1 of 0.2 is 0.5 * 0.04.
    assert losses["regression"].item() == pytest.approx(0.02, abs=1e-5)
    assert losses["iou_gain"].item() == pytest.approx(-0.2, abs=1e-5)


# --- which proposals regress, and to what --------------------------------------------------------

# Above 0.25 from 1 to 7, above 0.65 from 3 to 5; the point is in both. p_OIC of 1 to 7 is
# 3.4 / 6 - 0.1, of 3 to 5 it is 0.9 - 0.4, which is more.
NESTED = recording([0.1, 0.4, 0.4, 0.9, 0.9, 0.4, 0.4, 0.1], point=4, first=0.0)


# Cross entropy of a completeness of 0.25 towards 1, and of 0.25 towards 1 / 3
TO_1, TO_A_THIRD = math.log(4), math.log(4) / 3 + 2 * math.log(4 / 3) / 3


@pytest.mark.parametrize(
    ("rule", "floor", "regression", "score"),
    [
        # 1 to 7 has IoU 2 / 6 with the reliable 3 to 5: SmoothL1 of 2 / 3 is 0.5 * 4 / 9 = 2 / 9.
        # 3 to 5 is where it should be. The mean over both:
        ("contrast", 0.3, 1 / 9, (TO_A_THIRD + TO_1) / 2),
        # Over the second one alone:
        ("contrast", 0.4, 0.0, (TO_A_THIRD + TO_1) / 2),
        # Both are reliable, complete, and have nowhere to go.
        ("none", 0.3, 0.0, TO_1),
    ],
)
def test_what_regresses(rule: ReliableRule, floor: float, regression: float, score: float) -> None:
    stage = stage_of([NESTED], (0.25, 0.65), reliable=rule, regression_floor=floor)
    borders = torch.tensor([[1.0, 7.0], [3.0, 5.0]])
    losses = stage._losses(torch.arange(2), torch.full((2, 1), 0.25), borders)
    assert losses["regression"].item() == pytest.approx(regression, abs=1e-5)
    assert losses["score"].item() == pytest.approx(score, abs=1e-5)
    assert losses["loss"].item() == pytest.approx(regression + score, abs=1e-5)
    assert losses["iou_gain"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("share", "batch", "negatives"), [(0.25, 8, 2), (0.75, 8, 6), (0.0, 8, 0), (0.3, 10, 3)]
)
def test_share_of_negative_proposals(share: float, batch: int, negatives: int) -> None:
    stage = InstanceStageConfig(batch_size=batch, negative_share=share)
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.tensor([0, 2, 4]), torch.tensor([1, 3])
    drawn = [_draw_proposals(positive, negative, stage, generator) for _ in range(20)]
    for rows in drawn:
        assert len(rows) == batch
        assert int((rows % 2 == 1).sum()) == negatives
    # All of them come up.
    assert torch.cat(drawn).unique().tolist() == ([0, 1, 2, 3, 4] if negatives else [0, 2, 4])
    # Where there are none, positive ones fill the batch.
    rows = _draw_proposals(positive, negative[:0], stage, generator)
    assert len(rows) == batch and not (rows % 2).any()


@pytest.mark.parametrize(
    ("points", "trust"),
    [
        (None, 1.0),  # to be read from a file
        ([20, 20, 20], 0.5),  # 1 - 10 / 20
        ([100, 100, 100], 0.9),
        ([15, 1000, 100], 0.9),  # by the median: neither the rare nor the frequent class counts
        ([10, 10, 10], 0.0),
        ([5, 2, 4], 0.0),
    ],
)
def test_few_points_are_not_trusted(points: list[int] | None, trust: float) -> None:
    snippet = SnippetModel(4, 3, ModelConfig(blocks=0))
    counts = None if points is None else torch.tensor(points)
    model = new_instance_model(TrainingConfig(), snippet, counts)
    assert model.trust.item() == pytest.approx(trust)
