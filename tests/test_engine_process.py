"""The engine as a process of its own: streams through it, its end, and its death."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import (
    ANY_PORT,
    PATIENCE_S,
    Floats,
    Trained,
    engine,
    environment,
    one_line,
    published_in_process,
    running,
    wait_for,
)
from driving import assert_same, finals, of_stream

from hrpro.clients import (
    EventSubscriber,
    FeatureFeeder,
    StreamError,
    StreamNotice,
    request_status,
)
from hrpro.engine.messages import FinalProposal, Publication

pytest_plugins = ("cli_fixtures",)

DIM = 96


@pytest.fixture(scope="module")
def long_recording(trained: Trained) -> Floats:
    """All recordings of the example, one after the other."""
    subsets = {"train": ("seq1", "seq2", "seq3", "seq4"), "test": ("seq5", "seq6")}
    parts = [trained.recording(subset, name) for subset, names in subsets.items() for name in names]
    return np.concatenate(parts)


def hear_until_ended(subscriber: EventSubscriber, *streams: str) -> list[Publication]:
    """All that comes until each of the streams has ended."""
    heard: list[Publication] = []
    left = set(streams)
    while left:
        publication = subscriber.receive(PATIENCE_S)
        assert publication is not None, f"{left} did not end"
        heard.append(publication)
        if isinstance(publication, StreamNotice) and publication.kind == "ended":
            left.remove(publication.stream)
    return heard


def without(proposals: Sequence[FinalProposal], others: Sequence[FinalProposal]) -> list[str]:
    """The proposals that are not among the others, by label and borders."""
    known = np.array([[each.start_s, each.end_s] for each in others])
    labels = np.array([each.label for each in others])
    return [
        f"{each.label} {each.start_s:.3f} to {each.end_s:.3f}"
        for each in proposals
        if not (
            (np.abs(known - [each.start_s, each.end_s]).max(axis=1) < 1e-3) & (labels == each.label)
        ).any()
    ]


# ---- through the engine ------------------------------------------------------------------------


def test_chunks_and_company_change_nothing(trained: Trained) -> None:
    recordings = trained.recordings
    streams = {f"{name}.{size}": (name, size) for name in recordings for size in (1, 13)}
    with engine(trained.bundle) as served, EventSubscriber(served.events) as subscriber:
        subscriber.wait_connected(PATIENCE_S)
        feeders = {stream: FeatureFeeder(served.feed, stream, DIM) for stream in streams}
        try:
            for first in range(0, max(map(len, recordings.values())), 13):
                for stream, (name, size) in streams.items():
                    rows = recordings[name][first : first + 13]
                    for at in range(0, len(rows), size):
                        feeders[stream].send(rows[at : at + size])
            ended = {stream: feeder.end() for stream, feeder in feeders.items()}
        finally:
            for feeder in feeders.values():
                feeder.close()
        heard = hear_until_ended(subscriber, *streams)
        assert (subscriber.gaps, subscriber.repeats) == (0, 0)
    expected = published_in_process(trained.bundle, recordings)
    for stream, (name, _) in streams.items():
        assert_same(
            of_stream(heard, stream), [replace(each, stream=stream) for each in expected[name]]
        )
        assert ended[stream].proposals == len(finals(expected[name])) > 0


# ---- its end -----------------------------------------------------------------------------------


def test_sigterm_ends_the_streams_and_publishes_their_tails(trained: Trained) -> None:
    features = trained.recordings["seq5"][:40]
    sides = [part for side in ("feed", "events", "control") for part in (f"--{side}", ANY_PORT)]
    sides += ["--state", "none"]
    with running("serve", trained.bundle, *sides, "--set", "threads=1") as process:
        assert process.stdout is not None and process.stderr is not None
        said: dict[str, str] = {}
        while "READY" not in said:
            name, _, value = process.stdout.readline().rstrip("\n").partition(" ")
            assert name, process.stderr.read()
            said[name] = value.strip()
        assert list(said) == ["bundle", "window", "feed", "events", "control", "log", "READY"]
        assert said["bundle"].startswith(f"{trained.exported['bundle_id']}, 6 classes, 96 features")
        assert said["window"].endswith("look-ahead 4 s")
        with EventSubscriber(said["events"], stream="cam") as subscriber:
            subscriber.wait_connected(PATIENCE_S)
            with FeatureFeeder(said["feed"], "cam", DIM) as feeder:
                feeder.send(features)
                feeder.flush()
                status = request_status(said["control"], PATIENCE_S)
                assert status["state"] == "serving"
                assert status["streams"][0]["next_index"] == 40
                process.send_signal(signal.SIGTERM)
                heard = hear_until_ended(subscriber, "cam")
                with pytest.raises(StreamError, match="'cam'") as refused:
                    feeder.send(features)  # if this comes too early for a refusal,
                    feeder.end(PATIENCE_S)  # then the end is not where it should be
                assert refused.value.code == "draining"
            assert (subscriber.gaps, subscriber.repeats) == (0, 0)
        assert process.wait(PATIENCE_S) == 0
        assert all(
            line.startswith("hrpro: refused, draining: stream 'cam': ") for line in process.stderr
        )
    expected = published_in_process(trained.bundle, {"cam": features})["cam"]
    assert_same(heard, expected)
    tail = [each for each in finals(heard) if each.published_index == 39 and each.end_s > 38 * 0.64]
    assert tail, "the recording should have been cut within an action"


# An engine without a model, which starts at once.
_BARE_ENGINE = """
from types import SimpleNamespace
from serving import ANY_PORT, TinyPipeline
from hrpro.engine import serve

serve.new_deployment = lambda *_: SimpleNamespace(backend=None)
serve.Pipeline = lambda _: TinyPipeline()
serve.serve(
    None,
    lambda _: (None, SimpleNamespace(drain_s=30.0, limits=None)),
    serve.Addresses(ANY_PORT, ANY_PORT, ANY_PORT),
    lambda bound, _: print(bound.feed, bound.control, flush=True),
)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_not_lost_among_other_work(number: signal.Signals) -> None:
    # It may come when the engine is about to wait, and is not waiting yet: while peers leave.
    path = f"{Path(__file__).parent}:{environment().get('PYTHONPATH', '')}"
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", _BARE_ENGINE],
            stdout=subprocess.PIPE,
            text=True,
            env={**environment(), "PYTHONPATH": path},
        ) as process:
            assert process.stdout is not None
            feed, control = process.stdout.readline().split()
            feeders = [FeatureFeeder(feed, f"cam{n}", 2) for n in range(12)]
            for feeder in feeders:
                feeder.connect()
            request_status(control, PATIENCE_S)
            for feeder in feeders:
                feeder.close()
            process.send_signal(number)
            try:
                assert process.wait(10.0) == 0
            finally:
                process.kill()


# ---- its death ---------------------------------------------------------------------------------


def test_a_killed_engine_is_continued_by_another(trained: Trained, long_recording: Floats) -> None:
    first_part, in_flight = 200, 220
    expected = finals(published_in_process(trained.bundle, {"cam": long_recording})["cam"])
    heard: list[Publication] = []
    with (
        engine(trained.bundle) as first,
        EventSubscriber(first.events, stream="cam") as subscriber,
        FeatureFeeder(first.feed, "cam", DIM, retry_s=0.1, timeout_s=PATIENCE_S) as feeder,
    ):
        subscriber.wait_connected(PATIENCE_S)
        feeder.send(long_recording[:first_part])
        # What was published of these has reached the subscriber; of the next ones, nobody knows.
        settled = sum(each.published_index < first_part - 1 for each in expected)
        while len(finals(heard)) < settled:
            publication = subscriber.receive(PATIENCE_S)
            assert publication is not None
            heard.append(publication)
        feeder.send(long_recording[first_part:in_flight])
        first.kill()
        before = subscriber.instance
        with engine(trained.bundle, addresses=first.addresses) as second:
            assert second.addresses == first.addresses

            def subscribed_again() -> bool:
                publication = subscriber.receive(timeout_s=0.1)
                heard.extend([publication] if publication else [])
                return subscriber.instance != before

            wait_for(subscribed_again)
            feeder.send(long_recording[in_flight:])
            ended = feeder.end()
            heard += hear_until_ended(subscriber, "cam")
    notice = heard[-1]
    assert isinstance(notice, StreamNotice)
    assert ended.next_index == notice.next_index == len(long_recording)
    # Not all over again, and nothing between the two left out.
    assert 0 < notice.first_index < first_part
    assert without(expected, finals(heard)) == []


def test_a_feed_command_outlives_its_engine(
    trained: Trained, long_recording: Floats, tmp_path: Path
) -> None:
    np.save(tmp_path / "cam.npy", long_recording)
    arguments = ("feed", "features", tmp_path / "cam.npy", "--speed", 100, "--json")
    with engine(trained.bundle) as first, EventSubscriber(first.events) as subscriber:
        subscriber.wait_connected(PATIENCE_S)
        with running(*arguments, "--to", first.feed) as process:
            publication: Publication | None = None
            while not isinstance(publication, FinalProposal):
                publication = subscriber.receive(PATIENCE_S)
                assert publication is not None, "nothing was published"
            assert process.poll() is None
            first.kill()
            with engine(trained.bundle, addresses=first.addresses):
                stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, one_line(stderr)
    T = len(long_recording)
    assert json.loads(stdout) == {"streams": {"cam": T}, "snippets": T}
