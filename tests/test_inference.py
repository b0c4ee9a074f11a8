"""Batches in flight, with a backend that answers when a test lets it, or fails."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from driving import PATIENCE_S, Drive, Floats, assert_same, engine_config, of_stream
from numpy.typing import NDArray
from tiny_model import tiny_recording

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.config import EngineConfig, TritonConfig
from hrpro.engine.deployment import Deployment
from hrpro.engine.inference import BackendError, Inference, Outputs
from hrpro.export.bundle import Bundle, Manifest


class Elsewhere:
    """A backend whose calls wait for ``gate``, and fail as often as ``failures`` says."""

    def __init__(self, backend: OnnxRuntimeBackend) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.failures = 0
        self.calls: list[int] = []
        self._backend = backend
        self.score_instances = backend.score_instances

    def score_snippets(self, features: Floats, valid: NDArray[np.bool_]) -> Outputs:
        self.calls.append(len(features))
        assert self.gate.wait(PATIENCE_S)
        if self.failures:
            self.failures -= 1
            raise BackendError("away")
        return self._backend.score_snippets(features, valid)


@pytest.fixture
def elsewhere(backend: OnnxRuntimeBackend) -> Iterator[Elsewhere]:
    made = Elsewhere(backend)
    yield made
    made.gate.set()  # threads that wait would not let the process end


def config_elsewhere(manifest: Manifest, in_flight: int = 2, **options: int) -> EngineConfig:
    changes = {"backend": "triton", "triton": TritonConfig(batches_in_flight=in_flight)}
    return engine_config(manifest, **options).model_copy(update=changes)


RECORDINGS = {"a": tiny_recording(70, 1), "b": tiny_recording(40, 2)}


def assert_as_local(drive: Drive, bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    """All that was published of each stream, in order."""
    local = Drive(bundle.manifest, backend, engine_config(bundle.manifest), RECORDINGS)
    expected = local.finish(chunk=7)
    for name in RECORDINGS:
        assert_same(of_stream(drive.published, name), of_stream(expected, name))


@pytest.mark.parametrize("in_flight", [1, 2, 5])
@pytest.mark.parametrize("failures", [0, 3])
def test_the_same_comes_out_as_at_once(
    bundle: Bundle, backend: OnnxRuntimeBackend, elsewhere: Elsewhere, in_flight: int, failures: int
) -> None:
    config = config_elsewhere(bundle.manifest, in_flight, hop=1, backlog=32)
    drive = Drive(bundle.manifest, elsewhere, config, RECORDINGS)
    drive.take_turns([("a", 20, 1), ("b", 3, 2)])
    elsewhere.failures = failures
    drive.finish(chunk=7)
    assert elsewhere.failures == 0
    assert_as_local(drive, bundle, backend)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere niceness is that of the process")
def test_threads_that_compute_let_the_loop_go_first() -> None:
    inference, own = Inference(2, 1), os.getpriority(os.PRIO_PROCESS, 0)
    for workers in (inference._workers, inference._refiner):
        assert workers is not None
        assert workers.submit(os.getpriority, os.PRIO_PROCESS, 0).result() == min(19, own + 5)
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_steps_go_on_while_an_answer_is_awaited(
    bundle: Bundle, backend: OnnxRuntimeBackend, elsewhere: Elsewhere
) -> None:
    config = config_elsewhere(bundle.manifest, 2, backlog=32)
    drive = Drive(bundle.manifest, elsewhere, config, RECORDINGS)
    elsewhere.gate.clear()
    drive.send("a", 20)
    drive.step()
    stream, pipeline = drive.pipeline.streams["a"], drive.pipeline
    assert (stream.processed, stream.asked) == (0, 4)  # max_batch is 4
    drive.step()
    assert (stream.processed, stream.asked) == (0, 8)
    # As many are in flight as may be: there is nothing to do until one is answered.
    assert not pipeline.pending()
    room = stream.send_until
    drive.send("a", 5)
    assert stream.next_index == 25
    assert stream.send_until == room  # credit is for what is processed
    assert not pipeline.pending()
    assert pipeline.waits_for is None
    elsewhere.gate.set()
    drive.settle()
    assert stream.processed == stream.asked == stream.ready_until()
    drive.finish()
    assert_as_local(drive, bundle, backend)


def test_a_backend_that_is_away_is_tried_by_one_batch(
    bundle: Bundle, backend: OnnxRuntimeBackend, elsewhere: Elsewhere
) -> None:
    drive = Drive(bundle.manifest, elsewhere, config_elsewhere(bundle.manifest, 3), RECORDINGS)
    elsewhere.failures = 10
    drive.send("a", 20)
    stream, pipeline = drive.pipeline.streams["a"], drive.pipeline
    waited = []
    while elsewhere.failures:
        drive.woken.clear()
        while pipeline.pending():
            drive.step()
            waited.append(pipeline.waits_for)
            assert stream.processed == 0
            if pipeline.waits_for is not None:
                assert stream.asked in (0, 4)
        if stream.asked > stream.processed:
            assert drive.woken.wait(PATIENCE_S)
    assert "away" in waited
    drive.settle()
    assert pipeline.waits_for is None
    drive.finish()
    assert_as_local(drive, bundle, backend)


def test_a_swap_forgets_what_is_in_flight_and_asks_the_other(
    bundle: Bundle, backend: OnnxRuntimeBackend, elsewhere: Elsewhere
) -> None:
    """Even one that does not answer at all; the late answers of the first go nowhere."""
    config = config_elsewhere(bundle.manifest, 2)
    drive = Drive(bundle.manifest, elsewhere, config, RECORDINGS)
    drive.take_turns([("a", 10, 0), ("b", 10, 0)])
    drive.settle()
    elsewhere.gate.clear()
    drive.take_turns([("a", 8, 1), ("b", 8, 1)])
    streams = drive.pipeline.streams
    assert any(each.asked > each.processed for each in streams.values())
    manifest = bundle.manifest.model_copy(update={"bundle_id": "other"})
    drive.pipeline.deploy(Deployment(manifest, backend, config))
    assert all(each.asked == each.processed for each in streams.values())
    drive.settle()
    assert all(each.processed == each.ready_until() for each in streams.values())
    elsewhere.gate.set()
    drive.finish()
    assert [len(drive.scores(name)) for name in RECORDINGS] == [70, 40]
    whole = Drive(bundle.manifest, backend, engine_config(bundle.manifest), RECORDINGS)
    whole.finish()
    for name in RECORDINGS:
        np.testing.assert_allclose(drive.scores(name), whole.scores(name), atol=1e-5)


def test_a_canary_that_does_not_answer_holds_its_own_streams_alone(
    bundle: Bundle, backend: OnnxRuntimeBackend, elsewhere: Elsewhere
) -> None:
    config = config_elsewhere(bundle.manifest, 2)
    drive = Drive(bundle.manifest, backend, config, RECORDINGS)
    manifest = bundle.manifest.model_copy(update={"bundle_id": "other"})
    drive.pipeline.deploy(Deployment(manifest, elsewhere, config), ["b"])
    elsewhere.gate.clear()
    drive.take_turns([("b", 10, 1), ("a", 14, 0)])
    streams = drive.pipeline.streams
    while streams["a"].processed < streams["a"].ready_until():
        drive.woken.clear()
        if drive.pipeline.pending():
            drive.step()
        else:
            assert drive.woken.wait(PATIENCE_S)
    assert streams["b"].processed == 0
    drive.pipeline.roll_back()
    drive.finish()
    assert_as_local(drive, bundle, backend)


@pytest.mark.parametrize("failures", [0, 2])
def test_what_is_in_flight_is_not_dropped(
    bundle: Bundle, backend: OnnxRuntimeBackend, elsewhere: Elsewhere, failures: int
) -> None:
    config = config_elsewhere(bundle.manifest, 1)
    features = tiny_recording(70, 1)
    drive = Drive(bundle.manifest, elsewhere, config, {"x": features})
    stream = drive.pipeline.streams["x"]
    stream.policy = "drop_oldest"
    elsewhere.gate.clear()
    drive.send("x", 12)
    drive.step()
    assert (stream.processed, stream.asked) == (0, 4)
    for at in (12, 18, 24):
        drive.pipeline.append("x", at, features[at : at + 6])
    assert (stream.dropped, stream.next_index) == (6 + 10, 30)  # 4 to 9, and 20 to 29
    elsewhere.failures = failures
    elsewhere.gate.set()
    drive.settle()
    drive.finish(chunk=3)
    assert [each.sequence for each in drive.published] == list(range(len(drive.published)))
    valid = np.ones((1, 70), np.bool_)
    whole = backend.score_snippets(features[None], valid)[0][0]
    scores = drive.scores("x")
    missing = [each for each in drive.published if getattr(each, "kind", "") == "gap"]
    spans = [(each.first_index, each.next_index) for each in missing]  # type: ignore[union-attr]
    assert spans[0][0] == 4  # behind what was in flight
    assert sum(stop - start for start, stop in spans) == stream.dropped
    np.testing.assert_allclose(scores[:4], whole[:4], atol=1e-5)
    start, stop = spans[0]
    np.testing.assert_array_equal(scores[start:stop], np.repeat(scores[3:4], stop - start, axis=0))
