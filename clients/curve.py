"""Streaming accuracy against look-ahead and hop, with what each point costs.

Each point is a run of the recordings through the engine's own pipeline, in this process: what it
publishes is what an engine publishes over its sockets, and its time is not mixed with theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.table import Table

from hrpro.clients.stream_eval import delay_percentiles, offline_segments, published_segments
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.config import EngineConfig, WindowConfig
from hrpro.engine.deployment import Deployment
from hrpro.engine.inference import Backend
from hrpro.engine.messages import FinalProposal, Publication
from hrpro.engine.noted import NotedBackend
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.settings import SettingsError
from hrpro.engine.windows import decision_lookahead_s, least_lookahead
from hrpro.export.bundle import Bundle
from hrpro.training.data import DataSet
from hrpro.training.metrics import GroundTruth

Lookahead = float | Literal["strict", "infinite"]
Floats = NDArray[np.float32]

LOOKAHEADS: tuple[Lookahead, ...] = ("strict", 0.64, 1.3, 2.6, 5.0, 10.0, "infinite")
HOPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Cost:
    """Milliseconds for each snippet, in the run that was measured."""

    inference_ms: float
    total_ms: float


@dataclass(frozen=True)
class Point:
    """One run. ``lookahead_s`` is what the engine derived, None for the whole recording.

    What is below ``least_s``, the least look-ahead of model and hop, has no figures: they are None.
    So are those of a hop that the configured window is too short for.
    """

    hop_snippets: int
    lookahead: Lookahead
    lookahead_s: float | None
    least_s: float
    average_map: float | None = None
    delay_s: Mapping[str, float] | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class Curve:
    """The points of a bundle on a test split, and what the same bundle gives offline."""

    offline_average_map: float
    snippets: int
    points: tuple[Point, ...]

    def figures(self) -> dict[str, object]:
        """As `hrpro stream-eval --curve --json` prints it."""
        return {
            "offline_average_map": self.offline_average_map,
            "snippets": self.snippets,
            "points": [self._figures(point) for point in self.points],
        }

    def retention(self, point: Point) -> float | None:
        """Streaming over offline average mAP."""
        if point.average_map is None or not self.offline_average_map:
            return None
        return point.average_map / self.offline_average_map

    def _figures(self, point: Point) -> dict[str, object]:
        cost = point.cost
        return {
            "hop_snippets": point.hop_snippets,
            "lookahead": point.lookahead,
            "lookahead_s": point.lookahead_s,
            "least_lookahead_s": point.least_s,
            "streaming_average_map": point.average_map,
            "retention": self.retention(point),
            "publish_delay_s": point.delay_s,
            "inference_ms_per_snippet": None if cost is None else cost.inference_ms,
            "total_ms_per_snippet": None if cost is None else cost.total_ms,
        }


def measure_curve(
    bundle: Bundle,
    config: EngineConfig,
    data: DataSet,
    truth: GroundTruth,
    progress: Callable[[int], None] = lambda _: None,
) -> Curve:
    """All look-aheads at all hops, those that are configured among them.

    Windows are computed by ONNX Runtime in this process. ``progress`` is told of each point.
    """
    # There is one stream at a time: a batch has no others to wait for.
    config = config.model_copy(update={"backend": "onnxruntime", "max_wait_ms": 0.0})
    offline = truth.compare(offline_segments(bundle, config, data)).average
    points = []
    for hop in sorted({*HOPS, config.window.hop_snippets}):
        window = config.window.model_copy(update={"hop_snippets": hop})
        at_hop = config.model_copy(update={"window": window})
        timed = _Timed(OnnxRuntimeBackend(bundle, at_hop)) if _fits(bundle, window) else None
        for lookahead in _lookaheads(config):
            points.append(_measure(bundle, at_hop, lookahead, timed, data, truth))
            progress(1)
    return Curve(offline, sum(map(len, data.recordings)), tuple(points))


def count_points(config: EngineConfig) -> int:
    """How many points `measure_curve` measures."""
    return len({*HOPS, config.window.hop_snippets}) * len(_lookaheads(config))


def _fits(bundle: Bundle, window: WindowConfig) -> bool:
    """Whether a window is long enough for its hop; that of the engine itself is."""
    manifest = bundle.manifest
    try:
        window.length(manifest.context_snippets, manifest.lookahead_snippets)
    except SettingsError:
        return False
    return True


def _lookaheads(config: EngineConfig) -> list[Lookahead]:
    """From short to long."""
    in_seconds = {each for each in (*LOOKAHEADS, config.lookahead_s) if isinstance(each, float)}
    return ["strict", *sorted(in_seconds), "infinite"]


def _measure(
    bundle: Bundle,
    config: EngineConfig,
    lookahead: Lookahead,
    timed: _Timed | None,
    data: DataSet,
    truth: GroundTruth,
) -> Point:
    manifest = bundle.manifest
    clock, hop = manifest.clock, config.window.hop_snippets
    least = least_lookahead(manifest, config)
    if lookahead == "infinite":
        longest = max(map(len, data.recordings), default=0)
        configured: float | str = clock.seconds(longest + least)
    else:
        configured = lookahead
    config = config.model_copy(update={"lookahead_s": configured})
    derived_s = decision_lookahead_s(manifest, config)
    told_s = None if lookahead == "infinite" else derived_s
    point = Point(hop, lookahead, told_s, clock.seconds(least))
    if timed is None or clock.position(derived_s) + 1e-9 < least:
        return point
    deployment = Deployment(manifest, timed.backend, config)
    deployment.warm_up(timed.backend)
    timed.spent_s = 0.0
    recordings = {each.name: each.features for each in data.recordings}
    started_s = time.perf_counter()
    published = run_in_process(deployment, recordings)
    total_s = time.perf_counter() - started_s
    ms_each = 1000 / max(1, sum(map(len, recordings.values())))
    finals = [each for each in published if isinstance(each, FinalProposal)]
    by_recording = {
        name: published_segments([f for f in finals if f.stream == name], manifest.classes)
        for name in truth.segments
    }
    return Point(
        hop,
        lookahead,
        told_s,
        point.least_s,
        truth.compare(by_recording).average,
        delay_percentiles(finals),
        Cost(timed.spent_s * ms_each, total_s * ms_each),
    )


def run_in_process(deployment: Deployment, recordings: Mapping[str, Floats]) -> list[Publication]:
    """What the engine publishes of recordings (T, D), one after the other, each as it has room."""
    pipeline = Pipeline(deployment)
    published: list[Publication] = []
    for name, features in recordings.items():
        stream = pipeline.open(name, 0)
        while stream.next_index < len(features):
            at = stream.next_index
            pipeline.append(name, at, np.asarray(features[at : stream.send_until]))
            published += pipeline.step()
        pipeline.end(name, len(features))
        while name in pipeline.streams:  # a batch may wait for its deadline
            published += pipeline.step()
    return published


class _Timed:
    """A backend and the seconds that were spent in it."""

    def __init__(self, inner: Backend) -> None:
        self.spent_s = 0.0
        self.backend = NotedBackend(inner, self._note)

    def _note(self, _stage: str, _rows: int, began_s: float, ended_s: float) -> None:
        self.spent_s += ended_s - began_s


def curve_table(curve: Curve) -> Table:
    """The curve for people: a row a point."""
    table = Table(
        title=f"streaming against offline, average mAP {curve.offline_average_map:.4f}",
        caption="p50 to p99: s from the end of a proposal to its publication; "
        "ms of a snippet: inference, and everything",
        box=SIMPLE,
    )
    names = ("hop", "look-ahead, s", "mAP", "retention", "p50", "p90", "p99", "inference", "all")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for hop in sorted({point.hop_snippets for point in curve.points}):
        for point in curve.points:
            if point.hop_snippets == hop:
                table.add_row(str(hop), *_cells(curve, point))
        table.add_section()
    return table


def _cells(curve: Curve, point: Point) -> list[str]:
    if point.average_map is None or point.delay_s is None or point.cost is None:
        is_below = isinstance(point.lookahead, float) and point.lookahead < point.least_s
        why = f"least {point.least_s:.2f}" if is_below else "window too short"
        return [_lookahead_text(point), "n/a", why]
    retention = curve.retention(point)
    strict = f" {point.least_s:.2f}" if point.lookahead == "strict" else ""
    return [
        _lookahead_text(point) + strict,
        f"{point.average_map:.4f}",
        "" if retention is None else f"{retention:.3f}",
        *(f"{delay_s:.2f}" for delay_s in point.delay_s.values()),
        f"{point.cost.inference_ms:.2f}",
        f"{point.cost.total_ms:.2f}",
    ]


def _lookahead_text(point: Point) -> str:
    return point.lookahead if isinstance(point.lookahead, str) else f"{point.lookahead:g}"


def points_by_hop(curve: Curve) -> dict[int, Sequence[Point]]:
    """Those that have figures, by their hop."""
    hops = sorted({point.hop_snippets for point in curve.points})
    return {
        hop: [p for p in curve.points if p.hop_snippets == hop and p.average_map is not None]
        for hop in hops
    }
