"""The instance heads of HR-Pro's second stage: completeness and border regression of proposals.

The heads read the embedding X^e of stage 1, which stays as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hrpro.training.attention import Dropout
from hrpro.training.roi import END_BINS, START_BINS, RegionPooling, Regions


class InstanceOutput(NamedTuple):
    """``completeness`` (N, C) of the proposals; ``refined`` (N, 2) borders in snippets and their
    ``refined_completeness`` (N, C). Completeness is in [0, 1]."""

    completeness: Tensor
    refined: Tensor
    refined_completeness: Tensor


def completeness_features(regions: Regions) -> Tensor:
    """What eq. 9 puts into the score head: [I_c - I_s; I_c; I_c - I_e] of max-pooled regions.

    (N, bins, W) each -> (N, 3 W).
    """
    start, centre, end = (region.amax(dim=1) for region in regions)
    return torch.cat([centre - start, centre, centre - end], dim=-1)


def border_features(regions: Regions) -> Tensor:
    """What eq. 11 puts into the regression head: [I_s; I_e], (N, outer bins * W)."""
    return torch.cat([regions.start.flatten(1), regions.end.flatten(1)], dim=-1)


def refined_borders(proposals: Tensor, offset: Tensor, unit: Tensor) -> Tensor:
    """Eq. 12: s_r = s - ds w, e_r = e - de w. ``proposals``, ``offset`` (N, 2), ``unit`` w (N, 1).

    The paper's w is the length of the proposal; here it is the width of its outer regions, and
    the offset lies in [-1, 1]: a border moves by no more than there is evidence for.
    """
    return proposals - offset * unit


class InstanceHeads(nn.Module):
    """Regions of proposals -> completeness (N, C) and offsets of their borders (N, 2) in [-1, 1].

    The score head says for each class how complete the proposal is as an instance of it. (The
    paper's head has one output; with one a class, a proposal of the wrong class can be told.)
    """

    def __init__(self, width: int, class_count: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.score = _two_layers(3 * width, hidden, class_count, dropout)
        self.regress = _two_layers((START_BINS + END_BINS) * width, hidden, 2, dropout)

    def forward(self, regions: Regions) -> tuple[Tensor, Tensor]:
        """Eq. 9 and 11."""
        completeness = self.score(completeness_features(regions)).float().sigmoid()
        return completeness, self.regress(border_features(regions)).float().tanh()


class InstanceModel(nn.Module):
    """Embedding of a stretch (T, W) and proposals (N, 2) in it -> `InstanceOutput`.

    Without ``scores`` completeness is 0, without ``moves`` borders stay: heads that were not
    trained do not speak. Those that were trained on few points do not say much: borders move by the
    share ``trust`` in [0, 1], and completeness has that share of its weight in the score.
    """

    trust: Tensor

    def __init__(
        self,
        heads: InstanceHeads,
        pooling: RegionPooling,
        scores: bool = True,
        moves: bool = True,
        trust: float = 1.0,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.heads = heads
        self.register_buffer("trust", torch.tensor(trust))
        self._completeness_factor = float(scores)
        self._offset_factor = float(moves)

    def forward(
        self, embedding: Tensor, proposals: Tensor, stretch: Tensor | None = None
    ) -> InstanceOutput:
        """Score the proposals, refine them, and score what became of them.

        Where the embedding holds several stretches, of other streams, one behind the other,
        ``stretch`` (int64, (N, 2)) are the first and the last row of each proposal's own, from
        whose first row the proposal counts.
        """
        lowest = torch.zeros(1, 1, dtype=torch.long, device=embedding.device)
        if stretch is None:
            return self.score(embedding, proposals, lowest, lowest + (embedding.shape[0] - 1))
        first, last = stretch[:, 0:1], stretch[:, 1:2]
        return self.score(embedding, proposals, lowest, last - first, first)

    def score(
        self,
        embedding: Tensor,
        proposals: Tensor,
        lowest: Tensor,
        highest: Tensor,
        row: Tensor | None = None,
    ) -> InstanceOutput:
        """The same where a proposal may see the snippets ``lowest`` to ``highest``, (N, 1), and
        snippet 0 of its own is ``row``, see `RegionPooling`."""
        regions = self.pooling(embedding, proposals, lowest, highest, row)
        completeness, offset = self.heads(regions)
        unit = self._offset_factor * self.trust * self.pooling.border(proposals)
        refined = refined_borders(proposals, offset, unit)
        again, _ = self.heads(self.pooling(embedding, refined, lowest, highest, row))
        factor = self._completeness_factor
        return InstanceOutput(factor * completeness, refined, factor * again)


def _two_layers(inputs: int, hidden: int, outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), Dropout(dropout), nn.Linear(hidden, outputs)
    )
