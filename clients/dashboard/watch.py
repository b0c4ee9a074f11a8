"""What fills the board: threads that subscribe to an engine, and one that asks how it is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import zmq

from hrpro.clients.connection import Connection, Key, read_key
from hrpro.clients.control import request_status
from hrpro.clients.dashboard.board import Board
from hrpro.clients.score_subscriber import ScoreSubscriber
from hrpro.clients.subscriber import EventSubscriber
from hrpro.engine.protocol import HrproError, NoReplyError

# Of what was published before, so many are asked of the log.
BACKFILL = 2_000
# An engine that has not answered for so long is away.
AWAY_S = 3.0
# Where it answers, but nothing is heard on events for so long, it is the line.
EVENTS_LOST_S = 6.0
_POLL_S = 0.25
_ASK_EVERY_S = 1.0
_ANSWER_S = 1.0
_RETRY_S = 2.0


class EngineWatch:
    """Keeps a board up to date for as long as the block lasts, whatever becomes of the engine.

    Raises KeyFileError for a file that is no key, and HrproError for an address that is none.
    """

    def __init__(self, board: Board, events: str, control: str, key: Key = None) -> None:
        self._board = board
        self._events = events
        self._control = control
        self._key = read_key(key)
        self._no_answer = f"no answer from {events}"
        self._stopped = threading.Event()
        for kind, address in ((zmq.SUB, events), (zmq.DEALER, control)):
            Connection(kind, address, {zmq.LINGER: 0}, self._key).close()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The threads run until the block is left."""
        followers = (self._follow_events, self._follow_scores, self._follow_status)
        threads = [threading.Thread(target=each, name=each.__name__) for each in followers]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            for thread in threads:
                thread.join()

    def _follow_status(self) -> None:
        answered_s = time.monotonic()
        while not self._stopped.is_set():
            try:
                self._board.take_status(request_status(self._control, _ANSWER_S, self._key))
                answered_s = time.monotonic()
            except NoReplyError:
                if time.monotonic() - answered_s >= AWAY_S:
                    self._board.take_silence(f"no answer from {self._control}")
            except HrproError as error:
                self._board.take_refusal(str(error))
            self._stopped.wait(_ASK_EVERY_S)

    def _follow_scores(self) -> None:
        """They come while the engine is there, and are no loss where they do not."""
        while not self._stopped.is_set():
            with (
                contextlib.suppress(HrproError),
                ScoreSubscriber(self._events, key=self._key) as subscriber,
            ):
                self._take_scores(subscriber)
            self._stopped.wait(_RETRY_S)

    def _take_scores(self, subscriber: ScoreSubscriber) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(NoReplyError):
                subscriber.wait_connected(_POLL_S)
                break
        self._board.take_hearing("scores")
        while not self._stopped.is_set():
            scores = subscriber.receive(_POLL_S)
            if scores is not None:
                self._board.take_scores(scores)

    def _follow_events(self) -> None:
        while not self._stopped.is_set():
            try:
                self._subscribe()
            except HrproError as error:  # another log than was asked for
                self._board.take_events_problem(str(error))
                self._stopped.wait(_RETRY_S)

    def _subscribe(self) -> None:
        """The open actions, then what was published lately, then all that comes."""
        with EventSubscriber(self._events, key=self._key) as live:
            if not self._wait_connected(live):
                return
            newest, instance = live.last_number, live.instance
            if newest is None:  # there is no log
                self._take_all(live)
                return
            while (publication := live.receive(timeout_s=0)) is not None and live.is_snapshot:
                self._board.take(publication, instance)
        since = max(0, newest - BACKFILL)
        with EventSubscriber(self._events, since=since, key=self._key, instance=instance) as logged:
            if self._wait_connected(logged):
                self._take_all(logged)

    def _wait_connected(self, subscriber: EventSubscriber) -> bool:
        """False once this is to stop."""
        asked_s = time.monotonic()
        while not self._stopped.is_set():
            try:
                subscriber.wait_connected(_POLL_S)
            except NoReplyError:
                if time.monotonic() - asked_s >= AWAY_S:
                    self._board.take_events_problem(self._no_answer)
            else:
                self._board.take_events_problem(None)
                self._board.take_hearing("events")
                return True
        return False

    def _take_all(self, subscriber: EventSubscriber) -> None:
        while not self._stopped.is_set():
            publication = subscriber.receive(_POLL_S)
            if publication is not None:
                self._board.take(publication, subscriber.instance)
            is_silent = subscriber.silent_s >= EVENTS_LOST_S
            self._board.take_events_problem(self._no_answer if is_silent else None)
