"""What a subscriber and an engine say to each other, without I/O and without a clock.

    connect --> echo --> ask the log for what follows the last number --> live
                ^                    ^                                      |
                |                    +------- a number is missing ----------+
                +---------------- nothing heard for SILENT_S ---------------+

The answers of the log and the live publications come over one line, in order: whatever is live
before the last page is in the pages, and whatever comes after it is not.
"""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict, deque
from collections.abc import Collection

from hrpro.clients.score_filter import STREAMS_REMEMBERED, ScoreFilter
from hrpro.engine import protocol, wire
from hrpro.engine.protocol import (
    ActionEvent,
    FinalProposal,
    HrproError,
    Mark,
    Page,
    Publication,
    SnippetScores,
    StreamNotice,
    Subscribed,
    topic_prefix,
)

_log = logging.getLogger(__name__)

KINDS = (ActionEvent.TYPE, FinalProposal.TYPE, StreamNotice.TYPE)
# The engine gives a sign of life each second. After so long without, the line is dead.
SILENT_S = 5.0


class ReplayError(HrproError):
    """The engine cannot send again what was asked for."""


class Subscription:
    """One subscriber's conversation: `topics` are for a new line, `asks` for the one that is there,
    `hear` takes what has come, and `next` gives it.

    Raises ValueError for filters that nothing can pass.
    """

    def __init__(
        self,
        address: str,
        stream: str | None,
        label: str | None,
        kinds: Collection[str],
        min_score: float | None,
        since: int | None,
        instance: str | None,
    ) -> None:
        self._kinds = set(kinds)
        if not self._kinds or not self._kinds <= set(KINDS):
            raise ValueError(f"kinds: expected some of {KINDS}, came {tuple(kinds)!r}")
        self._stream = wire.checked("stream", wire.optional(wire.stream_id), stream)
        self._label = wire.checked("label", wire.optional(wire.label), label)
        lowest = wire.checked("min_score", wire.optional(wire.number), min_score)
        if lowest is not None and not 0 <= lowest <= 1:
            raise ValueError(f"min_score: expected a score in [0, 1], came {lowest:g}")
        self._since = wire.checked("since", wire.optional(wire.count), since)
        self._scores = None if lowest is None else ScoreFilter(lowest, bool(since))
        self._address = address
        self.instance = instance
        self.gaps = 0
        self.repeats = 0
        self.missed = 0
        self.is_snapshot = False
        self.is_ready = False
        self.asks: list[tuple[bool, bytes]] = []
        """What is still to be subscribed to (True), and to be given up (False)."""
        self._number: int | None = self._since  # everything up to it has come
        self._snapshot: deque[Publication] = deque()
        self._came: deque[Publication] = deque()  # and is not given yet
        self._asked: bytes | None = None  # the topic on which a page is to come
        self._asked_s = 0.0
        self._is_quiet = True  # since the mark before
        self._last: OrderedDict[str, tuple[int, int]] = OrderedDict()  # (session, sequence)

    def topics(self) -> list[bytes]:
        """What a new line subscribes to. Whole streams, or a loss could not be told from what is
        not wanted."""
        stream = () if self._stream is None else (self._stream,)
        wanted = [topic_prefix(kind, *stream) for kind in KINDS]
        self._asked = None
        self.asks.clear()
        # The engine's echo of the last one says that those above are in force.
        return [*wanted, topic_prefix(Mark.TYPE), topic_prefix("welcome", secrets.token_hex(8))]

    @property
    def last_number(self) -> int | None:
        """All that was asked for up to this number was given; None where nothing is numbered."""
        waiting = self._came[0].number if self._came else None
        return self._number if waiting is None else waiting - 1

    def next(self) -> Publication | None:
        """What is to be given next, if it has come."""
        self.is_snapshot = bool(self._snapshot)
        if self._snapshot:
            return self._snapshot.popleft()
        return self._came.popleft() if self._came else None

    # ---- what comes ------------------------------------------------------------------------------

    def hear(self, frames: list[bytes], now_s: float) -> None:
        """Takes in a message of the engine. Raises ProtocolError for what is none, and ReplayError
        where the engine has no log, or another one, for `since`."""
        match protocol.decode_publication(frames):
            case Subscribed() as message:
                self._on_subscribed(message, now_s)
            case Mark() as message:
                self._on_mark(message, now_s)
            case Page() as message:
                self._on_page(message, frames[0], now_s)
            case SnippetScores():
                pass  # another subscriber's, see `ScoreSubscriber`
            case message:
                self._on_publication(message, now_s)

    def _on_publication(self, message: Publication, now_s: float) -> None:
        """One that is live: given, unless the log is asked, which has it too."""
        if message.number is None:
            self._count(message)
            self._keep(self._came, message)
            return
        if self._number is None or self._asked is not None:
            return
        if message.number <= self._number:
            self.repeats += 1
            return
        previous = message.number - 1 if self._stream is None else message.previous
        if previous is None or previous > self._number:
            self._ask(now_s)
            return
        self._number = message.number
        self._is_quiet = False
        self._keep(self._came, message)

    def _keep(self, queue: deque[Publication], *messages: Publication) -> None:
        """Those that are wanted."""
        for message in messages:
            label = None if isinstance(message, StreamNotice) else message.label
            if self._label is not None and label not in (None, self._label):
                continue
            # Asked of those of other kinds, too: they tell what becomes of actions.
            if self._scores is not None and not self._scores.passes(message):
                continue
            if message.TYPE in self._kinds:
                queue.append(message)

    def _on_subscribed(self, message: Subscribed, now_s: float) -> None:
        """Comes after every reconnection, too; in another engine, sessions begin from 1 again."""
        is_other = self.instance not in (None, message.instance)
        self.instance = message.instance
        if is_other and self._scores is not None:
            self._scores.forget()
        if message.number is not None:
            if is_other:
                self._number = 0
            self._ask(now_s)
            return
        if self._since is not None:
            raise ReplayError(
                f"events at {self._address}: expected an engine that keeps a log, to go on from "
                f"number {self._since}; it was started with --state none"
            )
        if is_other:
            self._last.clear()
        self._number = None
        self.is_ready = True

    def _on_mark(self, mark: Mark, now_s: float) -> None:
        """Where a number is missing, ask for it.

        Of one stream it cannot be told from the number, but only while nothing comes of it.
        """
        if self._asked is not None:
            # A page that was too much for the line does not come any more.
            if now_s >= self._asked_s + SILENT_S:
                self._ask(now_s)
        elif mark.number is not None and self._number is not None:
            is_missing = mark.instance == self.instance and mark.number > self._number
            if is_missing and (self._stream is None or self._is_quiet):
                self._ask(now_s)
        self._is_quiet = True

    # ---- the log ---------------------------------------------------------------------------------

    def _ask(self, now_s: float) -> None:
        """Ask for what follows the last number; at the beginning, for the actions that are open."""
        self._settle()
        token = secrets.token_hex(8)
        self._asked = (
            protocol.open_topic(token, self._stream)
            if self._number is None
            else protocol.replay_topic(token, self._number, self._stream)
        )
        self._asked_s = now_s
        self.asks.append((True, self._asked))

    def _settle(self) -> None:
        if self._asked is not None:
            self.asks.append((False, self._asked))
            self._asked = None

    def _on_page(self, page: Page, topic: bytes, now_s: float) -> None:
        if topic != self._asked:
            return  # it was asked for once more
        self._settle()
        if page.since is None:
            self._keep(self._snapshot, *page.publications)
        elif page.since > page.newest:
            raise ReplayError(
                f"events at {self._address}: expected a log with the number {page.since}, came one "
                f"that ends at {page.newest} (instance {self.instance}): it is another log"
            )
        else:
            gone = page.oldest - 1 - page.since
            if gone > 0:
                self.missed += gone
                _log.warning("%d of the numbers asked for are no longer in the log", gone)
            self._keep(self._came, *page.publications)
        self._number = page.next
        self.is_ready = True
        if not page.is_last:
            self._ask(now_s)

    def _count(self, message: Publication) -> None:
        session, sequence = message.session, message.sequence
        last_session, last_sequence = self._last.get(message.stream, (session, sequence - 1))
        if session > last_session:
            self.gaps += sequence  # of the new session; the tail of the old one is unknown
        elif session < last_session or sequence <= last_sequence:
            self.repeats += 1
        else:
            self.gaps += sequence - last_sequence - 1
        self._last[message.stream] = (session, sequence)
        self._last.move_to_end(message.stream)
        if len(self._last) > STREAMS_REMEMBERED:
            self._last.popitem(last=False)
