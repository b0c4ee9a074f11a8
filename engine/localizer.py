"""Stitched snippet scores of one stream -> action events and final proposals.

The localizer takes one snippet at a time and decides by what it has seen up to that snippet, so
what it publishes depends neither on chunks, windows nor batches. Offline, it is given a whole
recording and publishes at the end.

What is published is final, and counts against all that comes later: soft-NMS lowers a proposal by
what it shares with those before it. So the best one of an action has to be the first. A high
threshold's run closes before the action is over, and would go out before the run that holds it.
Therefore a proposal waits, beside its look-ahead, for the end of the action that it is a part of:

    P            0.6  0.9  0.4  0.8  0.7  0.1        event_end 0.25
    above 0.5    |-------|     |--------|            two runs; the first waits for the action
    above 0.3    |----------------------|            the best of them, published first

For the same reason it waits for a better one that overlaps it and is over, but not yet final.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.asking import Asking, InstanceScorer, alone
from hrpro.engine.config import LocalizationConfig
from hrpro.engine.proposals import DETECTION_SETTINGS, Run, RunDetector
from hrpro.engine.refine import Proposal, refine_runs
from hrpro.engine.ring import Ring
from hrpro.engine.soft_nms import soft_nms, subtract_published, waits_for_better
from hrpro.engine.tracker import ActionChange, ActionTracker

Floats = NDArray[np.float64]

# What was published is remembered for as long as it can overlap what is still to come, and no
# more than this many a class.
_PUBLISHED_LIMIT = 256
# So many proposals of a class that are due may wait for better ones, or for the end of their
# action: with those that a snippet adds, few enough for the quick way of soft-NMS.
_POOL_LIMIT = 192


class Final(NamedTuple):
    """A proposal that is final, and the action it belongs to."""

    proposal: Proposal
    action_id: int | None


Decision = ActionChange | Final


class StreamLocalizer:
    """From scores to decisions, for one stream.

    ``wait`` is how many snippets after its end (`Proposal.due_from`) a proposal is published; None
    waits for the end of the stream (offline).
    """

    def __init__(
        self,
        class_count: int,
        embedding_width: int,
        config: LocalizationConfig,
        scorer: InstanceScorer | None,
        wait: int | None,
        first_index: int = 0,
        next_action_id: int = 0,
    ) -> None:
        self._config = config
        self._scorer = scorer
        self._wait = wait
        self._detector = RunDetector(class_count, config, first_index)
        self._tracker = ActionTracker(class_count, config, first_index, next_action_id)
        self._history = Ring(config.history_snippets, (embedding_width,), first_index)
        self._embedded_from = first_index  # by the model that the scorer belongs to
        self.decided_until = first_index  # what comes below is remembered alone, see `restored`
        self._due_config: LocalizationConfig | None = None  # from there on
        self._scores = Ring(config.history_snippets, (class_count,), first_index)
        self._closed: list[Run] = []  # until there is enough evidence right of them
        self._pool: list[list[Proposal]] = [[] for _ in range(class_count)]  # not yet final
        self._due_from: dict[int, int] = {}  # of each class in it, the first
        self._published: list[deque[Proposal]] = [
            deque(maxlen=_PUBLISHED_LIMIT) for _ in range(class_count)
        ]

    def state(self) -> dict[str, Any]:
        """All that decisions go on from, as numbers and bytes, but for what is remembered of the
        snippets from `remembered_from` on: that comes again, see `restored`."""
        stop = min([run.stop for run in self._closed], default=self._detector.next_index)
        return {
            "settings": {name: getattr(self._config, name) for name in DETECTION_SETTINGS},
            "detector": self._detector.state(stop),
            "tracker": self._tracker.state(),
            "closed": list(self._closed),
            "pool": list(chain.from_iterable(self._pool)),
            "published": list(chain.from_iterable(self._published)),
            "embedded_from": self._embedded_from,
        }

    @classmethod
    def restored(
        cls,
        class_count: int,
        embedding_width: int,
        config: LocalizationConfig,
        scorer: InstanceScorer | None,
        wait: int | None,
        first_index: int,
        state: Mapping[str, Any],
    ) -> Self:
        """A localizer that goes on from the `state` of another.

        The snippets from ``first_index`` on, at most its ``remembered_from``, have to come again:
        up to `decided_until` they are remembered, and nothing is decided. Where thresholds are
        others than before, those before hold until then.
        """
        settings = {**state["settings"], "thresholds": tuple(state["settings"]["thresholds"])}
        before = config.model_copy(update=settings)
        localizer = cls(class_count, embedding_width, before, scorer, wait, first_index)
        localizer._detector = RunDetector.restored(class_count, before, state["detector"])
        localizer._tracker = ActionTracker.restored(class_count, before, state["tracker"])
        localizer._closed = [Run(*run) for run in state["closed"]]
        localizer._keep([Proposal(*each) for each in state["pool"]])
        for each in state["published"]:
            proposal = Proposal(*each)
            localizer._published[proposal.label_index].append(proposal)
        localizer._embedded_from = state["embedded_from"]
        localizer.decided_until = localizer._detector.next_index
        localizer._due_config = None if before == config else config
        return localizer

    @property
    def began_at(self) -> int:
        """Nothing is known of snippets before this one."""
        return self._history.first_index

    @property
    def remembered_from(self) -> int:
        """The first snippet of those that decisions to come may look at again."""
        runs = [run.start for run in self._closed]
        earliest = min([self._detector.earliest_start(), *runs])
        # As far as stage 2 looks left of a run, whose border is up to a snippet before its start.
        earliest -= 2 * self._config.border_limit + 2
        newest = self._detector.next_index - self._config.history_snippets
        return max(earliest, newest, self.began_at)

    @property
    def open_actions(self) -> int:
        """Actions whose end is not published yet."""
        return self._tracker.open_count

    @property
    def next_action_id(self) -> int:
        """The id of the next action that starts."""
        return self._tracker.next_id

    @property
    def buffer_bytes(self) -> int:
        """Of memory in its rings."""
        return self._history.nbytes + self._scores.nbytes

    @property
    def newest(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """P (C,) and embedding (W,) of the newest snippet, as views; zeros where there is none."""
        return self._scores.newest, self._history.newest

    def advance(
        self, scores: NDArray[np.float32], embedding: NDArray[np.float32]
    ) -> list[Decision]:
        """Take the next n snippets: scores P (n, C) in [0, 1] and embedding (n, W)."""
        return alone(self.advancing(scores, embedding))

    def advancing(
        self, scores: NDArray[np.float32], embedding: NDArray[np.float32]
    ) -> Asking[list[Decision]]:
        """The same, beside other streams."""
        decisions: list[Decision] = []
        position = 0
        if self._history.next_index < self.decided_until:
            position = self._remember(scores, embedding)
        if self._due_config is not None and self._history.next_index >= self.decided_until:
            config, self._due_config = self._due_config, None
            self.use(config, self._scorer, None)
        for row in range(position, len(scores)):
            if self.takes_quietly(scores[row], embedding[row]):
                continue
            decisions += self._take(scores[row], embedding[row])
            if self._closed and (ready := self._ready()):
                yield from self._refine(ready)
            if self._wait is not None:
                decisions += self._publish(self._detector.next_index - self._wait)
        return decisions

    def takes_quietly(self, scores: NDArray[np.float32], embedding: NDArray[np.float32]) -> bool:
        """Take the next snippet, scores (C,) and embedding (W,), if nothing can come of it, as of
        most: nothing goes on or waits, and nothing begins. Otherwise it is not taken."""
        if (
            self._closed
            or self._due_from
            or not (self._detector.is_idle and self._tracker.is_idle)
            or self._due_config is not None
            or self._history.next_index < self.decided_until
        ):
            return False
        current = scores.astype(np.float64)  # as thresholds are
        highest = current.item(current.argmax())
        if highest > self._config.thresholds[0] or highest > self._config.event_start:
            return False
        self._history.push(embedding)
        self._scores.push(scores)
        self._detector.pass_over(current)
        self._tracker.pass_over(current)
        return True

    def _remember(self, scores: NDArray[np.float32], embedding: NDArray[np.float32]) -> int:
        """Take those of the snippets that are decided; returns how many they are."""
        count = min(len(scores), self.decided_until - self._history.next_index)
        for row in range(count):
            self._history.push(embedding[row])
            self._scores.push(scores[row])
        return count

    def _take(
        self, scores: NDArray[np.float32], embedding: NDArray[np.float32]
    ) -> list[ActionChange]:
        """Take one snippet, scores (C,) and embedding (W,), but for what is to be published."""
        self._history.push(embedding)
        self._scores.push(scores)
        current = scores.astype(np.float64)  # as thresholds are
        self._closed += self._detector.push(current)
        return self._tracker.push(current)

    def flush(self) -> list[Decision]:
        """The stream is over: everything open ends at its last snippet and is published."""
        self._closed += self._detector.flush()
        self._tracker.flush()
        ready, self._closed = self._closed, []
        alone(self._refine(ready))
        return self._publish(self._detector.next_index)

    def use(
        self,
        config: LocalizationConfig,
        scorer: InstanceScorer | None,
        embedding_width: int | None,
    ) -> None:
        """Go on with another bundle: its settings, its stage 2, and the width of its embedding.

        None says that it embeds as the one before. Otherwise what was embedded before is forgotten,
        since stage 2 knows nothing of another model's: a run that is over is scored with what is
        known of it, and one that goes on will be scored by its contrast alone.

        What a restored one has to remember again is not there yet: the settings hold from
        `decided_until` on, and runs that are over wait for what the other model embeds of them.
        """
        if self._history.next_index < self.decided_until:
            if embedding_width is not None:
                self._forget_embedding(config, embedding_width)
            self._due_config, self._scorer = config, scorer
            return
        if embedding_width is not None or config != self._config:
            ready, self._closed = self._closed, []
            alone(self._refine(ready))
        if any(getattr(config, name) != getattr(self._config, name) for name in DETECTION_SETTINGS):
            self._detector = self._replayed(config)
        if config.history_snippets != self._config.history_snippets:
            self._scores = self._scores.resized(config.history_snippets)
            self._history = self._history.resized(config.history_snippets)
        self._tracker.config = config
        if embedding_width is not None:
            self._forget_embedding(config, embedding_width)
        self._config, self._scorer, self._due_config = config, scorer, None

    def _forget_embedding(self, config: LocalizationConfig, width: int) -> None:
        self._embedded_from = self._history.next_index
        self._history = Ring(config.history_snippets, (width,), self._embedded_from)

    def _replayed(self, config: LocalizationConfig) -> RunDetector:
        """A detector of other thresholds that knows which runs are open.

        It begins at the last snippet where none was; a run that is longer than what is remembered
        begins there.
        """
        first, next_index = self._scores.oldest, self._scores.next_index
        scores = self._scores.read(first, next_index)
        highest = scores.max(axis=1).astype(np.float64)  # as the detector compares them
        quiet = np.flatnonzero(highest <= config.thresholds[0])
        if len(quiet):  # its outer region, and what a border may move
            skipped = max(0, int(quiet[-1]) - 2 * config.border_limit)
            first, scores = first + skipped, scores[skipped:]
        detector = RunDetector(scores.shape[1], config, first)
        for row in scores:
            detector.push(row)
        return detector

    def _ready(self) -> list[Run]:
        """Closed runs whose evidence is complete, or which have to be published now."""
        now = self._detector.next_index
        due = now if self._wait is None else now - self._wait
        ready: list[Run] = []
        waiting: list[Run] = []
        for run in self._closed:
            is_ready = run.evidence_stop <= now or (self._wait is not None and run.stop <= due)
            (ready if is_ready else waiting).append(run)
        self._closed = waiting
        return ready

    def _refine(self, runs: list[Run]) -> Asking[None]:
        embedded = [run for run in runs if run.start >= self._embedded_from]
        older = [run for run in runs if run.start < self._embedded_from]
        for scorer, of_one_model in ((self._scorer, embedded), (None, older)):
            proposals = yield from refine_runs(
                of_one_model, self._detector, self._history, scorer, self._config
            )
            self._keep(proposals)

    def _keep(self, proposals: list[Proposal]) -> None:
        """Until they are final."""
        for proposal in proposals:
            label_index, due_from = proposal.label_index, proposal.due_from
            self._pool[label_index].append(proposal)
            self._due_from[label_index] = min(due_from, self._due_from.get(label_index, due_from))

    def _publish(self, due_until: int) -> list[Decision]:
        """Publish the proposals of runs, and the ends of actions, that ended by ``due_until``."""
        finals: list[Final] = []
        for label_index in sorted(self._due_from):
            if self._due_from[label_index] <= due_until:
                finals += self._publish_class(label_index, due_until)
        return [*finals, *self._tracker.conclude(due_until, self._pool)]

    def _publish_class(self, label_index: int, due_until: int) -> list[Final]:
        pool, published = self._pool[label_index], self._published[label_index]
        # What goes on: the action, and runs that are over and not yet scored.
        goes_on_from = self._tracker.open_since(label_index, self._detector.next_index)
        for run in self._closed:
            if run.label_index == label_index and run.start < goes_on_from:
                goes_on_from = run.start
        is_final = [p.end <= goes_on_from and p.due_from <= due_until for p in pool]
        # An action may last for hours: nothing waits for longer than what is remembered.
        latest = due_until - self._config.history_snippets
        if len(pool) > _POOL_LIMIT:  # as of noise: each snippet would cost the square of it
            due_from = sorted(p.due_from for p in pool)
            latest = max(latest, min(due_from[len(pool) - _POOL_LIMIT - 1], due_until))
        some_are_late = self._due_from[label_index] <= latest
        if not (some_are_late or any(is_final)):
            return []
        start, end, score = _columns(pool)
        if not all(is_final):
            late = np.array([p.due_from <= latest for p in pool])
            over = late | is_final
            is_final = (late | over & ~waits_for_better(start, end, score, over)).tolist()
            if not any(is_final):
                return []
        self._forget(label_index)
        sigma = self._config.soft_nms_sigma
        added = subtract_published(start, end, score, sigma, *_columns(list(published)))
        scores = soft_nms(start, end, added, sigma).tolist()
        finals = []
        for n in sorted(range(len(pool)), key=lambda n: -scores[n]):
            if is_final[n] and scores[n] > self._config.score_floor:
                final = pool[n]._replace(score=scores[n])
                published.append(final)
                finals.append(Final(final, self._tracker.assign(final)))
        self._pool[label_index] = []
        del self._due_from[label_index]
        self._keep([p for p, out in zip(pool, is_final, strict=True) if not out])
        return finals

    def _forget(self, label_index: int) -> None:
        """Drop what can no longer overlap a proposal that is still to come."""
        earliest = min(
            [self._detector.earliest_open_start(label_index)]
            + [run.start for run in self._closed if run.label_index == label_index]
            + [int(proposal.start) for proposal in self._pool[label_index]]
        )
        reach = earliest - self._config.border_limit - 1
        published = self._published[label_index]
        kept = [proposal for proposal in published if proposal.end > reach]
        if len(kept) < len(published):
            published.clear()
            published.extend(kept)


def localize(
    scores: NDArray[np.float32],
    embedding: NDArray[np.float32],
    config: LocalizationConfig,
    scorer: InstanceScorer | None,
) -> list[Proposal]:
    """The offline case: a whole recording's P (T, C) and embedding (T, W) -> final proposals."""
    localizer = StreamLocalizer(scores.shape[1], embedding.shape[1], config, scorer, wait=None)
    decisions = localizer.advance(scores, embedding) + localizer.flush()
    return [decision.proposal for decision in decisions if isinstance(decision, Final)]


def _columns(proposals: list[Proposal]) -> tuple[Floats, Floats, Floats]:
    """Start, end and score of proposals as arrays."""
    table = np.array([(p.start, p.end, p.score) for p in proposals], dtype=np.float64)
    start, end, score = table.reshape(-1, 3).T
    return start, end, score
