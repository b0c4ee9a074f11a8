"""An engine whose windows a real Triton server computes: equality, its death, its slowness."""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import wait_for
from driving import PATIENCE_S, Drive, Floats, assert_same, engine_config, of_stream
from other_bundles import renamed_bundle, reweighted_bundle
from serving import RawPeer, serving
from tiny_model import DIM, tiny_recording
from triton_place import MODEL, Place, new_place

from hrpro.clients import EventSubscriber, FeatureFeeder, StreamNotice, request_status
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.backends.triton import TritonBackend
from hrpro.engine.config import SharedMemory
from hrpro.engine.deployment import Deployment
from hrpro.engine.inference import BackendError
from hrpro.engine.messages import Ack, Chunk, Hello, Publication, Welcome
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.serve import new_deployment
from hrpro.engine.settings import SettingsError
from hrpro.export.bundle import Bundle, BundleError

RECORDINGS = {"a": tiny_recording(150, 1), "b": tiny_recording(90, 2), "c": tiny_recording(60, 3)}
# An answer of the feed or of the control socket must come in this time, whatever Triton does.
# It is some milliseconds; the bound is for machines that are busy.
ANSWERED_IN_S = 1.0


@pytest.fixture(scope="module")
def other(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return reweighted_bundle(bundle.folder, tmp_path_factory.mktemp("other") / "bundle", seed=1)


@pytest.fixture
def place(bundle: Bundle, tmp_path: Path) -> Place:
    return new_place(bundle, tmp_path)


@pytest.fixture(scope="module")
def both(
    bundle: Bundle, other: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """Served: version 2 has ``bundle``, version 3 ``other``. For tests that leave it as it was."""
    made = Place(tmp_path_factory.mktemp("both"), tmp_path_factory.mktemp("triton"))
    made.write(bundle, 2)
    made.write(other, 3)
    with made.served():
        yield made


def published_here(
    bundle: Bundle, backend: OnnxRuntimeBackend, recordings: Mapping[str, Floats] = RECORDINGS
) -> list[Publication]:
    return Drive(bundle.manifest, backend, engine_config(bundle.manifest), recordings).finish()


def assert_as_here(
    published: list[Publication],
    bundle: Bundle,
    backend: OnnxRuntimeBackend,
    recordings: Mapping[str, Floats] = RECORDINGS,
) -> None:
    expected = published_here(bundle, backend, recordings)
    assert len(expected) > 50
    for name in recordings:
        assert_same(of_stream(published, name), of_stream(expected, name))


# --- the same ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_memory", ["always", "never"])
@pytest.mark.parametrize(("hop", "max_batch", "chunk"), [(1, 4, 7), (3, 16, 50)])
def test_the_same_events_as_by_onnxruntime_here(
    bundle: Bundle, backend: OnnxRuntimeBackend, both: Place, hop: int, max_batch: int, chunk: int,
    shared_memory: SharedMemory,
) -> None:  # fmt: skip
    config = both.config(bundle, hop=hop, max_batch=max_batch, shared_memory=shared_memory)
    drive = Drive(bundle.manifest, TritonBackend(bundle, config), config, RECORDINGS)
    drive.take_turns([("a", 20, 1), ("b", 3, 2), ("c", 30, 3)])
    got = drive.finish(chunk)
    local = Drive(
        bundle.manifest, backend, engine_config(bundle.manifest, hop=hop), RECORDINGS
    ).finish()
    assert len(local) > 50
    for name in RECORDINGS:
        assert_same(of_stream(got, name), of_stream(local, name))


def test_a_swap_to_another_version_with_batches_in_flight(
    bundle: Bundle, other: Bundle, backend: OnnxRuntimeBackend, both: Place
) -> None:
    config = both.config(bundle)
    local = engine_config(bundle.manifest, backlog=64)
    drives = (
        Drive(bundle.manifest, TritonBackend(bundle, config), config, RECORDINGS),
        Drive(bundle.manifest, backend, local, RECORDINGS),
    )
    others = (
        new_deployment(other, config),
        Deployment(other.manifest, OnnxRuntimeBackend(other, local), local),
    )
    for drive in drives:
        drive.take_turns([("a", 60, 0), ("b", 40, 0)])
        drive.settle()
        drive.take_turns([("a", 20, 0), ("b", 20, 0)])
    assert both.server is not None
    both.server.stop()
    drives[0].step()
    streams = drives[0].pipeline.streams
    assert any(each.asked > each.processed for each in streams.values())
    for drive, deployment in zip(drives, others, strict=True):
        drive.pipeline.deploy(deployment)
    both.server.go_on()
    got, expected = (drive.finish() for drive in drives)
    for name in RECORDINGS:
        assert_same(of_stream(got, name), of_stream(expected, name))
    bundle_ids = {each.bundle_id for each in got if not isinstance(each, StreamNotice)}
    assert bundle_ids == {bundle.manifest.bundle_id, other.manifest.bundle_id}


# --- what is refused at the start ----------------------------------------------------------------


def test_a_server_that_is_not_there(bundle: Bundle, place: Place) -> None:
    with pytest.raises(BackendError) as refused:
        new_deployment(bundle, place.config(bundle))
    text = str(refused.value)
    assert text.startswith(f"Triton at {place.address}: {MODEL}: failed to connect")
    assert "Connection refused" in text


def test_a_server_that_does_not_answer(bundle: Bundle, place: Place) -> None:
    with place.served() as server:
        server.stop()
        begin_s = time.monotonic()
        try:
            with pytest.raises(BackendError, match=r"in triton.deadline_s 0.5, got none"):
                new_deployment(bundle, place.config(bundle, deadline_s=0.5))
            assert time.monotonic() - begin_s < 5
        finally:
            server.go_on()


def test_a_server_without_the_bundle(
    bundle: Bundle, other: Bundle, both: Place, tmp_path: Path
) -> None:
    renamed = renamed_bundle(bundle.folder, tmp_path / "renamed")
    ids = [each.manifest.bundle_id for each in (renamed, bundle, other)]
    with pytest.raises(BackendError) as refused:
        new_deployment(renamed, both.config(bundle))
    assert str(refused.value) == (
        f"Triton at {both.address}: {MODEL}: expected a version with bundle {ids[0]}, "
        f"got 2 has {ids[1]}, 3 has {ids[2]}"
    )


def test_models_that_are_not_there_or_take_too_little(bundle: Bundle, both: Place) -> None:
    config = both.config(bundle)
    triton = config.triton.model_copy(update={"name": "mocap"})
    with pytest.raises(BackendError, match=r"mocap-snippet: .*mocap-snippet.* not found"):
        new_deployment(bundle, config.model_copy(update={"triton": triton}))
    with pytest.raises(BackendError, match=r"max_batch 17 to be taken, got a model that takes 16"):
        new_deployment(bundle, both.config(bundle, max_batch=17))


def test_golden_windows_go_through_the_server(bundle: Bundle, other: Bundle, place: Place) -> None:
    shutil.copyfile(other.snippet_graph, place.repository / MODEL / "1" / "model.onnx")
    with place.served(), pytest.raises(BundleError, match=r"golden windows: .* differ"):
        new_deployment(bundle, place.config(bundle))


def test_without_the_client_of_triton(
    bundle: Bundle, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "hrpro.engine.backends.triton")
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(SettingsError, match=r"pip install hrpro-stream\[triton\]"):
        new_deployment(bundle, place.config(bundle))


# --- a server that goes, and comes back ----------------------------------------------------------


class Watching:
    """What an engine publishes, until all streams have ended."""

    def __init__(self, subscriber: EventSubscriber, streams: int) -> None:
        self.heard: list[Publication] = []
        self._subscriber = subscriber
        self._left = streams
        self._thread = threading.Thread(target=self._hear)
        self._thread.start()

    def _hear(self) -> None:
        while self._left and (each := self._subscriber.receive(PATIENCE_S)) is not None:
            self.heard.append(each)
            self._left -= isinstance(each, StreamNotice) and each.kind == "ended"

    def all(self) -> list[Publication]:
        self._thread.join(2 * PATIENCE_S)
        assert self._left == 0
        return self.heard


def feed(address: str, name: str, features: Floats) -> int:
    with FeatureFeeder(address, name, DIM, timeout_s=PATIENCE_S) as feeder:
        for at in range(0, len(features), 4):
            feeder.send(features[at : at + 4])
        return feeder.end().next_index


@pytest.mark.parametrize("shared_memory", ["always", "never"])
def test_killed_in_mid_stream_and_started_again(
    bundle: Bundle, backend: OnnxRuntimeBackend, place: Place, shared_memory: SharedMemory
) -> None:
    """Twice; nothing is lost and nothing comes twice."""
    recordings = {name: np.tile(each, (12, 1)) for name, each in RECORDINGS.items()}
    config = place.config(bundle, max_batch=2, shared_memory=shared_memory)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(place.served())
        pipeline = Pipeline(new_deployment(bundle, config))
        engine = stack.enter_context(serving(pipeline))
        subscriber = stack.enter_context(EventSubscriber(engine.events_address))
        subscriber.wait_connected(PATIENCE_S)
        watching = Watching(subscriber, len(recordings))
        pool = stack.enter_context(ThreadPoolExecutor(len(recordings)))
        fed = {
            name: pool.submit(feed, engine.feed_address, name, each)
            for name, each in recordings.items()
        }

        def status() -> dict[str, Any]:
            return request_status(engine.control_address, PATIENCE_S)

        def streams() -> list[dict[str, Any]]:
            return status()["streams"]

        for number in (1, 2):
            wait_for(lambda n=number: status()["counters"]["snippets_processed"] > 300 * n)
            server.kill()
            wait_for(lambda: status()["state"] == "waiting")
            held = status()
            # As far as there is room the snippets are taken; what is processed stays where it was.
            wait_for(lambda: all(each["next_index"] > each["processed"] for each in streams()))
            assert held["counters"]["snippets_processed"] == pipeline.snippets_scored
            assert not any(each.done() for each in fed.values())
            server = stack.enter_context(place.served())
            wait_for(lambda: status()["state"] == "serving")
        assert {name: each.result(PATIENCE_S) for name, each in fed.items()} == {
            name: len(each) for name, each in recordings.items()
        }
        published = watching.all()
        assert (subscriber.gaps, subscriber.repeats) == (0, 0)
    assert_as_here(published, bundle, backend, recordings)


def test_another_bundle_in_its_place_is_not_asked(
    bundle: Bundle, other: Bundle, backend: OnnxRuntimeBackend, place: Place
) -> None:
    """Also where no request fails in between: the streams were silent."""
    config = place.config(bundle)
    recordings = {"b": RECORDINGS["b"]}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(place.served())
        backend_there = TritonBackend(bundle, config)
        drive = Drive(bundle.manifest, backend_there, config, recordings)
        drive.send("b", 40)
        drive.settle()
        server.kill()
        shutil.rmtree(place.repository / MODEL)
        shutil.rmtree(place.repository / "hrpro-instance")
        place.write(other, 1)
        stack.enter_context(place.served())
        drive.send("b", 20)
        while drive.pipeline.waits_for is None or "expected" not in drive.pipeline.waits_for:
            drive.woken.clear()
            if drive.pipeline.pending():
                drive.step()
            else:
                assert drive.woken.wait(PATIENCE_S)
        assert drive.pipeline.waits_for == (
            f"Triton at {place.address}: {MODEL}: expected a version with bundle "
            f"{bundle.manifest.bundle_id}, got 1 has {other.manifest.bundle_id}"
        )
        place.write(bundle, 2)
        place.load()
        published = drive.finish()
    assert_as_here(published, bundle, backend, recordings)


# --- a server that takes its time ----------------------------------------------------------------


class Asking:
    """A peer that feeds one snippet a turn and asks for the status, and how long it waits."""

    def __init__(self, peer: RawPeer, control: str) -> None:
        self.peer = peer
        self.control = control
        self.acknowledged_s: list[float] = []
        self.answered_s: list[float] = []
        self.states: list[str] = []
        assert isinstance(peer.ask(Hello("live", DIM, 25.0, 16, 0)), Welcome)

    def turn(self) -> None:
        index = len(self.acknowledged_s)
        begin_s = time.monotonic()
        self.peer.say(Chunk("live", index, tiny_recording(1, index)))
        while (said := self.peer.hear()) and not (
            isinstance(said, Ack) and said.next_index == index + 1
        ):
            assert isinstance(said, Ack)
        self.acknowledged_s.append(time.monotonic() - begin_s)
        begin_s = time.monotonic()
        self.states.append(request_status(self.control, PATIENCE_S)["state"])
        self.answered_s.append(time.monotonic() - begin_s)

    def assert_in_time(self) -> None:
        times = {"acknowledged": self.acknowledged_s, "status answered": self.answered_s}
        for what, each in times.items():
            sys.stdout.write(f"{what} in {1000 * max(each):.1f} ms at most, of {len(each)}\n")
            assert max(each) < ANSWERED_IN_S


def test_a_slow_server_keeps_no_feeder_waiting(
    bundle: Bundle, backend: OnnxRuntimeBackend, place: Place
) -> None:
    place.slow_down(pause_s=0.4)
    config = place.config(bundle, max_batch=16)
    with (
        place.served(),
        serving(Pipeline(new_deployment(bundle, config))) as engine,
        EventSubscriber(engine.events_address) as subscriber,
        RawPeer(engine.feed_address) as peer,
        ThreadPoolExecutor(1) as pool,
    ):
        subscriber.wait_connected(PATIENCE_S)
        watching = Watching(subscriber, 1)
        begin_s = time.monotonic()
        fed = pool.submit(feed, engine.feed_address, "b", RECORDINGS["b"])
        asking = Asking(peer, engine.control_address)
        while len(asking.states) < 50:
            asking.turn()
        assert fed.result(PATIENCE_S) == len(RECORDINGS["b"])
        assert time.monotonic() - begin_s > 1.0  # it was slow
        published = of_stream(watching.all(), "b")
    asking.assert_in_time()
    assert set(asking.states) == {"serving"}
    assert_as_here(published, bundle, backend, {"b": RECORDINGS["b"]})


def test_a_server_that_answers_no_more_is_reported_and_keeps_no_feeder_waiting(
    bundle: Bundle, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """It does not refuse connections: requests end by their deadline alone."""
    config = place.config(bundle, deadline_s=0.3)
    with (
        place.served() as server,
        serving(Pipeline(new_deployment(bundle, config))) as engine,
        RawPeer(engine.feed_address) as peer,
    ):
        asking = Asking(peer, engine.control_address)
        for _ in range(10):
            asking.turn()
        server.stop()
        try:
            while "waiting" not in asking.states and len(asking.states) < 64:
                asking.turn()
                time.sleep(0.05)  # a live feed has a pace
            for _ in range(5):
                asking.turn()
        finally:
            server.go_on()
        asking.assert_in_time()
        assert asking.states[-1] == "waiting"

        def state() -> str:
            return request_status(engine.control_address, PATIENCE_S)["state"]

        wait_for(lambda: state() == "serving")
    said = [each.getMessage() for each in caplog.records if each.name == "hrpro.engine.server"]
    assert said[0] == (
        f"waiting, the streams are held: Triton at {place.address}: {MODEL}: "
        "expected an answer in triton.deadline_s 0.3, got none"
    )
