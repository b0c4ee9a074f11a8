"""Offline evaluation: whole recordings of the test split at once."""

from __future__ import annotations

from dataclasses import dataclass

from hrpro.engine.config import LocalizationConfig
from hrpro.training.data import DataSet
from hrpro.training.localize import localize_recording
from hrpro.training.metrics import GroundTruth, MeanAveragePrecision, Segments
from hrpro.training.snippet_stage import snippet_scores
from hrpro.training.train import TrainedModel


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
    model: TrainedModel, data: DataSet, truth: GroundTruth, config: LocalizationConfig
) -> Evaluation:
    """Localize every recording of ``data`` and compare with ``truth``."""
    both: dict[str, Segments] = {}
    stage1: dict[str, Segments] = {}
    for recording in data.recordings:
        output = snippet_scores(model.snippet, recording.features)
        for predictions, instance in ((both, model.instance), (stage1, None)):
            found = localize_recording(output, config, data.clock, instance)
            predictions[recording.name] = found
    return Evaluation(truth.compare(both), truth.compare(stage1), both)
