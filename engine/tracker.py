"""Snippet scores -> actions with an identity, that start, grow, are over, and end.

P of a class   0.1   0.6   0.8   0.3   0.7   0.2   0.1       event_start 0.5, event_end 0.25
                      start                   over    end, when the look-ahead has passed

An action is of one class: what looks like another one is another action. It is confirmed by a
final proposal whose score is not below ``event_confirm``; one that none confirms is retracted.
Each start is followed by one `end` or `retract`, and by nothing of its id after that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.messages import EventKind
from hrpro.engine.refine import Proposal


@dataclass(slots=True)
class Action:
    """One action of one class; positions are in snippets. ``stop`` is None while it goes on.

    ``told_until`` and ``told_score`` are what was last said of it.
    """

    id: int
    label_index: int
    start: float
    first_index: int
    stop: int | None = None
    revision: int = -1
    score_sum: float = 0.0
    snippets: int = 0
    told_until: int = 0
    told_score: float = 0.0
    told_over: bool = False
    best: Proposal | None = None

    @property
    def next_index(self) -> int:
        """One past the last snippet that it has so far."""
        return self.first_index + self.snippets

    @property
    def mean_score(self) -> float:
        """The mean of P over its snippets."""
        return self.score_sum / self.snippets

    def overlap(self, proposal: Proposal, next_index: int) -> float:
        """How many snippets the action shares with a proposal of its class."""
        stop = next_index if self.stop is None else self.stop
        return min(stop, proposal.end) - max(self.first_index, proposal.start)


class ActionChange(NamedTuple):
    """What is to be said of an action: borders in snippets, ``end`` None until it is over.

    ``score`` is the mean of P until it is final, and then the score of its best final proposal.
    """

    kind: EventKind
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

    def state(self) -> dict[str, Any]:
        """All that the tracker goes on from, as numbers and bytes."""
        return {
            "next_id": self.next_id,
            "first_index": self._first_index,
            "next_index": self._next_index,
            "previous": self._previous.tobytes(),
            "open": [_values(action) for action in self._open.values()],
            "ending": [_values(action) for action in self._ending],
            "ended": [_values(action) for action in self._ended.values()],
        }

    @classmethod
    def restored(
        cls, class_count: int, config: LocalizationConfig, state: Mapping[str, Any]
    ) -> Self:
        """A tracker that goes on from the `state` of another."""
        tracker = cls(class_count, config, state["first_index"], state["next_id"])
        tracker._next_index = state["next_index"]
        tracker._previous = np.frombuffer(state["previous"])
        tracker._open = {each.label_index: each for each in map(_action, state["open"])}
        tracker._ending = [_action(each) for each in state["ending"]]
        tracker._ended = {each.label_index: each for each in map(_action, state["ended"])}
        return tracker

    @property
    def open_count(self) -> int:
        """Actions whose end is not published yet."""
        return len(self._open) + len(self._ending)

    @property
    def is_idle(self) -> bool:
        """Whether no action goes on, or waits to be final."""
        return not (self._open or self._ending)

    def open_since(self, label_index: int, otherwise: int) -> int:
        """The first snippet of the action of a class that goes on; ``otherwise`` if none does."""
        action = self._open.get(label_index)
        return otherwise if action is None else action.first_index

    def push(self, scores: NDArray[np.floating]) -> list[ActionChange]:
        """Take P of the next snippet, shape (C,); actions start, grow, or are over."""
        t, current = self._next_index, scores.astype(np.float64, copy=False)
        starts = current.item(current.argmax()) > self.config.event_start
        if not (starts or self._open):
            self.pass_over(current)
            return []
        changes: list[ActionChange] = []
        for label_index, action in list(self._open.items()):
            score = current.item(label_index)
            if score < self.config.event_end:
                action.stop = t
                self._ending.append(self._open.pop(label_index))
            elif (grown := self._grow(action, score)) is not None:
                changes.append(grown)
        if starts:
            above = np.flatnonzero(current > self.config.event_start).tolist()
            changes += [self._start(each, t, current) for each in above if each not in self._open]
        self.pass_over(current)
        return changes

    def pass_over(self, current: NDArray[np.float64]) -> None:
        """Go on by a snippet's P (C,): by itself where no action starts, grows, or is over."""
        self._previous = current
        self._next_index += 1

    def assign(self, proposal: Proposal) -> int | None:
        """The id of the action that a final proposal belongs to, if there is one."""
        action = self._action_of(proposal)
        if action is None:
            return None
        if action.best is None or proposal.score > action.best.score:
            action.best = proposal
        return action.id

    def conclude(
        self, over_until: int, pending: Sequence[Sequence[Proposal]] = ()
    ) -> list[ActionChange]:
        """End, or retract, the actions that were over at ``over_until``: they are final now.

        ``pending`` are the proposals of each class that are not final yet: where one of them is
        better than the best of its action, that waits. Of each that waits it is said that it is
        over.
        """
        changes, waiting = [], []
        for action in self._ending:
            assert action.stop is not None
            if action.stop <= over_until and not self._may_improve(action, pending):
                changes.append(self._conclude(action))
                continue
            waiting.append(action)
            if not action.told_over:
                action.told_over = True
                changes.append(self._change("update", action, float(action.stop)))
        self._ending = waiting
        return changes

    def flush(self) -> None:
        """The stream is over, and so is every action."""
        for action in self._open.values():
            action.stop = self._next_index
        self._ending += self._open.values()
        self._open = {}

    def _of_class(self, label_index: int) -> Iterator[Action]:
        yield from (a for a in (self._open.get(label_index), self._ended.get(label_index)) if a)
        yield from (action for action in self._ending if action.label_index == label_index)

    def _action_of(self, proposal: Proposal) -> Action | None:
        """The action that shares most with a proposal."""
        best, most = None, 0.0
        for action in self._of_class(proposal.label_index):
            shared = action.overlap(proposal, self._next_index)
            if shared > most:
                best, most = action, shared
        return best

    def _may_improve(self, action: Action, pending: Sequence[Sequence[Proposal]]) -> bool:
        of_class = pending[action.label_index] if pending else ()
        return any(
            (action.best is None or proposal.score > action.best.score)
            and self._action_of(proposal) is action
            for proposal in of_class
        )

    def _start(self, label_index: int, t: int, current: NDArray[np.float64]) -> ActionChange:
        before, now = self._previous[label_index], current[label_index]
        threshold, start = self.config.event_start, float(t)
        # As for proposals, the border lies where the score crosses the threshold; it does not where
        # the stream begins, or where the threshold of another bundle is lower.
        if t > self._first_index and before <= threshold:
            start = t - 0.5 + float((threshold - before) / (now - before))
        action = Action(self.next_id, label_index, start, first_index=t)
        self.next_id += 1
        self._open[label_index] = action
        action.score_sum, action.snippets = float(now), 1
        return self._change("start", action)

    def _grow(self, action: Action, score: float) -> ActionChange | None:
        action.score_sum += score
        action.snippets += 1
        grown = action.next_index - action.told_until
        changed = abs(action.mean_score - action.told_score)
        if grown < self.config.event_update_snippets and changed < self.config.event_update_score:
            return None
        return self._change("update", action)

    def _conclude(self, action: Action) -> ActionChange:
        best = action.best
        if best is not None and best.score >= self.config.event_confirm:
            self._ended[action.label_index] = action
            action.start = best.start
            return self._change("end", action, best.end, best.score)
        # Its own borders: those of a proposal that does not count say nothing.
        assert action.stop is not None
        score = 0.0 if best is None else best.score
        return self._change("retract", action, float(action.stop), score)

    def _change(
        self, kind: EventKind, action: Action, end: float | None = None, score: float | None = None
    ) -> ActionChange:
        action.revision += 1
        action.told_until = action.next_index
        action.told_score = action.mean_score if score is None else score
        return ActionChange(
            kind,
            action.id,
            action.label_index,
            action.revision,
            action.start,
            end,
            action.told_score,
        )


# Many times faster than `dataclasses.astuple`, and a state is made with nearly each event.
_values: Callable[[Action], tuple[Any, ...]] = attrgetter(*(each.name for each in fields(Action)))


def _action(values: Sequence[Any]) -> Action:
    best = values[-1]
    return Action(*[*values[:-1], None if best is None else Proposal(*best)])
