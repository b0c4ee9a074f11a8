"""What a page is told of the engine's messages, in the form of JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from hrpro.engine.protocol import ActionEvent, SnippetScores

Json = dict[str, Any]
RowState = Literal["live", "idle", "ended", "gone"]

# Scores are told in thousandths: of each snippet, those of the classes that come highest, and only
# from here on.
LEAST_SCORE = 10
CLASSES_TOLD = 8
# Of a stream's entry in the status.
STATUS_ENTRIES = (
    *("lag_snippets", "lag_ms", "credit_snippets", "open_actions", "dropped", "missing"),
    *("proposals", "events", "policy", "fed_by", "bundle_id"),
)
# What a stream is after a notice of this kind.
STATES: Mapping[str, RowState] = {
    "opened": "live",
    "resumed": "live",
    "idle": "idle",
    "ended": "ended",
}


def action_state(event: ActionEvent) -> str:
    """What an action is: one that is over has its last event still to come."""
    if event.kind == "end":
        return "ended"
    if event.kind == "retract":
        return "retracted"
    return "now" if event.end_s is None else "over"


def told_scores(scores: SnippetScores) -> Json:
    """Attention, and (class, score) of the classes that are not next to 0, of each snippet."""
    thousandths = np.rint(scores.scores * 1000).astype(int)  # (n, C)
    highest = np.argsort(-thousandths, axis=1)[:, :CLASSES_TOLD]  # (n, at most CLASSES_TOLD)
    return {
        "first": scores.first_index,
        "attention": np.rint(scores.attention * 1000).astype(int).tolist(),
        "scores": [
            [[k, of[k]] for k in classes if of[k] >= LEAST_SCORE]
            for of, classes in zip(thousandths.tolist(), highest.tolist(), strict=True)
        ],
    }
