"""What the dashboard knows of an engine, bounded, and what of it has changed since when.

    publications, scores --+                      +--> page, at its own pace
                           +--> board, revision --+
    status, once a second -+                      +--> page

Whatever changes takes the next revision of the board. A page is given all that is newer than what
it has: everything in the beginning, and one message for all that came while it was slow.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from hrpro.engine.protocol import (
    ActionEvent,
    FinalProposal,
    Publication,
    SnippetScores,
    StreamNotice,
)
from hrpro.engine.timebase import SnippetClock

# So much of each stream's scores is kept, in its own time.
HISTORY_S = 600.0
# How long a stream is shown that the engine does not have any more.
ENDED_SHOWN_S = 600.0
STREAMS_SHOWN = 500
# Actions and notices that are kept, of all streams.
EVENTS_KEPT = 5_000
# Scores are told in thousandths: of each snippet, those of the classes that come highest, and only
# from here on.
_LEAST_SCORE = 10
_CLASSES_TOLD = 8

Json = dict[str, Any]
EventKey = tuple[Any, ...]
RowState = Literal["live", "idle", "ended", "gone"]


@dataclass
class _Event:
    """An action, or a notice of a stream, as it was told last."""

    content: Json
    revision: int
    is_open: bool


@dataclass
class _Scores:
    """Of consecutive snippets: attention, and the classes that are above the least score."""

    content: Json
    revision: int


@dataclass
class _Row:
    """A stream. `head` is one past its newest snippet that is known of."""

    session: int
    revision: int
    head: int
    moved_s: float
    state: RowState = "live"
    # Sessions from here on share one course of snippet indices; the newest began behind `before`.
    from_session: int = 0
    before: int = 0
    status: Json = field(default_factory=dict)
    absent: int = 0  # status replies in a row that did not name it
    scores: deque[_Scores] = field(default_factory=deque)


class Board:
    """For one thread that takes and others that read. Times are seconds since the epoch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._revision = 0
        self._rows: dict[str, _Row] = {}
        self._rows_revision = 0  # when a stream came or went
        self._events: OrderedDict[EventKey, _Event] = OrderedDict()  # the newest change last
        self._serial = 0
        self._snippet_s: float | None = None
        self._engine: Json = {
            "answered_at": None,
            "away_since": None,
            "problem": None,
            "events_problem": None,
            "hears": [],
            "restarts": 0,
            "status": None,
            "snippet_s": None,
            "classes": [],
        }
        self._engine_revision = 1
        self._instance: str | None = None

    @property
    def revision(self) -> int:
        """Grows with each change."""
        return self._revision

    # ---- what is read ----------------------------------------------------------------------------

    def changes(self, since: int) -> Json:
        """All that has changed behind the revision `since`, 0 for everything, ready for JSON."""
        with self._lock:
            events: list[Json] = []
            for event in reversed(self._events.values()):
                if event.revision <= since:
                    break
                events.append(event.content)
            message: Json = {
                "revision": self._revision,
                "is_snapshot": since == 0,
                "now": time.time(),
                "rows": [
                    _told(stream, row) for stream, row in self._rows.items() if row.revision > since
                ],
                "events": events[::-1],
                "scores": [
                    {"stream": stream, **chunk.content}
                    for stream, row in self._rows.items()
                    for chunk in _newer(row.scores, since)
                ],
            }
            if self._rows_revision > since or since == 0:
                message["streams"] = sorted(self._rows)
            if self._engine_revision > since:
                message["engine"] = dict(self._engine)
            if since == 0:
                message["history_s"] = HISTORY_S
                message["events_kept"] = EVENTS_KEPT
            return message

    # ---- what is taken ---------------------------------------------------------------------------

    def take(self, publication: Publication, instance: str | None) -> None:
        """An event, a proposal or a notice; what is known already changes nothing."""
        with self._lock:
            self._follow(instance)
            match publication:
                case ActionEvent():
                    head = publication.published_index + 1
                    self._take_clock(publication.published_s / head)
                    self._advance(publication.stream, publication.session, head)
                    self._take_action(publication)
                case FinalProposal():
                    self._take_clock(publication.published_s / (publication.published_index + 1))
                case StreamNotice():
                    self._take_notice(publication)

    def take_scores(self, scores: SnippetScores) -> None:
        """Of a stream's snippets, as they have become final."""
        with self._lock:
            head = scores.first_index + len(scores.attention)
            self._take_clock(SnippetClock(scores.frames_per_s, scores.snippet_frames).snippet_s)
            row = self._advance(scores.stream, scores.session, head)
            if row is None:
                return
            if list(scores.classes) != self._engine["classes"]:
                self._change_engine(classes=list(scores.classes))
            # After a restart an engine may compute again what it had.
            while row.scores and row.scores[-1].content["first"] >= scores.first_index:
                row.scores.pop()
            row.scores.append(_Scores(_in_thousandths(scores), self._next_revision()))
            self._trim_scores(row)

    def take_status(self, reply: Mapping[str, Any]) -> None:
        """The engine's answer to a status request, as a dict."""
        now_s = time.time()
        with self._lock:
            self._follow(reply["instance"])
            told = {name: value for name, value in reply.items() if name != "streams"}
            self._change_engine(answered_at=now_s, away_since=None, problem=None, status=told)
            there = {each["stream"]: each for each in reply["streams"]}
            for stream, entry in there.items():
                row = self._advance(stream, entry["session"], entry["next_index"])
                if row is not None:
                    self._take_entry(row, entry)
            for stream, row in list(self._rows.items()):
                if stream not in there:
                    self._miss(stream, row, now_s)

    def take_silence(self, problem: str) -> None:
        """The engine did not answer."""
        with self._lock:
            away_since = self._engine["away_since"] or self._engine["answered_at"] or time.time()
            self._set_problem(problem, away_since)

    def take_refusal(self, problem: str) -> None:
        """The engine is there, and does not let us ask."""
        with self._lock:
            self._set_problem(problem, None)

    def take_hearing(self, what: str) -> None:
        """The engine has confirmed that events, or scores, are sent to us."""
        with self._lock:
            if what not in self._engine["hears"]:
                self._change_engine(hears=[*self._engine["hears"], what])

    def take_events_problem(self, problem: str | None) -> None:
        """Why nothing comes from the events address; None where it does."""
        with self._lock:
            if self._engine["events_problem"] != problem:
                self._change_engine(events_problem=problem)

    # ---- what becomes of it; the lock is held ----------------------------------------------------

    def _next_revision(self) -> int:
        self._revision += 1
        return self._revision

    def _change_engine(self, **changed: object) -> None:
        self._engine |= changed
        self._engine_revision = self._next_revision()

    def _set_problem(self, problem: str, away_since: float | None) -> None:
        if (self._engine["problem"], self._engine["away_since"]) != (problem, away_since):
            self._change_engine(problem=problem, away_since=away_since)

    def _follow(self, instance: str | None) -> None:
        """In another instance, sessions and ids count from the beginning again."""
        if instance is None or instance == self._instance:
            return
        if self._instance is not None:
            for row in self._rows.values():
                row.session, row.head, row.state = -1, 0, "gone"
                self._begin_course(row)
            self._lose(lambda _content: True)
            self._change_engine(restarts=self._engine["restarts"] + 1)
        self._instance = instance

    def _take_clock(self, snippet_s: float) -> None:
        """All streams of an engine have one clock."""
        if self._snippet_s is None:
            self._snippet_s = snippet_s
            self._change_engine(snippet_s=snippet_s)

    def _advance(self, stream: str, session: int, head: int) -> _Row | None:
        """The row of a stream, whose snippets below `head` were there; None of a former session."""
        row = self._rows.get(stream)
        if row is None:
            row = _Row(session, 0, head, time.time(), from_session=session)
            self._rows[stream] = row
            self._rows_revision = row.revision = self._next_revision()
            self._drop_rows()
        elif session > row.session:
            self._begin_session(row, stream, session, head)
        elif session < row.session:
            return None
        elif head > row.head:
            row.head, row.moved_s = head, time.time()
            row.revision = self._next_revision()
        return row

    def _begin_session(self, row: _Row, stream: str, session: int, head: int) -> None:
        """A session whose indices do not go on where the last one was has a timeline of its own."""
        is_other = row.session < 0 or head < row.head
        row.session, row.state, row.before = session, "live", row.head
        if is_other:
            self._begin_course(row)
        row.head, row.moved_s = head, time.time()
        row.revision = self._next_revision()
        self._lose(lambda told: told["stream"] == stream and told["session"] < session)

    def _begin_course(self, row: _Row) -> None:
        row.from_session, row.before = row.session, 0
        row.scores.clear()
        row.revision = self._next_revision()

    def _drop_rows(self) -> None:
        if len(self._rows) > STREAMS_SHOWN:
            del self._rows[min(self._rows, key=lambda each: self._rows[each].moved_s)]

    def _take_entry(self, row: _Row, entry: Mapping[str, Any]) -> None:
        """What the status says of a stream."""
        row.absent = 0
        if row.state == "ended":  # it was asked before that was heard of
            return
        state: RowState = "idle" if entry["idle"] else "live"
        status = {name: entry[name] for name in _ENTRIES if name in entry}
        if row.state != state or row.status != status:
            row.state, row.status = state, status
            row.revision = self._next_revision()

    def _miss(self, stream: str, row: _Row, now_s: float) -> None:
        """A stream that the status does not name. Once may be a matter of who was first."""
        row.absent += 1
        if row.absent == 2 and row.state != "ended":
            row.state, row.revision = "gone", self._next_revision()
        if row.absent > 2 and now_s - row.moved_s > ENDED_SHOWN_S:
            del self._rows[stream]
            self._rows_revision = self._next_revision()

    def _trim_scores(self, row: _Row) -> None:
        kept = HISTORY_S / (self._snippet_s or 1.0)
        while row.scores and row.scores[0].content["first"] < row.head - kept:
            row.scores.popleft()

    def _take_action(self, event: ActionEvent) -> None:
        key = (self._instance, event.stream, event.session, event.id)
        known = self._events.get(key)
        if known is not None and known.content["change"] >= event.revision:
            return
        content = {
            "type": "action",
            **self._head_of(known, event),
            "id": event.id,
            "change": event.revision,
            "label": event.label,
            "start_s": event.start_s,
            "end_s": event.end_s,
            "score": event.score,
            "state": _state(event),
        }
        self._put(key, content, is_open=not event.is_last)

    def _take_notice(self, notice: StreamNotice) -> None:
        row = self._advance(notice.stream, notice.session, notice.next_index)
        if row is not None and notice.kind == "opened" and notice.first_index < row.before:
            self._begin_course(row)
        state = _STATES.get(notice.kind)
        if row is not None and state is not None and row.state != state:
            row.state, row.revision = state, self._next_revision()
        if notice.kind == "ended":
            at = (notice.stream, notice.session)
            self._lose(lambda told: (told["stream"], told["session"]) == at)
        key = (self._instance, notice.stream, notice.session, notice.kind, notice.sequence)
        if key in self._events:
            return
        content = {
            "type": "notice",
            **self._head_of(None, notice),
            "state": notice.kind,
            "first_index": notice.first_index,
            "next_index": notice.next_index,
        }
        self._put(key, content, is_open=False)

    def _head_of(self, known: _Event | None, publication: ActionEvent | StreamNotice) -> Json:
        if known is not None:
            return {name: known.content[name] for name in ("n", "at", "stream", "session")}
        self._serial += 1
        return {
            "n": self._serial,
            "at": time.time(),
            "stream": publication.stream,
            "session": publication.session,
        }

    def _put(self, key: EventKey, content: Json, is_open: bool) -> None:
        self._events[key] = _Event(content, self._next_revision(), is_open)
        self._events.move_to_end(key)
        if len(self._events) > EVENTS_KEPT:
            closed = (each for each, event in self._events.items() if not event.is_open)
            del self._events[next(closed, next(iter(self._events)))]

    def _lose(self, is_meant: Callable[[Json], bool]) -> None:
        """Actions whose end was missed: their session is over."""
        lost = [
            (key, event)
            for key, event in self._events.items()
            if event.is_open and is_meant(event.content)
        ]
        for key, event in lost:
            self._put(key, {**event.content, "state": "lost"}, is_open=False)


# Of a stream's entry in the status, what a page shows.
_ENTRIES = (
    *("lag_snippets", "lag_ms", "credit_snippets", "open_actions", "dropped", "missing"),
    *("proposals", "events", "policy", "fed_by", "bundle_id"),
)
_STATES: Mapping[str, RowState] = {
    "opened": "live",
    "resumed": "live",
    "idle": "idle",
    "ended": "ended",
}


def _state(event: ActionEvent) -> str:
    """What an action is: one that is over has its last event still to come."""
    if event.kind == "end":
        return "ended"
    if event.kind == "retract":
        return "retracted"
    return "now" if event.end_s is None else "over"


def _told(stream: str, row: _Row) -> Json:
    return {
        "stream": stream,
        "session": row.session,
        "from_session": row.from_session,
        "head": row.head,
        "moved_at": row.moved_s,
        "state": row.state,
        **row.status,
    }


def _in_thousandths(scores: SnippetScores) -> Json:
    """What is told of scores: most classes are next to 0, and are left out."""
    thousandths = np.rint(scores.scores * 1000).astype(int)  # (n, C)
    highest = np.argsort(-thousandths, axis=1)[:, :_CLASSES_TOLD]  # (n, at most _CLASSES_TOLD)
    return {
        "first": scores.first_index,
        "attention": np.rint(scores.attention * 1000).astype(int).tolist(),
        "scores": [
            [[k, of[k]] for k in classes if of[k] >= _LEAST_SCORE]
            for of, classes in zip(thousandths.tolist(), highest.tolist(), strict=True)
        ],
    }


def _newer(chunks: Iterable[_Scores], since: int) -> Iterable[_Scores]:
    return (chunk for chunk in chunks if chunk.revision > since)
