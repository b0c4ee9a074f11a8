"""Stage 2 asked by many at once, and beside the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest
from driving import PATIENCE_S, Drive, assert_same, engine_config, of_stream
from numpy.typing import NDArray
from other_bundles import reweighted_bundle
from tiny_model import tiny_recording

from hrpro.engine.asking import Answers, Asking, Question, UnderWay, alone, at_once
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.deployment import Deployment
from hrpro.engine.incremental import Stepped
from hrpro.engine.recovery import save
from hrpro.export.bundle import Bundle

Floats = NDArray[np.float32]


class Adding:
    """A scorer that gives what stands where a proposal begins, and notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[list[int]] | None]] = []

    def score_instances(
        self, embedding: Floats, proposals: Floats, stretch: NDArray[np.int64] | None = None
    ) -> tuple[Floats, Floats, Floats]:
        self.calls.append((len(proposals), None if stretch is None else stretch.tolist()))
        first = np.zeros(len(proposals), np.int64) if stretch is None else stretch[:, 0]
        found = embedding[first + proposals[:, 0].astype(np.int64)]
        return found, proposals + 1, -found


def asking(scorer: Adding, values: list[float], rounds: int = 1) -> Asking[list[float]]:
    """Asks of each of its values in turn; as often as told."""
    outcome: list[float] = []
    for _ in range(rounds):
        embedding = np.array(values, np.float32)[:, None]
        places = np.arange(len(values), dtype=np.float32)
        proposals = np.stack([places, places + 1], axis=1)
        completeness, refined, again = yield Question(scorer, embedding, proposals)
        np.testing.assert_array_equal(refined, proposals + 1)
        np.testing.assert_array_equal(again, -completeness)
        outcome += completeness[:, 0].tolist()
    return outcome


def test_questions_that_come_together_are_one_call_for_each_scorer() -> None:
    one, other = Adding(), Adding()
    all_asking = [asking(one, [1, 2]), asking(other, [3]), asking(one, [4], rounds=2)]
    under_way = UnderWay(all_asking, at_once)
    assert sorted(under_way.take()) == [[1, 2], [3], [4, 4]]
    assert under_way.is_over
    assert one.calls == [(3, [[0, 1], [0, 1], [2, 2]]), (1, None)]
    assert other.calls == [(1, None)]
    assert alone(asking(one, [7, 8])) == [7, 8]


def test_who_asks_nothing_does_not_wait_for_those_who_do() -> None:
    asked: list[Callable[[], Answers]] = []
    answer: Future[Answers] = Future()

    def later(compute: Callable[[], Answers]) -> Future[Answers]:
        asked.append(compute)
        return answer

    scorer = Adding()
    under_way = UnderWay([asking(scorer, [], 0), asking(scorer, [5]), asking(scorer, [6])], later)
    assert under_way.take() == [[]]
    assert under_way.waits and not under_way.is_over
    assert under_way.take() == []
    answer.set_result(asked[0]())
    assert not under_way.waits
    assert under_way.take() == [[5], [6]]
    assert under_way.is_over and len(asked) == 1


class Gated:
    """A backend whose stage 2 waits for ``gate``; ``asked`` says that it was asked."""

    def __init__(self, backend: OnnxRuntimeBackend) -> None:
        self.gate, self.asked = threading.Event(), threading.Event()
        self._backend = backend
        self.score_snippets = backend.score_snippets

    def score_step(self, *inputs: object) -> Stepped:
        return self._backend.score_step(*inputs)  # type: ignore[arg-type]

    def score_instances(self, *inputs: object) -> tuple[Floats, Floats, Floats]:
        self.asked.set()
        assert self.gate.wait(PATIENCE_S)
        return self._backend.score_instances(*inputs)  # type: ignore[arg-type]


RECORDINGS = {"a": tiny_recording(70, 1), "b": tiny_recording(70, 2)}


def until_asked(bundle: Bundle, gated: Gated) -> Drive:
    """Streams on their way, of which some wait for stage 2, and all else is done."""
    config = engine_config(bundle.manifest).model_copy(
        update={"mode": "throughput", "max_wait_ms": 0.0}
    )
    drive = Drive(bundle.manifest, gated, config, RECORDINGS)
    while not gated.asked.is_set():
        for name in RECORDINGS:
            drive.send(name, 1)
        while not gated.asked.is_set() and any(
            each.lag for each in drive.pipeline.streams.values()
        ):
            drive.woken.wait(0.01)
            drive.step()
    return drive


def test_streams_wait_for_stage_2_and_the_loop_does_not(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    gated = Gated(backend)
    drive = until_asked(bundle, gated)
    pipeline = drive.pipeline
    waiting = [each for each in pipeline.streams.values() if each.is_under_way]
    assert waiting
    for each in waiting:
        before = each.processed, each.next_index
        drive.send(each.stream, 2)
        assert not pipeline.rest(each.stream)
        for _ in range(5):
            drive.step()
        assert (each.processed, each.next_index) == (before[0], before[1] + 2)
        each.saved_at = each.processed - 1000
        pipeline.moved.add(each.stream)
        assert save(pipeline, []) == []  # what is under way is not written
    gated.gate.set()
    drive.settle()
    assert not any(each.is_under_way for each in waiting)
    for each in waiting:
        each.localizer = drive.recorders[each.stream].inner
    assert {each.name for each in save(pipeline, [])} == {each.stream for each in waiting}
    drive.finish(chunk=3)
    expected = Drive(bundle.manifest, backend, engine_config(bundle.manifest), RECORDINGS)
    expected.finish(chunk=7)
    for name in RECORDINGS:
        assert_same(of_stream(drive.published, name), of_stream(expected.published, name))


@pytest.mark.parametrize("goes_back", [False, True])
def test_a_bundle_takes_over_what_is_under_way_once_it_is_decided(
    bundle: Bundle,
    backend: OnnxRuntimeBackend,
    tmp_path_factory: pytest.TempPathFactory,
    goes_back: bool,
) -> None:
    folder = tmp_path_factory.mktemp("alike") / "bundle"
    other = reweighted_bundle(bundle.folder, folder, seed=5)
    gated = Gated(backend)
    drive = until_asked(bundle, gated)
    pipeline = drive.pipeline
    (name, *_) = [each.stream for each in pipeline.streams.values() if each.is_under_way]
    before = pipeline.streams[name].processed
    threading.Timer(0.2, gated.gate.set).start()
    config = pipeline.deployments.current.config
    pipeline.deploy(Deployment(other.manifest, OnnxRuntimeBackend(other, config), config))
    assert not pipeline.streams[name].is_under_way
    assert pipeline.streams[name].processed > before
    if goes_back:
        pipeline.roll_back()
    drive.settle()
    published = drive.finish(chunk=3)
    for each in RECORDINGS:
        own = of_stream(published, each)
        assert [one.sequence for one in own] == list(range(len(own)))
    assert not pipeline.streams


def test_what_there_is_no_room_for_waits_until_it_is_decided(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    """A stream that drops its oldest snippets passes over them once, also while it is under way."""
    gated = Gated(backend)
    drive = until_asked(bundle, gated)
    pipeline = drive.pipeline
    (stream, *_) = [each for each in pipeline.streams.values() if each.is_under_way]
    stream.policy = "drop_oldest"
    features = RECORDINGS[stream.stream]
    threading.Timer(0.2, gated.gate.set).start()
    room = stream.send_until
    for at in range(stream.next_index, 60, 4):
        pipeline.append(stream.stream, at, features[at : at + 4])
    assert stream.next_index > room and stream.dropped > 0
    drive.settle()
    drive.finish(chunk=3)
    own = of_stream(drive.published, stream.stream)
    assert [each.sequence for each in own] == list(range(len(own)))
    assert len(np.concatenate(drive.recorders[stream.stream].scores)) == len(features)
