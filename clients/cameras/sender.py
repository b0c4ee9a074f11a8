"""A feeder in a thread of its own, so that no stream waits for what another one sends."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.feeder import FeatureFeeder
from hrpro.engine.protocol import Ended, NoReplyError, StreamError

_log = logging.getLogger(__name__)

# So often the feeder reads and sends when nothing new is there.
_TURN_S = 0.1
_ROOM = 8
_AGAIN_S = 1.0

Row = NDArray[np.float32]


class StreamSender:
    """Sends the features of one stream in the order of their indices; what is left out between
    them is told as a gap. The feeder is connected, and belongs to the sender from here on.

    ``changed`` is notified when there is room for more. ``renew`` makes another feeder, for a
    stream that begins at an index, where an engine has ended the stream because it is drained; None
    takes that as a refusal.
    """

    def __init__(
        self,
        feeder: FeatureFeeder,
        changed: threading.Condition,
        renew: Callable[[int], FeatureFeeder] | None = None,
    ) -> None:
        self._feeder = feeder
        self._changed = changed
        self._renew = renew
        self._is_renewed = False
        self._dropped_before = 0  # by feeders that were given up
        self._waiting: queue.Queue[tuple[int, Row] | None] = queue.Queue(_ROOM)
        self._leave_at_s: float | None = None
        self.sent = 0
        """How many snippets were given to the feeder."""
        self.ended: Ended | None = None
        self.refused: StreamError | None = None
        """Why the engine takes no more of the stream."""
        self._thread = threading.Thread(
            target=self._run, name=f"sender {feeder.stream}", daemon=True
        )
        self._thread.start()

    @property
    def room(self) -> int:
        """How many snippets `put` takes without waiting."""
        return _ROOM - self._waiting.qsize()

    @property
    def is_done(self) -> bool:
        """Whether the stream is ended, refused or left."""
        return not self._thread.is_alive()

    @property
    def lag(self) -> int:
        """Snippets that the engine has not accepted yet."""
        return self._feeder.lag

    @property
    def dropped(self) -> int:
        """Snippets that the feeder had no room for."""
        return self._dropped_before + self._feeder.dropped

    @property
    def next_index(self) -> int:
        """One past the newest snippet that was given to the feeder."""
        return self._feeder.next_index

    def put(self, index: int, features: Row) -> None:
        """Send the features (D,) of a snippet; those of a stream that is done go nowhere."""
        self._put((index, features))

    def end(self) -> None:
        """End the stream behind what was put."""
        self._put(None)

    def leave(self, within_s: float) -> None:
        """Give up in so many seconds what is not done by then."""
        self._leave_at_s = time.monotonic() + within_s

    def join(self) -> None:
        """Wait until it is done."""
        self._thread.join()

    def _put(self, item: tuple[int, Row] | None) -> None:
        while not self.is_done:
            try:
                self._waiting.put(item, timeout=_TURN_S)
                return
            except queue.Full:
                continue

    # ---- in the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self.ended is None and not self._is_over():
                try:
                    self._send_what_comes()
                except StreamError as error:
                    if error.code != "draining" or self._renew is None:
                        raise
                    self._begin_anew(self._renew)
        except StreamError as error:
            self.refused = error
            _log.error("stream %r: %s", self._feeder.stream, error)
        finally:
            self._feeder.close()

    def _send_what_comes(self) -> None:
        while not self._is_over():
            try:
                item = self._waiting.get(timeout=_TURN_S)
            except queue.Empty:
                self._feeder.skip(0)
                continue
            with self._changed:
                self._changed.notify_all()
            if item is None:
                self._end()
                return
            self._send(*item)

    def _begin_anew(self, renew: Callable[[int], FeatureFeeder]) -> None:
        if not self._is_renewed or self._feeder.welcome is not None:
            _log.warning(
                "stream %r: the engine is drained, which has ended it; it begins anew with the "
                "next engine",
                self._feeder.stream,
            )
        before, self._is_renewed = self._feeder, True
        before.close()
        self._dropped_before += before.dropped
        time.sleep(_AGAIN_S)
        self._feeder = renew(before.next_index)

    def _send(self, index: int, features: Row) -> None:
        self._feeder.skip(index - self._feeder.next_index)
        while self._feeder.next_index <= index and not self._is_over():
            try:
                self._feeder.send(features, timeout_s=_TURN_S)
            except NoReplyError:
                continue
        self.sent += 1

    def _end(self) -> None:
        while self.ended is None and not self._is_over():
            try:
                self.ended = self._feeder.end(timeout_s=_TURN_S)
            except NoReplyError:
                continue

    def _is_over(self) -> bool:
        return self._leave_at_s is not None and time.monotonic() > self._leave_at_s
