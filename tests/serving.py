"""What the tests of the server and the clients share: a tiny pipeline, a running server, peers.

The pipeline needs no model, and what it publishes can be told from the features alone: one
FinalProposal for each snippet, its score the first feature; and before it one ActionEvent, where
that feature is above 0.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import zmq
from numpy.typing import NDArray

from hrpro.engine import protocol
from hrpro.engine.deployer import Deployer
from hrpro.engine.deployment import DeployError, Deployment, Deployments
from hrpro.engine.metrics import Metrics
from hrpro.engine.protocol import (
    ActionEvent,
    Chunk,
    FinalProposal,
    Hello,
    Message,
    Publication,
    StreamError,
    StreamNotice,
)
from hrpro.engine.server import Server
from hrpro.engine.timebase import SnippetClock

ANY_PORT = "tcp://127.0.0.1:*"
DIM = 2
CLOCK = SnippetClock(25.0, 16)
# Far more than any step of a test takes; it only bounds how long a failure takes to show.
PATIENCE_S = 10.0


@dataclass
class TinyStream:
    stream: str
    session: int
    first_index: int
    next_index: int
    processed: int
    send_until: int
    bundle_id: str = "tiny"
    duplicates: int = 0
    ended: bool = False
    proposals: int = 0
    events: int = 0
    open_actions: int = 0
    sequence: int = 0
    waiting: list[NDArray[np.float32]] = field(default_factory=list)

    @property
    def lag(self) -> int:
        return len(self.waiting)


class TinyPipeline:
    """The pipeline's interface, with 4 snippets a step and room for 16 in a stream."""

    clock = CLOCK
    feature_dim = DIM
    classes = ("high", "low")
    window_snippets = 4
    hop_snippets = 2
    context_snippets = 2
    lookahead_snippets = 1
    lookahead_s = 0.64
    bundle_id = "tiny"
    waits_for = None
    deployments = Deployments(
        SimpleNamespace(bundle_id="tiny", config=SimpleNamespace(provider="cpu"))  # type: ignore[arg-type]
    )
    max_chunk_snippets = 8
    room_snippets = 16
    step_snippets = 4
    max_streams = 100

    def __init__(self) -> None:
        self.streams: dict[str, TinyStream] = {}
        self.sessions: dict[str, int] = {}
        self.received: dict[str, list[tuple[int, float]]] = {}
        self.batches = 0
        self.snippets_scored = 0
        self.paused = False

    def open(self, stream: str, first_index: int) -> TinyStream:
        if stream not in self.streams:
            if len(self.streams) >= self.max_streams:
                raise StreamError("too_many_streams", f"stream {stream!r}: too many streams")
            session = self.sessions[stream] = self.sessions.get(stream, 0) + 1
            self.streams[stream] = TinyStream(
                stream, session, first_index, first_index, first_index,
                first_index + self.room_snippets,
            )  # fmt: skip
        return self.streams[stream]

    def append(self, stream: str, first_index: int, features: NDArray[np.float32]) -> None:
        state = self.streams[stream]
        n, dim = features.shape
        checks = {
            "wrong_dimension": dim != self.feature_dim,
            "not_finite": not np.isfinite(features).all(),
            "out_of_order": first_index > state.next_index,
            "no_credit": first_index + n > state.send_until,
        }
        for code, refused in checks.items():
            if refused:
                raise StreamError(code, f"stream {stream!r}: {code}", state.next_index)
        known = min(state.next_index - first_index, n)
        state.duplicates += known
        for row in features[known:]:
            self.received.setdefault(stream, []).append((state.next_index, float(row[0])))
            state.waiting.append(row)
            state.next_index += 1

    def end(self, stream: str, next_index: int) -> None:
        state = self.streams[stream]
        assert state.next_index == next_index and not state.ended
        state.ended = True

    def pending(self) -> bool:
        return not self.paused and any(map(self._has_work, self.streams.values()))

    @staticmethod
    def _has_work(state: TinyStream) -> bool:
        return bool(state.waiting) or state.ended or state.sequence == 0

    def step(self) -> list[Publication]:
        state = next(filter(self._has_work, self.streams.values()))
        published: list[Publication] = []
        if state.sequence == 0:
            published.append(self._notice(state, "opened"))
        batch = state.waiting[: self.step_snippets]
        self.batches += bool(batch)
        self.snippets_scored += len(batch)
        for row in batch:
            published += self._publications(state, float(row[0]))
        del state.waiting[: self.step_snippets]
        state.send_until = state.processed + self.room_snippets
        if state.ended and not state.waiting:
            published.append(self._notice(state, "ended"))
            del self.streams[state.stream]
        return published

    def _notice(self, state: TinyStream, kind: str) -> StreamNotice:
        state.sequence += 1
        return StreamNotice(
            state.stream, state.session, state.sequence - 1, kind,  # type: ignore[arg-type]
            state.first_index, state.next_index, state.proposals, state.events,
        )  # fmt: skip

    def _publications(self, state: TinyStream, value: float) -> Iterator[Publication]:
        at = state.processed
        start_s, end_s = self.clock.seconds(at), self.clock.seconds(at + 1)
        common = {"stream": state.stream, "session": state.session, "start_s": start_s}
        common |= {"end_s": end_s, "score": value, "published_index": at, "published_s": end_s}
        common |= {"bundle_id": self.bundle_id}
        label = "high" if value > 0 else "low"
        if value > 0:
            yield ActionEvent(
                sequence=state.sequence, id=at, kind="end", revision=0, label=label, **common
            )
            state.sequence += 1
            state.events += 1
        yield FinalProposal(sequence=state.sequence, id=at, label=label, action_id=None, **common)
        state.sequence += 1
        state.proposals += 1
        state.processed += 1


def new_server(
    pipeline: TinyPipeline,
    feed: str = ANY_PORT,
    events: str = ANY_PORT,
    control: str = ANY_PORT,
    metrics: Metrics | None = None,
) -> Server:
    """A server to which no bundle can be deployed."""
    return Server(pipeline, feed, events, control, Deployer(no_bundle), metrics)


def no_bundle(folder: Path) -> Deployment:
    raise DeployError(f"{folder}: not here")


@contextlib.contextmanager
def serving(
    pipeline: TinyPipeline | None = None,
    feed: str = ANY_PORT,
    events: str = ANY_PORT,
    control: str = ANY_PORT,
    metrics: Metrics | None = None,
) -> Iterator[Server]:
    """A server that runs in a thread until the block is left."""
    with new_server(pipeline or TinyPipeline(), feed, events, control, metrics) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "the server did not stop"


class RawPeer:
    """A bare DEALER, free to say anything."""

    def __init__(
        self, address: str, routing_id: bytes | None = None, messages_to_send: int = 1000
    ) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.set(zmq.SNDHWM, messages_to_send)
        if routing_id is not None:
            self.socket.set(zmq.ROUTING_ID, routing_id)
        self.socket.connect(address)

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def say(self, *what: Message | list[bytes]) -> None:
        for each in what:
            self.socket.send_multipart(protocol.encode(each) if isinstance(each, Message) else each)

    def hear(self) -> Message:
        return protocol.decode_feed_reply(self.hear_frames())

    def hear_frames(self) -> list[bytes]:
        assert self.socket.poll(PATIENCE_S * 1000), "no answer came"
        return self.socket.recv_multipart()

    def ask(self, *what: Message | list[bytes]) -> Message:
        self.say(*what)
        return self.hear()


def hello(stream: str = "cam", first_index: int = 0, dim: int = DIM) -> Hello:
    return Hello(stream, dim, CLOCK.frames_per_s, CLOCK.snippet_frames, first_index)


def rows(first: int, stop: int, dim: int = DIM) -> NDArray[np.float32]:
    """(stop - first, dim) features, each with its snippet index + 1 in all places."""
    values = np.arange(first + 1, stop + 1, dtype=np.float32)
    return np.repeat(values[:, None], dim, axis=1)


def chunk(first: int, stop: int, stream: str = "cam") -> Chunk:
    return Chunk(stream, first, rows(first, stop))


def hear_until(peer: RawPeer, last: Message) -> list[Message]:
    """All that comes up to `last`, which must come."""
    heard = [peer.hear()]
    while heard[-1] != last:
        heard.append(peer.hear())
    return heard


class CuttableRoad:
    """A TCP relay in front of a server, whose connections can be cut and which can be moved."""

    def __init__(self, address: str) -> None:
        self.target_port = int(address.rsplit(":", 1)[1])
        self.accepted = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> CuttableRoad:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(PATIENCE_S)
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        for end in self._ends:
            end.close()

    def cut(self) -> None:
        """Resets all connections that stand now."""
        with self._lock:
            for end in self._ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.accepted += 1
                try:
                    far = socket.create_connection(("127.0.0.1", self.target_port))
                except ConnectionRefusedError:
                    near.close()
                    continue
                with self._lock:
                    self._ends += [near, far]
                    for pair in ((near, far), (far, near)):
                        thread = threading.Thread(target=self._carry, args=pair)
                        self._threads.append(thread)
                        thread.start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def open_files() -> list[str]:
    """What the process has open; a leaked socket shows as one entry more."""
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(str(link.readlink()).split(":")[0])
    return sorted(names)
