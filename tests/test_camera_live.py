"""`hrpro feed camera` with real cameras: an RTSP server that dies, comes back, and stands still."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cameras import (
    PATTERN,
    RtspServer,
    colour_extractor,
    feeding,
    rtsp,
    steady,
    transcoded,
    write_video,
)
from serving import CLOCK, TinyPipeline, serving

from hrpro.clients import request_drain, request_status

MEDIA = Path(__file__).resolve().parents[1].parent / "shared" / "media"


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_extractor(tmp_path_factory.mktemp("extractor") / "colours")


@pytest.fixture
def camera() -> Iterator[RtspServer]:
    with rtsp(live=PATTERN) as server:
        yield server


def test_25_frames_a_second_are_kept(extractor: Path) -> None:
    pipeline = TinyPipeline()
    with (
        rtsp(a=PATTERN, b=PATTERN) as camera,
        serving(pipeline) as server,
        feeding(
            camera.url("a"), camera.url("b"), "--to", server.feed_address,
            "--extractor", extractor, "--stream", "a", "--stream", "b",
        ) as feed,
    ):  # fmt: skip
        begun = {name: feed.wait(name, lambda it: it["frames"] > 0) for name in "ab"}
        began_s = time.monotonic()
        for name in "ab":
            feed.wait(name, lambda it: it["next_index"] >= 10)
        took_s = time.monotonic() - began_s
        for name in "ab":
            status = feed.status(name)
            frames = status["frames"] - begun[name]["frames"]
            # Lines are a second apart.
            assert abs(frames - 25 * took_s) < 50
            for nothing in ("skipped", "missing", "dropped", "late_frames", "reconnects"):
                assert status[nothing] == 0, status
            assert status["state"] == "reading"
            assert -0.5 < status["behind_s"] < 5
        assert feed.leave() == ""
        # Both were ended, and nothing is open.
        assert not pipeline.streams
    for name in "ab":
        assert [at for at, _ in pipeline.received[name]] == list(range(feed.status(name)["sent"]))


def test_a_killed_camera_comes_back_with_the_right_clock(
    extractor: Path, camera: RtspServer
) -> None:
    pipeline = TinyPipeline(window={"window_snippets": 64})
    with (
        rtsp(live=PATTERN) as other,
        serving(pipeline) as server,
        feeding(
            camera.url("live"), other.url("live"), "--to", server.feed_address,
            "--extractor", extractor, "--stream", "dies", "--stream", "lives",
        ) as feed,
    ):  # fmt: skip
        before = feed.wait("dies", lambda it: it["sent"] >= 3)
        before_s = time.monotonic()
        camera.kill()
        away = feed.wait("dies", lambda it: it["state"] == "away" and it["reconnects"] >= 2)
        assert away["reason"].startswith(f"rtsp://127.0.0.1:{camera.port}/live: ")
        camera.start()
        sent = feed.status("dies")["sent"]
        behind = feed.wait("dies", lambda it: it["sent"] >= sent + 3)
        passed_s = time.monotonic() - before_s
        snippets = behind["next_index"] - before["next_index"]
        assert abs(snippets * CLOCK.snippet_s - passed_s) < 2.5
        assert behind["missing"] * CLOCK.snippet_s > 2.5  # two pauses of 1 s and 2 s
        assert -0.5 < behind["behind_s"] < 5 and behind["state"] == "reading"
        # The engine was told of the gap, and did not wait for it.
        (entry,) = [
            each
            for each in request_status(server.control_address)["streams"]
            if each["stream"] == "dies"
        ]
        assert entry["missing"] == behind["missing"] and entry["session"] == 1
        lives = feed.status("lives")
        said = feed.leave()
    assert (lives["missing"], lives["skipped"], lives["reconnects"]) == (0, 0, 0)
    assert [at for at, _ in pipeline.received["lives"]] == list(range(feed.status("lives")["sent"]))
    lines = said.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("; trying again") and lines[1].endswith(": there again")


def test_a_camera_that_stands_still(extractor: Path, camera: RtspServer) -> None:
    with (
        serving() as server,
        feeding(
            camera.url("live"), "--to", server.feed_address, "--extractor", extractor,
            "--stream", "still", "--stall", "1.5",
        ) as feed,
    ):  # fmt: skip
        feed.wait("still", lambda it: it["sent"] >= 1)
        camera.signal(signal.SIGSTOP)
        away = feed.wait("still", lambda it: it["state"] == "away")
        assert away["reason"].endswith("nothing came for 1.5 s")
        camera.signal(signal.SIGCONT)
        again = feed.wait("still", lambda it: it["state"] == "reading" and it["missing"] > 0)
        assert again["reconnects"] >= 1
        feed.leave()


def test_an_extractor_that_is_slow_skips_and_keeps_to_the_time(tmp_path: Path) -> None:
    slow = colour_extractor(tmp_path / "slow", convolutions=4, height=64, width=64, short_side=64)
    pipeline = TinyPipeline()
    with (
        rtsp(a=PATTERN, b=PATTERN) as camera,
        serving(pipeline) as server,
        feeding(
            camera.url("a"), camera.url("b"), "--to", server.feed_address,
            "--extractor", slow, "--threads", "1", "--stream", "a", "--stream", "b",
        ) as feed,
    ):  # fmt: skip
        for name in "ab":
            status = feed.wait(name, lambda it: it["skipped"] >= 3)
            # Frames come as they did; what is sent was among the newest, or in work.
            assert status["frames_per_s"] > 5
            assert status["behind_s"] < 20
        feed.leave()
        for name in "ab":
            status = feed.status(name)
            indices = [at for at, _ in pipeline.received[name]]
            assert indices == sorted(set(indices)) and len(indices) == status["sent"]
            assert indices[-1] + 1 == status["next_index"]
            assert status["missing"] == 0 and status["skipped"] >= 3


def test_an_engine_that_goes_away_and_comes_back(extractor: Path, camera: RtspServer) -> None:
    first, second = TinyPipeline(), TinyPipeline()
    with contextlib.ExitStack() as engine:
        server = engine.enter_context(serving(first))
        with feeding(
            camera.url("live"), "--to", server.feed_address, "--extractor", extractor,
            "--stream", "cam",
        ) as feed:  # fmt: skip
            feed.wait("cam", lambda it: it["sent"] >= 2)
            engine.close()
            feed.wait("cam", lambda it: it["lag"] >= 3)
            with serving(second, feed=server.feed_address):
                again = feed.wait("cam", lambda it: it["lag"] == 0 and it["sent"] >= 6)
                feed.leave()
    assert (again["skipped"], again["dropped"], again["missing"]) == (0, 0, 0)
    came = sorted({at for each in (first, second) for at, _ in each.received["cam"]})
    assert came == list(range(feed.status("cam")["sent"]))


def test_a_drained_engine_ends_the_stream_and_the_next_one_has_another(
    extractor: Path, camera: RtspServer
) -> None:
    first, second = TinyPipeline(), TinyPipeline()
    with contextlib.ExitStack() as engine:
        server = engine.enter_context(serving(first))
        with feeding(
            camera.url("live"), "--to", server.feed_address, "--extractor", extractor,
            "--stream", "cam",
        ) as feed:  # fmt: skip
            feed.wait("cam", lambda it: it["sent"] >= 2)
            request_drain(server.control_address)
            feed.wait_said("the engine is drained")
            engine.close()
            with serving(second, feed=server.feed_address):
                sent = feed.status("cam")["sent"]
                feed.wait("cam", lambda it: it["lag"] == 0 and it["sent"] >= sent + 3)
                said = feed.leave()
    assert len(said.splitlines()) == 1
    assert min(at for at, _ in second.received["cam"]) > max(at for at, _ in first.received["cam"])


def test_a_killed_client_goes_on_behind_what_the_engine_has(
    extractor: Path, camera: RtspServer
) -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server:
        arguments = (
            camera.url("live"), "--to", server.feed_address, "--extractor", extractor,
            "--stream", "cam",
        )  # fmt: skip
        with feeding(*arguments) as feed:
            feed.wait("cam", lambda it: it["sent"] >= 2 and it["lag"] == 0)
            feed.leave(signal.SIGKILL, -signal.SIGKILL)
        with feeding(*arguments) as feed:
            again = feed.wait("cam", lambda it: it["sent"] >= 2)
            feed.leave()
    indices = [at for at, _ in pipeline.received["cam"]]
    assert indices == list(range(len(indices)))
    assert again["missing"] == 0 and again["next_index"] > again["sent"]


def test_a_recording_comes_from_a_camera_as_from_its_file(extractor: Path, tmp_path: Path) -> None:
    """Each frame is a level brighter: the features tell which frames they are made of."""
    video = write_video(
        tmp_path / "video.mp4", steady(25, 180), "libx264", (320, 240), lambda n: 40 + n
    )
    played = f"filesrc location={video} ! qtdemux ! rtph264pay name=pay0 pt=96 config-interval=-1"
    pipeline = TinyPipeline()
    with rtsp(file=played) as camera, serving(pipeline) as server:
        to = ("--to", server.feed_address, "--extractor", extractor)
        with feeding(video, *to, "--speed", "max", "--stream", "file") as feed:
            feed.leave(None)
        with feeding(camera.url("file"), *to, "--stream", "live") as feed:
            feed.wait("live", lambda it: it["sent"] >= 5)
            feed.leave()
    from_file = 255 * np.array([level for _, level in pipeline.received["file"]])
    live = 255 * np.array([level for _, level in pipeline.received["live"]])[:5]
    assert np.abs(from_file - (45 + 16 * np.arange(11))).max() < 2
    # The first ones of a connection are left out; what follows is the same.
    begin = live[0] - from_file[0]
    assert begin >= 0
    assert np.abs(live - (live[0] + 16 * np.arange(5))).max() < 2


@pytest.mark.parametrize(("name", "frames_per_s"), [("vtest", 10), ("dancer", 25)])
def test_real_recordings_by_udp_keep_their_rate(
    extractor: Path, tmp_path: Path, name: str, frames_per_s: int
) -> None:
    recording = MEDIA / f"{name}.avi"
    if not recording.is_file():
        pytest.skip(f"{recording} is not here: no camera played it")
    video = transcoded(recording, tmp_path / "video.mp4", frames=12 * frames_per_s)
    played = f"filesrc location={video} ! qtdemux ! rtph264pay name=pay0 pt=96 config-interval=-1"
    pipeline = TinyPipeline()
    with (
        rtsp(file=played) as camera,
        serving(pipeline) as server,
        feeding(
            camera.url("file"), "--to", server.feed_address, "--extractor", extractor,
            "--stream", name, "--rtsp-transport", "udp",
        ) as feed,
    ):  # fmt: skip
        begun = feed.wait(name, lambda it: it["next_index"] >= 1)
        began_s = time.monotonic()
        status = feed.wait(name, lambda it: it["next_index"] >= begun["next_index"] + 6)
        frames, took_s = status["frames"] - begun["frames"], time.monotonic() - began_s
        feed.leave()
    assert abs(frames - frames_per_s * took_s) < 1.5 * frames_per_s  # lines are a second apart
    assert (status["skipped"], status["missing"], status["reconnects"]) == (0, 0, 0)
    indices = [index for index, _ in pipeline.received[name]]
    assert indices[: begun["next_index"] + 6] == list(range(begun["next_index"] + 6))


def test_a_password_is_never_shown(extractor: Path, camera: RtspServer) -> None:
    with (
        serving() as server,
        feeding(
            camera.url("live", "user:s3cret@"), camera.url("gone", "user:s3cret@"),
            "http://user:s3cret@127.0.0.1:9/x?token=s3cret", "--to", server.feed_address,
            "--extractor", extractor,
        ) as feed,
    ):  # fmt: skip
        port = camera.port
        feed.wait(f"127.0.0.1-{port}-live", lambda it: it["sent"] >= 1)
        gone = feed.wait(f"127.0.0.1-{port}-gone", lambda it: it["reconnects"] >= 1)
        closed = feed.wait("127.0.0.1-9-x", lambda it: it["reconnects"] >= 1)
        assert gone["reason"].startswith(f"rtsp://127.0.0.1:{port}/gone: ")
        assert closed["reason"] == "http://127.0.0.1:9/x: Connection refused"
        said = feed.leave()
    assert "s3cret" not in said + str(feed._said)
