"""Random crops of the training recordings as padded batches, without a loop over snippets."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrpro.training.data import DataSet


class Crops(NamedTuple):
    """``features`` (B, T, D) float32, ``points`` (B, T, C) bool, ``valid`` (B, T) bool."""

    features: Tensor
    points: Tensor
    valid: Tensor


class CropSampler:
    """Draws crops of at most ``crop_snippets`` from recordings, each equally likely."""

    def __init__(self, data: DataSet, crop_snippets: int, generator: torch.Generator) -> None:
        lengths = [len(recording) for recording in data.recordings]
        self.features = torch.from_numpy(
            np.concatenate([recording.features for recording in data.recordings])
        )  # (M, D), all recordings one after the other
        self.points = torch.zeros(len(self.features), len(data.classes), dtype=torch.bool)
        self._first = torch.tensor([0, *lengths[:-1]]).cumsum(0)  # (R,)
        self._length = torch.tensor(lengths)
        for recording, first in zip(data.recordings, self._first.tolist(), strict=True):
            self.points[first + recording.point_index, recording.point_label] = True
        self._crop = min(crop_snippets, max(lengths))
        self._generator = generator

    def draw(self, batch_size: int) -> Crops:
        """A batch of crops; all are as long as the longest, with ``valid`` False behind the end."""
        chosen = torch.randint(len(self._length), (batch_size,), generator=self._generator)
        room = (self._length[chosen] - self._crop).clamp(min=0)
        share = torch.rand(batch_size, generator=self._generator)
        start = (share * (room + 1)).long().clamp(max=room)  # (B,)
        offset = start[:, None] + torch.arange(self._crop)  # (B, T) within the recording
        valid = offset < self._length[chosen, None]
        row = torch.where(valid, self._first[chosen, None] + offset, 0)
        features = torch.where(valid[..., None], self.features[row], 0.0)
        return Crops(features, self.points[row] & valid[..., None], valid)
