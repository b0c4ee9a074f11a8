"""`hrpro feed camera` with files, pipes and HTTP, and what it says of what cannot work."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cameras import brightness, colour_extractor, feeding, steady, write_video
from commands import HRPRO, environment, hrpro, refusal
from serving import TinyPipeline, serving

from hrpro.clients.cameras.camera import fitting_batch
from hrpro.clients.cameras.sources import SourceError, parse_source


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Looks at the frames 0, 5 and 10 of 16."""
    return colour_extractor(tmp_path_factory.mktemp("extractor") / "colours")


def expected(count: int) -> list[tuple[int, float]]:
    """What comes of the snippets of a video of 25 frames/s, index and mean level."""
    levels = [[brightness(16 * i + n) for n in (0, 5, 10)] for i in range(count)]
    return [(i, float(np.mean(each))) for i, each in enumerate(levels)]


def same(received: list[tuple[int, float]], wanted: list[tuple[int, float]]) -> bool:
    """Levels are a little off by the conversion from and to YUV."""
    indices = [index for index, _ in received] == [index for index, _ in wanted]
    levels = np.array([value * 255 for _, value in received])
    return indices and np.allclose(levels, [value for _, value in wanted], atol=1.6)


# ---- recordings ----------------------------------------------------------------------------------


def test_two_files_as_fast_as_they_go(extractor: Path, tmp_path: Path) -> None:
    long = write_video(tmp_path / "long video.mkv", steady(25, 500))
    short = write_video(tmp_path / "short.mkv", steady(25, 40))
    pipeline = TinyPipeline()
    with serving(pipeline) as server:
        said = hrpro(
            "feed", "camera", long, short, "--to", server.feed_address, "--extractor", extractor,
            "--speed", "max",
        )  # fmt: skip
    assert same(pipeline.received["long-video"], expected(31))
    assert same(pipeline.received["short"], expected(2))
    assert said.stdout.splitlines() == [
        "long-video: 31 snippets, 0 skipped, 0 missing, 31 proposals, 31 events",
        "short: 2 snippets, 0 skipped, 0 missing, 2 proposals, 2 events",
    ]
    assert said.stderr == ""
    assert not pipeline.streams


def test_a_hole_in_a_file_is_a_gap(extractor: Path, tmp_path: Path) -> None:
    times_s = steady(25, 40) + [Fraction(4) + each for each in steady(25, 60)]
    video = write_video(tmp_path / "hole.mkv", times_s)
    pipeline = TinyPipeline()
    with serving(pipeline) as server, feeding(
        video, "--to", server.feed_address, "--extractor", extractor, "--speed", "max"
    ) as feed:  # fmt: skip
        assert feed.leave(None) == ""
        status = feed.status("hole")
    # 40 frames are 2.5 snippets; from 4 s on, position 100, the first whole one is 7.
    assert [index for index, _ in pipeline.received["hole"]] == [0, 1, 7, 8, 9]
    assert (status["sent"], status["missing"], status["next_index"]) == (5, 5, 10)
    assert status["state"] == "ended"


def test_standard_input(extractor: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mkv", steady(25, 100))
    pipeline = TinyPipeline()
    with serving(pipeline) as server:
        command = ["feed", "camera", "-", "--to", server.feed_address, "--speed", "max"]
        said = subprocess.run(
            [*HRPRO, *command, "--extractor", extractor, "--stream", "piped"],
            input=video.read_bytes(),
            check=True,
            capture_output=True,
            env=environment(),
        )
    assert said.stdout.startswith(b"piped: 6 snippets")
    assert same(pipeline.received["piped"], expected(6))


def test_a_file_at_its_own_pace(extractor: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mkv", steady(25, 50))
    with serving() as server, feeding(
        video, "--to", server.feed_address, "--extractor", extractor, "--speed", "0.5"
    ) as feed:  # fmt: skip
        # At half its pace it lasts 4 s: lines of a second see it at 12.5 frames a second.
        status = feed.wait("video", lambda it: it["frames"] > 20)
        assert 10 < status["frames_per_s"] < 15
        feed.leave(None)
        assert feed.status("video")["sent"] == 3


def test_an_engine_that_is_slow_loses_nothing_of_a_recording(
    extractor: Path, tmp_path: Path
) -> None:
    video = write_video(tmp_path / "video.mkv", steady(25, 16 * 90))
    pipeline = TinyPipeline()
    pipeline.paused = True
    with serving(pipeline) as server, feeding(
        video, "--to", server.feed_address, "--extractor", extractor, "--speed", "max"
    ) as feed:  # fmt: skip
        held = feed.wait("video", lambda it: it["sent"] >= 15)
        later = feed.wait("video", lambda it: it["frames_per_s"] == 0 and it["sent"] >= 15)
        # What the engine has no room for waits in bounded places, and in the file.
        assert held["sent"] <= later["sent"] <= 17
        assert later["frames"] < 16 * 50
        pipeline.paused = False
        server._wake()
        feed.leave(None)
    assert same(pipeline.received["video"], expected(90))


@pytest.mark.parametrize(
    ("snippets", "took_s", "most"),
    [(16, 0.5, 16), (16, 2.0, 8), (8, 8.5, 1), (1, 20.0, 1), (1, 0.25, 4), (3, 0.0, 16)],
)
def test_a_batch_is_to_take_a_second_at_most(snippets: int, took_s: float, most: int) -> None:
    assert fitting_batch(snippets, took_s) == most


# ---- what cannot work ----------------------------------------------------------------------------


def test_an_extractor_that_does_not_fit_the_bundle(extractor: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mkv", steady(25, 20))
    other_clock = colour_extractor(tmp_path / "clock", frames_per_s=30.0)
    with serving() as server:
        to = ("--to", server.feed_address)
        said = refusal("feed", "camera", video, *to, "--extractor", other_clock)
        assert said == (
            "extractor 'tiny' does not fit the engine's bundle: "
            "stream 'video': expected 25.0 frames/s and 16 frames per snippet, came 30.0 and 16"
        )


@pytest.mark.parametrize(
    ("sources", "options", "expected"),
    [
        (["gone.mkv"], [], "gone.mkv: expected a video file, a device or an address; it is not"),
        (["."], [], "expected a video file, came a folder"),
        (["a/x.mkv", "b/x.mkv"], [], "would both be the stream 'x'; name them with --stream"),
        (["-", "-"], ["--stream", "a", "--stream", "b"], "expected standard input (-) once"),
        (["a/x.mkv"], ["--stream", "no/slash"], "stream"),
        (["ftp://u:secret@host/x"], [], "a source: expected rtsp://HOST"),
        (["rtsp://u:secret@:port/x"], [], "a source: expected rtsp://HOST"),
    ],
)
def test_sources_that_are_refused(
    extractor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    sources: list[str], options: list[str], expected: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.mkv").write_bytes(b"no video")
    said = refusal(
        "feed", "camera", *sources, "--to", "ipc://nobody", "--extractor", extractor, *options
    )
    assert expected in said
    assert "secret" not in said


def test_a_file_that_is_no_video_fails_alone(extractor: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mkv", steady(25, 50))
    (tmp_path / "text.mkv").write_bytes(b"no video" * 100)
    pipeline = TinyPipeline()
    with serving(pipeline) as server:
        said = hrpro(
            "feed", "camera", tmp_path / "text.mkv", video, "--to", server.feed_address,
            "--extractor", extractor, "--speed", "max", status=1,
        )  # fmt: skip
    assert said.stderr.startswith(f"hrpro: stream 'text': {tmp_path / 'text.mkv'}: Invalid data")
    assert same(pipeline.received["video"], expected(3))


def test_without_an_engine_it_waits_and_can_be_stopped(extractor: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mkv", steady(25, 40))
    address = f"ipc://{tmp_path}/engine"
    with feeding(video, "--to", address, "--extractor", extractor) as feed:
        feed.wait_said(f"hrpro: no engine answers at {address} yet; waiting\n")
        assert len(feed.leave().splitlines()) == 1
    pipeline = TinyPipeline()
    with feeding(video, "--to", address, "--extractor", extractor, "--speed", "max") as feed:
        feed.wait_said("waiting")
        with serving(pipeline, feed=address):
            feed.leave(None)
    assert same(pipeline.received["video"], expected(2))


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown", "stream"),
    [
        ("rtsp://u:pw@cam.lan:8554/live/1", "rtsp://cam.lan:8554/live/1", "cam.lan-8554-live-1"),
        ("RTSP://cam", "rtsp://cam", "cam"),
        ("rtsp://[fe80::1]/x", "rtsp://fe80::1/x", "fe80-1-x"),
        ("rtsp://cam/user=a&password=pw&channel=1", "rtsp://cam", "cam"),
        ("rtsp://u:p%40pw@cam/a?token=pw#pw", "rtsp://cam/a", "cam-a"),
        ("https://cam/live.m3u8?key=pw", "https://cam/live.m3u8", "cam-live.m3u8"),
        ("/dev/video12", "/dev/video12", "video12"),
        ("-", "standard input", "stdin"),
        ("http://" + "x" * 90, "http://" + "x" * 90, "x" * 64),
    ],
)  # fmt: skip
def test_what_sources_are_called(text: str, shown: str, stream: str) -> None:
    source = parse_source(text)
    assert (source.shown, source.stream) == (shown, stream)
    assert "pw" not in repr(source)


def test_an_address_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "door").write_text("rtsp://u:pw@cam/live\nnothing\n")
    source = parse_source(f"@{tmp_path / 'door'}")
    assert (source.address, source.stream) == ("rtsp://u:pw@cam/live", "cam-live")
    (tmp_path / "door").write_text("")
    with pytest.raises(SourceError, match="expected a video file"):
        parse_source(f"@{tmp_path / 'door'}")


def test_a_colon_in_a_file_name_is_no_protocol(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("concat:a.mkv").write_bytes(b"")
    assert parse_source("concat:a.mkv").stream == "concat-a"
    with pytest.raises(SourceError, match="it is not there"):
        parse_source("concat:b.mkv")


def test_the_package_is_named_where_it_is_missing(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['av'] = None; from hrpro.clients.cli import main; main()"
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            hidden,
            "feed",
            "camera",
            "-",
            "--to",
            "ipc://x",
            "--extractor",
            "x",
        ],
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert said.returncode == 1
    assert said.stderr == "hrpro: cameras need the package av: pip install 'hrpro-stream[camera]'\n"
