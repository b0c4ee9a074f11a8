"""Windows' outputs -> the scores of a stream, each snippet's once and in order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.batcher import Job

Rows = NDArray[np.float32]


def stitch(job: Job, scores: Rows, embedding: Rows, attention: Rows) -> tuple[Rows, Rows, Rows]:
    """The positions of a window that count: P (n, C), embedding (n, W) and attention (n,) for its
    job.

    ``scores`` (T, C), ``embedding`` (T, W) and ``attention`` (T,) are of the whole window, which
    ends before ``job.stop``.
    """
    start = job.stop - len(scores)
    counted = slice(job.first - start, job.until - start)
    return scores[counted], embedding[counted], attention[counted]
