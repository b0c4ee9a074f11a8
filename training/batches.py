"""Random crops of the training recordings as padded batches, without a loop over snippets."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrpro.training.data import DataSet, in_blocks
from hrpro.training.parallel import share


class Crops(NamedTuple):
    """``features`` (B, T, D) float32, ``points`` (B, T, C) bool, ``valid`` (B, T) bool."""

    features: Tensor
    points: Tensor
    valid: Tensor


class CropSampler:
    """Draws crops of at most ``crop_snippets`` from recordings, each equally likely.

    Features stay where they are (memory maps); a batch reads no more than its own crops.
    """

    def __init__(self, data: DataSet, crop_snippets: int, generator: torch.Generator) -> None:
        self._data = data
        self._length = torch.tensor([len(recording) for recording in data.recordings])
        self._crop = min(crop_snippets, int(self._length.max()))
        self._generator = generator

    def draw(self, batch_size: int) -> Crops:
        """A batch of crops; all are as long as the longest, with ``valid`` False behind the end.

        Of several processes each draws the whole batch and reads its share.
        """
        chosen = torch.randint(len(self._length), (batch_size,), generator=self._generator)
        room = (self._length[chosen] - self._crop).clamp(min=0)
        position = torch.rand(batch_size, generator=self._generator)
        start = (position * (room + 1)).long().clamp(max=room)
        chosen, start = share(chosen), share(start)
        B, T = len(chosen), self._crop
        features = np.zeros((B, T, self._data.feature_dim), dtype=np.float32)
        points = np.zeros((B, T, len(self._data.classes)), dtype=bool)
        for row, (number, first) in enumerate(zip(chosen.tolist(), start.tolist(), strict=True)):
            recording = self._data.recordings[number]
            piece = recording.features[first : first + T]
            features[row, : len(piece)] = piece
            index = recording.point_index - first
            inside = (index >= 0) & (index < T)
            points[row, index[inside], recording.point_label[inside]] = True
        valid = torch.arange(T) < self._length[chosen, None]
        return Crops(torch.from_numpy(features), torch.from_numpy(points), valid)


def feature_statistics(data: DataSet) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature over all snippets, (D,) float32 each."""
    count = sum(len(recording) for recording in data.recordings)
    total = np.zeros(data.feature_dim)
    for recording in data.recordings:
        total += recording.features.sum(axis=0, dtype=np.float64)
    mean = total / count
    squares = np.zeros(data.feature_dim)
    for recording in data.recordings:
        for _, rows in in_blocks(recording.features):
            squares += ((rows - mean) ** 2).sum(axis=0)
    deviation = np.sqrt(squares / max(1, count - 1))
    return torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()


def features_at_points(data: DataSet) -> tuple[Tensor, Tensor]:
    """The features at all points, (P, D), and their classes, (P, C) bool."""
    rows = np.concatenate([each.features[each.point_index] for each in data.recordings])
    return torch.from_numpy(rows), classes_at_points(data)


def classes_at_points(data: DataSet) -> Tensor:
    """The classes of all points, recording by recording, (P, C) bool."""
    label = torch.from_numpy(np.concatenate([each.point_label for each in data.recordings]))
    return torch.nn.functional.one_hot(label, len(data.classes)).bool()
