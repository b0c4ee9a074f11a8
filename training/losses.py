"""The losses of both stages; each function names its equation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hrpro.training.config import InstanceStageConfig, SnippetStageConfig
from hrpro.training.parallel import process_count, total
from hrpro.training.pseudo_snippets import PseudoSnippets

_PROBABILITY_FLOOR = 1e-6


class BaseLoss(NamedTuple):
    """The terms of L_base (eq. 1) and the background term on P; scalars."""

    action: Tensor
    background: Tensor
    background_class: Tensor


def focal_loss(probability: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Binary focal loss FL (Lin et al. 2017), elementwise; ``target`` is 0 or 1."""
    p = probability.clamp(_PROBABILITY_FLOOR, 1 - _PROBABILITY_FLOOR)
    positive = (1 - p) ** gamma * p.log()
    negative = p**gamma * (1 - p).log()
    return -(target * positive + (1 - target) * negative)


def base_loss(
    scores: Tensor,
    attention: Tensor,
    pseudo: PseudoSnippets,
    gamma: float,
    lowest_weight: float = 1.0,
) -> BaseLoss:
    """L_base, eq. 1: focal loss of P on pseudo-action snippets and of 1 - A on pseudo background.

    ``scores`` P (B, T, C), ``attention`` A (B, T). Each term is a sum over its snippets (and over
    classes), divided by their number, and 0 where there are none. The third term, focal loss of P
    towards 0 on pseudo background, is not in the paper.

    Background for being the lowest between two points alone counts ``lowest_weight``: 1 is
    Algorithm 1, less is for recordings whose actions follow each other without a break.
    """
    background = pseudo.background.to(scores.dtype)  # (B, T), weights
    background = torch.where(pseudo.confident_background, 1.0, lowest_weight * background)
    count = _count(pseudo.background)
    on_action = focal_loss(scores, pseudo.action.to(scores.dtype), gamma).sum(dim=-1)  # (B, T)
    on_background = focal_loss(attention, torch.zeros_like(attention), gamma)
    on_classes = focal_loss(scores, torch.zeros_like(scores), gamma).sum(dim=-1)
    return BaseLoss(
        mean_where(on_action, pseudo.action.any(dim=-1)),
        (on_background * background).sum() / count,
        (on_classes * background).sum() / count,
    )


def contrastive_loss(
    embedding: Tensor, prototypes: Tensor, pseudo: PseudoSnippets, temperature: float
) -> Tensor:
    """L_contra, eq. 7: pseudo-action snippets against other prototypes and against background.

    ``embedding`` (B, T, W), ``prototypes`` (C, W). The similarity is
    ``exp(cosine / temperature)``. Background is what attention is sure of.

    With a the share of a snippet's own prototype among the classes and b its share against
    background, eq. 7 as printed is -1/C sum_c sum_i log(a + b). Here it is -log a - log b, so that
    each has its own gradient: in the sum, the one that is high hides the other. And the mean runs
    over the pseudo-action snippets, so that the weight does not depend on how many were mined.

    A snippet with several classes (two at one point, or mined from the points on both sides) is not
    held against the prototypes of any of them: otherwise each class would push the others away.
    """
    # Divided by the length after the product, which is narrower than the embedding.
    length = embedding.norm(dim=-1, keepdim=True).clamp(min=_PROBABILITY_FLOOR)
    similarity = embedding @ F.normalize(prototypes, dim=-1).T / length  # (B, T, C), cosines
    similarity = similarity / temperature  # logarithms
    others = torch.where(pseudo.action, -torch.inf, similarity).logsumexp(dim=-1, keepdim=True)
    among_classes = similarity - torch.logaddexp(similarity, others)
    background = torch.where(pseudo.confident_background[..., None], similarity, -torch.inf)
    background = background.logsumexp(dim=1, keepdim=True)  # (B, 1, C): the recording's own
    against_background = similarity - torch.logaddexp(similarity, background)
    return -mean_where(among_classes + against_background, pseudo.action)


def snippet_loss(base: BaseLoss, contrastive: Tensor, stage: SnippetStageConfig) -> Tensor:
    """L_snippet, eq. 8: L_base + lambda_1 L_contra, with a weight for each term of L_base."""
    return (
        stage.action_weight * base.action
        + stage.background_weight * base.background
        + stage.background_class_weight * base.background_class
        + stage.contrastive_weight * contrastive
    )


def instance_loss(score: Tensor, regression: Tensor, stage: InstanceStageConfig) -> Tensor:
    """L_instance, eq. 14: L_score + lambda_2 L_reg."""
    return stage.score_weight * score + stage.regression_weight * regression


def temporal_iou(a: Tensor, b: Tensor) -> Tensor:
    """Temporal IoU of segments (..., 2) against segments (..., 2), broadcast; no +1."""
    start = torch.maximum(a[..., 0], b[..., 0])
    end = torch.minimum(a[..., 1], b[..., 1])
    intersection = (end - start).clamp(min=0)
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - intersection
    return intersection / union.clamp(min=_PROBABILITY_FLOOR)


def score_loss(completeness: Tensor, target: Tensor, kind: str) -> Tensor:
    """L_score, eq. 10, over all classes: (N, C) completeness against IoU with reliable proposals.

    ``kind`` is "smooth_l1", the paper's kind of loss, or "cross_entropy". The paper has one score a
    proposal and names no beta: the sum over classes and the beta of 0.1 (differences of more than
    that count linearly) are choices made here.
    """
    if kind == "smooth_l1":
        loss = F.smooth_l1_loss(completeness, target, reduction="none", beta=0.1)
    else:
        clamped = completeness.clamp(_PROBABILITY_FLOOR, 1 - _PROBABILITY_FLOOR)
        loss = F.binary_cross_entropy(clamped, target, reduction="none")
    return loss.sum(dim=-1).mean()


def regression_loss(refined: Tensor, reliable: Tensor, matched: Tensor) -> Tensor:
    """L_reg, eq. 13: SmoothL1 of IoU(refined, reliable) towards 1 where ``matched`` (N,) holds."""
    iou = temporal_iou(refined, reliable)
    return mean_where(F.smooth_l1_loss(iou, torch.ones_like(iou), reduction="none"), matched)


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values where the mask holds; 0 where it holds nowhere."""
    return torch.where(mask, values, 0.0).sum() / _count(mask)


def _count(mask: Tensor) -> Tensor:
    """How often the mask holds, at least 1: for each process, on the mean over all processes.

    Their gradients are averaged; so a sum over this is the mean over the global batch.
    """
    return total(mask.sum()).clamp(min=1) / process_count()
