"""What the tests of the server and the clients share: a tiny pipeline, a running server, peers.

The pipeline needs no model, and what it publishes can be told from the features alone: one
FinalProposal for each snippet, its score the first feature; and before it one ActionEvent, where
that feature is above 0.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import zmq
from numpy.typing import NDArray

from hrpro.engine import protocol
from hrpro.engine.asking import Asking
from hrpro.engine.client_key import ClientKey
from hrpro.engine.config import EngineConfig, LimitsConfig
from hrpro.engine.deployer import Deployer
from hrpro.engine.deployment import DeployError, Deployment
from hrpro.engine.event_log import EventLog
from hrpro.engine.inference import Outputs
from hrpro.engine.keys import Keyring
from hrpro.engine.localizer import Decision, Final
from hrpro.engine.metrics import Metrics
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.protocol import Chunk, Hello, Message, Policy
from hrpro.engine.refine import Proposal
from hrpro.engine.server import Server
from hrpro.engine.timebase import SnippetClock
from hrpro.engine.tracker import ActionChange

ANY_PORT = "tcp://127.0.0.1:*"
DIM = 2
CLOCK = SnippetClock(25.0, 16)
# Far more than any step of a test takes; it only bounds how long a failure takes to show.
PATIENCE_S = 10.0


class TinyBackend:
    """Both scores of a snippet are its first feature, its attention the second."""

    def score_snippets(self, features: NDArray[np.float32], valid: NDArray[np.bool_]) -> Outputs:
        first = features[:, :, :1]
        return np.repeat(first, 2, axis=2), first, features[:, :, 1]

    def score_instances(self, *_: object) -> NoReturn:
        raise AssertionError("there is no stage 2")


class TinyLocalizer:
    """An action and a proposal for each snippet, as soon as it is scored."""

    open_actions = 0
    next_action_id = 0

    def __init__(self, first_index: int) -> None:
        self._next_index = self.decided_until = self.began_at = first_index
        self.newest = np.zeros(2, np.float32), np.zeros(1, np.float32)

    @property
    def remembered_from(self) -> int:
        return self._next_index

    def state(self) -> dict[str, int]:
        return {"next_index": self._next_index}

    def takes_quietly(self, *_: NDArray[np.float32]) -> bool:
        return False

    def advancing(
        self, scores: NDArray[np.float32], embedding: NDArray[np.float32]
    ) -> Asking[list[Decision]]:
        yield from ()
        self.newest = scores[-1], embedding[-1]
        decisions: list[Decision] = []
        for value in scores[:, 0].tolist():
            at, self._next_index = self._next_index, self._next_index + 1
            if at < self.decided_until:
                continue
            label_index = 0 if value > 0 else 1
            if value > 0:
                decisions.append(ActionChange("end", at, label_index, 0, at, at + 1, value))
            decisions.append(Final(Proposal(label_index, at, at + 1, value, at + 1), None))
        return decisions

    def flush(self) -> list[Decision]:
        return []


class TinyDeployment(Deployment):
    def new_localizer(self, first_index: int, next_action_id: int = 0) -> TinyLocalizer:  # type: ignore[override]
        return TinyLocalizer(first_index)

    def restored_localizer(self, first_index: int, state: Mapping[str, Any]) -> TinyLocalizer:  # type: ignore[override]
        restored = TinyLocalizer(first_index)
        restored.decided_until = state["next_index"]
        return restored


class TinyPipeline(Pipeline):
    """The pipeline with 4 snippets a step and room for 16 in a stream, and no model.

    `received` has what came of each stream: index and first feature. Nothing is done while it is
    `paused`.
    """

    step_snippets = 4
    room_snippets = 16

    def __init__(self, **config: Any) -> None:
        manifest = SimpleNamespace(
            bundle_id="tiny",
            clock=CLOCK,
            classes=("high", "low"),
            feature_dim=DIM,
            embedding_width=1,
            context_snippets=3,
            lookahead_snippets=0,
            step=None,
        )
        settings = {
            "lookahead_s": 0.64,
            "max_batch": self.step_snippets,
            "backlog_snippets": self.room_snippets - 1,
            "max_chunk_snippets": 8,
            **config,
        }
        super().__init__(TinyDeployment(manifest, TinyBackend(), EngineConfig(**settings)))  # type: ignore[arg-type]
        self.received: dict[str, list[tuple[int, float]]] = {}
        self.paused = False

    @property
    def sessions(self) -> dict[str, int]:
        return self._sessions

    def append(self, stream: str, first_index: int, features: NDArray[np.float32]) -> None:
        super().append(stream, first_index, features)
        received = self.received.setdefault(stream, [])
        known = {index for index, _ in received}
        for index, row in enumerate(features, first_index):
            if index not in known:
                received.append((index, float(row[0])))

    def due_in_s(self) -> float | None:
        return None if self.paused else super().due_in_s()


def new_server(
    pipeline: TinyPipeline,
    feed: str = ANY_PORT,
    events: str = ANY_PORT,
    control: str = ANY_PORT,
    metrics: Metrics | None = None,
    log: EventLog | None = None,
    keyring: Keyring | None = None,
    limits: LimitsConfig | None = None,
) -> Server:
    """A server to which no bundle can be deployed."""
    deployer = Deployer(no_bundle)
    return Server(
        pipeline, feed, events, control, deployer, metrics, log=log, keyring=keyring, limits=limits
    )


def no_bundle(folder: Path) -> Deployment:
    raise DeployError(f"{folder}: not here")


@contextlib.contextmanager
def serving(
    pipeline: TinyPipeline | None = None,
    feed: str = ANY_PORT,
    events: str = ANY_PORT,
    control: str = ANY_PORT,
    metrics: Metrics | None = None,
    log: EventLog | None = None,
    keyring: Keyring | None = None,
    limits: LimitsConfig | None = None,
) -> Iterator[Server]:
    """A server that runs in a thread until the block is left."""
    pipeline = pipeline or TinyPipeline()
    with new_server(pipeline, feed, events, control, metrics, log, keyring, limits) as server:
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
        self,
        address: str,
        routing_id: bytes | None = None,
        messages_to_send: int = 1000,
        key: ClientKey | None = None,
        kind: int = zmq.DEALER,
    ) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(kind)
        self.socket.set(zmq.SNDHWM, messages_to_send)
        if key is not None:
            self.socket.set(zmq.CURVE_PUBLICKEY, key.public)
            self.socket.set(zmq.CURVE_SECRETKEY, key.secret)
            self.socket.set(zmq.CURVE_SERVERKEY, key.engine)
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


def hello(
    stream: str = "cam", first_index: int = 0, dim: int = DIM, policy: Policy = "wait"
) -> Hello:
    return Hello(stream, dim, CLOCK.frames_per_s, CLOCK.snippet_frames, first_index, policy)


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


def open_files() -> Counter[str]:
    """What the process has open, each socket by its number; ``now - before`` is what was left."""
    names: Counter[str] = Counter()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names[str(link.readlink())] += 1
    return names
