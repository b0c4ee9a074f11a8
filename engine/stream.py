"""All state of one live stream: its newest snippets, how far they are processed, its localizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.messages import Policy
from hrpro.engine.snippets import SnippetBuffer
from hrpro.engine.wire import StreamError

if TYPE_CHECKING:
    from hrpro.engine.deployment import Deployment
    from hrpro.engine.inference import Outputs

Rows = NDArray[np.float32]
Span = tuple[int, int]

# Fields that are saved as they are.
_SAVED = (
    "session",
    "first_index",
    "policy",
    "idle",
    "sequence",
    "proposals",
    "events",
    "received",
    "duplicates",
    "dropped",
    "missing",
)


class Stream:
    """One live stream; ``session`` counts how often its id was opened, ``deployment`` works for it.

    Snippets below ``next_index`` have come or never will, scores below ``asked`` are asked for and
    below ``processed`` final. ``policy`` says what becomes of snippets that there is no room for.
    """

    def __init__(
        self,
        stream: str,
        session: int,
        first_index: int,
        deployment: Deployment,
        policy: Policy = "wait",
    ) -> None:
        self.stream = stream
        self.session = session
        self.first_index = first_index
        self.policy = policy
        self.asked = first_index
        self.processed = first_index
        self.deployment = deployment
        self.localizer = deployment.new_localizer(first_index)
        self.ended = False
        self.idle = False
        self.sequence = 0
        self.proposals = 0
        self.events = 0
        self.received = 0
        self.duplicates = 0  # snippets that came again, or after they were given up
        self.dropped = 0  # snippets that there was no room for
        self.missing = 0  # snippets that were given up
        self._plan = plan = deployment.plan
        self._backlog = backlog = deployment.config.backlog_snippets
        self._hop, self._room = plan.hop, plan.lookahead + backlog
        self._snippets = SnippetBuffer(
            plan.window + backlog, deployment.manifest.feature_dim, first_index
        )
        self._flush_at: int | None = None  # a silent stream is processed up to here, as if it ended
        self._gone_until = first_index  # no snippet from here on is given up
        self._gap_start: int | None = None  # of the gap that processing is in
        self._skip: Span | None = None  # dropped, to be passed over once processing is there
        self._attention = 0.0  # of the newest snippet whose scores are known
        self._known_gaps: list[Span] = []  # of before it was restored, where snippets come again
        self.needed_from: int | None = None
        """No snippet below is ever needed again; None where the engine is stateless."""
        self.saved_at = first_index  # how far it was processed when it was saved
        self.is_under_way = False
        """Whether its next scores are decided on, for which it may wait for stage 2: it cannot be
        saved then."""

    # ---- across a restart ----------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that its decisions go on from, as numbers and bytes, but for the snippets from
        ``needed_from`` on, which have to come again."""
        first = max(self.localizer.remembered_from, self.first_index)
        hop = first // self._plan.hop * self._plan.hop
        decided = max(self.processed, self.decided_until)
        needed_from = max(hop - self._plan.context, self.first_index)
        if self.needed_from is not None and needed_from < self.needed_from:
            # Another bundle may look back further, but what was not needed is gone.
            needed_from = self.needed_from
            next_hop = -(-needed_from // self._plan.hop) * self._plan.hop
            hop = max(hop, min(next_hop, decided))
        return {
            **{name: getattr(self, name) for name in _SAVED},
            "idle": self.idle and self._flush_at is None,  # once that is processed
            "processed": decided,
            "asked": max(hop, self.localizer.began_at),
            "came_until": self.came_until,
            "gap_start": self._gap_start,
            "gaps": self._gaps_from(needed_from),
            "needed_from": needed_from,
            "localizer": self.localizer.state(),
        }

    @classmethod
    def restored(cls, stream: str, state: Mapping[str, Any], deployment: Deployment) -> Stream:
        """A stream that goes on from the `state` of another.

        Its snippets from `needed_from` on have to come again: as far as all of them were decided,
        they are remembered, and nothing is decided or published.
        """
        restored = cls(stream, state["session"], state["first_index"], deployment, state["policy"])
        for name in _SAVED:
            setattr(restored, name, state[name])
        restored.localizer = deployment.restored_localizer(state["asked"], state["localizer"])
        restored.asked = restored.processed = state["asked"]
        restored.needed_from = needed_from = state["needed_from"]
        restored.saved_at = state["processed"]
        plan, dim = deployment.plan, deployment.manifest.feature_dim
        restored._snippets = SnippetBuffer(plan.window + restored._backlog, dim, needed_from)
        restored._snippets.came_until = max(state["processed"], state["came_until"])
        restored._gap_start = state["gap_start"]
        restored._known_gaps = [(start, stop) for start, stop in state["gaps"]]
        restored._gone_until = max([needed_from, *(stop for _, stop in restored._known_gaps)])
        return restored

    @property
    def decided_until(self) -> int:
        """What comes of the snippets below is published, though they may have to come again."""
        return self.localizer.decided_until

    def _gaps_from(self, first: int) -> list[Span]:
        """Where nothing came of the known snippets from this one on."""
        if self._gone_until <= first and not self._known_gaps:
            return []
        first = max(first, self._snippets.oldest)
        came = self._snippets.here(first, self.known_until)
        edges = np.flatnonzero(np.diff(came.astype(np.int8), prepend=1, append=1)) + first
        spans = [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
        return spans + [span for span in self._known_gaps if span[1] > self.known_until]

    @property
    def bundle_id(self) -> str:
        """Of the bundle that works for it."""
        return self.deployment.bundle_id

    @property
    def next_index(self) -> int:
        """The first snippet that has not come yet and may come."""
        return self._snippets.next_index

    @property
    def known_until(self) -> int:
        """Of the snippets below it is known whether they come: `next_index`, if there is room."""
        return self._snippets.known_until

    @property
    def came_until(self) -> int:
        """One past the newest snippet that came."""
        return self._snippets.came_until

    @property
    def missing_until(self) -> int | None:
        """The end of what is missing from ``next_index`` on, if a later snippet is here."""
        return self._snippets.missing_until

    @property
    def send_until(self) -> int:
        """There is room for the snippets below this index."""
        return (self.processed // self._hop + 1) * self._hop + self._room

    @property
    def open_actions(self) -> int:
        """Actions whose end is not published yet."""
        return self.localizer.open_actions

    @property
    def flush_due(self) -> bool:
        """Whether a silent stream is processed as far as it came."""
        return self._flush_at == self.processed

    @property
    def buffer_bytes(self) -> int:
        """Of memory that the stream has for itself as long as it lives."""
        return self._snippets.nbytes + self.localizer.buffer_bytes

    @property
    def finished(self) -> bool:
        """Whether the stream is over and all its scores are final."""
        return self.ended and self._flush_at is None and self.processed == self.next_index

    @property
    def skips(self) -> bool:
        """Whether some snippets are to be passed over."""
        return self._skip is not None

    @property
    def lag(self) -> int:
        """Snippets whose scores could be computed now and are not."""
        return max(0, self.ready_until() - self.processed)

    # ---- what comes ----------------------------------------------------------------------------

    def check(self, first_index: int, features: NDArray[np.float32]) -> None:
        """Raise StreamError if the chunk (n, D) is beyond the credit, has another D, or holds a
        value that is not finite."""
        n, D = features.shape
        if self.ended:
            raise self._error("out_of_order", first_index, "no more snippets after the end")
        if self._snippets.feature_dim != D:
            expected = self._snippets.feature_dim
            raise self._error("wrong_dimension", first_index, f"expected D = {expected}, got {D}")
        taken_until = self.send_until
        if self.policy != "wait":  # what there is no room for is dropped
            taken_until = max(taken_until, self.next_index + self._backlog)
        if first_index + n > taken_until:
            raise self._error(
                "no_credit", first_index, f"room up to snippet {taken_until}, got {n} snippets"
            )
        if math.isfinite(np.vdot(features, features)):  # all but all that come
            return
        is_finite = np.isfinite(features)  # what is large has a square that is not
        if not is_finite.all():
            at = first_index + int(is_finite.all(axis=1).argmin())
            raise self._error("not_finite", at, "expected finite features, got NaN or infinity")

    def append(self, first_index: int, features: NDArray[np.float32]) -> None:
        """Take a checked chunk: what is there already, or was given up, is a duplicate, and what
        there is no room for is dropped."""
        stop, room = first_index + len(features), self.send_until
        fitting = len(features) if stop <= room else max(first_index, room) - first_index
        if fitting:
            repeated = self._snippets.write(first_index, features[:fitting], room)
            self.duplicates += repeated
            self.received += fitting - repeated
        if fitting < len(features):
            self.dropped += max(0, stop - max(first_index + fitting, self.next_index))
            self.give_up(stop)
        while self._known_gaps and self._known_gaps[0][0] < self.known_until:
            start, end = self._known_gaps.pop(0)
            self._snippets.take_out(start, end)
            if end > self.known_until:
                self._known_gaps.insert(0, (self.known_until, end))
                break

    def give_up(self, until: int) -> None:
        """The snippets below this index that are not here will never come."""
        self._gone_until = max(self._gone_until, until)
        self._snippets.give_up(until, self.send_until)

    def give_up_decided(self) -> None:
        """What was decided before a restart, and has not come again, never will."""
        if self.next_index < self.decided_until:
            self.give_up(self.decided_until)

    def drop_oldest(self, stop: int) -> None:
        """Do without the scores of what is not asked for yet, as far as snippets below ``stop``
        need the room. The features stay, for the windows of those that follow."""
        hop = self._plan.hop
        blocks = -(-(stop - self._backlog - self._plan.lookahead) // hop) - 1
        until = min(blocks * hop, self.ready_until())
        start, before = self._skip or (self.asked, self.asked)
        if until > before:
            self.dropped += int(self._snippets.here(before, until).sum())
            self._skip = (start, until)

    def end(self, next_index: int) -> None:
        """No more snippets will come. Raises StreamError if some are missing."""
        if next_index != self.next_index:
            raise self._error(
                "out_of_order",
                next_index,
                f"expected the end at snippet {self.next_index}, which is the next one",
            )
        self.ended = True

    def rest(self) -> bool:
        """Process what is there as if it were the end; False where that has been done or must
        wait, because something is missing or in work."""
        self.give_up_decided()
        if self.ended or self.idle or self.lag or self.asked > self.processed:
            return False
        if self.known_until < self.next_index or self.missing_until is not None:
            return False
        self.idle = True
        self._flush_at = self.known_until
        return True

    def resume(self) -> bool:
        """Whether a stream whose silence is processed goes on now."""
        if not self.idle or self._flush_at is not None:
            return False
        if max(self.next_index, self._snippets.top_index) <= self.processed:
            return False
        self.idle = False
        return True

    def restart(self) -> None:
        """What comes from here on begins anew, but for what stage 1 sees and the ids."""
        self._flush_at, self._attention = None, 0.0
        self.localizer = self.deployment.new_localizer(
            self.processed, self.localizer.next_action_id
        )

    # ---- processing ----------------------------------------------------------------------------

    def ready_until(self) -> int:
        """Scores can be computed for the snippets below this index."""
        if self._flush_at is not None:
            return self._flush_at
        if self.ended:
            return self.known_until
        return (self._snippets.known_until - self._plan.lookahead) // self._hop * self._hop

    def read_snippets(
        self, start: int, features: NDArray[np.float32], valid: NDArray[np.bool_]
    ) -> None:
        """Fill ``features`` (T, D) and ``valid`` (T,) with the snippets from ``start`` on; before
        the stream, and where nothing is known yet, there is none."""
        stop, snippets = start + len(valid), self._snippets
        if snippets.first_index <= start and stop <= snippets.known_until:
            snippets.read(start, stop, features, valid)
            return
        last = max(start, min(stop, snippets.known_until))
        first = min(max(start, snippets.first_index), last)
        here = slice(first - start, last - start)
        features[: here.start] = 0
        valid[: here.start] = False
        if first < last:
            snippets.read(first, last, features[here], valid[here])
        features[here.stop :] = 0
        valid[here.stop :] = False

    def windows_from(self, first: int) -> int:
        """How many windows can be computed, from the one for snippet ``first`` on."""
        until = self.ready_until()
        if self._skip is not None and self._skip[0] < until:
            until = self._skip[0]
        return 0 if until <= first else self._plan.windows(first, until)

    def pass_over(self) -> Outputs | None:
        """P (n, C), embedding (n, W) and attention (n,) in the place of dropped snippets that are
        next, for which none are computed: the last ones before them."""
        if self._skip is None or self.processed < self._skip[0]:
            return None
        n = self._skip[1] - self.processed
        scores, embedding = (np.tile(each, (n, 1)) for each in self.localizer.newest)
        return scores, embedding, np.full(n, self._attention, dtype=np.float32)

    def is_whole_from(self, first: int) -> bool:
        """Whether all snippets that are known from here on have come, and none was dropped."""
        return first >= self._gone_until and self._gap_start is None and self._skip is None

    def gaps_to(self, until: int) -> list[Span]:
        """The gaps that end between ``processed`` and this index."""
        first = max(self.processed, self.decided_until)
        if first >= until or self.is_whole_from(first):
            return []
        came = self._snippets.here(first, until)
        self.missing += int((~came).sum())
        came &= self._skip is None or first < self._skip[0]
        ended: list[Span] = []
        for index, is_here in enumerate(came.tolist(), first):
            if is_here and self._gap_start is not None:
                ended.append((self._gap_start, index))
                self._gap_start = None
            elif not is_here and self._gap_start is None:
                self._gap_start = index
        return ended

    def newest_used(self, until: int) -> int:
        """The newest snippet that the scores below this index are computed from."""
        known_until = self.known_until if self._flush_at is None else self._flush_at
        return min(self._plan.stop(until - 1), known_until) - 1

    def last_gap(self) -> list[Span]:
        """The gap that processing is in, where it ends with the stream."""
        start, self._gap_start = self._gap_start, None
        return [] if start is None else [(start, self.processed)]

    def advance(self, attention: Rows) -> None:
        """What is decided by the scores of the next snippets, with attention (n,), is known."""
        self._attention = attention.item(-1)
        self.processed += len(attention)
        self.asked = max(self.asked, self.processed)
        if self._skip is not None and self._skip[1] <= self.processed:
            self._skip = None
        if self.known_until < self.next_index:  # it waited for room
            self._snippets.settle(self.send_until)

    def _error(self, code: str, index: int, text: str) -> StreamError:
        where = f"stream {self.stream!r}, snippet {index}"
        return StreamError(code, f"{where}: {text}", self.next_index)
