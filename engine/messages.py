"""All messages, as frozen dataclasses; docs/PROTOCOL.md says what each field means.

A message checks its fields when it is made, whether from values or from bytes, so a message
that exists is a valid one. `Message.known` alone leaves that to whoever makes it.
`hrpro.engine.protocol` turns messages into frames and back.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from hrpro.engine import wire
from hrpro.engine.wire import ProtocolError

MAX_ERROR_CHARACTERS = 1024

Policy = Literal["wait", "drop_oldest", "drop_newest"]
NoticeKind = Literal["opened", "gap", "idle", "resumed", "ended"]
EventKind = Literal["start", "update", "end", "retract"]
LAST_KINDS: tuple[EventKind, ...] = ("end", "retract")
_FLOAT32 = np.dtype(np.float32)


def _wire(check: wire.Check, default: Any = MISSING) -> Any:
    """A dataclass field, the check of its value, and what it is where a peer leaves it out."""
    return field(metadata={"check": check}, default=default)


@dataclass(frozen=True)
class Message:
    """What all messages share. Making one raises ProtocolError when a field does not fit."""

    TYPE: ClassVar[str]
    # Of each field its name, what errors call it, and its check.
    _CHECKS: ClassVar[tuple[tuple[str, str, wire.Check], ...]]

    def __post_init__(self) -> None:
        wire.check_fields(vars(self), self._checks())

    @classmethod
    def known(cls, *values: Any) -> Self:
        """Of all fields in their order, which are known to fit: nothing is checked."""
        message = object.__new__(cls)
        vars(message).update(zip(cls.__match_args__, values, strict=True))
        return message

    @classmethod
    def _checks(cls) -> tuple[tuple[str, str, wire.Check], ...]:
        """Looked up once for each kind of message."""
        if "_CHECKS" not in cls.__dict__:
            cls._CHECKS = tuple(
                (each.name, f"{cls.TYPE}.{each.name}", each.metadata["check"])
                for each in fields(cls)
            )
        return cls._CHECKS


# ---- feed: feeder -> engine --------------------------------------------------------------------


@dataclass(frozen=True)
class Hello(Message):
    """Opens or resumes a stream; `first_index` is the oldest snippet the feeder can still send.

    `policy` says what becomes of snippets that the engine has no room for.
    """

    TYPE: ClassVar[str] = "hello"
    stream: str = _wire(wire.stream_id)
    feature_dim: int = _wire(wire.size)
    frames_per_s: float = _wire(wire.positive_number)
    snippet_frames: int = _wire(wire.size)
    first_index: int = _wire(wire.index)
    policy: Policy = _wire(wire.one_of(*get_args(Policy)), "wait")


@dataclass(frozen=True, eq=False)
class Chunk(Message):
    """Features of consecutive snippets from `first_index`: (n, D) float32, n and D at least 1.

    `features` may be read-only and share memory with the received frame. Whether the values are
    finite is not looked at here. Compared by identity.
    """

    TYPE: ClassVar[str] = "chunk"
    stream: str = _wire(wire.stream_id)
    first_index: int = _wire(wire.index)
    features: NDArray[np.float32] = _wire(lambda value: value)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.features, np.ndarray) or self.features.dtype != _FLOAT32:
            came = getattr(self.features, "dtype", type(self.features).__name__)
            raise self._unfit(f"a float32 array, came {came}", "wrong_dtype")
        if self.features.ndim != 2 or self.features.size == 0:
            raise self._unfit(f"shape (n, D), came {self.features.shape}")
        if self.first_index + len(self.features) > wire.MAX_INDEX:
            raise self._unfit(f"indices up to {wire.MAX_INDEX}")

    def _unfit(self, expected: str, code: str = "bad_message") -> ProtocolError:
        where = f"stream {self.stream!r}, snippet {self.first_index}"
        return ProtocolError(f"{where}: expected {expected}", code)


@dataclass(frozen=True)
class Gap(Message):
    """The snippets `first_index <= index < next_index` will not come: the source left them out,
    or, with `dropped`, the feeder had no room for them."""

    TYPE: ClassVar[str] = "gap"
    stream: str = _wire(wire.stream_id)
    first_index: int = _wire(wire.index)
    next_index: int = _wire(wire.index)
    dropped: bool = _wire(wire.flag, False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.next_index <= self.first_index:
            raise ProtocolError(
                f"stream {self.stream!r}, snippet {self.first_index}: expected a gap that ends"
                f" behind it, came its end at {self.next_index}"
            )


@dataclass(frozen=True)
class End(Message):
    """No more snippets will come; `next_index` is one past the last one."""

    TYPE: ClassVar[str] = "end"
    stream: str = _wire(wire.stream_id)
    next_index: int = _wire(wire.index)


# ---- feed: engine -> feeder --------------------------------------------------------------------


@dataclass(frozen=True)
class Welcome(Message):
    """The answer to Hello: where to continue, how much to send, and what the engine runs."""

    TYPE: ClassVar[str] = "welcome"
    stream: str = _wire(wire.stream_id)
    next_index: int = _wire(wire.index)
    send_until: int = _wire(wire.index)
    max_chunk_snippets: int = _wire(wire.size)
    feature_dim: int = _wire(wire.size)
    frames_per_s: float = _wire(wire.positive_number)
    snippet_frames: int = _wire(wire.size)
    classes: tuple[str, ...] = _wire(wire.listing(wire.label))
    window_snippets: int = _wire(wire.size)
    hop_snippets: int = _wire(wire.size)
    context_snippets: int = _wire(wire.count)
    lookahead_snippets: int = _wire(wire.count)
    lookahead_s: float = _wire(wire.number)
    bundle_id: str = _wire(wire.text(256))
    needed_from: int | None = _wire(wire.optional(wire.index), None)


@dataclass(frozen=True)
class Ack(Message):
    """Snippets below `next_index` are accepted, or given up; those below `send_until` may be sent.

    From `next_index` up to `missing_until` snippets are missing, while later ones are there.
    `dropped` counts what the session had no room for. Snippets below `needed_from` are never needed
    again, whatever happens to the engine; None where it keeps nothing.
    """

    TYPE: ClassVar[str] = "ack"
    stream: str = _wire(wire.stream_id)
    next_index: int = _wire(wire.index)
    send_until: int = _wire(wire.index)
    missing_until: int | None = _wire(wire.optional(wire.index), None)
    dropped: int = _wire(wire.count, 0)
    needed_from: int | None = _wire(wire.optional(wire.index), None)


@dataclass(frozen=True)
class Ended(Message):
    """All snippets of the session are processed, and all that came of them is published."""

    TYPE: ClassVar[str] = "ended"
    stream: str = _wire(wire.stream_id)
    next_index: int = _wire(wire.index)
    proposals: int = _wire(wire.count)
    events: int = _wire(wire.count)


@dataclass(frozen=True)
class Error(Message):
    """A message was refused. `code` is one of ERROR_CODES, or one of a later version's."""

    TYPE: ClassVar[str] = "error"
    stream: str | None = _wire(wire.optional(wire.stream_id))
    code: str = _wire(wire.matching(r"[a-z_]{1,64}"))
    message: str = _wire(wire.text(MAX_ERROR_CHARACTERS))
    next_index: int | None = _wire(wire.optional(wire.index))


# ---- events: engine -> subscribers -------------------------------------------------------------


@dataclass(frozen=True)
class ActionEvent(Message):
    """An action as it is seen while it happens. `end_s` is None until it is over; `bundle_id` is
    the bundle that saw it.

    In all publications, `number` is that in the engine's log, and `previous` the one of the
    stream's publication before, 0 for none; both are None where the engine keeps no log.
    """

    TYPE: ClassVar[str] = "event"
    stream: str = _wire(wire.stream_id)
    session: int = _wire(wire.count)
    sequence: int = _wire(wire.count)
    id: int = _wire(wire.count)
    kind: EventKind = _wire(wire.one_of(*get_args(EventKind)))
    revision: int = _wire(wire.count)
    label: str = _wire(wire.label)
    start_s: float = _wire(wire.number)
    end_s: float | None = _wire(wire.optional(wire.number))
    score: float = _wire(wire.number)
    published_index: int = _wire(wire.index)
    published_s: float = _wire(wire.number)
    bundle_id: str = _wire(wire.text(256))
    number: int | None = _wire(wire.optional(wire.count), None)
    previous: int | None = _wire(wire.optional(wire.count), None)

    @property
    def is_last(self) -> bool:
        """Whether no more is said of this action."""
        return self.kind in LAST_KINDS


@dataclass(frozen=True)
class FinalProposal(Message):
    """A located action, never changed once published; `bundle_id` is the bundle that found it."""

    TYPE: ClassVar[str] = "final"
    stream: str = _wire(wire.stream_id)
    session: int = _wire(wire.count)
    sequence: int = _wire(wire.count)
    id: int = _wire(wire.count)
    label: str = _wire(wire.label)
    start_s: float = _wire(wire.number)
    end_s: float = _wire(wire.number)
    score: float = _wire(wire.number)
    published_index: int = _wire(wire.index)
    published_s: float = _wire(wire.number)
    action_id: int | None = _wire(wire.optional(wire.count))
    bundle_id: str = _wire(wire.text(256))
    number: int | None = _wire(wire.optional(wire.count), None)
    previous: int | None = _wire(wire.optional(wire.count), None)


@dataclass(frozen=True)
class StreamNotice(Message):
    """A session of a stream began, had a gap, is silent, goes on, or is complete.

    `first_index <= index < next_index` are the snippets of the session so far; of a `gap`, those
    that are missing.
    """

    TYPE: ClassVar[str] = "stream"
    stream: str = _wire(wire.stream_id)
    session: int = _wire(wire.count)
    sequence: int = _wire(wire.count)
    kind: NoticeKind = _wire(wire.one_of(*get_args(NoticeKind)))
    first_index: int = _wire(wire.index)
    next_index: int = _wire(wire.index)
    proposals: int = _wire(wire.count)
    events: int = _wire(wire.count)
    number: int | None = _wire(wire.optional(wire.count), None)
    previous: int | None = _wire(wire.optional(wire.count), None)


@dataclass(frozen=True)
class Subscribed(Message):
    """The echo of a subscription to `welcome/{token}/`: all earlier ones are in force.

    `instance` is that of the engine's log, or new whenever an engine without one starts; sessions
    count within one instance. `number` is the newest in the log.
    """

    TYPE: ClassVar[str] = "subscribed"
    token: str = _wire(wire.stream_id)
    instance: str = _wire(wire.matching(r"[0-9a-f]{16}"))
    number: int | None = _wire(wire.optional(wire.count), None)


@dataclass(frozen=True)
class Mark(Message):
    """A sign of life, and the newest number in the log: every publication up to it was sent."""

    TYPE: ClassVar[str] = "mark"
    instance: str = _wire(wire.matching(r"[0-9a-f]{16}"))
    number: int | None = _wire(wire.optional(wire.count))


Publication = ActionEvent | FinalProposal | StreamNotice


@dataclass(frozen=True, eq=False)
class SnippetScores(Message):
    """Scores of consecutive snippets from `first_index`, as they have become final.

    `curves` is (n, 1 + C) float32, all in [0, 1]: the class-agnostic attention A, and for each of
    the `classes` P = A * S, where S is the class activation sequence. They are no publication:
    sent only to who has subscribed, and neither numbered nor logged. Compared by identity.
    """

    TYPE: ClassVar[str] = "scores"
    stream: str = _wire(wire.stream_id)
    session: int = _wire(wire.count)
    first_index: int = _wire(wire.index)
    frames_per_s: float = _wire(wire.positive_number)
    snippet_frames: int = _wire(wire.size)
    classes: tuple[str, ...] = _wire(wire.listing(wire.label))
    bundle_id: str = _wire(wire.text(256))
    curves: NDArray[np.float32] = _wire(lambda value: value)

    def __post_init__(self) -> None:
        super().__post_init__()
        width = 1 + len(self.classes)
        if self.curves.ndim != 2 or self.curves.shape[1] != width or not len(self.curves):
            raise ProtocolError(
                f"scores of stream {self.stream!r}, snippet {self.first_index}: expected shape "
                f"(n, {width}), came {self.curves.shape}"
            )

    @property
    def attention(self) -> NDArray[np.float32]:
        """A of each snippet, (n,)."""
        return self.curves[:, 0]

    @property
    def scores(self) -> NDArray[np.float32]:
        """P of each snippet and class, (n, C)."""
        return self.curves[:, 1:]


@dataclass(frozen=True)
class Page(Message):
    """The answer to a subscription to `replay/{token}/{since}/{stream}/` or to
    `open/{token}/{stream}/`: publications out of the log, each in a frame of its own.

    The next page begins behind the number `next`; there is none where that is the `newest`. What
    is smaller than `oldest` is no longer in the log. `since` is None for open actions, `stream` for
    all streams.
    """

    TYPE: ClassVar[str] = "page"
    token: str = _wire(wire.stream_id)
    since: int | None = _wire(wire.optional(wire.count))
    stream: str | None = _wire(wire.optional(wire.stream_id))
    next: int = _wire(wire.count)
    oldest: int = _wire(wire.count)
    newest: int = _wire(wire.count)
    publications: tuple[Publication, ...] = _wire(lambda value: value)

    @property
    def is_last(self) -> bool:
        """Whether the log has no more."""
        return self.next >= self.newest


# ---- control -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatusRequest(Message):
    """Asks for a StatusReply."""

    TYPE: ClassVar[str] = "status"


@dataclass(frozen=True)
class DrainRequest(Message):
    """Asks the engine to end all streams, publish what is left, and stop."""

    TYPE: ClassVar[str] = "drain"


@dataclass(frozen=True)
class DeployRequest(Message):
    """Asks the engine to load the bundle in a folder of its machine and let it work.

    For all streams, or, if some are named, for these: open ones, and ones to come.
    """

    TYPE: ClassVar[str] = "deploy"
    folder: str = _wire(wire.text(1024))
    canary_streams: tuple[str, ...] = _wire(wire.listing(wire.stream_id))


@dataclass(frozen=True)
class RollBackRequest(Message):
    """Asks the engine to end a canary, or else to go back to the previous bundle."""

    TYPE: ClassVar[str] = "roll_back"


@dataclass(frozen=True)
class DeployReply(Message):
    """It is done: the bundles as they are now, and how many open streams have another one."""

    TYPE: ClassVar[str] = "deploy_reply"
    bundle_id: str = _wire(wire.text(256))
    previous_bundle_id: str | None = _wire(wire.optional(wire.text(256)))
    canary_bundle_id: str | None = _wire(wire.optional(wire.text(256)))
    changed_streams: int = _wire(wire.count)


@dataclass(frozen=True)
class StatusReply(Message):
    """The engine at this moment; PROTOCOL.md lists the entries of the maps."""

    TYPE: ClassVar[str] = "status_reply"
    instance: str = _wire(wire.matching(r"[0-9a-f]{16}"))
    bundle_id: str = _wire(wire.text(256))
    previous_bundle_id: str | None = _wire(wire.optional(wire.text(256)))
    canary_bundle_id: str | None = _wire(wire.optional(wire.text(256)))
    state: Literal["serving", "waiting", "draining"] = _wire(
        wire.one_of("serving", "waiting", "draining")
    )
    streams: tuple[dict[str, int | str | bool], ...] = _wire(wire.listing(wire.plain_map))
    counters: dict[str, int | str | bool] = _wire(wire.plain_map)
    waits_for: str | None = _wire(wire.optional(wire.text(MAX_ERROR_CHARACTERS)), None)
    provider: str | None = _wire(wire.optional(wire.text(64)), None)


@dataclass(frozen=True)
class DrainReply(Message):
    """The drain is complete: every accepted snippet is processed, and its events published."""

    TYPE: ClassVar[str] = "drain_reply"
