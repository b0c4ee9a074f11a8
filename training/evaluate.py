"""Offline evaluation: whole recordings of the test split at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.localizer import localize
from hrpro.training.data import DataSet
from hrpro.training.instance import InstanceModel
from hrpro.training.metrics import (
    THUMOS_TIOU_THRESHOLDS,
    MeanAveragePrecision,
    Segments,
    mean_average_precision,
    to_segments,
)
from hrpro.training.snippet_stage import snippet_scores
from hrpro.training.train import TrainedModel


class TorchScorer:
    """Stage 2 in torch, as the localizer wants it."""

    def __init__(self, model: InstanceModel) -> None:
        self._model = model

    def score_instances(
        self, embedding: NDArray[np.float32], proposals: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """See `InstanceScorer`."""
        with torch.no_grad():
            output = self._model(torch.from_numpy(embedding), torch.from_numpy(proposals))
        return tuple(each.numpy() for each in output)


@dataclass(frozen=True)
class Evaluation:
    """mAP with both stages, and of stage 1 alone (runs scored by contrast).

    ``predictions`` are those of both stages by recording.
    """

    both_stages: MeanAveragePrecision
    stage1: MeanAveragePrecision
    predictions: dict[str, Segments]

    @property
    def recordings(self) -> int:
        """Recordings that were evaluated."""
        return len(self.predictions)


def evaluate(
    model: TrainedModel,
    data: DataSet,
    truth: Mapping[str, Segments],
    config: LocalizationConfig,
    tiou_thresholds: Sequence[float] = THUMOS_TIOU_THRESHOLDS,
    ambiguous: Mapping[str, NDArray[np.float64]] | None = None,
) -> Evaluation:
    """Localize every recording of ``data`` and compare with ``truth``.

    ``ambiguous`` as `mean_average_precision` takes them.
    """
    both: dict[str, Segments] = {}
    stage1: dict[str, Segments] = {}
    scorer = TorchScorer(model.instance)
    for recording in data.recordings:
        output = snippet_scores(model.snippet, recording.features)
        for predictions, each in ((both, scorer), (stage1, None)):
            found = localize(output.scores, output.embedding, config, each)
            predictions[recording.name] = to_segments(found, data.clock)
    count = len(data.classes)
    return Evaluation(
        mean_average_precision(truth, both, count, tiou_thresholds, ambiguous),
        mean_average_precision(truth, stage1, count, tiou_thresholds, ambiguous),
        both,
    )
