"""Which windows go into a batch, how many, and when."""

from __future__ import annotations

import numpy as np
import pytest
from driving import Drive, engine_config
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import LOOKAHEAD, tiny_recording

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.batcher import Batcher, Job, batch_sizes
from hrpro.engine.config import EngineConfig
from hrpro.engine.windows import WindowPlan
from hrpro.export.bundle import Bundle

PLAN = WindowPlan(window=4, hop=1, context=3, lookahead=0, wait=1)


class Source:
    """What a batcher sees of a stream."""

    def __init__(self, name: str, ready: int, plan: WindowPlan = PLAN) -> None:
        self.stream = name
        self.plan = plan
        self.asked = 0
        self.ready = ready

    def ready_until(self) -> int:
        return self.ready

    def windows_from(self, first: int) -> int:
        return self.plan.windows(first, self.ready) if first < self.ready else 0


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def taken(batcher: Batcher) -> list[tuple[str, int]]:
    """A batch as stream and snippet, and asked for."""
    jobs = batcher.take()
    for job in jobs:
        job.stream.asked = job.until
    return [(job.stream.stream, job.first) for job in jobs]


def offer(batcher: Batcher, *sources: Source) -> None:
    for source in sources:
        batcher.offer(source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("max_batch", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])]
)
def test_batches_have_a_few_sizes(max_batch: int, sizes: list[int]) -> None:
    assert batch_sizes(max_batch) == sizes


def test_streams_take_turns_and_what_does_not_fit_is_first_next_time() -> None:
    batcher = Batcher(PLAN, max_batch=4)
    offer(batcher, Source("fast", 5), Source("b", 1), Source("c", 1))
    # 4 of 7: one of each, then a second of the one that has more.
    assert taken(batcher) == [("fast", 0), ("b", 0), ("c", 0), ("fast", 1)]
    offer(batcher, Source("d", 1))
    assert taken(batcher) == [("fast", 2), ("d", 0), ("fast", 3), ("fast", 4)]
    assert taken(batcher) == [] and batcher.due_in_s() is None


def test_three_windows_are_a_batch_of_two_and_one() -> None:
    batcher = Batcher(PLAN, max_batch=8)
    offer(batcher, Source("a", 1), Source("b", 1), Source("c", 1))
    assert taken(batcher) == [("a", 0), ("b", 0)]
    assert taken(batcher) == [("c", 0)]


def test_a_batch_waits_for_others_but_not_for_long() -> None:
    clock = Clock()
    batcher = Batcher(PLAN, max_batch=4, max_wait_s=0.05, now_s=clock)
    offer(batcher, Source("a", 1))
    assert taken(batcher) == [] and batcher.due_in_s() == pytest.approx(0.05)
    clock.now_s += 0.03
    offer(batcher, Source("b", 1))
    assert taken(batcher) == [] and batcher.due_in_s() == pytest.approx(0.02)
    clock.now_s += 0.02
    assert taken(batcher) == [("a", 0), ("b", 0)]


def test_a_full_batch_does_not_wait() -> None:
    batcher = Batcher(PLAN, max_batch=4, max_wait_s=60.0)
    offer(batcher, Source("a", 3))
    assert taken(batcher) == []
    offer(batcher, Source("b", 2))
    assert taken(batcher) == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert taken(batcher) == []  # what is left of "a" waits anew
    assert batcher.due_in_s() == pytest.approx(60.0, abs=30.0)


def test_what_cannot_be_computed_any_more_is_not_waited_for() -> None:
    batcher = Batcher(PLAN, max_batch=4)
    source = Source("a", 1)
    offer(batcher, source)
    source.ready = 0
    offer(batcher, source)
    assert batcher.due_in_s() is None and taken(batcher) == []


@given(
    arrivals=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 9)), max_size=60),
    max_batch=st.integers(1, 9),
)
def test_each_window_is_taken_once_in_order_and_nobody_waits_for_a_fast_one(
    arrivals: list[tuple[str, int]], max_batch: int
) -> None:
    batcher = Batcher(PLAN, max_batch)
    sources = {name: Source(name, 0) for name in "abcdef"}
    served: dict[str, list[int]] = {name: [] for name in sources}
    batches = dict.fromkeys(sources, 0)  # since a stream waits
    for name, count in [*arrivals, *[("a", 0)] * 200]:
        sources[name].ready += count
        offer(batcher, sources[name])
        batch = taken(batcher)
        assert len(batch) in {0, *batch_sizes(max_batch)}
        for stream, first in batch:
            served[stream].append(first)
            batches[stream] = 0
        for stream, source in sources.items():
            if source.asked < source.ready and stream not in dict(batch):
                batches[stream] += 1
                # Six streams, the least size of a batch being 1: each has had its turn by then.
                assert batches[stream] <= len(sources)
    for name, source in sources.items():
        assert served[name] == list(range(source.ready))


def test_where_more_wait_than_fit_batches_go_around_the_places() -> None:
    places = dict(zip("abcdefg", (6, 0, 4, 2, 5, 1, 3), strict=True))
    batcher = Batcher(PLAN, 2, place_of=lambda stream: places[stream.stream])
    sources = {name: Source(name, 1) for name in places}
    offer(batcher, *sources.values())
    assert taken(batcher) == [("b", 0), ("f", 0)]  # places 0 and 1
    sources["b"].ready = 2
    offer(batcher, sources["b"])  # behind: its turn comes again
    assert taken(batcher) == [("d", 0), ("g", 0)]  # 2 and 3
    assert taken(batcher) == [("c", 0), ("e", 0)]
    offer(batcher, Source("f", 1))
    assert taken(batcher) == [("a", 0), ("b", 1)]  # 6, and around to 0
    assert taken(batcher) == [("f", 0)]  # what fits comes in the order in which it was offered


def test_modes_stand_for_values() -> None:
    assert (EngineConfig().batch_limit, EngineConfig().batch_wait_s) == (16, 0.0)
    throughput = EngineConfig(mode="throughput")
    assert (throughput.batch_limit, throughput.batch_wait_s) == (64, 0.05)
    # For throughput each thread computes a batch of its own, where that is done on a CPU.
    in_turn = EngineConfig(threads=4)
    assert (in_turn.inference_workers, in_turn.session_threads) == (1, 4)
    side_by_side = EngineConfig(mode="throughput", threads=4)
    assert (side_by_side.inference_workers, side_by_side.session_threads) == (4, 1)
    assert side_by_side.batches_in_flight == 5
    on_gpu = EngineConfig(mode="throughput", threads=4, provider="cuda")
    assert (on_gpu.inference_workers, on_gpu.session_threads) == (1, 4)
    own = EngineConfig(mode="throughput", max_batch=3, max_wait_ms=0.0)
    assert (own.batch_limit, own.batch_wait_s) == (3, 0.0)


def test_waiting_changes_nothing_but_the_size_of_batches(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    names = ("a", "b", "c")
    recordings = {name: tiny_recording(30, seed) for seed, name in enumerate(names)}

    def scored(wait_ms: float) -> tuple[dict[str, np.ndarray], int]:
        config = engine_config(bundle.manifest, max_batch=4)
        config = config.model_copy(update={"max_wait_ms": wait_ms})
        drive = Drive(bundle.manifest, backend, config, recordings)
        for _ in range(20):
            for name in names:
                drive.send(name, 1)
            drive.step()
        drive.finish(chunk=8)
        return {name: drive.scores(name) for name in names}, drive.pipeline.batches

    (at_once, batches), (later, fewer) = scored(0.0), scored(20.0)
    for name in names:
        np.testing.assert_allclose(later[name], at_once[name], atol=1e-5)
    assert fewer < batches and LOOKAHEAD == 3


def test_a_job_says_what_it_gives() -> None:
    plan = WindowPlan(window=12, hop=4, context=6, lookahead=2, wait=1)
    batcher = Batcher(plan, max_batch=4)
    source = Source("a", 10, plan)
    source.asked = 3
    offer(batcher, source)
    assert batcher.take() == [
        Job(source, 3, 4, 6),  # type: ignore[arg-type]
        Job(source, 4, 8, 10),  # type: ignore[arg-type]
    ]
