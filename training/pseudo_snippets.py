"""Pseudo snippets: from points to labelled stretches (paper, Algorithm 1), for a whole batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PseudoSnippets(NamedTuple):
    """``action`` (B, T, C) bool: pseudo-action snippets by class; ``background`` (B, T) bool.

    ``confident_background`` (B, T) bool leaves out what is background for being the lowest alone:
    where actions touch, that is still action.
    """

    action: Tensor
    background: Tensor
    confident_background: Tensor


def mine_pseudo_snippets(
    evidence: Tensor,
    attention: Tensor,
    points: Tensor,
    valid: Tensor,
    action_threshold: float,
    background_threshold: float,
) -> PseudoSnippets:
    """Algorithm 1 over a padded batch.

    From each point the walk goes both ways, up to the neighbouring points, for as long as
    ``evidence`` stays above ``action_threshold`` (theta_1); what it passes is action of the
    point's class. The point itself always is. A snippet is background where ``attention`` is
    below ``background_threshold`` (theta_2) or lowest between two neighbouring points (or a point
    and the border of the crop), unless it is action. Where a crop cuts a gap, that may be inside
    an action; to leave those gaps out measured worse (docs/TRAINING.md).

    Args:
        evidence: (B, T, C), or (B, T, 1) for the same evidence for all classes (the paper's A).
        attention: A, (B, T).
        points: (B, T, C) bool, the annotated snippets; one may have several classes.
        valid: (B, T) bool, False where a crop is padded.
    """
    passing = (evidence > action_threshold) & valid[..., None]  # (B, T, C or 1)
    forward = _walk_forward(passing, points)
    backward = _walk_forward(passing.flip(1), points.flip(1)).flip(1)
    action = forward | backward
    other = valid & ~action.any(dim=-1)
    below = (attention < background_threshold) & other
    lowest = _lowest_between_points(attention, points, valid) & other
    return PseudoSnippets(action, below | lowest, below)


def _walk_forward(passing: Tensor, points: Tensor) -> Tensor:
    """Where the walk from the latest point at or before a snippet gets to it; (B, T, C) bool."""
    index = torch.arange(points.shape[1], device=points.device)[None, :, None]
    point = torch.where(points, index, -1).cummax(dim=1).values  # (B, T, C), -1: none yet
    latest = point.amax(dim=-1, keepdim=True)  # a point of any class ends the walk
    stopped = torch.where(passing | points, -1, index).cummax(dim=1).values
    return (point >= 0) & (point == latest) & (stopped < point)


def _lowest_between_points(attention: Tensor, points: Tensor, valid: Tensor) -> Tensor:
    """Where A is lowest in its gap between two points; (B, T) bool. Ties count all."""
    B, T = attention.shape
    is_point = points.any(dim=-1)
    gap = is_point.cumsum(dim=1)  # 0 before the first point, 1 after it, ...
    usable = valid & ~is_point
    candidate = torch.where(usable, attention, torch.inf)
    lowest = candidate.new_full((B, T + 1), torch.inf).scatter_reduce(1, gap, candidate, "amin")
    return usable & (candidate == lowest.gather(1, gap))
