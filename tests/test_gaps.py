"""Snippets that come in any order or never, silent streams, and what there is no room for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from driving import Drive, Floats, assert_same, engine_config, finals
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import CONTEXT, LOOKAHEAD, tiny_recording

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.messages import ActionEvent, Publication, StreamNotice
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.stream import Stream
from hrpro.engine.wire import StreamError
from hrpro.export.bundle import Bundle

BACKLOG = 16
few = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def drive_of(
    bundle: Bundle,
    backend: OnnxRuntimeBackend,
    features: Floats,
    hop: int = 1,
    first_index: int = 0,
    policy: str = "wait",
) -> tuple[Drive, Stream]:
    """A recording that is about to be fed as the stream "x"."""
    config = engine_config(bundle.manifest, hop=hop, backlog=BACKLOG)
    drive = Drive(bundle.manifest, backend, config, {"x": features}, first_index)
    drive.pipeline.streams["x"].policy = policy  # type: ignore[assignment]
    return drive, drive.pipeline.streams["x"]


def masked_scores(backend: OnnxRuntimeBackend, features: Floats, here: np.ndarray) -> Floats:
    """P (T, C) of a whole recording in which some snippets are not there."""
    kept = np.where(here[:, None], features, np.float32(0))
    return backend.score_snippets(kept[None], here[None])[0][0]


def notices(published: Sequence[Publication]) -> list[tuple[str, int, int]]:
    return [
        (each.kind, each.first_index, each.next_index)
        for each in published
        if isinstance(each, StreamNotice)
    ]


def feed_in_order(pipeline: Pipeline, features: Floats, start: int, stop: int) -> None:
    pipeline.append("x", start, features[start:stop])


# --- order ---------------------------------------------------------------------------------------


@few
@given(seed=st.integers(0, 2**32 - 1), hop=st.sampled_from([1, 4]))
def test_in_whatever_order_they_come(
    bundle: Bundle, backend: OnnxRuntimeBackend, seed: int, hop: int
) -> None:
    draw = np.random.default_rng(seed)
    features = tiny_recording(seed=3, length=50)
    expected = drive_of(bundle, backend, features, hop)[0].finish()
    drive, stream = drive_of(bundle, backend, features, hop)
    while stream.next_index < len(features):
        room = min(stream.send_until, len(features))
        first = int(draw.integers(room))
        stop = int(draw.integers(first, min(first + 8, room))) + 1
        drive.pipeline.append("x", first, features[first:stop])
        if draw.random() < 0.5 or stream.next_index == stream.send_until:
            drive.settle()
    assert_same(drive.finish(), expected)
    assert (stream.missing, stream.dropped, stream.received) == (0, 0, len(features))


def test_what_comes_again_is_counted(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    features = tiny_recording(seed=3, length=20)
    drive, stream = drive_of(bundle, backend, features)
    for start, stop in ((0, 4), (6, 9), (2, 8), (7, 10)):
        drive.pipeline.append("x", start, features[start:stop])
    assert (stream.next_index, stream.missing_until) == (10, None)
    assert (stream.received, stream.duplicates) == (10, 2 + 2 + 2)


# --- gaps ----------------------------------------------------------------------------------------


@few
@given(
    gaps=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 12)), min_size=1, max_size=4),
    hop=st.sampled_from([1, 4]),
    chunk=st.integers(1, 9),
)
def test_windows_go_on_with_the_gaps_masked(
    bundle: Bundle,
    backend: OnnxRuntimeBackend,
    gaps: list[tuple[int, int]],
    hop: int,
    chunk: int,
) -> None:
    features = tiny_recording(seed=5, length=60)
    here = np.ones(len(features), dtype=np.bool_)
    for start, length in gaps:
        here[start : start + length] = False
    drive, stream = drive_of(bundle, backend, features, hop)
    at = 0
    while at < len(features):
        until = at + 1
        while until < len(features) and here[until] == here[at] and until - at < chunk:
            until += 1
        if not here[at]:
            drive.pipeline.give_up("x", until)
        else:
            drive.pipeline.append("x", at, features[at:until])
        drive.settle()
        at = until
        assert stream.next_index == at
    published = drive.finish()
    np.testing.assert_allclose(drive.scores("x"), masked_scores(backend, features, here), atol=1e-5)
    edges = np.flatnonzero(np.diff(np.concatenate([[1], here, [1]])))
    spans = [("gap", int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
    assert [each for each in notices(published) if each[0] == "gap"] == spans
    assert stream.missing == int((~here).sum())


def test_a_gap_is_published_before_what_is_decided_behind_it(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    features = tiny_recording(seed=5, length=60)
    drive, _ = drive_of(bundle, backend, features)
    feed_in_order(drive.pipeline, features, 0, 10)
    feed_in_order(drive.pipeline, features, 14, 18)  # early
    drive.settle()
    assert notices(drive.published) == [("opened", 0, 0)]
    drive.pipeline.give_up("x", 14)
    drive.settle()
    assert notices(drive.published) == [("opened", 0, 0), ("gap", 10, 14)]
    at = drive.published.index(
        next(e for e in drive.published if notices([e])[:1] == [("gap", 10, 14)])
    )
    told = [each for each in drive.published if not isinstance(each, StreamNotice)]
    behind = [each for each in told if each.published_index >= 14 + LOOKAHEAD]
    assert all(drive.published.index(each) > at for each in behind)
    assert [each.sequence for each in drive.published] == list(range(len(drive.published)))


def test_a_gap_longer_than_the_room_is_followed(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    features = tiny_recording(seed=6, length=90)
    drive, stream = drive_of(bundle, backend, features)
    feed_in_order(drive.pipeline, features, 0, 10)
    drive.pipeline.give_up("x", 10 + 4 * BACKLOG)
    assert stream.next_index == 10 + 4 * BACKLOG > stream.send_until
    drive.settle()
    feed_in_order(drive.pipeline, features, 74, 90)
    published = drive.finish()
    here = np.ones(90, dtype=np.bool_)
    here[10:74] = False
    np.testing.assert_allclose(drive.scores("x"), masked_scores(backend, features, here), atol=1e-5)
    assert ("gap", 10, 74) in notices(published)


def test_a_gap_at_the_end(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    features = tiny_recording(seed=6, length=20)
    drive, _ = drive_of(bundle, backend, features)
    feed_in_order(drive.pipeline, features, 0, 15)
    drive.pipeline.give_up("x", 20)
    drive.pipeline.end("x", 20)
    drive.settle()
    assert notices(drive.published) == [("opened", 0, 0), ("gap", 15, 20), ("ended", 0, 20)]


# --- silence -------------------------------------------------------------------------------------


def test_a_silent_stream_ends_its_actions_and_goes_on(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    features = tiny_recording(seed=5, length=60)
    drive, stream = drive_of(bundle, backend, features, first_index=0)
    drive.send("x", 8)
    drive.settle()
    drive.send("x", 16)
    drive.settle()
    stop = stream.next_index
    assert drive.pipeline.rest("x")
    drive.settle()
    assert stream.processed == stop and stream.open_actions == 0
    # As if the stream had ended there, but for the last word.
    other, _ = drive_of(bundle, backend, features[:stop])
    expected = other.finish()
    assert isinstance(expected[-1], StreamNotice) and expected[-1].kind == "ended"
    assert_same(drive.published[:-1], expected[:-1])
    assert notices(drive.published)[-1] == ("idle", 0, stop)
    before = len(drive.published)
    assert drive.pipeline.rest("x") and not drive.pipeline.pending()  # once is enough

    stream.localizer = drive.recorders["x"] = type(drive.recorders["x"])(stream.localizer)  # type: ignore[assignment]
    drive.finish()
    later = drive.published[before:]
    assert notices(later) == [("resumed", 0, stop), ("ended", 0, 60)]
    whole = masked_scores(backend, features, np.ones(60, dtype=np.bool_))
    np.testing.assert_allclose(drive.scores("x"), whole[stop:], atol=1e-5)
    ids = [
        {e.id for e in part if isinstance(e, ActionEvent)}
        for part in (drive.published[:before], later)
    ]
    assert ids[0] and ids[1] and max(ids[0]) < min(ids[1])
    assert all(each.start_s >= stop * 0.64 - 1e-9 for each in finals(later))


def test_what_is_missing_or_in_work_keeps_a_stream_awake(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    features = tiny_recording(seed=5, length=60)
    drive, stream = drive_of(bundle, backend, features)
    drive.send("x", 12)
    assert not drive.pipeline.rest("x")  # nothing of it is computed
    drive.settle()
    feed_in_order(drive.pipeline, features, 14, 16)
    assert not drive.pipeline.rest("x")  # 12 and 13 are missing
    feed_in_order(drive.pipeline, features, 12, 14)
    drive.settle()
    assert drive.pipeline.rest("x") and stream.idle


def test_an_end_while_a_stream_is_idle(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    drive, _ = drive_of(bundle, backend, tiny_recording(seed=5, length=30))
    drive.send("x", 12)
    drive.settle()
    drive.pipeline.rest("x")
    drive.pipeline.end("x", 12)  # before the silence is processed
    drive.settle()
    assert notices(drive.published) == [("opened", 0, 0), ("idle", 0, 12), ("ended", 0, 12)]


# --- no room -------------------------------------------------------------------------------------


def test_the_newest_are_dropped(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    features = tiny_recording(seed=7, length=60)
    drive, stream = drive_of(bundle, backend, features, policy="drop_newest")
    room = stream.send_until
    assert room == 1 + LOOKAHEAD + BACKLOG
    for start in range(0, 30, 6):  # nothing is processed meanwhile
        drive.pipeline.append("x", start, features[start : start + 6])
    assert (stream.next_index, stream.dropped, stream.received) == (30, 30 - room, room)
    drive.settle()
    published = drive.finish()
    here = np.ones(60, dtype=np.bool_)
    here[room:30] = False
    np.testing.assert_allclose(drive.scores("x"), masked_scores(backend, features, here), atol=1e-5)
    assert notices(published)[1] == ("gap", room, 30)


@pytest.mark.parametrize("hop", [1, 4])
def test_the_oldest_are_dropped(bundle: Bundle, backend: OnnxRuntimeBackend, hop: int) -> None:
    features = tiny_recording(seed=7, length=80)
    drive, stream = drive_of(bundle, backend, features, hop, policy="drop_oldest")
    drive.send("x", 8)
    drive.settle()
    first = stream.processed
    while stream.next_index < 48:  # nothing is computed meanwhile
        at = stream.next_index
        drive.pipeline.append("x", at, features[at : at + 6])
        assert stream.next_index == at + 6 <= stream.send_until
    dropped = stream.dropped
    assert stream.processed == first + dropped and dropped % hop == 0 and dropped > 16
    drive.settle()
    drive.finish(chunk=4)
    assert stream.dropped == dropped
    scores = drive.scores("x")
    whole = masked_scores(backend, features, np.ones(80, dtype=np.bool_))
    # The last score stands in for those that were dropped; all others are as ever.
    np.testing.assert_allclose(scores[:first], whole[:first], atol=1e-5)
    expected = np.repeat(scores[first - 1 : first], dropped, axis=0)
    np.testing.assert_array_equal(scores[first : first + dropped], expected)
    np.testing.assert_allclose(scores[first + dropped :], whole[first + dropped :], atol=1e-5)
    assert ("gap", first, first + dropped) in notices(drive.published)
    assert (stream.received, stream.missing) == (80, 0)


def test_what_was_dropped_comes_again(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    features = tiny_recording(seed=7, length=60)
    drive, stream = drive_of(bundle, backend, features, policy="drop_newest")
    for start in (0, 6, 12, 18, 18, 12):
        drive.pipeline.append("x", start, features[start : start + 6])
    assert (stream.dropped, stream.received, stream.next_index) == (4, 20, 24)


def test_a_gap_is_published_whatever_is_given_up_before_it(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    features = tiny_recording(seed=7, length=60)
    drive, stream = drive_of(bundle, backend, features)
    drive.send("x", 4)
    drive.pipeline.give_up("x", 6)
    drive.pipeline.give_up("x", 3)
    drive.finish()
    assert ("gap", 4, 6) in notices(drive.published) and stream.missing == 2


def test_no_more_is_dropped_than_is_known(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    features = tiny_recording(seed=7, length=80)
    drive, stream = drive_of(bundle, backend, features, policy="drop_oldest")
    drive.send("x", 6)
    drive.pipeline.give_up("x", 40)  # far beyond the room
    drive.pipeline.append("x", 40, features[40:56])
    drive.settle()
    assert stream.processed <= stream.known_until <= stream.next_index == 56
    drive.finish()
    assert len(drive.scores("x")) == 80
    gaps = [stop - start for kind, start, stop in notices(drive.published) if kind == "gap"]
    assert sum(gaps) == 34 + stream.dropped  # 6 to 39 never came


def test_what_never_came_is_not_dropped_again(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    features = tiny_recording(seed=7, length=80)
    drive, stream = drive_of(bundle, backend, features, policy="drop_oldest")
    drive.send("x", 8)
    drive.settle()
    first = stream.processed
    drive.pipeline.give_up("x", 11)
    while stream.next_index < 35:
        at = stream.next_index
        drive.pipeline.append("x", at, features[at : at + 6])
    assert stream.processed > 11
    assert stream.dropped == stream.processed - first - 3  # 8 to 10
    assert stream.missing == 3


def test_nobody_may_send_without_end(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    features = tiny_recording(seed=7, length=60)
    drive, stream = drive_of(bundle, backend, features, policy="drop_newest")
    with pytest.raises(StreamError, match="room up to snippet 20") as caught:
        drive.pipeline.append("x", 2**40, features[:1])
    assert caught.value.code == "no_credit"
    assert (stream.next_index, stream.dropped, stream.known_until) == (0, 0, 0)


def test_context_is_what_the_test_counts_on() -> None:
    assert (CONTEXT, LOOKAHEAD) == (13, 3)
