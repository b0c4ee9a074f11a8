"""Snippet scores -> actions with an identity, that start, grow and end.

P of a class   0.1   0.6   0.8   0.3   0.7   0.2   0.1       event_start 0.5, event_end 0.25
                      start                   over    end, when the look-ahead has passed
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.refine import Proposal


@dataclass(slots=True)
class Action:
    """One action of one class; positions are in snippets. ``stop`` is None while it goes on."""

    id: int
    label_index: int
    start: float
    first_index: int
    stop: int | None = None
    revision: int = 0
    score_sum: float = 0.0
    snippets: int = 0
    updated_at: int = 0
    best: Proposal | None = None

    def overlap(self, proposal: Proposal, next_index: int) -> float:
        """How many snippets the action shares with a proposal of its class."""
        stop = next_index if self.stop is None else self.stop
        return min(stop, proposal.end) - max(self.first_index, proposal.start)


@dataclass(frozen=True, slots=True)
class ActionChange:
    """What is to be said of an action: borders in snippets, ``end`` None until it is over.

    ``score`` is the mean of P while the action goes on, and at its end the score of its best
    final proposal.
    """

    kind: Literal["start", "update", "end"]
    id: int
    label_index: int
    revision: int
    start: float
    end: float | None
    score: float


class ActionTracker:
    """The actions of one stream."""

    def __init__(
        self, class_count: int, config: LocalizationConfig, first_index: int, next_id: int = 0
    ) -> None:
        self.config = config
        self.next_id = next_id
        self._first_index = first_index
        self._next_index = first_index
        self._previous = np.zeros(class_count)
        self._open: dict[int, Action] = {}  # by class
        self._ending: list[Action] = []  # over, but not yet final
        self._ended: dict[int, Action] = {}  # the last one of each class, for late proposals

    @property
    def open_count(self) -> int:
        """Actions whose end is not published yet."""
        return len(self._open) + len(self._ending)

    def open_since(self, label_index: int, otherwise: int) -> int:
        """The first snippet of the action of a class that goes on; ``otherwise`` if none does."""
        action = self._open.get(label_index)
        return otherwise if action is None else action.first_index

    def push(self, scores: NDArray[np.float32]) -> list[ActionChange]:
        """Take P of the next snippet, shape (C,); actions start, grow, or are over."""
        t, current = self._next_index, scores.astype(np.float64)
        self._next_index += 1
        changes = []
        for label_index, action in list(self._open.items()):
            if current[label_index] < self.config.event_end:
                action.stop = t
                self._ending.append(self._open.pop(label_index))
            else:
                changes += self._grow(action, float(current[label_index]))
        for label_index in np.flatnonzero(current > self.config.event_start).tolist():
            if label_index not in self._open:
                changes.append(self._start(label_index, t, current))
        self._previous = current
        return changes

    def assign(self, proposal: Proposal) -> int | None:
        """The id of the action that a final proposal belongs to, if there is one."""
        candidates = [
            action
            for action in self._of_class(proposal.label_index)
            if action.overlap(proposal, self._next_index) > 0
        ]
        if not candidates:
            return None
        action = max(candidates, key=lambda each: each.overlap(proposal, self._next_index))
        if action.best is None or proposal.score > action.best.score:
            action.best = proposal
        return action.id

    def conclude(self, over_until: int) -> list[ActionChange]:
        """End the actions that were over at ``over_until``: they are final now."""
        final = [a for a in self._ending if a.stop is not None and a.stop <= over_until]
        self._ending = [a for a in self._ending if a.stop is None or a.stop > over_until]
        self._ended |= {action.label_index: action for action in final}
        return [self._end(action) for action in final]

    def flush(self) -> None:
        """The stream is over, and so is every action."""
        for action in self._open.values():
            action.stop = self._next_index
        self._ending += self._open.values()
        self._open = {}

    def _of_class(self, label_index: int) -> Iterator[Action]:
        yield from (a for a in (self._open.get(label_index), self._ended.get(label_index)) if a)
        yield from (action for action in self._ending if action.label_index == label_index)

    def _start(self, label_index: int, t: int, current: NDArray[np.float64]) -> ActionChange:
        before, now = self._previous[label_index], current[label_index]
        # As for proposals, the border lies where the score crosses the threshold.
        crossing = (self.config.event_start - before) / (now - before)
        start = float(t) if t == self._first_index else t - 0.5 + crossing
        action = Action(self.next_id, label_index, float(start), first_index=t, updated_at=t)
        self.next_id += 1
        self._open[label_index] = action
        action.score_sum, action.snippets = float(now), 1
        return self._change("start", action)

    def _grow(self, action: Action, score: float) -> list[ActionChange]:
        action.score_sum += score
        action.snippets += 1
        grown = action.first_index + action.snippets - 1 - action.updated_at
        if grown < self.config.event_update:
            return []
        action.updated_at += grown
        action.revision += 1
        return [self._change("update", action)]

    def _end(self, action: Action) -> ActionChange:
        action.revision += 1
        return self._change("end", action)

    def _change(self, kind: Literal["start", "update", "end"], action: Action) -> ActionChange:
        start, end, score = action.start, None, action.score_sum / action.snippets
        if kind == "end":
            end = float(action.stop or 0)
            if action.best is not None:
                start, end, score = action.best.start, action.best.end, action.best.score
        return ActionChange(kind, action.id, action.label_index, action.revision, start, end, score)
