"""Windows' outputs -> the scores of a stream, each snippet's once and in order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.batcher import Job

Rows = NDArray[np.float32]


def stitch(job: Job, scores: Rows, embedding: Rows) -> tuple[Rows, Rows]:
    """The positions of a window that count: P (n, C) and embedding (n, W) for its job.

    ``scores`` (T, C) and ``embedding`` (T, W) are of the whole window, which ends before
    ``job.stop``.
    """
    start = job.stop - len(scores)
    counted = slice(job.first - start, job.until - start)
    return scores[counted], embedding[counted]
