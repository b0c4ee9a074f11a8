"""What is published on its way out: into the log, then to the subscribers.

Nothing is sent that is not in the log. While that cannot be written, as when the disk is full, what
was to be published is held, and so are the streams: nothing new is computed. It is tried again, at
first soon, then every 5 s.

The events socket also brings what subscribers ask: a subscription to a topic with a token of their
own is answered on that topic.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import zmq

from hrpro.engine import protocol, sockets
from hrpro.engine.event_log import EventLog
from hrpro.engine.event_reader import LogError
from hrpro.engine.logs import PeerLog
from hrpro.engine.protocol import Mark, Message, Page, Publication, Subscribed
from hrpro.engine.recovery import SavedStream

_log = logging.getLogger(__name__)

Sees = Callable[[str], bool]
Save = Callable[[Sequence[Publication]], list[SavedStream]]

MARK_INTERVAL_S = 1.0
_RETRY_FIRST_S = 0.1
_RETRY_LONGEST_S = 5.0

_ID = rb"([A-Za-z0-9._:-]{1,64})"
_STREAM = rb"(\*|[A-Za-z0-9._:-]{1,64})"
_WELCOME = re.compile(rb"\x01welcome/" + _ID + rb"/")
_OPEN = re.compile(rb"\x01open/" + _ID + rb"/" + _STREAM + rb"/")
_REPLAY = re.compile(rb"\x01replay/" + _ID + rb"/([0-9]{1,15})/" + _STREAM + rb"/")


class Outbox:
    """Of one engine, whose `events` socket it sends on. Without a log, everything goes out at once.

    `waits_for` says why nothing can be logged, and is None while it can.
    """

    def __init__(
        self,
        events: zmq.Socket[bytes],
        log: EventLog | None,
        peer_log: PeerLog,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.instance = secrets.token_hex(8) if log is None else log.instance
        self.waits_for: str | None = None
        self._events = events
        self._log = log
        self._peer_log = peer_log
        self._now_s = now_s
        self._held: list[Publication] = []  # of the last step, until it is logged
        self._saved: list[SavedStream] = []  # what is logged with it
        self._retry_s = _RETRY_FIRST_S
        self._retry_at_s = 0.0
        self._mark_at_s = now_s()

    def publish(self, publications: Iterable[Publication], save: Save) -> Iterator[Publication]:
        """Sends what is given, and what was held; gives what was sent. To be read to its end.

        ``save`` gives the streams to be logged with what is to be published.

        Not to be given anything while it waits, but to be called: that tries again.
        """
        if self._log is None:
            for publication in publications:
                sockets.try_send(self._events, protocol.encode(publication))
                yield publication
            return
        if self.waits_for is None:
            self._held = list(publications)
            self._saved = save(self._held)
        elif self._now_s() < self._retry_at_s:
            return
        if not self._saved:
            return
        try:
            sent = self._log.commit(self._held, {each.name: each.data for each in self._saved})
        except LogError as error:
            self._hold(error)
            return
        self.waits_for, self._retry_s = None, _RETRY_FIRST_S
        for stream in self._saved:
            stream.settle()
        for publication, frames in zip(self._held, sent, strict=True):
            sockets.try_send(self._events, frames)
            yield publication

    def _hold(self, error: LogError) -> None:
        self.waits_for = str(error)
        self._retry_at_s = self._now_s() + self._retry_s
        self._retry_s = min(2 * self._retry_s, _RETRY_LONGEST_S)

    def tend(self) -> None:
        """Sends a mark, and trims the log, when it is time."""
        if self._now_s() < self._mark_at_s:
            return
        self._mark_at_s = self._now_s() + MARK_INTERVAL_S
        self._send(Mark(self.instance, self._newest))
        if self._log is not None and self.waits_for is None:
            try:
                self._log.trim()
            except LogError as error:
                _log.warning("the log keeps what is too old: %s", error)

    def due_in_s(self) -> float:
        """When `tend` or `publish` has something to do."""
        due_s = (
            self._mark_at_s if self.waits_for is None else min(self._mark_at_s, self._retry_at_s)
        )
        return max(0.0, due_s - self._now_s())

    def send_on(self, events: zmq.Socket[bytes]) -> None:
        """The socket was bound anew: this one is in its place."""
        self._events = events

    def answer(self, subscription: bytes, sees: Sees | None = None) -> None:
        """Answers a subscription that asks for something; others ZeroMQ has seen to.

        Of the log, with what ``sees`` says of a stream, if not everything.
        """
        if found := _WELCOME.fullmatch(subscription):
            self._send(Subscribed(found[1].decode(), self.instance, self._newest))
            return
        try:
            if found := _REPLAY.fullmatch(subscription):
                self._replay(found[1].decode(), int(found[2]), _stream(found[3]), sees)
            elif found := _OPEN.fullmatch(subscription):
                self._snapshot(found[1].decode(), _stream(found[2]), sees)
        except LogError as error:
            self._peer_log.say(logging.ERROR, "log_unread", str(error))

    def _replay(self, token: str, since: int, stream: str | None, sees: Sees | None) -> None:
        log = self._log
        if log is not None:
            found, following = log.read(since, stream)
            page = Page(token, since, stream, following, log.oldest, log.newest, ())
            self._send(page, _seen((each.header for each in found), sees))

    def _snapshot(self, token: str, stream: str | None, sees: Sees | None) -> None:
        log = self._log
        if log is not None:
            page = Page(token, None, stream, log.newest, log.oldest, log.newest, ())
            self._send(page, _seen(log.open_actions(stream), sees))

    @property
    def _newest(self) -> int | None:
        return None if self._log is None else self._log.newest

    def _send(self, message: Message, headers: Iterable[bytes] = ()) -> None:
        """A message, and publications behind it as they were sent before."""
        sockets.try_send(self._events, [*protocol.encode(message), *headers])


def _seen(headers: Iterable[bytes], sees: Sees | None) -> Iterable[bytes]:
    if sees is None:
        return headers
    return [each for each in headers if sees(protocol.decode_logged(each).stream)]


def _stream(text: bytes) -> str | None:
    return None if text == b"*" else text.decode()
