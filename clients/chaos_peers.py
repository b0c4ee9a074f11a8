"""The peers of `hrpro chaos`, each a process that may be killed at any instant.

    python -m hrpro.clients.chaos_peers {a _Feeding or a _Watching as JSON}

A feeder begins its streams anew, and the engine tells where to go on; a subscriber goes on behind
the last line of its own file.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.connection import Line, SharedConnection
from hrpro.clients.feed_talk import FeedTalk
from hrpro.clients.feeder import FeatureFeeder
from hrpro.clients.kept_snippets import KeptSnippets
from hrpro.clients.subscriber import EventSubscriber
from hrpro.engine.protocol import Hello
from hrpro.engine.timebase import SnippetClock

_CHUNK_SNIPPETS = 16
# How many of the chunks come twice, and how many after the one behind.
_TWICE, _LATE = 0.03, 0.03


@dataclass(frozen=True)
class Feeding:
    """Streams to be fed at ``snippets_per_s`` from the monotonic time ``began_s`` on.

    How many of them are accepted is kept in a file for each stream in ``folder``. A feeder that
    ``forgets`` keeps nothing of what it has sent.
    """

    address: str
    streams: tuple[str, ...]
    recording: str
    frames_per_s: float
    snippet_frames: int
    snippets: int
    snippets_per_s: float
    began_s: float
    folder: str
    forgets: bool
    seed: int


@dataclass(frozen=True)
class Watching:
    """All publications into a file, a line of JSON each."""

    address: str
    file: str


def command(peer: Feeding | Watching) -> list[str]:
    """How to start it."""
    said = json.dumps({type(peer).__name__: asdict(peer)})
    return [sys.executable, "-m", "hrpro.clients.chaos_peers", said]


def features_of(recording: NDArray[np.float32], stream: str, snippets: int) -> NDArray[np.float32]:
    """The features (snippets, D) of a stream: the recording, again and again, from some place."""
    start = random.Random(stream).randrange(len(recording))  # noqa: S311 - not a secret
    return recording[(start + np.arange(snippets)) % len(recording)]


class _RoughConnection(SharedConnection):
    """Some chunks leave twice, and some after the one behind."""

    def __init__(self, inner: Line, seed: str) -> None:
        self.__dict__.update(inner.__dict__)
        self._random = random.Random(seed)  # noqa: S311 - of faults, not of secrets
        self._late: list[bytes] | None = None

    def try_send(self, frames: list[bytes]) -> bool:
        chance, is_chunk = self._random.random(), len(frames) == 2
        if is_chunk and chance < _LATE and self._late is None:
            self._late = frames
            return True
        if not super().try_send(frames):
            return False
        if is_chunk and chance > 1 - _TWICE:
            super().try_send(frames)
        if self._late is not None and super().try_send(self._late):
            self._late = None
        return True


class _ForgetfulTalk(FeedTalk):
    def _forget(self) -> None:
        super()._forget()
        self.kept.forget(self.sent, self.sent)


class _RoughFeeder(FeatureFeeder):
    def __init__(self, feeding: Feeding, stream: str, feature_dim: int) -> None:
        clock = SnippetClock(feeding.frames_per_s, feeding.snippet_frames)
        self._forgets = feeding.forgets
        self._rough_seed = f"{feeding.seed} {stream}"
        super().__init__(feeding.address, stream, feature_dim, clock, timeout_s=None)

    def _new_line(self) -> Line:
        return _RoughConnection(super()._new_line(), self._rough_seed)

    def _new_talk(self, hello: Hello, kept: KeptSnippets) -> FeedTalk:
        return _ForgetfulTalk(hello, kept) if self._forgets else FeedTalk(hello, kept)


def _feed(feeding: Feeding, stream: str, features: NDArray[np.float32]) -> None:
    accepted = Path(feeding.folder) / f"{stream}.accepted"
    with _RoughFeeder(feeding, stream, features.shape[1]) as feeder:
        if feeding.forgets:  # not even after its own death
            assert feeder.welcome is not None
            feeder.skip(feeder.welcome.next_index)
        while (first := feeder.next_index) < len(features):
            due = int((time.monotonic() - feeding.began_s) * feeding.snippets_per_s)
            stop = min(due, len(features), first + _CHUNK_SNIPPETS)
            if first < stop:
                feeder.send(features[first:stop])
                accepted.write_text(str(feeder.next_index - feeder.lag), encoding="ascii")
            else:
                time.sleep(1 / feeding.snippets_per_s)
        feeder.end()
        accepted.write_text(str(len(features)), encoding="ascii")


def feed(feeding: Feeding) -> None:
    """Until all streams have ended."""
    recording = np.load(feeding.recording, allow_pickle=False)
    with ThreadPoolExecutor(len(feeding.streams)) as pool:
        for fed in [
            pool.submit(_feed, feeding, name, features_of(recording, name, feeding.snippets))
            for name in feeding.streams
        ]:
            fed.result()


def watch(watching: Watching) -> None:
    """Without an end."""
    file = os.open(watching.file, os.O_RDWR | os.O_CREAT)
    lines = Path(watching.file).read_bytes()
    whole = lines[: lines.rfind(b"\n") + 1]  # the last one may have been on its way
    os.truncate(file, len(whole))
    os.lseek(file, 0, os.SEEK_END)
    since = json.loads(whole.splitlines()[-1])["number"] if whole else 0
    with EventSubscriber(watching.address, since=since) as subscriber:
        for publication in subscriber:
            line = json.dumps({"type": publication.TYPE, **asdict(publication)})
            os.write(file, line.encode() + b"\n")


def main() -> None:
    """One peer, as it is told."""
    ((kind, values),) = json.loads(sys.argv[1]).items()
    if kind == Feeding.__name__:
        feed(Feeding(**{**values, "streams": tuple(values["streams"])}))
    else:
        watch(Watching(**values))


if __name__ == "__main__":
    main()
