"""The loop around the pipeline: what is read, computed, published and acknowledged in a turn.

One thread and one poller. A turn of the loop does a bounded amount of everything, so that no
peer can keep the others waiting:

    read some messages -> change bundles -> at most one micro-batch -> log -> publish -> acknowledge

Three sockets, specified in docs/PROTOCOL.md: `feed` (ROUTER), `events` (XPUB) and `control`
(ROUTER). A peer that sends nonsense gets an Error and is counted; it never ends the loop.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import zmq

from hrpro.engine import protocol, sockets
from hrpro.engine.access import Access, Change, Misuse, Peer
from hrpro.engine.config import LimitsConfig
from hrpro.engine.deployer import Deployer, Order, Outcome
from hrpro.engine.deployment import DeployError
from hrpro.engine.feeds import Counters, Feeds, error_message
from hrpro.engine.keys import Keyring
from hrpro.engine.logs import PeerLog, fact
from hrpro.engine.metrics import DEPLOY_REFUSED, Metrics
from hrpro.engine.outbox import Outbox
from hrpro.engine.protocol import (
    DeployReply,
    DeployRequest,
    DrainReply,
    DrainRequest,
    Error,
    FinalProposal,
    HrproError,
    Message,
    ProtocolError,
    Publication,
    RollBackRequest,
    StatusReply,
    StatusRequest,
    StreamError,
    StreamNotice,
)
from hrpro.engine.recovery import restore, save
from hrpro.engine.status import all_counters, stream_statuses
from hrpro.engine.zap import Doorkeeper

if TYPE_CHECKING:
    from hrpro.engine.event_log import EventLog
    from hrpro.engine.pipeline import Pipeline

_log = logging.getLogger(__name__)

# A few milliseconds of reading: peers wait for the others' messages at most that long.
MESSAGES_PER_TURN = 200
# Of the reading of a socket, for messages that are refused: there may be any number of them.
REFUSING_S = 0.0005
# So long the engine may take to read what came while it stood still.
_BEHIND_S = 10.0
# Each may ask for a page of the log, which takes up to some milliseconds.
SUBSCRIPTIONS_PER_TURN = 20


class DrainError(HrproError):
    """A drain was given up; the message says what is lost."""


class Server:
    """Serves one pipeline on three addresses until it is stopped or drained.

        with Server(pipeline, "tcp://127.0.0.1:*", ...) as server:
            server.run()

    A port `*` or 0 takes a free one; `feed_address`, `events_address` and `control_address` name
    what was bound. With a keyring, nobody without a key is let in. `stop` and `drain` may be called
    from any thread and from a signal handler, and `metrics` reads from others; everything else only
    from the thread that runs. Raises zmq.ZMQError when an address cannot be bound.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        feed: str,
        events: str,
        control: str,
        deployer: Deployer,
        metrics: Metrics | None = None,
        drain_s: float = math.inf,
        log: EventLog | None = None,
        keyring: Keyring | None = None,
        limits: LimitsConfig | None = None,
    ) -> None:
        self.counters = Counters()
        self.refused: Counter[str] = Counter()  # messages, by the code of their Error
        self._refusals = 0  # all of them
        self.turn_began_s: float | None = None  # monotonic; None while it waits for messages
        self._heard_until_s = time.monotonic()  # what had come to `feed` by then is handled
        self._behind_since_s: float | None = None  # when more had come than a turn reads
        self._pipeline = pipeline
        self._deployer = deployer
        self._metrics = metrics or Metrics()
        self._peer_log = PeerLog(_log)
        self._keyring = keyring
        self._access = Access(keyring, limits or LimitsConfig(), pipeline.max_streams)
        self._drain_envelopes: list[list[bytes]] = []
        self._drain_requested = False
        self._stop_requested = False
        self._drain_s = drain_s
        self._drain_until_s = math.inf  # monotonic; when a drain is given up
        self._waited_for: str | None = None
        pipeline.wake = self._wake
        if log is not None:
            pipeline.count_on(log.sessions)
            restore(pipeline, log.states())
        self._feeds = Feeds(
            pipeline,
            self.counters,
            self._send_to_feeder,
            arrivals=self._metrics.arrivals,
            ended_before=None if log is None else log.ended,
        )
        self._open(feed, events, control)
        self._outbox = Outbox(self._events, log, self._peer_log)
        self.instance = self._outbox.instance
        self._metrics.watch(self, pipeline)

    def _open(self, feed: str, events: str, control: str) -> None:
        feed_bytes = protocol.max_frame_bytes(
            self._pipeline.max_chunk_snippets, self._pipeline.feature_dim
        )
        small_bytes = protocol.MAX_REQUEST_HEADER_BYTES
        with contextlib.ExitStack() as opened:
            context = sockets.new_context()
            opened.callback(context.term)
            self._doorkeeper = None if self._keyring is None else Doorkeeper(context, self._keyring)
            if self._doorkeeper is not None:
                opened.enter_context(self._doorkeeper.socket)
            guard = None if self._doorkeeper is None else self._doorkeeper.guard
            self._bind_events = lambda at: sockets.bind_publisher(context, at, small_bytes, guard)
            self._feed = opened.enter_context(sockets.bind_router(context, feed, feed_bytes, guard))
            self._events = self._bind_events(events)
            opened.callback(self._close_events)
            self._control = opened.enter_context(
                sockets.bind_router(context, control, small_bytes, guard)
            )
            self._wake_reader, self._wake_writer = socket.socketpair()
            for end in (self._wake_reader, self._wake_writer):
                opened.enter_context(end).setblocking(False)
            self._opened = opened.pop_all()
        self.feed_address = self._feed.get_string(zmq.LAST_ENDPOINT)
        self.events_address = self._events.get_string(zmq.LAST_ENDPOINT)
        self.control_address = self._control.get_string(zmq.LAST_ENDPOINT)
        self._poller = zmq.Poller()
        for source in (self._feed, self._events, self._control, self._wake_reader):
            self._poller.register(source, zmq.POLLIN)
        if self._doorkeeper is not None:
            self._poller.register(self._doorkeeper.socket, zmq.POLLIN)
        self._deployer.start(self._wake)
        self._opened.callback(self._deployer.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the sockets once what was sent is delivered, or after `sockets.LINGER_MS`."""
        self._opened.close()

    # ---- life cycle ----------------------------------------------------------------------------

    @property
    def state(self) -> Literal["serving", "waiting", "draining"]:
        """Whether it takes snippets, and computes them."""
        if self._drain_requested:
            return "draining"
        return "serving" if self._waits_for is None else "waiting"

    @property
    def _waits_for(self) -> str | None:
        return self._outbox.waits_for or self._pipeline.waits_for

    def run(self) -> None:
        """Serves until `stop()`, or until a drain is complete.

        Raises DrainError for one that is not complete within ``drain_s``.
        """
        bundle_id = self._pipeline.bundle_id
        _log.info("serving: bundle %s", bundle_id, extra=fact("serving", bundle_id=bundle_id))
        with self._woken_by_signals():
            while not (self._stop_requested or self._drained() or self._drain_overdue()):
                ready = {source for source, _ in self._poller.poll(self._idle_ms())}
                self.turn_began_s = time.monotonic()
                self._turn(ready)
                self.turn_began_s = None
        if self._drained():
            for order in self._deployer.asked:
                self._refuse_deploy(_draining(), order.envelope)
            for envelope in self._drain_envelopes:
                self._send(self._control, envelope, DrainReply())
        self._peer_log.say_left_out(now=True)
        if self._drain_overdue() and not self._drained():
            raise self._gave_up()
        how = "drained" if self._drained() else "stopped"
        _log.info("%s", how, extra=fact(how))

    def _idle_ms(self) -> int:
        """How long there is nothing to do unless a message comes."""
        parts = (self._feeds, self._peer_log)
        due_s = [each for part in parts if (each := part.due_in_s()) is not None]
        due_s.append(self._outbox.due_in_s())
        if self._outbox.waits_for is None and (step_s := self._pipeline.due_in_s()) is not None:
            due_s.append(step_s)
        if self._keyring is not None:
            due_s.append(self._keyring.due_in_s())
        if self._drain_until_s < math.inf:
            due_s.append(max(0.0, self._drain_until_s - time.monotonic()))
        return math.ceil(min(due_s) * 1000)

    def stop(self) -> None:
        """Ends `run` after its current turn; what is not processed yet stays unprocessed."""
        self._stop_requested = True
        self._wake()

    def drain(self) -> None:
        """Makes `run` refuse everything new, end all streams, publish what is left and return."""
        self._drain_requested = True
        self._wake()

    @contextlib.contextmanager
    def _woken_by_signals(self) -> Iterator[None]:
        """A signal ends the wait for messages, so that its handler runs at once.

        ZeroMQ waits on when a signal comes just before it waits, or to another thread.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # handlers run in the main thread alone
            return
        writer = self._wake_writer.fileno()
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)

    def _wake(self) -> None:
        # Full means that a wake-up waits already; closed means that nothing is left to wake.
        with contextlib.suppress(OSError):
            self._wake_writer.send(b"\0")

    def _drained(self) -> bool:
        pipeline = self._pipeline
        left = pipeline.streams or pipeline.pending() or self._outbox.waits_for is not None
        return self._feeds.draining and not left

    def _drain_overdue(self) -> bool:
        return time.monotonic() >= self._drain_until_s

    def _gave_up(self) -> DrainError:
        """Tells those who wait for the drain what is lost."""
        streams = self._pipeline.streams.values()
        reason = self._waits_for
        error = DrainError(
            f"the drain was given up after {self._drain_s:g} s (drain_s): {len(streams)} streams "
            f"are not finished, {sum(stream.lag for stream in streams)} of their snippets not "
            f"processed{f'; {reason}' if reason else ''}"
        )
        for envelope in self._drain_envelopes:
            text = str(error)[: protocol.MAX_ERROR_CHARACTERS]
            self._send(self._control, envelope, Error(None, "draining", text, None))
        return error

    # ---- one turn ------------------------------------------------------------------------------

    def _turn(self, ready: Collection[object]) -> None:
        """Of the sockets, only those are read that are ``ready``: an attempt is not free."""
        if self._wake_reader.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wake_reader.recv(4096)
        if self._keyring is not None and self._keyring.look():
            self._reopen_events()
        if self._doorkeeper is not None:
            self._let_in(self._doorkeeper)
        self._hear(self._feed in ready)
        if self._events in ready:
            self._read(self._events, self._on_subscription, SUBSCRIPTIONS_PER_TURN)
        if self._control in ready:
            self._read(self._control, self._on_control)
        for outcome in self._deployer.outcomes():
            self._deploy(outcome)
        if self._drain_requested and not self._feeds.draining:
            count = len(self._pipeline.streams)
            _log.info("draining: %d open streams", count, extra=fact("draining", streams=count))
            self._feeds.drain()
            self._drain_until_s = time.monotonic() + self._drain_s
        self._publish()
        self._feeds.admit_waiting()
        self._feeds.tend(self._heard_until_s)
        self._feeds.acknowledge()
        self._outbox.tend()
        self._peer_log.say_left_out()

    def _hear(self, is_ready: bool) -> None:
        """Reads from `feed`, and notes until when everything that had come is handled.

        Behind a turn that stood still there are more messages than one reads: a stream is not
        silent, and nothing of it missing, as long as those are not read. But not for ever: one peer
        that sends more than is read would keep all streams awake.
        """
        began_s = time.monotonic()
        if not is_ready or self._read(self._feed, self._on_feed):
            self._behind_since_s = None
        elif self._behind_since_s is None:
            self._behind_since_s = began_s
        if self._behind_since_s is None or began_s - self._behind_since_s > _BEHIND_S:
            self._heard_until_s = began_s

    def _read(
        self,
        source: zmq.Socket[bytes],
        handle: Callable[[zmq.Frame, list[bytes]], None],
        at_most: int = MESSAGES_PER_TURN,
    ) -> bool:
        """So many messages, fewer where some are refused; returns whether those were all."""
        refusing_s = 0.0
        for _ in range(at_most):
            refusals, began_s = self._refusals, time.monotonic()
            received = None if source.closed else sockets.receive(source)
            if received is None:
                return True
            handle(*received)
            if self._refusals > refusals:
                refusing_s += time.monotonic() - began_s
                if refusing_s > REFUSING_S:
                    return False
        return False

    def _publish(self) -> None:
        holds = self._outbox.waits_for is not None
        steps = self._pipeline.step() if not holds and self._pipeline.pending() else ()
        for publication in self._outbox.publish(steps, partial(save, self._pipeline)):
            self._on_published(publication)
        self._pipeline.is_held = self._outbox.waits_for is not None
        for scores in self._pipeline.curves.take():
            sockets.try_send(self._events, protocol.encode(scores))
        self._report_waiting()

    def _on_published(self, publication: Publication) -> None:
        self._metrics.published(publication)
        if isinstance(publication, FinalProposal):
            self.counters.proposals += 1
        elif not isinstance(publication, StreamNotice):
            self.counters.events += 1
        else:
            self._on_notice(publication)

    def _on_notice(self, notice: StreamNotice) -> None:
        where = f"at snippet {notice.next_index}"
        if notice.kind == "opened":
            where = f"from snippet {notice.first_index}"
        elif notice.kind == "gap":
            self.counters.gaps += 1
            self.counters.snippets_missing += notice.next_index - notice.first_index
            where = f"from snippet {notice.first_index} to before {notice.next_index}"
        elif notice.kind == "ended":
            where += f", {notice.proposals} proposals, {notice.events} events"
            self.counters.ended_streams += 1
            self._feeds.on_ended(notice)
        self._peer_log.say(
            logging.INFO,
            f"stream_{notice.kind}",
            f"stream {notice.stream!r}: {notice.kind} session {notice.session} {where}",
            stream=notice.stream,
            session=notice.session,
        )

    def _report_waiting(self) -> None:
        reason, before = self._waits_for, self._waited_for
        if reason is not None and reason != before:
            _log.warning("waiting, the streams are held: %s", reason)
        elif reason is None and before is not None:
            _log.info("serving again")
        self._waited_for = reason

    # ---- the three sockets ---------------------------------------------------------------------

    def _on_feed(self, first: zmq.Frame, frames: list[bytes]) -> None:
        peer = self._access.peer(first)
        stream = None
        try:
            self._access.check_known(peer)
            message = protocol.decode_feed(frames[1:])
            stream = message.stream
            self._access.check_feed(peer, message, self._feeds.streams_of)
        except (ProtocolError, StreamError) as error:
            self.counters.messages_refused += isinstance(error, ProtocolError)
            self._send_to_feeder(peer, error_message(error, stream))
            return
        self._feeds.handle(peer, message)

    def _on_subscription(self, first: zmq.Frame, frames: list[bytes]) -> None:
        change = self._subscribe(first)
        self._pipeline.curves.subscribed(change.topic, change.more)
        if not change.refused:
            self._outbox.answer(frames[0], change.sees)

    def _on_control(self, first: zmq.Frame, frames: list[bytes]) -> None:
        # A REQ socket puts an empty frame before its message; its reply needs the same.
        split = 2 if frames[1:2] == [b""] else 1
        envelope, body = frames[:split], frames[split:]
        peer = self._access.peer(first)
        try:
            self._access.check_control(peer)
            request = protocol.decode_control(body)
        except (ProtocolError, StreamError) as error:
            self.counters.messages_refused += isinstance(error, ProtocolError)
            self._send(self._control, envelope, error_message(error), peer)
            return
        match request:
            case StatusRequest():
                self._send(self._control, envelope, self._status())
            case DrainRequest():
                self._drain_envelopes.append(envelope)
                self._drain_requested = True
            case DeployRequest():
                self._order(request, tuple(envelope))
            case RollBackRequest():
                self._roll_back(tuple(envelope))

    # ---- keys ----------------------------------------------------------------------------------

    def _let_in(self, doorkeeper: Doorkeeper) -> None:
        for refused in doorkeeper.answer(MESSAGES_PER_TURN):
            self.counters.connections_refused += 1
            self._peer_log.say(logging.WARNING, "connection_refused", f"refused, {refused}")

    def _subscribe(self, first: zmq.Frame) -> Change:
        """Does what a message on events asks for, as far as its key goes."""
        try:
            change = self._access.subscription(first)
        except Misuse as misuse:
            # libzmq gives what is read behind such a message to the wrong connection (4.3.5, in
            # manual mode): another key's subscription to the one that sent it.
            _log.error("%s: sent what is no subscription; refused from now on", misuse)
            self._reopen_events()
            return Change(str(misuse), first.bytes, 0, refused=True)
        for topic in change.add:
            self._events.set(zmq.SUBSCRIBE, topic)
        for topic in change.remove:
            self._events.set(zmq.UNSUBSCRIBE, topic)
        if change.refused:
            self.counters.subscriptions_refused += 1
            self._refusals += 1
            self._peer_log.say(
                logging.WARNING,
                "subscription_refused",
                f"subscription to {change.topic[:200]!r} refused: {change.peer}",
                peer=change.peer,
            )
        return change

    def _close_events(self) -> None:
        self._events.close()  # the one that is open by then

    def _reopen_events(self) -> None:
        """Ends all subscriptions; whoever has a key connects and subscribes again by itself.

        ZeroMQ cannot cut one connection off, nor end a subscription without a message from it.
        """
        self._poller.unregister(self._events)
        self._events = sockets.bind_again(self._events, self._bind_events)
        self._poller.register(self._events, zmq.POLLIN)
        self._outbox.send_on(self._events)
        self._pipeline.curves.forget()

    # ---- bundles -------------------------------------------------------------------------------

    def _order(self, request: DeployRequest, envelope: tuple[bytes, ...]) -> None:
        try:
            if self._drain_requested:
                raise _draining()
            self._deployer.ask(Order(Path(request.folder), request.canary_streams, envelope))
        except DeployError as error:
            self._refuse_deploy(error, envelope)

    def _deploy(self, outcome: Outcome) -> None:
        """Let a bundle that was loaded work from the next batch on."""
        order, loaded = outcome.order, outcome.loaded
        if self._drain_requested:
            loaded = _draining()
        if isinstance(loaded, HrproError):
            self._refuse_deploy(loaded, order.envelope)
        else:
            changed = self._pipeline.deploy(loaded, order.canary_streams)
            self._on_deployed(changed, order.envelope)

    def _roll_back(self, envelope: tuple[bytes, ...]) -> None:
        try:
            changed = self._pipeline.roll_back()
        except DeployError as error:
            self._refuse_deploy(error, envelope)
        else:
            self._on_deployed(changed, envelope)

    def _on_deployed(self, changed_streams: int, envelope: tuple[bytes, ...] | None) -> None:
        self.counters.deploys += 1
        reply = DeployReply(*self._pipeline.deployments.bundle_ids, changed_streams)
        _log.info(
            "deployed: bundle %s, previous %s, canary %s, changed %d open streams",
            *self._pipeline.deployments.bundle_ids,
            changed_streams,
            extra=fact("deployed", bundle_id=reply.bundle_id, changed_streams=changed_streams),
        )
        if envelope is not None:
            self._send(self._control, list(envelope), reply)

    def _refuse_deploy(self, error: HrproError, envelope: tuple[bytes, ...] | None) -> None:
        self.counters.deploys_refused += 1
        _log.warning("not deployed: %s", error, extra=fact(DEPLOY_REFUSED, code=DEPLOY_REFUSED))
        if envelope is not None:
            text = str(error)[: protocol.MAX_ERROR_CHARACTERS]
            refusal = Error(None, DEPLOY_REFUSED, text, None)
            self._send(self._control, list(envelope), refusal)

    def _status(self) -> StatusReply:
        return StatusReply(
            self.instance,
            *self._pipeline.deployments.bundle_ids,
            self.state,
            tuple(stream_statuses(self._pipeline, self._feeds)),
            all_counters(self._pipeline, self.counters, self.refused),
            self._waits_for and self._waits_for[: protocol.MAX_ERROR_CHARACTERS],
            self._pipeline.deployments.current.provider,
        )

    # ---- sending -------------------------------------------------------------------------------

    def _send_to_feeder(self, peer: Peer, message: Message) -> bool:
        return self._send(self._feed, [peer.routing_id], message, peer)

    def _send(
        self,
        target: zmq.Socket[bytes],
        envelope: list[bytes],
        message: Message,
        peer: Peer | None = None,
    ) -> bool:
        if isinstance(message, Error) and message.code != DEPLOY_REFUSED:
            self.refused[message.code] += 1
            self._refusals += 1
            # From a recoverable one the feeder goes on by itself, after each start of the engine.
            recoverable = message.code in protocol.RECOVERABLE_CODES
            self._peer_log.say(
                logging.INFO if recoverable else logging.WARNING,
                "refused_recoverable" if recoverable else "refused",
                f"refused, {message.code}: {message.message}{'' if peer is None else f' ({peer})'}",
                stream=message.stream,
                code=message.code,
                peer=None if peer is None else str(peer),
            )
        return sockets.try_send(target, envelope + protocol.encode(message))


def _draining() -> DeployError:
    return DeployError("the engine is draining")
