"""What a stream costs in memory, and whether memory grows with what has gone through an engine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.bench_bundle import BenchError
from hrpro.clients.bench_engine_process import bench_engine
from hrpro.clients.bench_feeder import Feed, FeederProcess, feeder_process
from hrpro.engine.config import EngineConfig, WindowConfig
from hrpro.engine.windows import plan_windows
from hrpro.export.bundle import Bundle

# Of the samples so many are taken before the engine has everything that it keeps.
_WARM_UP_SHARE = 0.2
# Streams that are there before memory is measured: they bring what all streams share.
_FIRST_STREAMS = 8
_CHUNK_SNIPPETS = 64


def resident_bytes(pid: int) -> int:
    """Memory of a process that is really there. Raises BenchError where there is no /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError as error:
        raise BenchError(f"memory can be measured on Linux alone: {error}") from None
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def available_bytes() -> int:
    """Memory that a process could take. Raises BenchError where there is no /proc."""
    try:
        info = Path("/proc/meminfo").read_text()
    except OSError as error:
        raise BenchError(f"memory can be measured on Linux alone: {error}") from None
    return int(info.split("MemAvailable:")[1].split()[0]) * 1024


# ---- idle streams --------------------------------------------------------------------------------


def idle_streams(
    bundle: Bundle, config: EngineConfig, recording: Path, streams: int, stream_bytes: int
) -> dict[str, Any]:
    """Fill the rings of streams, so that all their pages are there, and let them be idle.

    Windows are computed by a stand-in that says that nothing happens: what is measured is what
    streams hold, not what a model needs. No more streams are opened than half of the memory holds;
    ``stream_bytes`` is what one should cost.
    """
    streams = min(streams, int(available_bytes() / 2 / (1.3 * stream_bytes)))
    if streams <= _FIRST_STREAMS:
        raise BenchError(f"too little memory: a stream needs {stream_bytes / 1e6:.1f} MB")
    plan = plan_windows(bundle.manifest, config)
    # As few windows as fill the rings; how long they are is what counts.
    hop = plan.window - bundle.manifest.context_snippets - bundle.manifest.lookahead_snippets
    windows = WindowConfig(window_snippets=plan.window, hop_snippets=hop)
    config = config.model_copy(update={"window": windows, "lookahead_s": "strict"})
    snippets = config.localization.history_snippets + config.backlog_snippets + plan.window
    with (
        tempfile.NamedTemporaryFile() as calls,
        bench_engine(bundle.folder, config, Path(calls.name), stand_in=True) as engine,
        feeder_process(engine.addresses.feed, recording, bundle.manifest.clock) as feeder,
    ):
        feeder.feed(Feed("first", _FIRST_STREAMS, snippets, _CHUNK_SNIPPETS, end=False))
        before = resident_bytes(engine.pid)
        others = streams - _FIRST_STREAMS
        feeder.feed(Feed("idle", others, snippets, _CHUNK_SNIPPETS, end=False))
        each = (resident_bytes(engine.pid) - before) / others
    return {
        "rss_bytes_per_stream": each,
        "told_bytes_per_stream": stream_bytes,
        "rss_ratio": each / stream_bytes,
        "idle_streams": streams,
    }


# ---- growth --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Growth:
    """Memory over what has gone through: samples of (snippets, bytes), in order."""

    snippets: NDArray[np.float64]
    rss_bytes: NDArray[np.float64]

    @property
    def slope_bytes_per_million(self) -> float:
        """Of the samples after the warm-up."""
        skipped = int(len(self.snippets) * _WARM_UP_SHARE)
        return 1e6 * median_slope(self.snippets[skipped:], self.rss_bytes[skipped:])


def median_slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The median of the slopes between all pairs of points (Theil and Sen's estimator): single
    steps, which an allocator makes, do not bend it."""
    first, second = np.triu_indices(len(x), k=1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def measure_growth(
    bundle: Bundle,
    config: EngineConfig,
    recording: Path,
    snippets: int,
    streams: int,
    samples: int = 100,
    leak_bytes: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Growth:
    """Feed so many snippets as fast as they go, and look at the engine's memory on the way.

    Most come from streams that go on; at each sample, one in eight comes from streams that begin
    and end. ``leak_bytes`` are lost for each stream in a step, or for each window, as a control.
    """
    guests = max(1, streams // 8)
    each = max(_CHUNK_SNIPPETS, round(snippets / samples / (streams + guests)))
    points: list[tuple[int, int]] = []
    fed = 0
    with (
        tempfile.NamedTemporaryFile() as calls,
        bench_engine(bundle.folder, config, Path(calls.name), leak_bytes=leak_bytes) as engine,
        feeder_process(engine.addresses.feed, recording, bundle.manifest.clock) as feeder,
    ):
        while fed < snippets:
            feed_once(feeder, streams, guests, each)
            fed += each * (streams + guests)
            points.append((fed, resident_bytes(engine.pid)))
            progress(each * (streams + guests))
    x, y = np.array(points, dtype=np.float64).T
    return Growth(x, y)


def feed_once(feeder: FeederProcess, streams: int, guests: int, snippets: int) -> None:
    """So many further snippets of each stream that goes on, and of each that begins and ends."""
    feeder.feed(Feed("cam", streams, snippets, _CHUNK_SNIPPETS, end=False))
    feeder.feed(Feed("guest", guests, snippets, _CHUNK_SNIPPETS))
