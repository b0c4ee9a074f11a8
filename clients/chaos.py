"""What an engine promises, held against processes that are killed and lines that are cut.

    feeders --line--> engine, with its log --line--> subscriber, with its file
       |                                                 |
       +--- what an undisturbed pipeline publishes ------+--> the ledger

All peers are processes of their own. While streams go on at their pace, now one and now another of
them is killed, stopped, or cut off; the engine is started again on the same addresses and log. At
the end, when all streams have ended, the subscriber's file is compared with what a pipeline in this
process publishes of the same features.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.chaos_link import Link
from hrpro.clients.chaos_peers import Feeding, Watching, command, features_of
from hrpro.clients.engine_process import EngineFailedError
from hrpro.engine.config import EngineConfig
from hrpro.engine.event_reader import FILE, LogError, reading
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.protocol import Publication
from hrpro.engine.serve import new_deployment
from hrpro.export.bundle import Bundle

_STREAMS_A_FEEDER = 4
_READY_S = 60.0  # for an engine to start
_REST_S = 120.0  # for what is left, once nothing is disturbed any more
_TOLERANCE = 1e-4  # of scores and times, which differ by the rounding of other batches

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChaosPlan:
    """``minutes`` of ``streams`` at ``snippets_per_s`` each; ``forgets`` is the control, whose
    feeders keep nothing that is not acknowledged."""

    minutes: float = 1.0
    seed: int = 0
    streams: int = 8
    snippets_per_s: float = 10.0
    forgets: bool = False

    @property
    def snippets(self) -> int:
        """Of each stream."""
        return max(1, round(60 * self.minutes * self.snippets_per_s))


@dataclass
class _Toll:
    """What was done to whom."""

    kills: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    recovery_s: list[float] = field(default_factory=list)


def run_chaos(
    bundle: Bundle,
    config: EngineConfig,
    recording: Path,
    plan: ChaosPlan,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The ledger of a run, see `ledger`; logs and files of it stay in ``folder``.

    Raises EngineFailedError where the engine does not start, or what is left does not come.
    """
    names = tuple(f"cam{n}" for n in range(plan.streams))
    features = np.load(recording, allow_pickle=False)
    expected = expected_of(bundle, config, features, names, plan.snippets)
    progress(f"{len(expected)} publications of {plan.streams} streams are expected")
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(_Engine(bundle, config, folder))
        toll = _Toll()
        links = [stack.enter_context(Link(each)) for each in (engine.feed, engine.events)]
        watching = Watching(links[1].address, str(folder / "received.jsonl"))
        subscriber = stack.enter_context(_Peer(command(watching), folder / "subscriber.log"))
        rate = bundle.manifest.frames_per_s, bundle.manifest.snippet_frames
        feeders = []
        for n in range(0, plan.streams, _STREAMS_A_FEEDER):
            feeding = Feeding(
                links[0].address,
                names[n : n + _STREAMS_A_FEEDER],
                str(recording),
                *rate,
                plan.snippets,
                plan.snippets_per_s,
                time.monotonic(),
                str(folder),
                plan.forgets,
                plan.seed,
            )
            peer = _Peer(command(feeding), folder / f"feeder{n}.log")
            feeders.append(stack.enter_context(peer))
        _disturb(plan, engine, feeders, subscriber, links, toll, progress)
        received = _received_all(folder, feeders)
        published = engine.newest
    sent = plan.streams * plan.snippets
    accepted = sum(int((folder / f"{name}.accepted").read_text()) for name in names)
    kills = sum(toll.kills.values())
    spans = toll.recovery_s or [float("nan")]
    return {
        "sent": sent,
        "acknowledged": accepted,
        "published": published,
        "received": len(received),
        **ledger([_plain(each) for each in expected], received),
        "kills": kills,
        "recovery_s": {
            "p50": float(np.percentile(spans, 50)),
            "p99": float(np.percentile(spans, 99)),
        },
        "killed": dict(toll.kills),
        "disturbed": dict(toll.others),
    }


def expected_of(
    bundle: Bundle,
    config: EngineConfig,
    recording: NDArray[np.float32],
    names: Sequence[str],
    snippets: int,
) -> list[Publication]:
    """What comes of the streams where nothing disturbs them."""
    pipeline = Pipeline(new_deployment(bundle, config))
    published: list[Publication] = []
    for name in names:
        stream, features = pipeline.open(name, 0), features_of(recording, name, snippets)
        while (at := stream.next_index) < snippets:
            pipeline.append(name, at, features[at : min(stream.send_until, snippets)])
            published += _all_of(pipeline)
        pipeline.end(name, snippets)
        published += _all_of(pipeline)
    return published


def _all_of(pipeline: Pipeline) -> Iterator[Publication]:
    while pipeline.streams and (due_s := pipeline.due_in_s()) is not None:
        time.sleep(due_s)
        yield from pipeline.step()


def ledger(expected: Lines, received: Lines) -> dict[str, int]:
    """How many publications are lost, came more than once, came and were not expected, and came
    otherwise than expected; the key is the number in the session of a stream."""
    due = {_key(each): each for each in expected}
    came: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    duplicated = 0
    for each in received:
        duplicated += _key(each) in came
        came.setdefault(_key(each), each)
    both = due.keys() & came.keys()
    return {
        "lost": len(due.keys() - came.keys()),
        "duplicated": duplicated,
        "unexpected": len(came.keys() - due.keys()),
        "changed": sum(not _same(due[key], came[key]) for key in both),
    }


def _key(publication: Mapping[str, Any]) -> tuple[Any, ...]:
    return publication["stream"], publication["session"], publication["sequence"]


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Equal, but for their number in the log; numbers with a fraction but for rounding."""
    for name in one.keys() - {"number", "previous"}:
        a, b = one[name], other.get(name)
        if isinstance(a, float) and isinstance(b, float):
            if abs(a - b) > _TOLERANCE:
                return False
        elif a != b:
            return False
    return True


def _plain(publication: Publication) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(
        json.dumps({"type": publication.TYPE, **asdict(publication)})
    )
    return plain


# ---- processes -----------------------------------------------------------------------------------


class _Peer:
    """A process that is started again after each kill; ``done`` when it has left by itself."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._arguments = list(arguments)
        self._log = log
        self._start()

    def _start(self) -> None:
        with self._log.open("a") as log:
            self.process = subprocess.Popen(  # noqa: S603 - this very interpreter
                self._arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def done(self) -> bool:
        status = self.process.poll()
        if status not in (None, 0):
            raise EngineFailedError(f"a peer left by itself: {self._log.read_text()[-2000:]}")
        return status == 0

    def kill(self) -> bool:
        """SIGKILL, and a new one; False where it has left before."""
        if self.done:
            return False
        self.process.kill()
        self.process.wait()
        self._start()
        return True

    def stop(self, seconds: float) -> bool:
        """SIGSTOP for so long."""
        if self.done:
            return False
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


class _Engine(_Peer):
    """The engine: always the same addresses and log."""

    def __init__(self, bundle: Bundle, config: EngineConfig, folder: Path) -> None:
        self._state = folder / "state"
        ports = [_free_port() for _ in range(3)]
        self.feed, self.events, self.control = (f"tcp://127.0.0.1:{port}" for port in ports)
        arguments = [sys.executable, "-m", "hrpro.clients.cli", "serve", str(bundle.folder)]
        arguments += ["--feed", self.feed, "--events", self.events, "--control", self.control]
        arguments += ["--state", str(self._state)]
        for name, value in config.model_dump(mode="json").items():
            arguments += ["--set", f"{name}={json.dumps(value)}"]
        super().__init__(arguments, folder / "engine.log")
        self._wait((self._state / FILE).exists)

    @property
    def newest(self) -> int:
        """The number that was given last."""
        with reading(self._state) as log:
            return log.newest

    def kill(self) -> bool:
        """SIGKILL, and a new one on the same log."""
        self.process.kill()
        self.process.wait()
        self._start()
        return True

    def recovered_in(self, newest: int, since_s: float) -> float:
        """How long it took until something was published again; NaN where nothing was."""
        while time.monotonic() < since_s + _READY_S:
            with contextlib.suppress(LogError):
                if self.newest > newest:
                    return time.monotonic() - since_s
            time.sleep(0.02)
        return float("nan")

    def _wait(self, there: Callable[[], bool]) -> None:
        until_s = time.monotonic() + _READY_S
        while not there():
            if self.process.poll() is not None or time.monotonic() > until_s:
                raise EngineFailedError(f"did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.05)


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


# ---- what happens to them ------------------------------------------------------------------------


def _disturb(
    plan: ChaosPlan,
    engine: _Engine,
    feeders: Sequence[_Peer],
    subscriber: _Peer,
    links: Sequence[Link],
    toll: _Toll,
    progress: Callable[[str], None],
) -> None:
    """One thing after the other, until the time is over or all streams have ended."""
    chance = random.Random(plan.seed)  # noqa: S311 - of faults, not of secrets
    until_s = time.monotonic() + 60 * plan.minutes
    watches: list[threading.Thread] = []

    def kill_engine() -> bool:
        newest, since_s = engine.newest, time.monotonic()
        engine.kill()
        kills = toll.kills["engine"]

        def watch() -> None:
            took_s = engine.recovered_in(newest, since_s)
            if toll.kills["engine"] == kills + 1 and took_s == took_s:  # not killed again since
                toll.recovery_s.append(took_s)

        watches.append(threading.Thread(target=watch, daemon=True))
        watches[-1].start()
        return True

    def done(act: Callable[..., None], *values: float) -> bool:
        act(*values)
        return True

    kills = {
        "engine": kill_engine,
        "feeder": lambda: chance.choice(feeders).kill(),
        "subscriber": subscriber.kill,
    }
    others = {
        "stopped engine": lambda: engine.stop(chance.uniform(0.1, 1.0)),
        "stopped feeder": lambda: chance.choice(feeders).stop(chance.uniform(0.1, 1.0)),
        "stopped subscriber": lambda: subscriber.stop(chance.uniform(0.1, 1.0)),
        "cut line": lambda: done(chance.choice(links).cut),
        "cut message": lambda: done(chance.choice(links).cut_within),
        "slow line": lambda: done(chance.choice(links).slow, chance.uniform(0.2, 1.5)),
        "silent line": lambda: done(chance.choice(links).hold, chance.uniform(0.2, 1.5)),
        "lost line": lambda: done(chance.choice(links).lose),
    }
    while time.monotonic() < until_s and not all(feeder.done for feeder in feeders):
        time.sleep(chance.uniform(0.05, 0.8))
        acts, tally = (kills, toll.kills) if chance.random() < 0.7 else (others, toll.others)
        name = chance.choice(list(acts))
        if acts[name]():
            tally[name] += 1
            progress(f"{sum(toll.kills.values())} kills; {name}")
    for thread in watches:
        thread.join(_READY_S)


def _received_all(folder: Path, feeders: Sequence[_Peer]) -> list[dict[str, Any]]:
    """What the subscriber has, once all streams have ended and it has what the log has."""
    until_s = time.monotonic() + _REST_S
    while not all(feeder.done for feeder in feeders):
        if time.monotonic() > until_s:
            raise EngineFailedError(f"streams did not end within {_REST_S:.0f} s; see {folder}")
        time.sleep(0.1)
    with reading(folder / "state") as log:
        newest = log.newest
    while True:
        received = _lines(folder / "received.jsonl")
        if received and received[-1]["number"] == newest:
            return received
        if time.monotonic() > until_s:
            return received
        time.sleep(0.1)


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
