"""The scores of snippets for who looks at them: the values, and that nobody else pays for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from driving import Drive, engine_config
from serving import (
    CLOCK,
    PATIENCE_S,
    TinyPipeline,
    serving,
)
from tiny_model import tiny_recording

from hrpro.clients import FeatureFeeder, NoReplyError, ScoreSubscriber, SnippetScores
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.client_key import ClientKey, Role, read_client_key
from hrpro.engine.curves import Curves
from hrpro.engine.keys import Keyring, new_client
from hrpro.engine.server import Server
from hrpro.export.bundle import Bundle

pytestmark = pytest.mark.usefixtures("nothing_left_open")


def feed(server: Server, stream: str, values: list[float], key: ClientKey | None = None) -> None:
    """Snippets whose scores are these, and their attention half of that."""
    with FeatureFeeder(
        server.feed_address, stream, 2, CLOCK, timeout_s=PATIENCE_S, key=key
    ) as feeder:
        feeder.send(np.array([[each, each / 2] for each in values], np.float32))
        feeder.end()


def receive(subscriber: ScoreSubscriber, snippets: int) -> list[SnippetScores]:
    came: list[SnippetScores] = []
    while sum(len(each.curves) for each in came) < snippets:
        scores = subscriber.receive(PATIENCE_S)
        assert scores is not None
        came.append(scores)
    return came


def wait_until(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.005)


def test_they_are_those_of_the_model(bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
    """By steps, by windows, and where a stream has begun before somebody looks."""
    features = tiny_recording(60)
    scores, _, attention = backend.score_snippets(features[None], np.ones((1, 60), np.bool_))
    config = engine_config(bundle.manifest, backlog=40)
    drive = Drive(bundle.manifest, backend, config, {"a": features})
    curves = drive.pipeline.curves
    drive.send("a", 30)
    drive.settle()
    assert curves.take() == []
    curves.subscribed(b"scores/a/")
    first = drive.pipeline.streams["a"].processed
    drive.finish()
    came = curves.take()
    assert [each.first_index for each in came] == [
        first + sum(len(before.curves) for before in came[:n]) for n in range(len(came))
    ]
    assert came[0].classes == bundle.manifest.classes
    assert came[0].bundle_id == bundle.manifest.bundle_id
    got = np.concatenate([each.scores for each in came])
    np.testing.assert_allclose(got, scores[0, first:], atol=1e-5)
    got = np.concatenate([each.attention for each in came])
    np.testing.assert_allclose(got, attention[0, first:], atol=1e-5)


def test_they_come_over_the_events_socket() -> None:
    with serving(TinyPipeline()) as server, ScoreSubscriber(server.events_address) as subscriber:
        subscriber.wait_connected(PATIENCE_S)
        feed(server, "cam1", [0.25, 0.5, 0.75, 1.0, 0.5])
        came = receive(subscriber, 5)
    assert {(each.stream, each.session, each.classes) for each in came} == {
        ("cam1", 1, ("high", "low"))
    }
    assert (came[0].frames_per_s, came[0].snippet_frames) == (25.0, 16)
    stops = np.cumsum([len(each.curves) for each in came])
    assert [each.first_index for each in came] == [0, *stops[:-1].tolist()]
    curves = np.concatenate([each.curves for each in came])
    expected = [[x / 2, x, x] for x in (0.25, 0.5, 0.75, 1.0, 0.5)]
    np.testing.assert_array_equal(curves, np.array(expected, np.float32))


def test_streams_are_chosen() -> None:
    with (
        serving(TinyPipeline()) as server,
        ScoreSubscriber(server.events_address, ["cam1", "cam3"]) as subscriber,
        ScoreSubscriber(server.events_address, "cam2") as of_one,
    ):
        subscriber.wait_connected(PATIENCE_S)
        of_one.wait_connected(PATIENCE_S)
        for name in ("cam1", "cam10", "cam2", "cam3"):
            feed(server, name, [0.5])
        assert [each.stream for each in receive(subscriber, 2)] == ["cam1", "cam3"]
        assert subscriber.receive(0) is None
        assert [each.stream for each in receive(of_one, 1)] == ["cam2"]
        assert of_one.receive(0) is None


def test_nothing_is_made_once_the_last_subscriber_has_gone() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server:
        with ScoreSubscriber(server.events_address) as first:
            first.wait_connected(PATIENCE_S)
            with ScoreSubscriber(server.events_address) as second:
                second.wait_connected(PATIENCE_S)
                assert pipeline.curves.wanted("cam1")
            wait_until(lambda: sum(pipeline.curves._topics.values()) == 1)
            feed(server, "cam1", [0.5])
            assert len(receive(first, 1)) == 1
        wait_until(lambda: not pipeline.curves.wanted("cam1"))
        feed(server, "cam2", [0.5])
        assert pipeline.curves.take() == []


def test_of_an_engine_that_is_started_again() -> None:
    with serving(TinyPipeline()) as server:
        address = server.events_address
        subscriber = ScoreSubscriber(address)
        subscriber.wait_connected(PATIENCE_S)
    pipeline = TinyPipeline()
    with subscriber, serving(pipeline, events=address) as server:
        wait_until(lambda: subscriber.receive(0) is None and pipeline.curves.wanted("cam1"))
        feed(server, "cam1", [0.5])
        assert receive(subscriber, 1)[0].scores.tolist() == [[0.5, 0.5]]


def test_no_engine() -> None:
    with (
        ScoreSubscriber("tcp://127.0.0.1:9") as subscriber,
        pytest.raises(NoReplyError, match="expected the engine's confirmation"),
    ):
        subscriber.wait_connected(0.1)


def test_a_key_sees_the_curves_of_its_streams_alone(tmp_path: Path) -> None:
    """And once its line is cut, as that of a page that is closed, nothing is made any more."""
    keys: dict[str, ClientKey] = {}
    roles: tuple[tuple[str, Role, str], ...] = (
        ("cams", "producer", "cam*"),
        ("sees_cam1", "subscriber", "cam1"),
    )
    for name, role, stream in roles:
        new_client(tmp_path / "keys", name, role, (stream,), tmp_path / name)
        keys[name] = read_client_key(tmp_path / name)
    pipeline = TinyPipeline()
    with serving(pipeline, keyring=Keyring(tmp_path / "keys")) as server:
        with ScoreSubscriber(server.events_address, key=keys["sees_cam1"]) as subscriber:
            subscriber.wait_connected(PATIENCE_S)
            for name in ("cam2", "cam1"):
                feed(server, name, [0.5], keys["cams"])
            assert [each.stream for each in receive(subscriber, 1)] == ["cam1"]
        wait_until(lambda: not pipeline.curves.wanted("cam1"))


def test_subscriptions_are_counted_by_what_they_are_to() -> None:
    curves = Curves()
    for topic in (b"event/", b"scores", b"scores/cam10/", b"scores/cam1/x", b"mark/"):
        curves.subscribed(topic)
        assert curves.wanted("cam1") == (topic == b"scores")
        curves.subscribed(topic, -1)
    for topic in (b"", b"scores/", b"scores/cam", b"scores/cam1/"):
        curves.subscribed(topic)
        assert curves.wanted("cam1")
        curves.subscribed(topic, -1)
        assert not curves.wanted("cam1")
    curves.subscribed(b"scores/cam1/", -1)  # of nobody
    curves.subscribed(b"scores/cam1/")
    assert curves.wanted("cam1")
    assert not curves.wanted("cam2")
    curves.forget()
    assert not curves.wanted("cam1")
