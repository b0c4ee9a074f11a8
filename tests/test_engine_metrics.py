"""What an engine tells over HTTP: counts, distributions, whether it turns and takes snippets."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from commands import (
    ANY_PORT,
    Engine,
    engine,
    hrpro_json,
    published_in_process,
    refusal,
    wait_for,
)
from driving import finals
from prometheus_client.parser import text_string_to_metric_families
from serving import PATIENCE_S, RawPeer, TinyPipeline, chunk, hello, serving
from tiny_model import CLASSES, DIM, tiny_recording

from hrpro.clients import FeatureFeeder, request_status
from hrpro.engine.feeds import Counters, Feeds
from hrpro.engine.messages import ActionEvent, Publication
from hrpro.engine.metrics import Arrivals, Metrics
from hrpro.engine.metrics_http import metrics_server
from hrpro.engine.protocol import Ack, End, Ended
from hrpro.engine.wire import ERROR_CODES

if TYPE_CHECKING:
    from hrpro.export.bundle import Bundle

FREE_PORT = "127.0.0.1:0"
# A metric's name and its labels -> its value.
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def ask(url: str, path: str) -> tuple[int, str]:
    """Status and body of /path at the address of a metrics URL."""
    try:
        with urllib.request.urlopen(url.removesuffix("metrics") + path, timeout=PATIENCE_S) as said:
            return said.status, said.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


class Scrape:
    def __init__(self, url: str) -> None:
        status, text = ask(url, "metrics")
        assert status == 200
        self.samples: Samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        return self.samples[f"hrpro_{name}", frozenset(labels.items())]

    def labels(self, name: str, label: str) -> dict[str, float]:
        """Its values by one label."""
        found = {}
        for (each, labels), value in self.samples.items():
            if each == f"hrpro_{name}":
                found[dict(labels)[label]] = value
        return found


@pytest.fixture(autouse=True)
def no_threads(nothing_left_open: None) -> Iterator[None]:
    threads = threading.active_count()
    yield
    wait_for(lambda: threading.active_count() <= threads)  # of requests that are answered


@pytest.fixture(scope="module")
def fed(bundle: Bundle) -> Iterator[tuple[Engine, dict[str, list[Publication]]]]:
    """An engine that has had two streams, and what it published of them."""
    recordings = {"one": tiny_recording(90, seed=1), "two": tiny_recording(70, seed=2)}
    with engine(bundle.folder, "--metrics", FREE_PORT) as served:
        for name, features in recordings.items():
            with FeatureFeeder(served.feed, name, DIM) as feeder:
                feeder.send(features)
                feeder.end()
        yield served, published_in_process(bundle.folder, recordings)


# ---- a real engine -----------------------------------------------------------------------------


def test_snippets_and_publications_are_counted(
    fed: tuple[Engine, dict[str, list[Publication]]],
) -> None:
    served, by_stream = fed
    published = [each for stream in by_stream.values() for each in stream]
    events = [each for each in published if isinstance(each, ActionEvent)]
    scrape = Scrape(served.metrics)
    assert scrape.value("snippets_received_total") == 160
    assert scrape.value("snippets_processed_total") == 160
    assert scrape.value("streams_ended_total") == 2
    assert scrape.value("streams_open") == 0
    assert len(events) > 10
    told = Counter({"start": 0, "update": 0, "end": 0, "retract": 0})
    told.update(each.kind for each in events)
    assert scrape.labels("events_total", "kind") == told
    assert scrape.value("proposals_total") == len(finals(published)) > 10
    assert scrape.value("ready") == 1
    assert 0 < scrape.value("uptime_seconds") < PATIENCE_S * 60
    assert scrape.samples["process_resident_memory_bytes", frozenset()] > 2**20


def test_inference_is_measured(fed: tuple[Engine, dict[str, list[Publication]]]) -> None:
    served, _ = fed
    scrape = Scrape(served.metrics)
    batches = request_status(served.control)["counters"]["batches"]
    # A stream goes on by a snippet or more in a step. That the engine warms up is not among them.
    assert batches <= scrape.value("batch_windows_sum") <= 160
    # Streams that have other numbers of snippets to feed are calls of their own.
    calls = scrape.value("batch_windows_count")
    assert batches <= calls <= 160
    assert scrape.value("inference_seconds_count", stage="snippet") == calls
    for stage in ("snippet", "instance"):
        count = scrape.value("inference_seconds_count", stage=stage)
        assert count > 0
        assert 1e-5 < scrape.value("inference_seconds_sum", stage=stage) / count < 1


def test_delays_of_publications_are_measured(
    fed: tuple[Engine, dict[str, list[Publication]]],
) -> None:
    served, by_stream = fed
    published = [each for stream in by_stream.values() for each in stream]
    events = [each for each in published if isinstance(each, ActionEvent)]
    scrape = Scrape(served.metrics)
    for kind, count in (("event", len(events)), ("final", len(finals(published)))):
        assert scrape.value("publication_latency_seconds_count", type=kind) == count
        mean_s = scrape.value("publication_latency_seconds_sum", type=kind) / count
        assert 1e-4 < mean_s < 5
    # In the time of the stream they are the same, however fast the streams came.
    delays_s = [max(0.0, each.published_s - each.end_s) for each in finals(published)]
    assert scrape.value("publication_delay_seconds_count", type="final") == len(delays_s)
    assert scrape.value("publication_delay_seconds_sum", type="final") == pytest.approx(
        sum(delays_s), abs=0.01
    )
    up_to_4_s = scrape.value("publication_delay_seconds_bucket", type="final", le="4.0")
    assert abs(up_to_4_s - sum(delay_s <= 4 for delay_s in delays_s)) <= 1
    starts = [each for each in events if each.kind == "start"]
    waited_s = sum(each.published_s - each.start_s for each in starts)
    assert scrape.value("publication_delay_seconds_count", type="event") == len(starts)
    assert scrape.value("publication_delay_seconds_sum", type="event") == pytest.approx(
        waited_s, abs=0.01
    )


def test_it_says_what_works(
    fed: tuple[Engine, dict[str, list[Publication]]], bundle: Bundle
) -> None:
    served, _ = fed
    status = request_status(served.control)
    info = {
        "version": version("hrpro-stream"), "instance": status["instance"], "provider": "cpu",
        "bundle_id": status["bundle_id"], "previous_bundle_id": "",
        "canary_bundle_id": "",
    }  # fmt: skip
    assert Scrape(served.metrics).value("engine_info", **info) == 1


def test_refusals_are_counted_by_their_code_and_deploys_apart(
    bundle: Bundle, tmp_path: Path
) -> None:
    with engine(bundle.folder, "--metrics", FREE_PORT, quiet=False) as served:
        with RawPeer(served.feed) as peer:
            for _ in range(3):
                peer.ask([b"\xc1"])
            peer.ask(hello(dim=DIM + 1))
            peer.ask(chunk(0, 1))
        with RawPeer(served.control) as peer:
            peer.say([b"\xc1"])
            peer.hear_frames()
        refusal("deploy", tmp_path / "nowhere", "--to", served.control)
        hrpro_json("deploy", bundle.folder, "--to", served.control)
        scrape = Scrape(served.metrics)
        counters = request_status(served.control)["counters"]
    expected = {"bad_message": 4, "wrong_dimension": 1, "unknown_stream": 1}
    assert scrape.labels("refused_total", "code") == {
        code: expected.get(code, 0) for code in ERROR_CODES if code != "deploy_refused"
    }
    refused = {name: n for name, n in counters.items() if name.startswith("refused_")}
    assert refused == {f"refused_{code}": n for code, n in expected.items()}
    assert scrape.value("deploys_refused_total") == 1
    assert scrape.value("deploys_total") == 1


def test_an_engine_says_where_its_metrics_are(bundle: Bundle) -> None:
    with engine(bundle.folder, "--metrics", ":0") as served:
        assert re.fullmatch(r"http://127\.0\.0\.1:[0-9]+/metrics", served.metrics)
        assert ask(served.metrics, "readyz") == (200, "serving\n")
        assert ask(served.metrics, "healthz") == (200, "ok\n")
        status, said = ask(served.metrics, "favicon.ico")
        assert (status, said) == (404, "expected /metrics, /healthz or /readyz\n")
        connection = http.client.HTTPConnection(served.metrics.split("/")[2], timeout=PATIENCE_S)
        connection.request("HEAD", "/readyz?now")
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"")
        connection.close()


@pytest.mark.parametrize("address", ["9100", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:65536"])
def test_an_address_that_is_none(address: str) -> None:
    sides = [part for side in ("feed", "events", "control") for part in (f"--{side}", ANY_PORT)]
    sides += ["--state", "none"]
    said = refusal("serve", "nowhere", *sides, "--metrics", address)
    assert said == f"--metrics: expected HOST:PORT, such as 127.0.0.1:9100, got {address}"


def test_an_address_that_is_taken_is_found_before_the_bundle_is_read() -> None:
    sides = [part for side in ("feed", "events", "control") for part in (f"--{side}", ANY_PORT)]
    sides += ["--state", "none"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        said = refusal("serve", "nowhere", *sides, "--metrics", address)
    assert said == f"--metrics {address}: cannot listen there: Address already in use"


# ---- lag and health, of a server that can be stopped ---------------------------------------------


def test_lag_is_told_by_the_worst_and_as_a_distribution() -> None:
    pipeline, metrics = TinyPipeline(), Metrics()
    with (
        serving(pipeline, metrics=metrics) as server,
        metrics_server(FREE_PORT, metrics) as url,
        RawPeer(server.feed_address) as peer,
    ):
        for stream in ("idle", "slow", "full"):
            peer.ask(hello(stream))
        pipeline.paused = True
        peer.ask(chunk(0, 3, "slow"))
        peer.ask(chunk(0, 8, "full"))
        peer.ask(chunk(8, 16, "full"))
        scrape = Scrape(url)
        assert scrape.value("streams_open") == 3
        assert scrape.value("streams_held") == 1
        assert scrape.value("snippets_waiting") == 19
        assert scrape.value("stream_lag_snippets_max") == 16
        assert scrape.value("stream_lag_seconds_max") == pytest.approx(16 * 0.64)
        assert scrape.labels("stream_lag_snippets_bucket", "le") == {
            "0": 1, "1": 1, "2": 1, "4": 2, "8": 2, "16": 3, "32": 3, "64": 3, "128": 3, "+Inf": 3
        }  # fmt: skip
        # No stream is named: with any number of them there is so much to store.
        assert "slow" not in ask(url, "metrics")[1]


def test_ready_from_the_first_snippet_on_until_the_drain() -> None:
    pipeline, metrics = TinyPipeline(), Metrics()
    with metrics_server(FREE_PORT, metrics) as url:
        assert ask(url, "readyz") == (503, "starting\n")
        assert ask(url, "healthz") == (200, "ok\n")
        assert Scrape(url).value("ready") == 0
        with serving(pipeline, metrics=metrics) as server, RawPeer(server.feed_address) as peer:
            assert ask(url, "readyz") == (200, "serving\n")
            assert Scrape(url).value("ready") == 1
            peer.ask(hello())
            pipeline.paused = True  # so that the drain does not end
            server.drain()
            assert ask(url, "readyz") == (503, "draining\n")
            assert ask(url, "healthz") == (200, "ok\n")
            assert Scrape(url).value("ready") == 0


def test_unhealthy_while_a_turn_does_not_end_but_not_while_nothing_comes() -> None:
    class Stuck(TinyPipeline):
        def __init__(self) -> None:
            super().__init__()
            self.goes_on = threading.Event()

        def step(self) -> Iterator[Publication]:
            assert self.goes_on.wait(PATIENCE_S)
            return super().step()

    pipeline, metrics = Stuck(), Metrics(hang_s=0.2)
    with (
        serving(pipeline, metrics=metrics) as server,
        metrics_server(FREE_PORT, metrics) as url,
        RawPeer(server.feed_address) as peer,
    ):
        began_s = Scrape(url).value("uptime_seconds")
        while Scrape(url).value("uptime_seconds") < began_s + 0.5:  # nothing comes
            assert ask(url, "healthz") == (200, "ok\n")
        peer.say(hello())
        wait_for(lambda: ask(url, "healthz")[0] == 503)
        status, said = ask(url, "healthz")
        assert status == 503 and said.startswith("the loop is in one turn for 0.")
        assert Scrape(url).value("streams_open") == 1  # it can still be asked
        pipeline.goes_on.set()
        peer.hear()
        wait_for(lambda: ask(url, "healthz") == (200, "ok\n"))


def test_who_asks_slowly_holds_nobody_up() -> None:
    metrics = Metrics()
    with (
        serving(metrics=metrics) as server,
        metrics_server(FREE_PORT, metrics) as url,
        RawPeer(server.feed_address) as peer,
    ):
        port = int(url.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(b"GET /metrics HT")
            peer.ask(hello())
            assert peer.ask(chunk(0, 4)) == Ack("cam", 4, 20)
            assert Scrape(url).value("snippets_received_total") == 4
        peer.say(End("cam", 4))
        assert peer.hear() == Ended("cam", 4, 4, 4)


# ---- arrivals ----------------------------------------------------------------------------------


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_age_of_a_snippet_is_that_of_its_chunk() -> None:
    clock = Clock()
    arrivals = Arrivals(clock)
    for clock.now_s, next_index in ((10.0, 4), (11.0, 8), (12.0, 9)):
        arrivals.came("cam", next_index, processed=0)
    arrivals.came("other", 9, processed=0)
    clock.now_s = 20.0
    ages = [(0, 10.0), (3, 10.0), (4, 9.0), (7, 9.0), (7, 9.0), (8, 8.0)]
    assert [(index, arrivals.age_s("cam", index)) for index, _ in ages] == ages
    assert arrivals.age_s("cam", 9) is None  # has not come
    assert arrivals.age_s("unknown", 0) is None
    assert arrivals.age_s("other", 0) == 8.0
    arrivals.forget("other")
    assert arrivals.age_s("other", 0) is None


def test_the_last_snippets_have_waited_for_the_end() -> None:
    clock = Clock()
    arrivals = Arrivals(clock)
    for clock.now_s, next_index in ((10.0, 4), (11.0, 8)):
        arrivals.came("cam", next_index, processed=0)
    clock.now_s = 50.0
    arrivals.ended("cam", 8)
    clock.now_s = 51.0
    assert arrivals.age_s("cam", 3) == 41.0
    assert arrivals.age_s("cam", 7) == 1.0


def test_feeders_make_arrivals_and_a_drain_makes_an_end() -> None:
    clock, counters = Clock(), Counters()
    arrivals = Arrivals(clock)
    feeds = Feeds(TinyPipeline(), counters, lambda *_: True, clock, arrivals)  # type: ignore[arg-type]
    for stream in ("left", "drained"):
        clock.now_s = 5.0
        feeds.handle(b"peer", hello(stream))
        for clock.now_s, first in ((10.0, 0), (11.0, 4), (12.0, 4)):  # the last one is a duplicate
            feeds.handle(b"peer", chunk(first, first + 4, stream))
    clock.now_s = 50.0
    feeds.handle(b"peer", End("left", 8))
    clock.now_s = 60.0
    feeds.drain()
    clock.now_s = 61.0
    assert [arrivals.age_s("left", index) for index in (3, 7)] == [51.0, 11.0]
    assert [arrivals.age_s("drained", index) for index in (3, 7)] == [51.0, 1.0]
    assert (counters.chunks_in, counters.chunks_duplicate) == (6, 2)


def test_no_more_is_kept_than_is_waiting() -> None:
    arrivals = Arrivals(Clock())
    for index in range(1000):
        arrivals.came("cam", index + 1, processed=max(0, index - 5))
        assert len(arrivals._times["cam"]) <= 7
        assert arrivals._times["cam"][0][0] > max(0, index - 5)


def test_classes_are_no_labels(fed: tuple[Engine, dict[str, list[Publication]]]) -> None:
    text = ask(fed[0].metrics, "metrics")[1]
    assert not any(f'"{name}"' in text for name in (*CLASSES, "one", "two"))
