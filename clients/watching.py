"""Publications for people and for programs: a live table, or JSON lines."""

from __future__ import annotations

import json
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from hrpro.clients.score_filter import STREAMS_REMEMBERED
from hrpro.clients.subscriber import EventSubscriber
from hrpro.engine.protocol import ActionEvent, FinalProposal, Publication, StreamNotice

_POLL_S = 0.25  # how often the idle time is looked at
_ROWS = 24
LOG_COLUMNS = "number", "logged", "stream", "what", "action", "from", "to", "score", "session"
_STYLES = {"● now": "bold green", "over": "green", "retracted": "dim"}


def publications(
    subscriber: EventSubscriber, until_idle_s: float | None = None
) -> Iterator[Publication | None]:
    """What comes; None whenever nothing came for a while. Ends, behind a None, when nothing came
    for so long."""
    last_s = time.monotonic()
    while True:
        publication = subscriber.receive(timeout_s=_POLL_S)
        yield publication
        if publication is not None:
            last_s = time.monotonic()  # what is done with it is no idle time
        elif until_idle_s is not None and time.monotonic() - last_s >= until_idle_s:
            return


def to_json(
    publication: Publication, is_snapshot: bool = False, instance: str | None = None
) -> str:
    """A publication as one line of JSON; ``type`` says which it is, ``instance`` in whose log its
    number counts, and ``snapshot`` is there and true for an action that was open before."""
    line = {"type": publication.TYPE, **asdict(publication)}
    line |= {"instance": instance} if instance else {}
    return json.dumps(line | ({"snapshot": True} if is_snapshot else {}), ensure_ascii=False)


def show_table(
    subscriber: EventSubscriber,
    console: Console,
    until_idle_s: float | None = None,
    finals: bool = False,
) -> None:
    """Show actions as they start, grow and end, or the newest final proposals, until interrupted or
    idle."""
    board = EventBoard(finals)
    with Live(board.table(), console=console, refresh_per_second=8) as live:
        instance = subscriber.instance
        for publication in publications(subscriber, until_idle_s):
            if instance not in (None, subscriber.instance):
                board.forget_streams()
            instance = subscriber.instance
            if publication is not None:
                board.take(publication)
            live.update(board.table())


def log_row(logged_s: float, publication: Publication) -> tuple[str, ...]:
    """A publication out of the log, and the wall clock's time when it was logged, as LOG_COLUMNS.

    Of actions the seconds, of streams the snippets (#) are shown.
    """
    at = datetime.fromtimestamp(logged_s).astimezone()
    head = str(publication.number), f"{at:%Y-%m-%d %H:%M:%S}", publication.stream
    return (*head, *_cells(publication), str(publication.session))


def _cells(publication: Publication) -> tuple[str, ...]:
    if isinstance(publication, StreamNotice):
        return publication.kind, "", f"#{publication.first_index}", f"#{publication.next_index}", ""
    kind = publication.kind if isinstance(publication, ActionEvent) else "final"
    end = "" if publication.end_s is None else f"{publication.end_s:.2f} s"
    times = f"{publication.start_s:.2f} s", end
    return kind, publication.label, *times, f"{publication.score:.2f}"


class EventBoard:
    """The newest actions of all streams as a table, or, with `finals`, the newest final proposals.

    An action is open for as long as its stream's session is: where the session's end or the next
    session is heard of, the action's own end was missed.
    """

    def __init__(self, finals: bool = False) -> None:
        self._newest_finals = deque[FinalProposal](maxlen=_ROWS if finals else 0)
        self._actions: dict[tuple[str, int, int], ActionEvent] = {}
        self._sessions: OrderedDict[str, int] = OrderedDict()  # of the live streams
        self._finals = 0

    def take(self, publication: Publication) -> None:
        """Take note of a publication."""
        self._follow_session(publication)
        match publication:
            case ActionEvent():
                key = (publication.stream, publication.session, publication.id)
                self._actions.pop(key, None)  # the newest change stands last
                self._actions[key] = publication
                # Open actions stay; of the ended ones only what fits on a screen.
                ended = [k for k, action in self._actions.items() if action.is_last]
                for old in ended[:-_ROWS]:
                    del self._actions[old]
            case FinalProposal():
                self._finals += 1
                self._newest_finals.append(publication)
            case StreamNotice(kind="ended"):
                self._forget(publication.stream)

    def forget_streams(self) -> None:
        """Another engine publishes now: what was live in the one before has no end any more."""
        for stream in list(self._sessions):
            self._forget(stream)

    def _follow_session(self, publication: Publication) -> None:
        stream, session = publication.stream, publication.session
        opened = isinstance(publication, StreamNotice) and publication.kind == "opened"
        if opened or self._sessions.get(stream, session) != session:
            self._forget(stream)
        self._sessions[stream] = session
        self._sessions.move_to_end(stream)
        if len(self._sessions) > STREAMS_REMEMBERED:
            self._forget(next(iter(self._sessions)))

    def _forget(self, stream: str) -> None:
        """Drop a stream and its open actions; ended ones have their place on the screen."""
        self._sessions.pop(stream, None)
        for key, action in list(self._actions.items()):
            if action.stream == stream and not action.is_last:
                del self._actions[key]

    def table(self) -> Table:
        """The board as it is now: open actions first, then the newest ended ones."""
        table = Table(caption=f"{len(self._sessions)} live streams, {self._finals} final proposals")
        for name in ("stream", "action", "from", "to", "score", ""):
            table.add_column(name, justify="right" if name in {"from", "to", "score"} else "left")
        newest = list(reversed(self._actions.values()))
        actions = sorted(newest, key=lambda each: each.is_last)[:_ROWS]
        shown: list[ActionEvent | FinalProposal] = [*actions, *reversed(self._newest_finals)]
        for action in shown:
            table.add_row(
                action.stream,
                escape(action.label),
                f"{action.start_s:.1f} s",
                "" if action.end_s is None else f"{action.end_s:.1f} s",
                f"{action.score:.2f}",
                _state(action),
                style=_STYLES.get(_state(action), ""),
            )
        return table


def _state(action: ActionEvent | FinalProposal) -> str:
    """What is shown of an action: one that is over has its last event still to come."""
    if isinstance(action, FinalProposal):
        return "final"
    match action.kind:
        case "end":
            return "ended"
        case "retract":
            return "retracted"
    return "● now" if action.end_s is None else "over"
