"""By steps or by windows: the same publications, whatever comes of the streams."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from driving import PATIENCE_S, Drive, assert_same, engine_config, of_stream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from other_bundles import reweighted_bundle
from tiny_model import DIM, PAST, tiny_recording

from hrpro.engine import incremental
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.batcher import Job
from hrpro.engine.config import EngineConfig
from hrpro.engine.deployment import Deployment
from hrpro.engine.incremental import StatePool, Stepped, runs_by_steps
from hrpro.engine.messages import Publication
from hrpro.engine.settings import SettingsError
from hrpro.export.bundle import Bundle, StepLayout

few = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NAMES = ("a", "b", "c")
LENGTH = 60

# What happens to a stream: (name, what, how many snippets)
happening = st.tuples(
    st.sampled_from(NAMES),
    st.sampled_from(["send", "send", "send", "step", "lose", "rest", "deploy", "forget"]),
    st.integers(1, 12),
)


@pytest.fixture(scope="session")
def other(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return reweighted_bundle(bundle.folder, tmp_path_factory.mktemp("other") / "bundle", seed=3)


@pytest.fixture(scope="session")
def backends(bundle: Bundle, other: Bundle) -> dict[tuple[str, str], OnnxRuntimeBackend]:
    """By bundle and how they compute."""
    return {
        (each.manifest.bundle_id, how): OnnxRuntimeBackend(each, config(each, how))
        for each in (bundle, other)
        for how in ("window", "incremental")
    }


def config(bundle: Bundle, inference: str, **changes: object) -> EngineConfig:
    return engine_config(bundle.manifest, lookahead_s="strict").model_copy(
        update={"inference": inference, **changes}
    )


def published(
    bundles: tuple[Bundle, Bundle],
    backends: dict[tuple[str, str], OnnxRuntimeBackend],
    inference: str,
    happenings: list[tuple[str, str, int]],
    **changes: object,
) -> list[Publication]:
    """What comes of three streams to which these things happen, one after the other."""
    deployments = [
        Deployment(
            each.manifest,
            backends[each.manifest.bundle_id, inference],
            config(each, inference, **changes),
        )
        for each in bundles
    ]
    recordings = {name: tiny_recording(LENGTH, seed) for seed, name in enumerate(NAMES)}
    first = deployments[0]
    drive = Drive(first.manifest, first.backend, first.config, recordings, first_index=5)
    at_work = 0
    for name, what, count in happenings:
        stream = drive.pipeline.streams[name]
        if what == "send":
            drive.send(name, count)
        elif what == "step":
            drive.settle()
        elif what == "lose" and stream.next_index + count <= min(5 + LENGTH, stream.send_until):
            drive.pipeline.give_up(name, stream.next_index + count)
        elif what == "rest":
            drive.settle()
            drive.pipeline.rest(name)
            drive.settle()
        elif what == "deploy":
            drive.settle()
            at_work = 1 - at_work
            drive.pipeline.deploy(deployments[at_work])
        elif what == "forget":  # as where a backend is away: what is in flight is asked for again
            drive.pipeline._finish_under_way()
            deployments[at_work].inference.forget()
            drive.pipeline._offer_all()
    return drive.finish(chunk=9)


@few
@given(
    happenings=st.lists(happening, max_size=30),
    hop=st.sampled_from([1, 3]),
    # In the loop, beside it, or two batches at the same time.
    mode=st.sampled_from([("latency", 1), ("throughput", 1), ("throughput", 2)]),
    is_untidy=st.booleans(),
)
def test_steps_publish_what_windows_publish(
    bundle: Bundle,
    other: Bundle,
    backends: dict[tuple[str, str], OnnxRuntimeBackend],
    happenings: list[tuple[str, str, int]],
    hop: int,
    mode: tuple[str, int],
    is_untidy: bool,
) -> None:
    """Whether slots lie where they did, or some are swapped before each batch."""
    window = bundle.manifest.window.model_copy(update={"hop_snippets": hop})
    changes = {"window": window, "max_wait_ms": 0.0}
    by_windows = published((bundle, other), backends, "window", happenings, **changes)
    changes["mode"], changes["threads"] = mode
    with pytest.MonkeyPatch.context() as patch:
        if is_untidy:
            patch.setattr(incremental, "_IN_VAIN", -1)
            patch.setattr(incremental, "_UNTIDY", 0)
        by_steps = published((bundle, other), backends, "incremental", happenings, **changes)
    for name in NAMES:
        assert_same(of_stream(by_steps, name), of_stream(by_windows, name))


def test_a_stream_is_fed_once(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    """Each snippet once, and one more time what scores depend on where something came between."""
    drive = Drive(
        bundle.manifest, backend, engine_config(bundle.manifest), {"x": tiny_recording(40)}
    )
    fed: list[int] = []
    scorer = drive.pipeline.deployments.current.steps
    assert scorer is not None
    score_step = backend.score_step

    class Counting:
        def score_step(self, features: np.ndarray, *rest: object) -> object:
            fed.append(features.shape[1])
            return score_step(features, *rest)  # type: ignore[arg-type]

    scorer._scorer = Counting()  # type: ignore[assignment]
    context, delay = bundle.manifest.context_snippets, bundle.manifest.lookahead_snippets
    for _ in range(20):
        drive.send("x", 1)
        drive.settle()
    assert fed == [1 + delay] + [1] * (20 - delay - 1)
    fed.clear()
    drive.pipeline.rest("x")
    drive.settle()
    assert sum(fed) == delay  # as if it ended: what is behind counts as missing
    fed.clear()
    drive.send("x", 1 + delay)
    drive.settle()
    assert sum(fed) == context + 1 + delay  # what was fed as missing is there now


class Waiting:
    """A backend whose steps wait for their gate, told by the stream's first feature."""

    def __init__(self, backend: OnnxRuntimeBackend, gates: dict[float, threading.Event]) -> None:
        self.began: list[float] = []
        self._backend = backend
        self._gates = gates

    def score_step(self, features: np.ndarray, *rest: object) -> Stepped:
        stream = float(features[0, -1, 0])
        self.began.append(stream)
        assert self._gates[stream].wait(PATIENCE_S)
        return self._backend.score_step(features, *rest)  # type: ignore[arg-type]


def test_batches_of_other_streams_are_computed_at_the_same_time_and_those_of_one_in_order(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    recordings = {name: np.full((20, DIM), seed, np.float32) for seed, name in enumerate("ab")}
    drive = Drive(bundle.manifest, backend, engine_config(bundle.manifest), recordings)
    gates = {0.0: threading.Event(), 1.0: threading.Event()}
    waiting = Waiting(backend, gates)
    steps = drive.pipeline.deployments.current.steps
    assert steps is not None
    steps._scorer = waiting  # type: ignore[assignment]
    delay = bundle.manifest.lookahead_snippets
    for name in recordings:
        drive.send(name, delay + 2)

    def job(name: str, first: int) -> Job:
        return Job(drive.pipeline.streams[name], first, first + 1, first + 1 + delay)

    prepared = [steps.prepare([job(*each)]) for each in (("a", 0), ("a", 1), ("b", 0))]
    with ThreadPoolExecutor(3) as workers:
        answers = [workers.submit(each.score) for each in prepared]
        for answer, each in zip(answers, prepared, strict=True):
            answer.add_done_callback(lambda _, over=each.over: over())
        gates[1.0].set()
        answers[2].result(PATIENCE_S)  # beside the first, which waits
        assert sorted(waiting.began) == [0.0, 1.0]  # the second has not begun
        gates[0.0].set()
        found = [answer.result(PATIENCE_S) for answer in answers]
    fresh = Drive(bundle.manifest, backend, engine_config(bundle.manifest), recordings)
    steps = fresh.pipeline.deployments.current.steps
    assert steps is not None
    for name in recordings:
        fresh.send(name, delay + 2)
    for scored, (name, first) in zip(found, (("a", 0), ("a", 1), ("b", 0)), strict=True):
        one = Job(fresh.pipeline.streams[name], first, first + 1, first + 1 + delay)
        batch = steps.prepare([one])
        (expected,) = batch.score()
        batch.over()
        for part, of_it in zip(scored[0][1:], expected[1:], strict=True):
            np.testing.assert_array_equal(part, of_it)


def test_a_batch_that_is_given_up_is_not_waited_for(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    config = engine_config(bundle.manifest).model_copy(
        update={"mode": "throughput", "max_wait_ms": 0.0, "threads": 1}
    )
    gates = {1.0: threading.Event()}
    recordings = {"a": np.ones((20, DIM), np.float32)}
    drive = Drive(bundle.manifest, backend, config, recordings)
    inference = drive.pipeline.deployments.current.inference
    steps = drive.pipeline.deployments.current.steps
    assert steps is not None
    real, steps._scorer = steps._scorer, Waiting(backend, gates)  # type: ignore[assignment]
    drive.send("a", 16)
    drive.step()
    drive.step()  # two in flight, of which the second has not begun
    assert len(steps._under_way) == 2
    inference.forget()
    gates[1.0].set()
    steps._scorer = real
    drive.pipeline._offer_all()
    drive.settle()
    drive.send("a", 1)
    drive.settle()
    assert len(steps._under_way) == 1  # the last one; those before are over


def test_slots_are_used_again(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    """A stream that follows another one in its slot knows nothing of it."""
    settings_ = engine_config(bundle.manifest, max_streams=1)
    features = tiny_recording(30, seed=4)
    fresh = Drive(bundle.manifest, backend, settings_, {"x": features}).finish()
    drive = Drive(bundle.manifest, backend, settings_, {"w": 100 * tiny_recording(30, seed=8)})
    drive.finish()
    again = Drive(bundle.manifest, backend, settings_, {"x": features})
    again.pipeline.deployments.current.steps = drive.pipeline.deployments.current.steps
    assert_same(again.finish(), fresh)


def test_more_streams_than_slots_are_refused_before(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    drive = Drive(
        bundle.manifest,
        backend,
        engine_config(bundle.manifest, max_streams=2),
        {name: tiny_recording(20) for name in "ab"},
    )
    assert len(drive.finish()) > 4


# --- the pool ------------------------------------------------------------------------------------

LAYOUT = StepLayout(
    history=4, capacity=3, state={"keys_0": (1, 3, 2), "values_0": (1, 3, 2), "tail": (2, 2)}
)


def rows(*values: float) -> np.ndarray:
    """New keys (1, 1, n, 2) of one stream."""
    return np.repeat(np.array(values, np.float32)[None, None, :, None], 2, axis=3)


def scattered(pool: StatePool, slot: int, arrival: int, new: np.ndarray) -> None:
    n = new.shape[2]
    tail = np.full((1, 2, 2), new[0, 0, -1, 0])
    flags = np.ones((1, 4 + n), np.bool_)
    pool.scatter(np.array([slot]), np.array([arrival]), [new, -new, tail], flags)


def test_the_oldest_row_is_overwritten_in_place(backend: OnnxRuntimeBackend) -> None:
    pool = StatePool(backend, LAYOUT, 4, np.float32)
    scattered(pool, 1, 10, rows(10, 11))  # 10 % 3 = 1
    scattered(pool, 1, 12, rows(12))
    scattered(pool, 1, 13, rows(13))  # in the place of 10
    keys, values, tail = pool.gather(np.array([1]), [])
    assert keys[0, 0, :, 0].tolist() == [12, 13, 11]
    np.testing.assert_array_equal(values, -keys)
    assert tail[0, :, 0].tolist() == [13, 13]
    scattered(pool, 1, 14, rows(14, 15, 16, 17, 18))  # of more than it holds, the newest
    assert pool.gather(np.array([1]), [])[0][0, 0, :, 0].tolist() == [18, 16, 17]


class Noting:
    """A backend whose steps are noted: how many states, and whether they were those of the pool."""

    def __init__(self, backend: OnnxRuntimeBackend) -> None:
        self.steps: list[tuple[int, bool]] = []
        self.pool: StatePool | None = None
        self._backend = backend

    def score_step(
        self, features: np.ndarray, valid: np.ndarray, arrival: np.ndarray, state: list[np.ndarray]
    ) -> Stepped:
        assert self.pool is not None
        in_place = np.shares_memory(state[0], self.pool._parts[0])
        self.steps.append((len(features), in_place))
        return self._backend.score_step(features, valid, arrival, state)


@pytest.mark.parametrize(
    ("slots", "steps"),
    [
        ([2, 3, 4, 5], [(4, True)]),
        ([*range(12), 13, 14], [(15, True)]),  # slot 12 in vain
        ([*range(12), *range(30, 38)], [(12, True), (8, True)]),
        ([*range(16), *range(26, 31), 39], [(22, False)]),  # a third call costs as much as to copy
        ([0, 12], [(2, False)]),
        ([7], [(1, True)]),
    ],
)
def test_slots_give_what_each_gives_alone(
    bundle: Bundle, backend: OnnxRuntimeBackend, slots: list[int], steps: list[tuple[int, bool]]
) -> None:
    """As they lie, where that is not too much in vain; otherwise copied together."""
    layout = bundle.manifest.step
    assert layout is not None
    random = np.random.default_rng(0)
    noting = Noting(backend)
    together = noting.pool = StatePool(noting, layout, 40, np.float32)  # type: ignore[arg-type]
    alone = StatePool(backend, layout, 40, np.float32)
    for slot in range(40):  # slots between them have a past of their own
        past = random.standard_normal((1, 5, DIM), dtype=np.float32)
        for pool in (together, alone):
            there = np.concatenate([pool.flags(np.array([slot])), np.ones((1, 5), bool)], axis=1)
            pool.step(past, there, np.array([slot]), np.zeros(1, np.int64))
    noting.steps.clear()
    for arrival in (5, 7):
        new = random.standard_normal((len(slots), 2, DIM), dtype=np.float32)
        there = np.ones((len(slots), layout.history + 2), np.bool_)
        got = together.step(new, there, np.array(slots), np.full(len(slots), arrival))
        for row, slot in enumerate(slots):
            one = alone.step(new[[row]], there[[row]], np.array([slot]), np.array([arrival]))
            for part, expected in zip(got, one, strict=True):
                np.testing.assert_allclose(part[row], expected[0], atol=1e-5)
    assert noting.steps == 2 * steps
    copied = sum(count for count, in_place in noting.steps if not in_place)
    assert (together.copied, alone.copied) == (copied, 0)


def test_streams_find_the_order_in_which_they_come(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    """Slots are given as streams begin. Those that go on in another order are copied together for
    some time, and then lie in that order, also where streams before them have left."""
    names = [f"{n:02}" for n in range(40)]
    recordings = {name: tiny_recording(60, seed) for seed, name in enumerate(names)}
    config = engine_config(bundle.manifest, max_batch=8, max_streams=40)
    drive = Drive(bundle.manifest, backend, config, recordings)
    steps = drive.pipeline.deployments.current.steps
    assert steps is not None
    for name in names:
        drive.send(name, 5)
        drive.settle()
    for name in names[:10]:  # what is left of the slots begins with the eleventh
        drive.pipeline.end(name, 5)
        drive.settle()
    mixed = np.random.default_rng(0).permutation(names[10:]).tolist()
    copied = []
    for _ in range(40):
        for first in range(0, len(mixed), 5):
            for name in mixed[first : first + 5]:
                drive.send(name, 1)
            drive.settle()
        assert isinstance(steps._pool, StatePool)
        copied.append(steps._pool.copied)
    assert copied[5] > copied[4] > 0
    assert copied[-1] == copied[-15]
    first = steps._places[drive.pipeline.streams[mixed[0]]].slot
    slots = [steps._places[drive.pipeline.streams[name]].slot for name in mixed]
    assert slots == [(first + n) % 30 for n in range(30)]
    for name in mixed:
        alone = Drive(bundle.manifest, backend, config, {name: recordings[name][:45]})
        alone.finish()
        np.testing.assert_allclose(
            np.concatenate(drive.recorders[name].scores)[:40],
            np.concatenate(alone.recorders[name].scores)[:40],
            atol=1e-5,
        )


def test_half_precision_keeps_eleven_bits(backend: OnnxRuntimeBackend) -> None:
    pool = StatePool(backend, LAYOUT, 2, np.float16)
    scattered(pool, 0, 0, rows(1 + 2**-10))
    scattered(pool, 1, 0, rows(1 + 2**-12))
    keys = pool.gather(np.array([0, 1]), [])[0]
    assert keys.dtype == np.float32
    assert keys[:, 0, 0, 0].tolist() == [1 + 2**-10, 1]


# --- settings ------------------------------------------------------------------------------------


def test_what_is_computed_how(bundle: Bundle, tmp_path: Path) -> None:
    manifest = bundle.manifest
    assert runs_by_steps(manifest, EngineConfig())
    assert not runs_by_steps(manifest, EngineConfig(inference="window"))
    assert not runs_by_steps(manifest, EngineConfig(backend="triton"))
    assert runs_by_steps(manifest, EngineConfig(provider="cuda"))
    assert not runs_by_steps(manifest, EngineConfig(provider="tensorrt"))
    without = manifest.model_copy(update={"step": None})
    assert not runs_by_steps(without, EngineConfig())
    for refused, expected in (
        ((without, EngineConfig(inference="incremental")), "a bundle with a step graph"),
        ((manifest, EngineConfig(inference="incremental", backend="triton")), "backend onnx"),
        ((manifest, EngineConfig(inference="incremental", provider="tensorrt")), "provider cpu"),
    ):
        with pytest.raises(SettingsError, match=f"inference incremental: expected {expected}"):
            runs_by_steps(*refused)


def test_the_state_is_told(bundle: Bundle) -> None:
    layout = bundle.manifest.step
    assert layout is not None
    assert layout.capacity == PAST + 1
    assert layout.state["keys_0"] == (2, PAST + 1, DIM // 2)
    assert layout.state["tail"] == (2, DIM)
