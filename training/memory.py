"""The memory of reliable prototypes, one a class (paper, eq. 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from hrpro.training.parallel import total


def class_means(rows: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Mean row of each class and whether the class occurs: (C, W), (C,) bool.

    ``rows`` (M, W); ``action`` (M, C) bool says to which classes a row belongs. Of several
    processes each has its own rows, and the means are over all of them.
    """
    weights = action.to(rows.dtype)
    count = total(weights.sum(dim=0))  # (C,)
    return total(weights.T @ rows) / count.clamp(min=1)[:, None], count > 0


def initial_prototypes(rows: Tensor, action: Tensor) -> Tensor:
    """Eq. 2: m_c is the mean of the rows at the points of class c. Shapes as `class_means`."""
    means, present = class_means(rows, action)
    assert bool(present.all()), "the data set reader refuses classes without points"
    return means


def update_prototypes(prototypes: Tensor, rows: Tensor, action: Tensor, momentum: float) -> Tensor:
    """Eq. 3, once per step: m_c <- mu m_c + (1 - mu) x, x the mean of the step's rows of class c.

    Classes without a row in this step keep their prototype.
    """
    means, present = class_means(rows, action)
    return torch.where(present[:, None], prototypes.lerp(means, 1 - momentum), prototypes)
