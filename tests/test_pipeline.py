"""The data path with a real bundle: chunks, windows, batches and neighbours change nothing."""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest
from driving import Drive, Turn, assert_same, engine_config, finals, last_stop, of_stream, renamed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import CLASSES, CONTEXT, DIM, LOOKAHEAD, tiny_recording

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.config import EngineConfig
from hrpro.engine.deployment import Deployment
from hrpro.engine.localizer import localize
from hrpro.engine.messages import ActionEvent, Publication, StreamNotice
from hrpro.engine.offline import localize_recording
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.settings import SettingsError, load_settings
from hrpro.engine.windows import WindowPlan, plan_windows
from hrpro.export.bundle import Bundle

SNIPPET_S = 0.64
few = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def whole_scores(backend: OnnxRuntimeBackend, features: np.ndarray) -> np.ndarray:
    return backend.score_snippets(features[None], np.ones((1, len(features)), np.bool_))[0][0]


def alone(
    bundle: Bundle, backend: OnnxRuntimeBackend, features: np.ndarray, first_index: int, hop: int
) -> list[Publication]:
    """What comes of a recording that has the engine for itself, a window an inference."""
    config = engine_config(bundle.manifest, hop=hop, max_batch=1)
    return Drive(bundle.manifest, backend, config, {"x": features}, first_index).finish()


# --- windows -------------------------------------------------------------------------------------


def test_the_tiny_model_has_the_window_that_the_tests_count_on(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert (
        (manifest.context_snippets, manifest.lookahead_snippets) == (CONTEXT, LOOKAHEAD) == (13, 3)
    )
    assert (manifest.feature_dim, manifest.classes, manifest.exact) == (DIM, CLASSES, True)


@pytest.mark.parametrize(
    ("hop", "window", "lookahead_snippets", "expected"),
    [
        # The shortest window: 13 + 1 + 3. A run that ends before snippet 9 is known to be over
        # with the scores of 9, which need 12: a look-ahead of 4 from the border 9.
        (1, None, 4, WindowPlan(window=17, hop=1, context=13, lookahead=3, wait=1)),
        (1, None, 8, WindowPlan(window=17, hop=1, context=13, lookahead=3, wait=5)),
        # With hop 4, the scores of 9 may come only with those of 12, which need 15.
        (4, None, 8, WindowPlan(window=20, hop=4, context=13, lookahead=3, wait=2)),
        # What a longer window has more is context.
        (4, 32, 7, WindowPlan(window=32, hop=4, context=25, lookahead=3, wait=1)),
    ],
)
def test_window_plans(
    bundle: Bundle, hop: int, window: int | None, lookahead_snippets: int, expected: WindowPlan
) -> None:
    config = engine_config(bundle.manifest, hop, window, lookahead_snippets * SNIPPET_S)
    assert plan_windows(bundle.manifest, config) == expected


def test_where_a_window_ends_and_what_it_counts() -> None:
    plan = WindowPlan(window=20, hop=4, context=13, lookahead=3, wait=2)
    # Snippets 8 to 11 are counted by the window that ends before 12 + 3.
    assert [plan.counts_until(t) for t in (8, 11, 12)] == [12, 12, 16]
    assert [plan.stop(t) for t in (8, 11, 12)] == [15, 15, 19]


def test_a_window_that_is_too_short_is_refused(bundle: Bundle) -> None:
    config = engine_config(bundle.manifest, hop=4, window=19)
    expected = (
        r"window_snippets: expected at least 20 \(context 13 \+ hop 4 \+ look-ahead 3\), got 19"
    )
    with pytest.raises(SettingsError, match=expected):
        plan_windows(bundle.manifest, config)


def test_a_lookahead_that_is_too_short_is_refused(bundle: Bundle) -> None:
    # 4 snippets are needed, see the plans above: 2.56 s.
    config = engine_config(bundle.manifest, lookahead_s=2.5)
    with pytest.raises(SettingsError, match=r"expected at least 2\.56 .* or strict, got 2\.5"):
        plan_windows(bundle.manifest, config)


@pytest.mark.parametrize(("hop", "least"), [(1, 4), (4, 7)])
def test_strict_is_the_least_lookahead_by_name(
    bundle: Bundle, backend: OnnxRuntimeBackend, hop: int, least: int
) -> None:
    named = engine_config(bundle.manifest, hop, lookahead_s="strict")
    in_seconds = engine_config(bundle.manifest, hop, lookahead_s=least * SNIPPET_S)
    plan = plan_windows(bundle.manifest, named)
    assert plan == plan_windows(bundle.manifest, in_seconds)
    assert plan.wait == 1
    one, other = (
        Drive(bundle.manifest, backend, config, {"x": tiny_recording(80)}, first_index=2)
        for config in (named, in_seconds)
    )
    assert one.pipeline.lookahead_s == pytest.approx(least * SNIPPET_S)
    assert_same(one.finish(chunk=5), other.finish())
    assert finals(one.published)


@pytest.mark.parametrize("value", [-0.5, "loose", True, None, [1.0]])
def test_a_lookahead_is_strict_or_seconds(value: object) -> None:
    expected = "lookahead_s: expected strict or seconds of at least 0, came "
    with pytest.raises(SettingsError) as refused:
        load_settings(EngineConfig, None, [], {"lookahead_s": value})
    assert str(refused.value) == f"{expected}{json.dumps(value)} (default)"


def test_a_lookahead_as_it_is_given() -> None:
    given = [
        load_settings(EngineConfig, None, [f"lookahead_s={t}"]) for t in ("strict", "2", "0.5")
    ]
    assert [each.lookahead_s for each in given] == ["strict", 2.0, 0.5]


# --- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hop", "window", "first_index", "length"),
    [
        (1, None, 0, 50),
        (1, 40, 7, 50),
        (4, None, 0, 50),
        (4, None, 6, 47),  # neither end on a multiple of the hop
        (5, 64, 1000, 33),
        (16, None, 3, 40),
        (1, None, 5, 1),
        (1, None, 0, 2),
        (4, None, 2, CONTEXT - 1),
        (32, None, 0, 5),  # shorter than a hop
    ],
)
def test_stitched_scores_are_those_of_the_whole_recording(
    bundle: Bundle,
    backend: OnnxRuntimeBackend,
    hop: int,
    window: int | None,
    first_index: int,
    length: int,
) -> None:
    features = tiny_recording(length)
    config = engine_config(bundle.manifest, hop, window, lookahead_s=64.0)
    drive = Drive(bundle.manifest, backend, config, {"x": features}, first_index)
    drive.finish(chunk=3)
    np.testing.assert_allclose(drive.scores("x"), whole_scores(backend, features), atol=1e-4)


def test_the_recordings_have_something_to_find(backend: OnnxRuntimeBackend) -> None:
    scores = whole_scores(backend, tiny_recording(200))
    assert scores.min() < 0.1 and scores.max() > 0.8
    assert ((scores > 0.5).mean(axis=0) > 0.05).all()
    assert ((scores < 0.25).mean(axis=0) > 0.05).all()


@few
@given(
    length=st.integers(0, 90),
    seed=st.integers(0, 1000),
    hop=st.sampled_from([1, 3, 8]),
    chunk=st.sampled_from([1, 7, 1000]),
    max_batch=st.sampled_from([1, 4]),
)
def test_with_an_endless_lookahead_the_engine_is_offline(
    bundle: Bundle,
    backend: OnnxRuntimeBackend,
    length: int,
    seed: int,
    hop: int,
    chunk: int,
    max_batch: int,
) -> None:
    features = tiny_recording(length, seed)
    # Soft-NMS of what reached the localizer, in one piece: the same arithmetic to the last digit.
    config = engine_config(bundle.manifest, hop, lookahead_s=640.0, max_batch=max_batch)
    drive = Drive(bundle.manifest, backend, config, {"x": features})
    recorder = drive.recorders["x"]
    got = finals(drive.finish(chunk))
    if not length:
        assert got == []
        return
    embedding = np.concatenate(recorder.embedding)
    expected = localize(drive.scores("x"), embedding, bundle.manifest.localization, backend)
    assert recorder.proposals == expected
    assert [each.label for each in got] == [CLASSES[each.label_index] for each in expected]
    clock = bundle.manifest.clock
    assert [(each.start_s, each.end_s, each.score) for each in got] == [
        (clock.seconds(p.start), clock.seconds(p.end), p.score) for p in expected
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_offline_is_the_whole_recording_at_once(
    bundle: Bundle, backend: OnnxRuntimeBackend, seed: int
) -> None:
    features = tiny_recording(60, seed)
    expected = localize_recording(backend, bundle.manifest, features, bundle.manifest.localization)
    config = engine_config(bundle.manifest, lookahead_s=640.0)
    got = finals(Drive(bundle.manifest, backend, config, {"x": features}).finish())
    assert len(got) > 20
    assert [each.label for each in got] == [CLASSES[each.label_index] for each in expected]
    np.testing.assert_allclose(
        [(each.start_s, each.end_s, each.score) for each in got],
        [(p.start * SNIPPET_S, p.end * SNIPPET_S, p.score) for p in expected],
        atol=1e-4,
    )


names = ("a", "b", "c")
turn = st.tuples(st.sampled_from(names), st.integers(0, 9), st.integers(0, 2))


@few
@given(
    lengths=st.tuples(*[st.integers(0, 40)] * 3),
    first_index=st.integers(0, 9),
    hop=st.sampled_from([1, 3, 4]),
    max_batch=st.sampled_from([1, 2, 5]),
    turns=st.lists(turn, max_size=25),
)
def test_chunks_neighbours_and_batches_change_nothing(
    bundle: Bundle,
    backend: OnnxRuntimeBackend,
    lengths: tuple[int, int, int],
    first_index: int,
    hop: int,
    max_batch: int,
    turns: list[Turn],
) -> None:
    recordings = {
        name: tiny_recording(length, seed)
        for seed, (name, length) in enumerate(zip(names, lengths, strict=True))
    }
    config = engine_config(bundle.manifest, hop=hop, max_batch=max_batch)
    drive = Drive(bundle.manifest, backend, config, recordings, first_index)
    drive.take_turns(turns)
    published = drive.finish(chunk=7)
    for name, features in recordings.items():
        got = of_stream(published, name)
        assert_same(got, renamed(alone(bundle, backend, features, first_index, hop), name))


# --- what is published ---------------------------------------------------------------------------


@pytest.mark.parametrize("hop", [1, 4])
@pytest.mark.parametrize("lookahead_snippets", [3, 4, 6, 7, 9])
def test_a_lookahead_is_refused_or_kept(
    bundle: Bundle, backend: OnnxRuntimeBackend, hop: int, lookahead_snippets: int
) -> None:
    config = engine_config(bundle.manifest, hop, lookahead_s=lookahead_snippets * SNIPPET_S)
    try:
        drive = Drive(bundle.manifest, backend, config, {"x": tiny_recording(80)}, first_index=2)
    except SettingsError:
        # Only what cannot be kept is refused: the last score of a hop waits for 3 snippets, the
        # first one for hop - 1 more, and that a run is over shows in the snippet behind it.
        assert lookahead_snippets < LOOKAHEAD + hop
        return
    got = finals(drive.finish(chunk=5))
    scores = drive.scores("x")
    for final, proposal in zip(got, drive.recorders["x"].proposals, strict=True):
        known = final.published_index + 1 - LOOKAHEAD  # scores, when it was published
        stop = last_stop(scores, config.localization, proposal, 2, known)
        assert final.published_index + 1 <= stop + lookahead_snippets


def test_publications_are_numbered_and_in_time(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    published = alone(bundle, backend, tiny_recording(60), first_index=5, hop=4)
    opened, *between, ended = published
    proposals = finals(published)
    events = [each for each in published if isinstance(each, ActionEvent)]
    assert proposals and events and len(proposals) + len(events) == len(between)
    assert opened == StreamNotice("x", 1, 0, "opened", 5, 5, 0, 0)
    count = len(published) - 1
    assert ended == StreamNotice("x", 1, count, "ended", 5, 65, len(proposals), len(events))
    assert [each.sequence for each in published] == list(range(len(published)))
    assert [each.id for each in proposals] == list(range(len(proposals)))
    told = [each for each in between if not isinstance(each, StreamNotice)]
    indices = [each.published_index for each in told]
    assert indices == sorted(indices)
    assert indices[-1] == 64
    for each in told:
        assert each.published_s == pytest.approx((each.published_index + 1) * SNIPPET_S)
        assert each.bundle_id == bundle.manifest.bundle_id
    for final in proposals:
        assert 5 * SNIPPET_S <= final.start_s < final.end_s <= 65 * SNIPPET_S
        assert 0 < final.score <= 1


def test_an_event_tells_of_nothing_that_has_not_come(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    for each in alone(bundle, backend, tiny_recording(60), first_index=5, hop=1):
        if isinstance(each, ActionEvent) and each.kind == "start":
            # Scores wait for the model's look-ahead, but for those at the recording's end.
            at_end = each.published_index == 64
            scored = each.published_index - (0 if at_end else LOOKAHEAD)
            # An action covers at least a half of the snippet in which it starts.
            assert each.start_s <= (scored + 0.5 + 1e-9) * SNIPPET_S


@pytest.mark.parametrize("length", [0, 1, 2, CONTEXT - 1])
def test_the_tail_is_flushed(bundle: Bundle, backend: OnnxRuntimeBackend, length: int) -> None:
    features = tiny_recording(length, seed=3)
    config = engine_config(bundle.manifest, hop=4)
    drive = Drive(bundle.manifest, backend, config, {"x": features}, first_index=9)
    *_, ended = drive.finish()
    assert isinstance(ended, StreamNotice)
    assert (ended.kind, ended.first_index, ended.next_index) == ("ended", 9, 9 + length)
    assert sum(map(len, drive.recorders["x"].scores)) == length
    assert (ended.proposals > 0) == (length > 0)
    opened = {each.id for each in drive.published if isinstance(each, ActionEvent)}
    closed = [e.id for e in drive.published if isinstance(e, ActionEvent) and e.is_last]
    assert sorted(closed) == sorted(opened)


def test_a_stream_leaves_nothing_that_has_to_be_looked_for(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    """No cycles: all that belongs to it goes with the last reference to it."""
    features = tiny_recording(60)
    pipeline = Pipeline(Deployment(bundle.manifest, backend, engine_config(bundle.manifest)))
    gc.collect()
    gc.disable()
    try:
        stream = pipeline.open("x", 0)
        left = [weakref.ref(each) for each in (stream, stream.localizer, stream._snippets)]
        for first in range(0, 60, 5):
            pipeline.append("x", first, features[first : first + 5])
            while pipeline.pending():
                list(pipeline.step())
        assert stream.proposals > 0
        pipeline.end("x", 60)
        while pipeline.pending():
            list(pipeline.step())
        del stream
        assert not pipeline.streams
        assert [each() for each in left] == [None] * 3
    finally:
        gc.enable()


def test_what_comes_behind_a_silence_is_not_what_its_end_is_decided_from(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    features = tiny_recording(40)
    pipeline = Pipeline(Deployment(bundle.manifest, backend, engine_config(bundle.manifest)))
    stream = pipeline.open("x", 0)
    came = stream.send_until
    pipeline.append("x", 0, features[:came])
    while pipeline.pending():
        list(pipeline.step())
    pipeline.rest("x")
    pipeline.append("x", came, features[came : came + 2])
    assert stream.newest_used(came - 2) == came - 1
    while pipeline.pending():
        list(pipeline.step())
    assert stream.newest_used(came - 2) == came - 3 + LOOKAHEAD == came
