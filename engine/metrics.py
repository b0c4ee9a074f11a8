"""What an engine tells Prometheus about itself.

Nothing here makes the loop wait. Counts are the loop's own; whoever asks reads them as they are,
from a thread of its own, so that two of them may stand a turn apart. Distributions are noted by
the loop while it works, and by the threads that compute for it. No label has more values than there
are error codes: streams are not among the labels, but as the worst of them and as a distribution
over them.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeHistogramMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from hrpro.engine.messages import ActionEvent, EventKind, FinalProposal, Publication
from hrpro.engine.noted import NotedBackend, Stage
from hrpro.engine.wire import ERROR_CODES

if TYPE_CHECKING:
    from hrpro.engine.inference import Backend
    from hrpro.engine.pipeline import Pipeline
    from hrpro.engine.server import Server

# A turn reads 600 messages and computes one micro-batch, some seconds for a wide model on a CPU.
HANG_S = 30.0
# An Error with this code answers a deploy, which has a counter of its own.
DEPLOY_REFUSED = "deploy_refused"

# The times at which histograms were made are one and the same, and process_start_time_seconds.
disable_created_metrics()

_VERSION = version("hrpro-stream")
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_WORK_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_DELAYS_S = (0.5, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 60)
_LAGS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


class Metrics(Collector):
    """The measurements of one engine, from its start; a server announces itself by `watch`."""

    def __init__(self, hang_s: float = HANG_S) -> None:
        self.registry = CollectorRegistry()
        self.arrivals = Arrivals()
        self._hang_s = hang_s
        self._started_s = time.monotonic()
        self._server: Server | None = None
        self._pipeline: Pipeline | None = None
        self._event_kinds: Counter[EventKind] = Counter()
        self._batch = self._histogram(
            "batch_windows",
            "Windows, or streams that go on by a step, in a call of stage 1.",
            _BATCHES,
        )
        inference = self._histogram(
            "inference_seconds", "Time of a call of a stage of the model.", _WORK_S, "stage"
        )
        self._snippet_stage = inference.labels("snippet")
        self._instance_stage = inference.labels("instance")
        latency = self._histogram(
            "publication_latency_seconds",
            "From the arrival of the newest snippet that a message is decided from, or of the end "
            "of its stream, to the message's publication.",
            _WORK_S,
            "type",
        )
        self._latency = {kind: latency.labels(kind.TYPE) for kind in (ActionEvent, FinalProposal)}
        delay = self._histogram(
            "publication_delay_seconds",
            "In the time of the stream: from the end of a final proposal, and from the start of "
            "an event's action, to where the stream was when it was published.",
            _DELAYS_S,
            "type",
        )
        self._final_delay = delay.labels(FinalProposal.TYPE)
        self._start_delay = delay.labels(ActionEvent.TYPE)
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def _histogram(
        self, name: str, help_text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(
            f"hrpro_{name}", help_text, labels, buckets=buckets, registry=self.registry
        )

    def watch(self, server: Server, pipeline: Pipeline) -> None:
        """From here on the engine can take snippets."""
        self._server, self._pipeline = server, pipeline

    # ---- noted by the loop ---------------------------------------------------------------------

    def timed(self, backend: Backend) -> Backend:
        """The same backend, its calls noted."""
        return NotedBackend(backend, self._note_call)

    def _note_call(self, stage: Stage, rows: int, began_s: float, ended_s: float) -> None:
        if stage == "instance":
            self._instance_stage.observe(ended_s - began_s)
            return
        self._batch.observe(rows)
        self._snippet_stage.observe(ended_s - began_s)

    def published(self, publication: Publication) -> None:
        """A message has been handed to the events socket."""
        if not isinstance(publication, (ActionEvent, FinalProposal)):
            if publication.kind == "ended":
                self.arrivals.forget(publication.stream)
            return
        age_s = self.arrivals.age_s(publication.stream, publication.published_index)
        if age_s is not None:
            self._latency[type(publication)].observe(age_s)
        if isinstance(publication, FinalProposal):
            # Stage 2 may move an end beyond the newest snippet.
            self._final_delay.observe(max(0.0, publication.published_s - publication.end_s))
            return
        self._event_kinds[publication.kind] += 1
        if publication.kind == "start":
            self._start_delay.observe(publication.published_s - publication.start_s)

    # ---- read by whoever asks ------------------------------------------------------------------

    @property
    def state(self) -> Literal["starting", "serving", "waiting", "draining"]:
        """Whether the engine takes snippets."""
        return "starting" if self._server is None else self._server.state

    def hung_s(self) -> float | None:
        """How long the loop has been in one turn, if that is too long."""
        began_s = None if self._server is None else self._server.turn_began_s
        if began_s is None:  # it waits for messages
            return None
        turn_s = time.monotonic() - began_s
        return turn_s if turn_s > self._hang_s else None

    def collect(self) -> Iterator[Metric]:
        """What is counted elsewhere, as it is now."""
        yield _gauge("uptime_seconds", "Since the engine was started.", self._up_s())
        yield _gauge("ready", "1 while the engine takes snippets.", self.state == "serving")
        if self._server is not None and self._pipeline is not None:
            yield _info(self._server, self._pipeline)
            yield from _counts(self._server, self._pipeline)
            yield from _streams(self._pipeline)
            yield self._events()

    def _events(self) -> Metric:
        family = CounterMetricFamily("hrpro_events", "ActionEvents published.", labels=["kind"])
        for kind in get_args(EventKind):
            family.add_metric([kind], self._event_kinds[kind])
        return family

    def _up_s(self) -> float:
        return time.monotonic() - self._started_s


def _info(server: Server, pipeline: Pipeline) -> Metric:
    bundles = pipeline.deployments
    return InfoMetricFamily(
        "hrpro_engine",
        "What works: the version, the bundles, and the provider that computes the windows.",
        {
            "version": _VERSION,
            "instance": server.instance,
            "provider": bundles.current.provider,
            "bundle_id": bundles.current.bundle_id,
            "previous_bundle_id": bundles.previous.bundle_id if bundles.previous else "",
            "canary_bundle_id": bundles.canary.bundle_id if bundles.canary else "",
        },
    )


def _counts(server: Server, pipeline: Pipeline) -> Iterator[Metric]:
    counters = server.counters
    for name, help_text, count in (
        ("snippets_received", "Snippets that were accepted.", counters.snippets_in),
        ("snippets_processed", "Snippets whose scores are final.", pipeline.snippets_scored),
        ("chunks_received", "Chunks that were accepted.", counters.chunks_in),
        ("chunks_duplicate", "Accepted chunks without a new snippet.", counters.chunks_duplicate),
        ("snippets_duplicate", "That came again, or too late.", counters.snippets_duplicate),
        ("snippets_missing", "That never came, or were dropped.", counters.snippets_missing),
        ("gaps", "Stretches of missing snippets.", counters.gaps),
        ("proposals", "FinalProposals published.", counters.proposals),
        ("streams_ended", "Sessions that are complete.", counters.ended_streams),
        ("deploys", "Changes of the bundle, those back among them.", counters.deploys),
        ("deploys_refused", "Bundles that could not work here.", counters.deploys_refused),
    ):
        yield CounterMetricFamily(f"hrpro_{name}", help_text, count)
    dropped = CounterMetricFamily(
        "hrpro_snippets_dropped", "Snippets that there was no room for.", labels=["policy"]
    )
    dropped.add_metric(["drop_oldest"], counters.snippets_dropped_oldest)
    dropped.add_metric(["drop_newest"], counters.snippets_dropped_newest)
    yield dropped
    refused = CounterMetricFamily(
        "hrpro_refused", "Messages that were answered with an Error.", labels=["code"]
    )
    for code in ERROR_CODES:
        if code != DEPLOY_REFUSED:
            refused.add_metric([code], server.refused[code])
    yield refused


def _streams(pipeline: Pipeline) -> Iterator[Metric]:
    # Copied at once: the loop may open and end streams meanwhile.
    streams = tuple(pipeline.streams.values())
    lags = [stream.lag for stream in streams]
    worst, waiting = max(lags, default=0), sum(lags)
    held = sum(stream.send_until <= stream.next_index for stream in streams)
    yield _gauge("streams_open", "Streams that are live or ending.", len(streams))
    idle = sum(stream.idle for stream in streams)
    yield _gauge("streams_idle", "Streams that nothing comes of.", idle)
    yield _gauge("streams_held", "Streams whose feeders have no credit left.", held)
    yield _gauge("open_actions", "Actions going on.", sum(each.open_actions for each in streams))
    yield _gauge("snippets_waiting", "Snippets that could be processed now.", waiting)
    yield _gauge("stream_lag_snippets_max", "Of the stream that is furthest behind.", worst)
    worst_s = worst * pipeline.clock.snippet_s
    yield _gauge("stream_lag_seconds_max", "The same in the time of the stream.", worst_s)
    up_to = [(str(most), float(sum(lag <= most for lag in lags))) for most in _LAGS]
    yield GaugeHistogramMetricFamily(
        "hrpro_stream_lag_snippets",
        "The open streams, by how many of their snippets could be processed now.",
        buckets=[*up_to, ("+Inf", float(len(lags)))],
        gsum_value=float(waiting),
    )


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"hrpro_{name}", help_text, value)


class Arrivals:
    """When the newest snippets of each live stream came; `now_s` never goes back.

    Of a stream, no more is kept than one time for each chunk that is not processed yet.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        # (one past the last snippet, when it came), in the order of both
        self._times: dict[str, deque[tuple[int, float]]] = {}

    def came(self, stream: str, next_index: int, processed: int) -> None:
        """The snippets below `next_index` are there; those below `processed` are dealt with."""
        times = self._times.get(stream)
        if times is None:  # a deque made in vain is not free
            times = self._times[stream] = deque()
        # What is still to be decided will know the snippet `processed`.
        while times and times[0][0] <= processed:
            times.popleft()
        times.append((next_index, self._now_s()))

    def ended(self, stream: str, next_index: int) -> None:
        """None will come after these: what is decided of the last ones has waited for that."""
        times = self._times.setdefault(stream, deque())
        if times and times[-1][0] == next_index:
            times.pop()
        times.append((next_index, self._now_s()))

    def age_s(self, stream: str, index: int) -> float | None:
        """How long ago a snippet came; to be asked in the order of snippets."""
        times = self._times.get(stream)
        while times and times[0][0] <= index:
            times.popleft()
        return self._now_s() - times[0][1] if times else None

    def forget(self, stream: str) -> None:
        """The session is complete."""
        self._times.pop(stream, None)
