"""Whole recordings at once: what `hrpro.engine.localizer` finds snippet by snippet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.refine import fuse
from hrpro.engine.soft_nms import soft_nms
from hrpro.engine.timebase import SnippetClock
from hrpro.training.candidates import find_candidates
from hrpro.training.instance import InstanceModel
from hrpro.training.metrics import Segments
from hrpro.training.ranking import Candidates, Floats
from hrpro.training.snippet_stage import SnippetScores

_PROPOSALS_AT_ONCE = 1024  # the features of all regions at once could need much memory


def localize_recording(
    output: SnippetScores,
    config: LocalizationConfig,
    clock: SnippetClock,
    instance: InstanceModel | None,
) -> Segments:
    """Final proposals of a recording, from what stage 1 says of it; shapes as `all_proposals`."""
    found = all_proposals(output, config, clock, instance)
    score = np.zeros(len(found))
    for label_index in np.unique(found.label_index):
        row = np.flatnonzero(found.label_index == label_index)
        own = found.rows(row)
        score[row] = soft_nms(own.start_s, own.end_s, own.score, config.soft_nms_sigma)
    order = np.lexsort((-score, found.label_index))
    return replace(found, score=score).rows(order[score[order] > config.score_floor])


def all_proposals(
    output: SnippetScores,
    config: LocalizationConfig,
    clock: SnippetClock,
    instance: InstanceModel | None,
) -> Segments:
    """The proposals of a recording before soft-NMS, in seconds; see `hrpro.engine.refine`.

    With ``instance`` they are refined, and scored by p_OIC and completeness; without, these are
    the runs of stage 1 and their p_OIC.
    """
    found = find_candidates(output.scores, config)
    borders, label, score = found.borders, found.label_index, found.contrast
    if instance is not None:
        completeness, borders, refined_completeness = _score(
            found, output.embedding, config, instance
        )
        rows = np.arange(len(borders))
        weight = config.completeness_weight * float(instance.trust)
        of_class = refined_completeness[rows, label].astype(np.float64)
        score = fuse(found.contrast, of_class, weight)
        if config.keep_unrefined:
            of_class = completeness[rows, label].astype(np.float64)
            unrefined = fuse(found.contrast, of_class, weight)
            borders = np.concatenate([borders, found.borders])
            label, score = np.tile(label, 2), np.concatenate([score, unrefined])
    borders = borders.clip(0, len(output.scores))
    start_s, end_s = clock.snippet_s * borders.T
    return Segments(start_s, end_s, label, score).rows(borders[:, 1] > borders[:, 0])


def _score(
    found: Candidates,
    embedding: NDArray[np.float32],
    config: LocalizationConfig,
    instance: InstanceModel,
) -> tuple[NDArray[np.float32], Floats, NDArray[np.float32]]:
    """Stage 2 on all candidates, see `InstanceOutput`. Each sees what a stream has kept by the
    time when it is refined."""
    highest = torch.from_numpy(found.evidence_stop - 1)[:, None]
    lowest = (highest + 1 - config.history_snippets).clamp(min=0)
    borders = torch.from_numpy(found.borders.astype(np.float32))
    rows = torch.from_numpy(embedding)
    with torch.no_grad():
        outputs = [
            instance.score(rows, *each)
            for each in zip(
                *(x.split(_PROPOSALS_AT_ONCE) for x in (borders, lowest, highest)), strict=True
            )
        ]
    completeness, refined, again = (torch.cat(each).numpy() for each in zip(*outputs, strict=True))
    return completeness, refined.astype(np.float64), again
