"""Point labels drawn from full annotations: one point an instance (paper, Table A)."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Distribution = Literal["uniform", "centre", "gaussian"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)

# Of the Gaussian, as a share of the instance's length; six of them span it.
_SIGMA = 1 / 6


def draw_points(
    start_s: NDArray[np.float64],
    end_s: NDArray[np.float64],
    distribution: str,
    random: np.random.Generator,
) -> NDArray[np.float64]:
    """A time in seconds within each instance ``start_s`` to ``end_s``, (N,) each.

    Uniform over the instance, its centre, or a Gaussian around the centre, drawn again where it
    falls outside.
    """
    N = len(start_s)
    if distribution == "uniform":
        share = random.random(N)
    elif distribution == "centre":
        share = np.full(N, 0.5)
    else:
        assert distribution == "gaussian", distribution
        share = np.full(N, -1.0)
        while (outside := (share < 0) | (share >= 1)).any():
            share[outside] = random.normal(0.5, _SIGMA, int(outside.sum()))
    return start_s + share * (end_s - start_s)
