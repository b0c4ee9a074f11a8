"""What the pipeline refuses, and that it leaves every stream as it was."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from driving import Drive, assert_same, engine_config, of_stream, renamed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import CONTEXT, DIM, LOOKAHEAD, tiny_recording

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.deployment import Deployment
from hrpro.engine.messages import Publication, StreamNotice
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.wire import StreamError
from hrpro.export.bundle import Bundle

BACKLOG = 16
RECORDINGS = {"a": tiny_recording(40, 1), "b": tiny_recording(35, 2)}

Misdeed = Callable[[Pipeline], object]


def new_drive(bundle: Bundle, backend: OnnxRuntimeBackend) -> Drive:
    config = engine_config(bundle.manifest, backlog=BACKLOG, max_streams=2)
    return Drive(bundle.manifest, backend, config, RECORDINGS)


def zeros(n: int, dim: int = DIM) -> np.ndarray:
    return np.zeros((n, dim), np.float32)


def spoilt(value: float) -> np.ndarray:
    """Snippets 10 to 12, of which 11 has a value that is not finite."""
    features = zeros(3)
    features[1, 5] = value
    return features


def state(pipeline: Pipeline) -> dict[str, tuple[int, ...]]:
    return {
        name: (s.session, s.next_index, s.processed, s.send_until, s.duplicates, s.ended)
        for name, s in pipeline.streams.items()
    }


# The streams have got 10 snippets, and 7 of them are processed: 3 wait for the look-ahead. The
# next window ends before 8 + 3; there is room for 16 more: 27.
MISDEEDS: list[tuple[str, Misdeed, str, str, int | None]] = [
    (
        "dimension",
        lambda p: p.append("a", 10, zeros(1, DIM + 1)),
        "wrong_dimension",
        "stream 'a', snippet 10: expected D = 8, got 9",
        10,
    ),
    (
        "nan",
        lambda p: p.append("a", 10, spoilt(np.nan)),
        "not_finite",
        "stream 'a', snippet 11: expected finite features, got NaN or infinity",
        10,
    ),
    (
        "infinity",
        lambda p: p.append("a", 10, spoilt(-np.inf)),
        "not_finite",
        "stream 'a', snippet 11: expected finite features",
        10,
    ),
    (
        "no-credit",
        lambda p: p.append("a", 10, zeros(18)),
        "no_credit",
        "stream 'a', snippet 10: room up to snippet 27, got 18 snippets",
        10,
    ),
    (
        "no-credit-behind-duplicates",
        lambda p: p.append("a", 0, zeros(28)),
        "no_credit",
        "room up to snippet 27, got 28 snippets",
        10,
    ),
    (
        "early-end",
        lambda p: p.end("a", 9),
        "out_of_order",
        "stream 'a', snippet 9: expected the end at snippet 10",
        10,
    ),
    ("late-end", lambda p: p.end("a", 11), "out_of_order", "expected the end at snippet 10", 10),
    (
        "unknown",
        lambda p: p.append("z", 0, zeros(1)),
        "unknown_stream",
        "stream 'z' is not open",
        None,
    ),
    ("unknown-end", lambda p: p.end("z", 0), "unknown_stream", "stream 'z' is not open", None),
    (
        "too-many",
        lambda p: p.open("c", 0),
        "too_many_streams",
        "stream 'c': 2 streams are open",
        None,
    ),
]


@pytest.mark.parametrize(
    ("misdeed", "code", "message", "next_index"),
    [pytest.param(*rest, id=name) for name, *rest in MISDEEDS],
)
def test_a_misdeed_is_refused_and_disturbs_nobody(
    bundle: Bundle,
    backend: OnnxRuntimeBackend,
    misdeed: Misdeed,
    code: str,
    message: str,
    next_index: int | None,
) -> None:
    drive = new_drive(bundle, backend)
    for name in RECORDINGS:
        drive.send(name, 10)
    drive.settle()
    before = state(drive.pipeline)
    assert before["a"] == (1, 10, 7, 27, 0, False)
    with pytest.raises(StreamError) as caught:
        misdeed(drive.pipeline)
    assert caught.value.code == code
    assert message in str(caught.value)
    assert caught.value.next_index == next_index
    assert state(drive.pipeline) == before
    assert not drive.pipeline.pending()
    published = drive.finish()
    undisturbed = new_drive(bundle, backend).finish()
    for name in RECORDINGS:
        assert_same(of_stream(published, name), of_stream(undisturbed, name))


def test_after_the_end_nothing_more_is_taken(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    drive = new_drive(bundle, backend)
    drive.send("a", 10)
    drive.pipeline.end("a", 10)
    with pytest.raises(StreamError, match="snippet 10: no more snippets after the end") as caught:
        drive.pipeline.append("a", 10, zeros(1))
    assert (caught.value.code, caught.value.next_index) == ("out_of_order", 10)
    drive.pipeline.end("a", 10)  # said twice, as after a lost answer
    drive.settle()
    with pytest.raises(StreamError) as caught:
        drive.pipeline.end("a", 10)
    assert caught.value.code == "unknown_stream"
    assert list(drive.pipeline.streams) == ["b"]


def test_a_stream_can_always_fill_its_room(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    drive = new_drive(bundle, backend)
    stream = drive.pipeline.streams["a"]
    # The first window ends before 1 + 3.
    assert stream.send_until == 1 + LOOKAHEAD + BACKLOG == 20
    drive.pipeline.append("a", 0, RECORDINGS["a"][:20])
    assert stream.next_index == 20
    drive.settle()
    assert (stream.processed, stream.send_until) == (17, 18 + LOOKAHEAD + BACKLOG)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), max_size=12))
def test_snippets_that_come_again_are_dropped_and_counted(
    bundle: Bundle, backend: OnnxRuntimeBackend, chunks: list[tuple[int, int]]
) -> None:
    features = RECORDINGS["a"]
    drive = new_drive(bundle, backend)
    stream = drive.pipeline.streams["a"]
    repeated = 0
    for back, count in chunks:
        start = max(0, stream.next_index - back)
        stop = min(start + count, len(features))
        repeated += min(stop, stream.next_index) - start
        again = features[start:stop].copy()
        again[: stream.next_index - start] = 7.0  # what came first stands
        drive.pipeline.append("a", start, again)
        drive.settle()
        assert stream.duplicates == repeated
    published = drive.finish()
    assert_same(of_stream(published, "a"), of_stream(new_drive(bundle, backend).finish(), "a"))


def test_sessions_are_counted_by_stream(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    pipeline = Pipeline(Deployment(bundle.manifest, backend, engine_config(bundle.manifest)))
    sessions = []
    for name in ("a", "a", "b", "a"):
        opened = pipeline.open(name, 5)
        assert pipeline.open(name, 99) is opened  # a feeder that comes back
        assert (opened.first_index, opened.next_index) == (5, 5)
        pipeline.end(name, 5)
        notices = []
        while pipeline.pending():
            notices += pipeline.step()
        assert [(each.kind, each.sequence) for each in notices] == [("opened", 0), ("ended", 1)]  # type: ignore[union-attr]
        sessions.append((name, {each.session for each in notices}))
    assert sessions == [("a", {1}), ("a", {2}), ("b", {1}), ("a", {3})]


def test_a_session_begins_anew(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    drive = new_drive(bundle, backend)
    first = of_stream(drive.finish(), "a")
    drive.published = []
    drive.pipeline.open("a", 0)
    drive.recordings = {"a": RECORDINGS["a"]}
    assert_same([_in_session(each, 1) for each in drive.finish()], first)


def _in_session(publication: Publication, session: int) -> Publication:
    assert publication.session == 2
    object.__setattr__(publication, "session", session)
    return publication


def test_two_pipelines_share_no_state(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    one, two = new_drive(bundle, backend), new_drive(bundle, backend)
    two.recordings = {"a": RECORDINGS["b"], "b": RECORDINGS["a"]}
    for _ in range(12):
        for drive in (one, two):
            drive.take_turns([("a", 2, 1), ("b", 3, 0)])
    two.finish()
    published = one.finish()
    expected = new_drive(bundle, backend).finish()
    for name, other in (("a", "b"), ("b", "a")):
        assert_same(of_stream(published, name), of_stream(expected, name))
        assert_same(of_stream(two.published, name), renamed(of_stream(expected, other), name))


@pytest.mark.parametrize("value", [1e30, -3e38])
@pytest.mark.parametrize(("hop", "window"), [(1, None), (4, None), (4, 40)])
def test_absurd_features_do_not_reach_further_than_the_model(
    bundle: Bundle, backend: OnnxRuntimeBackend, value: float, hop: int, window: int | None
) -> None:
    at = 30
    features = tiny_recording(80)
    absurd = features.copy()
    absurd[at] = value
    scores = []
    for each in (features, absurd):
        config = engine_config(bundle.manifest, hop, window, lookahead_s=64.0)
        drive = Drive(bundle.manifest, backend, config, {"x": each})
        *_, ended = drive.finish()
        assert isinstance(ended, StreamNotice) and ended.next_index == 80
        scores.append(drive.scores("x"))
    ordinary, disturbed = scores
    assert np.isfinite(disturbed).all()
    np.testing.assert_allclose(disturbed[: at - LOOKAHEAD], ordinary[: at - LOOKAHEAD], atol=1e-4)
    after = at + CONTEXT + 1
    np.testing.assert_allclose(disturbed[after:], ordinary[after:], atol=1e-4)
