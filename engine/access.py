"""Who may do what, and how often: the rules of keys and limits, without I/O.

A peer is known by what ZeroMQ says of its connection, never by what it says of itself: with keys by
the User-Id that the engine gave the connection when it let it in, without keys by the address that
it comes from. The routing id is the peer's own choice, and counts only together with the key.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

import zmq

from hrpro.engine.config import LimitsConfig
from hrpro.engine.keys import ClientRecord, Keyring
from hrpro.engine.messages import Chunk, End, Gap, Hello
from hrpro.engine.wire import StreamError

# Of one connection to events; and of all so many topics are remembered, to end them one by one.
MAX_SUBSCRIPTIONS = 10_000
MAX_TOPICS_IN_ALL = 200_000
# Accounts with a bucket that is not full; beyond it the ones that are full again are forgotten.
_BUCKETS = 1024
BURST_S = 10

_OF_STREAMS = (b"event/", b"final/", b"stream/", b"scores/")
_ID = rb"[A-Za-z0-9._:-]{1,64}"
_OWN_TOPIC = re.compile(rb"welcome/" + _ID + rb"/|mark/.*", re.DOTALL)
# Answers to one subscriber, about one stream or all.
_ANSWER = re.compile(
    rb"(?:replay/" + _ID + rb"/[^/]{1,128}|open/" + _ID + rb")/(" + _ID + rb"|\*)/"
)


def permitted_topics(key: ClientRecord, topic: bytes) -> tuple[bytes, ...]:
    """What a subscription to all topics that begin with `topic` comes to for this key.

    All of it for a key that may see all streams, otherwise as much as it may see:

    >>> from hrpro.engine.keys import ClientRecord
    >>> key = ClientRecord(name="a", role="subscriber", streams=("cam1", "door*"), public="0" * 40)
    >>> permitted_topics(key, b"event/")
    (b'event/cam1/', b'event/door')
    >>> permitted_topics(key, b"event/door7/Run/")
    (b'event/door7/Run/',)
    >>> permitted_topics(key, b"event/cam2/")
    ()
    """
    if key.role == "producer":
        return ()
    answer = _ANSWER.fullmatch(topic)
    if answer is not None:
        # What is about all streams is answered with those that the key may see.
        permitted = answer[1] == b"*" or key.may_see(answer[1].decode())
        return (topic,) if permitted else ()
    if key.sees_all or _OWN_TOPIC.fullmatch(topic):
        return (topic,)
    allowed = [kind + stream for kind in _OF_STREAMS for stream in _stream_prefixes(key.streams)]
    allowed.append(b"mark/")
    # Of two prefixes one holds the other, or they have nothing in common.
    return tuple(
        topic if topic.startswith(each) else each
        for each in allowed
        if topic.startswith(each) or each.startswith(topic)
    )


def _stream_prefixes(patterns: Collection[str]) -> list[bytes]:
    """The slash ends an id: without it, `cam1` would be the beginning of `cam10`."""
    return [(each[:-1] if each.endswith("*") else f"{each}/").encode() for each in patterns]


# ---- peers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """The other end of a message on feed or control.

    Two are equal if they have the same routing id and the same key: a connection with another key
    that takes a routing id over is another peer. An address may change, as a laptop's does.
    """

    routing_id: bytes
    key: str = ""  # public; empty where there are no keys
    address: str = field(default="", compare=False)
    record: ClientRecord | None = field(default=None, compare=False)

    @property
    def account(self) -> str:
        """What limits are counted by."""
        return self.key or self.address

    def __str__(self) -> str:
        if self.record is not None:
            return f"key {self.record.name!r}"
        return f"key {self.key}, which is revoked" if self.key else f"address {self.address}"


class Frame(Protocol):
    """The first frame of a message, with what ZeroMQ knows of the connection (zmq.Frame)."""

    @property
    def bytes(self) -> bytes:
        """Its content."""
        ...

    def get(self, option: str) -> object:
        """Metadata of the message."""
        ...


def user_id(connection: int, public: str) -> str:
    """What the engine calls a connection that it has let in: unlike any other, and of which key."""
    return f"{connection} {public}"


@functools.lru_cache(1024)
def _peer(routing_id: bytes, address: str) -> Peer:
    """One without a key; the same object for message after message."""
    return Peer(routing_id, "", address)


def _said(frame: Frame, name: str) -> str:
    """Metadata of a message; empty where there is none."""
    try:
        return str(frame.get(name))
    except zmq.ZMQError:
        return ""


# ---- subscriptions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """What of a subscription or its end is to be done for the connection that it came from.

    There are ``more`` subscriptions to the topic by it, refused ones among them: 1, -1 or 0.
    """

    peer: str
    topic: bytes
    more: int
    add: Collection[bytes] = ()
    remove: Collection[bytes] = ()
    refused: bool = False
    sees: Callable[[str], bool] | None = None  # of which streams, if not of all


class Subscriptions:
    """What each connection has subscribed to, as it asked for it and as it got it.

    ZeroMQ keeps a set of topics for each connection, in which what two subscriptions have in common
    is there once: it must stay until the last of them ends.
    """

    def __init__(self) -> None:
        self._of: OrderedDict[str, dict[bytes, tuple[bytes, ...]]] = OrderedDict()
        self._counts: dict[str, Counter[bytes]] = {}
        self._topics = 0

    def add(self, connection: str, topic: bytes, permitted: tuple[bytes, ...]) -> bool:
        """Notes a subscription; False for one too many."""
        asked = self._of.setdefault(connection, {})
        self._of.move_to_end(connection)
        if topic in asked:
            return True
        if len(asked) >= MAX_SUBSCRIPTIONS:
            return False
        asked[topic] = permitted
        self._counts.setdefault(connection, Counter()).update(permitted)
        self._topics += len(permitted)
        while self._topics > MAX_TOPICS_IN_ALL:
            oldest, _ = self._of.popitem(last=False)
            self._topics -= sum(self._counts.pop(oldest).values())
        return True

    def remove(self, connection: str, topic: bytes) -> list[bytes]:
        """What ends with this subscription."""
        permitted = self._of.get(connection, {}).pop(topic, ())
        counts = self._counts.get(connection, Counter())
        counts.subtract(permitted)
        self._topics -= len(permitted)
        ended = [each for each in permitted if counts[each] == 0]
        for each in ended:
            del counts[each]
        return ended


# ---- rates ---------------------------------------------------------------------------------------


class Buckets:
    """So many a second of each account, and at first so many at once (token buckets)."""

    def __init__(self, per_s: float, burst: float, now_s: Callable[[], float]) -> None:
        self._per_s = per_s
        self._burst = burst
        self._now_s = now_s
        self._left: dict[str, tuple[float, float]] = {}  # how many, at what time

    def take(self, account: str) -> bool:
        """Whether there is one left; it is taken."""
        now_s = self._now_s()
        left = self._at(account, now_s)
        self._left[account] = (left - 1 if left >= 1 else left, now_s)
        if len(self._left) > _BUCKETS:
            full = [each for each in self._left if self._at(each, now_s) >= self._burst]
            for each in full:
                del self._left[each]
        return left >= 1

    def _at(self, account: str, now_s: float) -> float:
        left, since_s = self._left.get(account, (self._burst, now_s))
        return min(self._burst, left + (now_s - since_s) * self._per_s)


# ---- all of it -----------------------------------------------------------------------------------


class Misuse(Exception):
    """What no subscriber sends came on events; the argument is the peer."""


class Access:
    """Decides on what comes; without ``keyring`` by the limits alone."""

    def __init__(
        self,
        keyring: Keyring | None,
        limits: LimitsConfig,
        max_streams: int,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keyring = keyring
        self.subscriptions = Subscriptions()
        self._asked: dict[bytes, str] = {}  # the topics of answers, and the keys that they are for
        # Without keys all peers of a host have one account, and often there is but one host.
        default = math.inf if keyring is None else max(1, max_streams // 2)
        self._streams_per_key = limits.streams_per_key or default
        # All streams may come back at once, after a restart.
        hellos = max(BURST_S * limits.hellos_per_s, 2 * max_streams)
        self._hellos = Buckets(limits.hellos_per_s, hellos, now_s)
        requests_per_s = limits.control_requests_per_s
        self._requests = Buckets(requests_per_s, BURST_S * requests_per_s, now_s)

    def peer(self, first: Frame) -> Peer:
        """Who sent the message whose first frame, the routing id, this is."""
        if self.keyring is None:
            return _peer(first.bytes, _said(first, "Peer-Address") or "local")
        public = _said(first, "User-Id").partition(" ")[2]
        return Peer(first.bytes, public or "none", "", self.keyring.clients.get(public))

    def check_known(self, peer: Peer) -> None:
        """Raises StreamError for a key that was revoked after its connection was let in."""
        if self.keyring is not None and peer.record is None:
            raise StreamError("not_permitted", f"expected a key that is known here, came {peer}")

    def check_feed(
        self,
        peer: Peer,
        message: Hello | Chunk | Gap | End,
        streams_of: Callable[[str], Collection[str]],
    ) -> None:
        """Raises StreamError for what a feeder may not do; `streams_of` an account are open."""
        if peer.record is not None and not peer.record.may_feed(message.stream):
            raise StreamError(
                "not_permitted",
                f"stream {message.stream!r}: expected the key of a producer of this stream, came "
                f"{peer}, of a {peer.record.role}",
            )
        if isinstance(message, Hello):
            self._check_hello(peer, message.stream, streams_of(peer.account))

    def _check_hello(self, peer: Peer, stream: str, own: Collection[str]) -> None:
        if not self._hellos.take(peer.account):
            raise StreamError(
                "too_fast", f"stream {stream!r}: too many Hellos from {peer} (limits.hellos_per_s)"
            )
        if stream not in own and len(own) >= self._streams_per_key:
            raise StreamError(
                "too_many_streams",
                f"stream {stream!r}: {len(own)} streams of {peer} are open, which is the most that "
                "limits.streams_per_key allows",
            )

    def check_control(self, peer: Peer) -> None:
        """Raises StreamError for a request that may not be made, or not now."""
        self.check_known(peer)
        if peer.record is not None and peer.record.role != "operator":
            raise StreamError(
                "not_permitted",
                f"expected the key of an operator, came {peer}, of a {peer.record.role}",
            )
        if not self._requests.take(peer.account):
            raise StreamError(
                "too_fast", f"too many requests from {peer} (limits.control_requests_per_s)"
            )

    def subscription(self, first: Frame) -> Change:
        """What to do about a message on events; without keys ZeroMQ has done it.

        Raises Misuse for one that no subscriber sends, and bans the key.
        """
        content = first.bytes
        if self.keyring is None:
            return Change("", content[1:], {b"\1": 1, b"\0": -1}.get(content[:1], 0))
        connection = _said(first, "User-Id")
        public = connection.partition(" ")[2]
        record = self.keyring.clients.get(public)
        peer = str(Peer(b"", public, "", record))
        if content[:1] not in (b"\0", b"\1"):
            self.keyring.ban(public)
            raise Misuse(peer)
        topic = content[1:]
        if content[:1] == b"\0":
            if not connection:  # it is gone, and ZeroMQ has ended all of it
                return Change(peer, topic, -1)
            remove = self.subscriptions.remove(connection, topic)
            return Change(peer, topic, -1 if remove else 0, remove=remove)
        permitted = permitted_topics(record, topic) if record is not None else ()
        if (
            self._asked_by_another(topic, public)
            or not permitted
            or not self.subscriptions.add(connection, topic, permitted)
        ):
            return Change(peer, topic, 1, refused=True)
        sees = None if record is None or record.sees_all else record.may_see
        return Change(peer, topic, 1, add=permitted, sees=sees)

    def _asked_by_another(self, topic: bytes, public: str) -> bool:
        """Whether an answer on this topic is for another key, which may see more.

        Tokens are random: an honest subscriber never comes upon another's.
        """
        if not _ANSWER.fullmatch(topic):
            return False
        holder = self._asked.setdefault(topic, public)
        if len(self._asked) > MAX_SUBSCRIPTIONS:
            self._asked.pop(next(iter(self._asked)))
        return holder != public
