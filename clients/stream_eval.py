"""Streaming accuracy: the test split through a real engine, beside the same bundle offline."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from hrpro.clients.control import request_status
from hrpro.clients.engine_process import EngineFailedError
from hrpro.clients.feeding import Source, feed_sources
from hrpro.clients.subscriber import EventSubscriber
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.config import EngineConfig
from hrpro.engine.offline import localize_recording
from hrpro.engine.protocol import (
    ActionEvent,
    FinalProposal,
    Publication,
    StreamNotice,
)
from hrpro.engine.serve import Addresses
from hrpro.engine.soft_nms import temporal_iou
from hrpro.engine.timebase import SnippetClock
from hrpro.engine.windows import decision_lookahead_s
from hrpro.export.bundle import Bundle, BundleError
from hrpro.training.annotations import read_ground_truth
from hrpro.training.data import DataSet, read_test_split
from hrpro.training.data_config import DataConfig
from hrpro.training.metrics import GroundTruth, Segments, to_segments

_COLLECT_TIMEOUT_S = 120.0
_CHUNK_SNIPPETS = 8
_STREAMS_AT_ONCE = 64


@dataclass(frozen=True)
class StreamingRun:
    """What was sent and what came back."""

    sent: dict[str, int]
    publications: list[Publication]
    gaps: int
    repeats: int
    counters: Mapping[str, int]

    def finals(self, stream: str | None = None) -> list[FinalProposal]:
        """Final proposals as they were published, of one stream or of all."""
        return [
            each
            for each in self.publications
            if isinstance(each, FinalProposal) and stream in (None, each.stream)
        ]

    def events(self, stream: str | None = None) -> list[ActionEvent]:
        """Action events, of one stream or of all."""
        return [
            each
            for each in self.publications
            if isinstance(each, ActionEvent) and stream in (None, each.stream)
        ]


def evaluate_streaming(
    bundle: Bundle,
    config: EngineConfig,
    data: DataSet,
    truth: GroundTruth,
    run: StreamingRun,
) -> dict[str, object]:
    """The figures of a run; `hrpro stream-eval --json` prints them."""
    classes = bundle.manifest.classes
    offline = truth.compare(offline_segments(bundle, config, data))
    published = {name: published_segments(run.finals(name), classes) for name in truth.segments}
    streaming = truth.compare(published)
    finals = run.finals()
    processed = int(run.counters["snippets_processed"])
    sent = sum(run.sent.values())
    identities = {(final.stream, final.session, final.id) for final in finals}
    return {
        "offline_average_map": offline.average,
        "streaming_average_map": streaming.average,
        "retention": streaming.average / offline.average if offline.average else 0.0,
        "lookahead_s": decision_lookahead_s(bundle.manifest, config),
        "publish_delay_s": delay_percentiles(finals),
        "snippets_sent": sent,
        "snippets_processed": processed,
        # Of snippets and of publications: what never came, and what came more than once.
        "lost": max(0, sent - processed) + run.gaps,
        "duplicated": max(0, processed - sent) + run.repeats + len(finals) - len(identities),
        "proposals": len(finals),
        "events": len(run.events()),
        "actions": _actions(run, truth, classes),
    }


def delay_percentiles(finals: Sequence[FinalProposal]) -> dict[str, float]:
    """From the end of final proposals to their publication, in seconds; 0 where there are none."""
    delays_s = [final.published_s - final.end_s for final in finals] or [0.0]
    return {
        name: float(np.percentile(delays_s, percent))
        for name, percent in (("p50", 50), ("p90", 90), ("p99", 99))
    }


def _actions(run: StreamingRun, truth: GroundTruth, classes: Sequence[str]) -> dict[str, int]:
    """Events counted by their kind, and how many ends and retractions were of true actions."""
    counts = {"started": 0, "ended": 0, "ended_true": 0, "retracted": 0, "retracted_true": 0}
    for event in run.events():
        if event.kind == "start":
            counts["started"] += 1
        elif event.is_last:
            name = "ended" if event.kind == "end" else "retracted"
            counts[name] += 1
            counts[f"{name}_true"] += _is_true(event, truth, classes)
    return counts


def _is_true(event: ActionEvent, truth: GroundTruth, classes: Sequence[str]) -> bool:
    """Whether an instance of its class has a tIoU of 0.5 or more with it."""
    of_stream = truth.segments[event.stream]
    of_class = of_stream.label_index == classes.index(event.label)
    start_s, end_s = np.array(event.start_s), np.array(event.end_s)
    tiou = temporal_iou(start_s, end_s, of_stream.start_s, of_stream.end_s)
    return bool((of_class & (tiou >= 0.5)).any())


def published_segments(
    published: Sequence[FinalProposal | ActionEvent], classes: Sequence[str]
) -> Segments:
    """Final proposals, and actions that have ended, as segments in seconds."""
    return Segments.from_rows(
        [
            (each.start_s, each.end_s, classes.index(each.label), each.score)
            for each in published
            if each.end_s is not None and (isinstance(each, FinalProposal) or each.kind == "end")
        ]
    )


def figures_table(figures: Mapping[str, object]) -> Table:
    """The figures for people."""
    table = Table("figure", "value", title="streaming against offline")
    for name, value in figures.items():
        if isinstance(value, dict):
            form = "{} {:.2f}" if name.endswith("_s") else "{} {}"
            text = ", ".join(form.format(key, each) for key, each in value.items())
        else:
            text = f"{value:.4f}" if isinstance(value, float) else str(value)
        table.add_row(name, text)
    return table


def offline_segments(bundle: Bundle, config: EngineConfig, data: DataSet) -> dict[str, Segments]:
    """The bundle over whole recordings: final proposals in seconds, by recording."""
    backend = OnnxRuntimeBackend(bundle, config)
    manifest = bundle.manifest
    return {
        recording.name: to_segments(
            localize_recording(backend, manifest, recording.features, config.localization),
            manifest.clock,
        )
        for recording in data.recordings
    }


def read_evaluation_data(folder: Path, bundle: Bundle) -> tuple[DataSet, GroundTruth]:
    """The test split as the bundle's training read its data, and its ground truth."""
    try:
        config = DataConfig.model_validate(bundle.manifest.training["data"])
    except (KeyError, ValueError) as error:
        raise BundleError(
            f"{bundle.folder}: training.data: expected how to read the data: {error}"
        ) from None
    manifest = bundle.manifest
    data = read_test_split(folder, manifest.classes, config, manifest.feature_dim)
    names = [recording.name for recording in data.recordings]
    return data, read_ground_truth(folder, names, manifest.classes, config)


def stream_recordings(
    addresses: Addresses,
    sources: Sequence[Source],
    clock: SnippetClock,
    speed: float | None = None,
    on_publication: Callable[[Publication], None] | None = None,
) -> StreamingRun:
    """Feed recordings through the real client and collect all that is published of them."""
    with EventSubscriber(addresses.events) as subscriber:
        subscriber.wait_connected()
        collector = _Collector(subscriber, {source.stream for source in sources}, on_publication)
        collector.start()
        try:
            chunk = _CHUNK_SNIPPETS if speed is None else 1
            for first in range(0, len(sources), _STREAMS_AT_ONCE):
                group = sources[first : first + _STREAMS_AT_ONCE]
                feed_sources(group, addresses.feed, clock, speed, chunk)
            collector.join(_COLLECT_TIMEOUT_S)
        finally:
            collector.stop.set()
            collector.join()  # before its socket is closed
        counters = request_status(addresses.control)["counters"]
    collector.check()
    return StreamingRun(
        sent={source.stream: len(source.features) for source in sources},
        publications=collector.publications,
        gaps=subscriber.gaps,
        repeats=subscriber.repeats,
        counters=counters,
    )


class _Collector(threading.Thread):
    """Receives until every stream has ended: a subscriber must not wait for the feeder."""

    def __init__(
        self,
        subscriber: EventSubscriber,
        streams: set[str],
        on_publication: Callable[[Publication], None] | None,
    ) -> None:
        super().__init__(name="collector", daemon=True)
        self.publications: list[Publication] = []
        self.error: Exception | None = None
        self.stop = threading.Event()
        self._subscriber = subscriber
        self._streams = streams
        self._on_publication = on_publication

    def run(self) -> None:
        try:
            while self._streams and not self.stop.is_set():
                publication = self._subscriber.receive(timeout_s=0.2)
                if publication is None:
                    continue
                self.publications.append(publication)
                if self._on_publication is not None:
                    self._on_publication(publication)
                if isinstance(publication, StreamNotice) and publication.kind == "ended":
                    self._streams.discard(publication.stream)
        except Exception as error:  # noqa: BLE001 - raised again where the thread is joined
            self.error = error

    def check(self) -> None:
        """Raise what went wrong."""
        if self.error is not None:
            raise self.error
        if self._streams:
            raise EngineFailedError(
                f"the end of {', '.join(sorted(self._streams))} was not published "
                f"within {_COLLECT_TIMEOUT_S:g} s"
            )
