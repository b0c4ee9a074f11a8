"""What fills the board: one thread that subscribes to an engine, one that asks how it is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from hrpro.clients.connection import Key
from hrpro.clients.control import request_status
from hrpro.clients.dashboard.board import Board
from hrpro.clients.subscriber import EventSubscriber
from hrpro.engine.protocol import HrproError, NoReplyError

# Of what was published before, so many are asked of the log.
BACKFILL = 2_000
_POLL_S = 0.25
_ASK_EVERY_S = 1.0
_ANSWER_S = 3.0
_CONNECT_S = 3.0
_RETRY_S = 2.0


class EngineWatch:
    """Keeps a board up to date for as long as the block lasts, whatever becomes of the engine."""

    def __init__(self, board: Board, events: str, control: str, key: Key = None) -> None:
        self._board = board
        self._events = events
        self._control = control
        self._key = key
        self._stopped = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The threads run until the block is left."""
        threads = [
            threading.Thread(target=self._follow_events, name="events"),
            threading.Thread(target=self._follow_status, name="status"),
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            for thread in threads:
                thread.join()

    def _follow_status(self) -> None:
        while not self._stopped.is_set():
            try:
                self._board.take_status(request_status(self._control, _ANSWER_S, self._key))
            except NoReplyError:
                self._board.take_silence(f"no answer from {self._control}")
            except HrproError as error:
                self._board.take_silence(str(error))
            self._stopped.wait(_ASK_EVERY_S)

    def _follow_events(self) -> None:
        while not self._stopped.is_set():
            try:
                self._subscribe()
            except HrproError as error:  # another log than was asked for, or no engine at all
                self._board.take_events_problem(str(error))
                self._stopped.wait(_RETRY_S)

    def _subscribe(self) -> None:
        """The open actions, then what was published lately, then all that comes."""
        with EventSubscriber(self._events, key=self._key) as live:
            if not self._wait_connected(live):
                return
            newest = live.last_number
            if newest is None:  # there is no log
                self._take_all(live)
                return
            while (publication := live.receive(timeout_s=0)) is not None and live.is_snapshot:
                self._board.take(publication, live.instance)
            instance = live.instance
        since = max(0, newest - BACKFILL)
        with EventSubscriber(self._events, since=since, key=self._key, instance=instance) as logged:
            if self._wait_connected(logged):
                self._take_all(logged)

    def _wait_connected(self, subscriber: EventSubscriber) -> bool:
        """False once this is to stop."""
        while not self._stopped.is_set():
            try:
                subscriber.wait_connected(_CONNECT_S)
            except NoReplyError:
                self._board.take_events_problem(f"no answer from {self._events}")
            else:
                self._board.take_events_problem(None)
                return True
        return False

    def _take_all(self, subscriber: EventSubscriber) -> None:
        while not self._stopped.is_set():
            publication = subscriber.receive(_POLL_S)
            if publication is not None:
                self._board.take(publication, subscriber.instance)
