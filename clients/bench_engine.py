"""The engine end to end beside bare inference, and what it adds to the time of inference.

The engine and its feeder are processes of their own; this one subscribes. All times are of the
monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.bench_bundle import BenchError
from hrpro.clients.bench_engine_process import Calls, bench_engine, read_calls
from hrpro.clients.bench_feeder import Fed, Feed, FeederProcess, feeder_process
from hrpro.clients.subscriber import EventSubscriber
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.bare import new_bare
from hrpro.engine.config import EngineConfig
from hrpro.engine.incremental import most_in_a_call, runs_by_steps
from hrpro.engine.messages import Publication, StreamNotice
from hrpro.engine.wire import NoReplyError
from hrpro.export.bundle import Bundle

_SILENCE_S = 120.0


@dataclass(frozen=True)
class Workload:
    """How an engine is fed: in rounds, in each of which every stream goes on by so many snippets.

    ``snippets`` is a multiple of the hop. ``paced_snippets`` are those of each stream at half load.
    """

    streams: int
    snippets: int
    rounds: int
    paced_snippets: int


@dataclass(frozen=True)
class Published:
    """A message and when the subscriber had it."""

    message: Publication
    came_s: float


class _Listener:
    """Notes all messages in a thread of its own, with the time at which they came."""

    def __init__(self, subscriber: EventSubscriber) -> None:
        self.published: list[Published] = []
        self._subscriber = subscriber
        self._ended: set[str] = set()
        self._came = threading.Condition()
        self._stop = False
        self._thread = threading.Thread(target=self._listen, name="listener")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()

    def wait_ended(self, streams: Collection[str]) -> None:
        """Returns when all that came of streams has arrived. Raises NoReplyError."""
        with self._came:
            if not self._came.wait_for(lambda: self._ended.issuperset(streams), _SILENCE_S):
                raise NoReplyError(f"expected the ends of streams within {_SILENCE_S:.0f} s")

    def _listen(self) -> None:
        while not self._stop:
            message = self._subscriber.receive(timeout_s=0.1)
            if message is None:
                continue
            self.published.append(Published(message, time.monotonic()))
            if isinstance(message, StreamNotice) and message.kind == "ended":
                with self._came:
                    self._ended.add(message.stream)
                    self._came.notify()


def measure(
    bundle: Bundle, config: EngineConfig, recording: Path, workload: Workload
) -> dict[str, Any]:
    """Throughput beside bare inference, in turn, and then the added latency at half load.

    ``recording`` is a .npy file of features (n, D) that the streams are made of.
    """
    with tempfile.NamedTemporaryFile() as file:
        figures, fed, published = _run(bundle, config, recording, workload, Path(file.name))
        calls = read_calls(Path(file.name))
    added, whole = added_latency_ms(fed, published, calls)
    return {
        **figures,
        "added_latency_ms": _percentiles(added),
        "whole_latency_ms": _percentiles(whole),
        "half_load_snippets_per_s": figures["engine_snippets_per_s"] / 2,
        "messages_at_half_load": len(added),
    }


def _run(
    bundle: Bundle, config: EngineConfig, recording: Path, workload: Workload, calls: Path
) -> tuple[dict[str, Any], Fed, list[Published]]:
    """The figures of the throughput; what was fed at half load, and what came of that."""
    with (
        bench_engine(bundle.folder, config, calls) as engine,
        EventSubscriber(engine.addresses.events) as subscriber,
        feeder_process(engine.addresses.feed, recording, bundle.manifest.clock) as feeder,
    ):
        subscriber.wait_connected()
        bare = _Bare(bundle, config, workload)
        with _Listener(subscriber) as listener:
            figures = _throughput(feeder, bare, workload, config, engine.pid)
            figures["messages_per_snippet"] = len(listener.published) / figures["snippets"]
            listener.published.clear()
            half = figures["engine_snippets_per_s"] / 2
            waited_s = -waiting_seconds(engine.pid)
            fed = feeder.feed(
                Feed("paced", workload.streams, workload.paced_snippets, snippets_per_s=half)
            )
            waited_s += waiting_seconds(engine.pid)
            # Other programs' part in the latency: more than some hundredths, and it is theirs.
            figures["waited_for_processor_share"] = waited_s / (fed.ended_s - fed.began_s)
            listener.wait_ended(fed.sent_s.keys())
            return figures, fed, listener.published


def _throughput(
    feeder: FeederProcess, bare: _Bare, workload: Workload, config: EngineConfig, pid: int
) -> dict[str, Any]:
    chunk = min(config.window.hop_snippets, config.max_chunk_snippets)
    round_ = Feed("cam", workload.streams, workload.snippets, chunk, end=False)
    feeder.feed(round_)  # streams are opened, and have a past
    bare.run()
    spent_s: dict[str, list[float]] = {"engine": [], "bare": []}
    cpu_s = {"engine": 0.0, "bare": 0.0}
    for n in range(workload.rounds):
        # The other way round every other time: what gets busier or quieter meets both.
        for side in ("engine", "bare")[:: 1 if n % 2 else -1]:
            cpu_s[side] -= cpu_seconds(pid if side == "engine" else os.getpid())
            if side == "bare":
                spent_s[side].append(bare.run())
            else:
                fed = feeder.feed(round_)
                spent_s[side].append(fed.ended_s - fed.began_s)
            cpu_s[side] += cpu_seconds(pid if side == "engine" else os.getpid())
    snippets = workload.rounds * workload.streams * workload.snippets
    engine_s, bare_s = np.array(spent_s["engine"]), np.array(spent_s["bare"])
    return {
        "engine_snippets_per_s": snippets / engine_s.sum(),
        "bare_snippets_per_s": snippets / bare_s.sum(),
        "ratio": bare_s.sum() / engine_s.sum(),
        "ratio_of_rounds": (bare_s / engine_s).tolist(),
        # What other programs take of the machine is not in it.
        "ratio_of_cpu_time": cpu_s["bare"] / cpu_s["engine"],
        "snippets": snippets,
    }


def cpu_seconds(pid: int) -> float:
    """What a process has had of the processors. Raises BenchError where there is no such clock."""
    try:
        # The clock of clock_getcpuclockid(3). /proc counts in ticks of 10 ms, too few for a round.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError as error:
        raise BenchError(
            f"process {pid}: expected its clock, which Linux alone has, came {error}"
        ) from None


def waiting_seconds(pid: int) -> float:
    """How long a process has been ready to run without a processor; NaN where nobody counts it."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return float("nan")


class _Bare:
    """Stage 1 in this process as the engine computes it, with nothing around it."""

    def __init__(self, bundle: Bundle, config: EngineConfig, workload: Workload) -> None:
        limit = most_in_a_call(bundle.manifest, config)
        streams, turns = workload.streams, workload.snippets // config.window.hop_snippets
        # Windows do not depend on each other; in a step a stream is at most once.
        by_steps = runs_by_steps(bundle.manifest, config)
        hops = [streams] * turns if by_steps else [streams * turns]
        self._calls = [min(limit, each - done) for each in hops for done in range(0, each, limit)]
        backend = OnnxRuntimeBackend(bundle, config)
        self._bare = new_bare(bundle.manifest, backend, config, max(self._calls))

    def run(self) -> float:
        """Seconds for the hops of a round, in batches as full as they can be."""
        began_s = time.monotonic()
        for streams in self._calls:
            self._bare.run(streams)
        return time.monotonic() - began_s


def added_latency_ms(
    fed: Fed, published: list[Published], calls: Calls
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each message: what the engine has added to inference, and all of its latency.

    All of it is from the sending of the last snippet that the message was decided from to the
    message on the subscriber's socket. Time in which the engine computed, be it for other streams,
    is inference; what remains is added. Messages that waited for the end of a stream are left out.
    """
    both = np.concatenate([calls.snippet_stage, calls.instance_stage])
    busy = both[np.argsort(both[:, 0])]
    added, whole = [], []
    for each in published:
        message = each.message
        # Of streams that were fed before, something may still come.
        if isinstance(message, StreamNotice) or message.stream not in fed.sent_s:
            continue
        sent_s = fed.sent_s[message.stream]
        if message.published_index >= len(sent_s) - 1:
            continue
        from_s = sent_s[message.published_index]
        first, last = np.searchsorted(busy[:, 1], from_s), np.searchsorted(busy[:, 0], each.came_s)
        overlap = np.minimum(busy[first:last, 1], each.came_s)
        overlap -= np.maximum(busy[first:last, 0], from_s)
        whole.append(each.came_s - from_s)
        added.append(whole[-1] - overlap.sum())
    return 1000 * np.array(added), 1000 * np.array(whole)


def _percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    if not len(values):
        return {"p50": float("nan"), "p99": float("nan")}
    return {f"p{percent}": float(np.percentile(values, percent)) for percent in (50, 99)}
