"""The instance heads of HR-Pro's second stage: completeness and border regression of proposals.

The heads read the embedding X^e of stage 1, which stays as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hrpro.training.roi import END_BINS, START_BINS, RegionPooling, Regions


class InstanceOutput(NamedTuple):
    """``completeness`` (N, C) of the proposals; ``refined`` (N, 2) borders in snippets and their
    ``refined_completeness`` (N, C). Completeness is in [0, 1]."""

    completeness: Tensor
    refined: Tensor
    refined_completeness: Tensor


class InstanceModel(nn.Module):
    """Embedding of a stretch (T, W) and proposals (N, 2) in it -> `InstanceOutput`.

    The score head says for each class how complete the proposal is as an instance of it. (The
    paper's head has one output; with one a class, a proposal of the wrong class can be told.)
    """

    def __init__(
        self, width: int, class_count: int, hidden: int, pooling: RegionPooling, dropout: float
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.score = _two_layers(3 * width, hidden, class_count, dropout)
        self.regress = _two_layers((START_BINS + END_BINS) * width, hidden, 2, dropout)

    def forward(self, embedding: Tensor, proposals: Tensor) -> InstanceOutput:
        """Score the proposals, refine them, and score what became of them."""
        lowest = torch.zeros(1, 1, dtype=torch.long, device=embedding.device)
        highest = lowest + (embedding.shape[0] - 1)
        completeness, refined = self.heads(
            self.pooling(embedding, proposals, lowest, highest), proposals
        )
        refined_completeness, _ = self.heads(
            self.pooling(embedding, refined, lowest, highest), refined
        )
        return InstanceOutput(completeness, refined, refined_completeness)

    def heads(self, regions: Regions, proposals: Tensor) -> tuple[Tensor, Tensor]:
        """Completeness (N, C) by eq. 9 and refined borders (N, 2) by eq. 11-12."""
        start, centre, end = (region.amax(dim=1) for region in regions)  # (N, W) each
        completeness = self.score(torch.cat([centre - start, centre, centre - end], -1)).sigmoid()
        outer = torch.cat([regions.start.flatten(1), regions.end.flatten(1)], dim=-1)
        # A refined border moves by no more than an outer region: beyond there is no evidence.
        offset = self.pooling.border(proposals) * self.regress(outer).tanh()  # (N, 2), snippets
        return completeness, proposals - offset


def _two_layers(inputs: int, hidden: int, outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs)
    )
