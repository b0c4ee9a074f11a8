"""A video through `feed camera` into a real engine: the same as its extracted features."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cameras import colour_extractor, steady, write_video
from commands import (
    HRPRO,
    PATIENCE_S,
    Engine,
    Screen,
    engine,
    environment,
    hrpro,
    refusal,
    wait_for,
)
from tiny_model import DIM

from hrpro.clients import ActionEvent, EventSubscriber, FinalProposal, StreamNotice
from hrpro.export.bundle import Bundle


@pytest.fixture(scope="module")
def served(bundle: Bundle) -> Iterator[Engine]:
    with engine(bundle.folder, quiet=False) as running_engine:  # it says whom it refuses
        yield running_engine


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of D features that change with the brightness."""
    weights = np.random.default_rng(5).normal(0, 3, (3, DIM)).astype(np.float32)
    return colour_extractor(tmp_path_factory.mktemp("extractor") / "colours", weights=weights)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 s, ever brighter and darker, at 30 frames/s for a clock of 25."""
    return write_video(
        tmp_path_factory.mktemp("video") / "yard.mp4",
        steady(30, 1200),
        "libx264",
        levels=lambda n: int(128 + 90 * np.sin(n / 40) + 30 * np.sin(n / 7)),
    )


def published(subscriber: EventSubscriber, stream: str) -> list[FinalProposal | ActionEvent]:
    """What is published of a stream up to its end."""
    came: list[FinalProposal | ActionEvent] = []
    for message in subscriber:
        if message.stream == stream and isinstance(message, StreamNotice):
            if message.kind == "ended":
                return came
        elif message.stream == stream and not isinstance(message, StreamNotice):
            came.append(message)
    raise AssertionError("the stream did not end")


def test_a_fed_video_is_the_same_as_its_extracted_features(
    served: Engine, extractor: Path, video: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    hrpro("features", "extract", video, "--extractor", extractor, "--out", data, "--split", "test")
    features = data / "features" / "test" / "yard.npy"
    with EventSubscriber(served.events) as subscriber:
        subscriber.wait_connected()
        fast = ("--to", served.feed, "--speed", "max")
        hrpro("feed", "camera", video, *fast, "--extractor", extractor, "--stream", "live")
        hrpro("feed", "features", features, *fast)
        live, recorded = published(subscriber, "live"), published(subscriber, "yard")
    assert len(live) > 5 and len(live) == len(recorded)
    for one, other in zip(live, recorded, strict=True):
        assert type(one) is type(other)
        assert (one.label, one.sequence) == (other.label, other.sequence)
        assert (one.start_s, one.score) == pytest.approx((other.start_s, other.score), abs=1e-4)
    assert len(np.load(features)) == 62


def test_an_extractor_of_other_features_is_refused(
    served: Engine, video: Path, tmp_path: Path
) -> None:
    other = colour_extractor(tmp_path / "other")
    said = refusal("feed", "camera", video, "--to", served.feed, "--extractor", other)
    assert said == (
        "extractor 'tiny' does not fit the engine's bundle: stream 'yard': "
        f"expected feature dimension {DIM}, came 2"
    )


def test_a_table_on_a_terminal(served: Engine, extractor: Path, video: Path) -> None:
    terminal, other_side = pty.openpty()
    try:
        command = ["feed", "camera", video, "rtsp://u:s3cret@127.0.0.1:9/x", "--to", served.feed]
        with subprocess.Popen(
            [*HRPRO, *map(str, command), "--extractor", str(extractor)],
            stdout=other_side,
            stderr=other_side,
            env={**environment(), "TERM": "xterm", "COLUMNS": "160"},
        ) as process:
            os.close(other_side)
            screen = Screen(terminal)
            for wanted in ("frames/s", "yard", "reading", "127.0.0.1-9-x", "away"):
                wait_for(lambda wanted=wanted: screen.shows(wanted))  # type: ignore[misc]
            wait_for(lambda: screen.shows("rtsp://127.0.0.1:9/x: Connection refused"))
            process.terminate()
            wait_for(lambda: screen.shows("127.0.0.1-9-x: 0 snippets, 0 skipped, 0 missing"))
            assert process.wait(PATIENCE_S) == 0
        assert "s3cret" not in screen.text and "Traceback" not in screen.text
    finally:
        os.close(terminal)
