"""Features of a proposal: the start, centre and end regions, sampled by linear interpolation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

START_BINS = 4
CENTRE_BINS = 16
END_BINS = 4


class Regions(NamedTuple):
    """Features of N proposals: ``start``, ``centre``, ``end``, each (N, bins, W)."""

    start: Tensor
    centre: Tensor
    end: Tensor


class RegionPooling(NamedTuple):
    """How wide the outer regions are: a share of the proposal's length, up to a limit in snippets.

    The limit is what lets a live engine wait for the end region.
    """

    border_ratio: float
    border_limit: float

    def border(self, proposals: Tensor) -> Tensor:
        """Width of the outer regions of ``proposals`` (N, 2); (N, 1), in snippets."""
        length = proposals[:, 1:2] - proposals[:, 0:1]
        return (self.border_ratio * length).clamp(max=self.border_limit)

    def __call__(
        self,
        embedding: Tensor,
        proposals: Tensor,
        lowest: Tensor,
        highest: Tensor,
        row: Tensor | None = None,
    ) -> Regions:
        """Sample the regions of ``proposals`` (N, 2), in snippets, from ``embedding`` (T, W).

        Snippet t has its centre at position t + 0.5. Positions outside the snippets ``lowest``
        to ``highest`` (int64, (N, 1)) take the nearest one's features. Where ``embedding`` holds
        several recordings, ``row`` (int64, (N, 1)) is that of snippet 0 of the proposal's own:
        a float32 cannot count through all of them and tell fractions.
        """
        start, end = proposals[:, 0:1], proposals[:, 1:2]  # (N, 1)
        border = self.border(proposals)

        def sample(left: Tensor, right: Tensor, bins: int) -> Tensor:
            fraction = (torch.arange(bins, device=embedding.device) + 0.5) / bins
            position = left + (right - left) * fraction - 0.5  # (N, bins)
            position = torch.minimum(torch.maximum(position, lowest), highest)
            below = position.floor()
            weight = (position - below)[..., None]
            first = below.long()
            second = torch.minimum(first + 1, highest)
            if row is not None:
                first, second = first + row, second + row
            return embedding[first] * (1 - weight) + embedding[second] * weight

        return Regions(
            sample(start - border, start, START_BINS),
            sample(start, end, CENTRE_BINS),
            sample(end, end + border, END_BINS),
        )
