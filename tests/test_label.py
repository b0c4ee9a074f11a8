"""`hrpro label` without its page: the file of points, who may change it, and the videos."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import numpy as np
import pytest
from coded_video import number_of, write_video
from commands import PATIENCE_S, environment, hrpro, refusal, running, wait_for

from hrpro.clients.label.media import VideoError, frame_times, playable_copy, playable_type
from hrpro.training.data import read_training_split
from hrpro.training.feature_source import FeatureSource, write_feature_source

STAMPS = [40 * n + 7 * (n % 2) for n in range(50)]  # ms


@dataclass
class Served:
    data: Path
    video: Path
    url: str

    def ask(
        self, path: str, method: str = "GET", body: Any = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers; as the page itself asks unless told otherwise."""
        host = urlsplit(self.url)
        line = http.client.HTTPConnection(host.netloc, timeout=PATIENCE_S)
        told = {"Origin": f"http://{host.netloc}", **headers}
        sent = None if body is None else json.dumps(body)
        line.request(method, path if path.startswith("//") else host.path + path, sent, told)
        answer = line.getresponse()
        content = answer.read()
        line.close()
        return answer.status, content, {k.lower(): v for k, v in answer.getheaders()}

    def ready(self) -> None:
        wait_for(lambda: json.loads(self.ask("api/videos/0")[1])["state"] == "ready")

    def put_points(self, *points: tuple[str, float], **headers: str) -> int:
        version = self.ask("api/videos/0/points")[2]["etag"]
        told = {"If-Match": version, **headers}
        return self.ask("api/videos/0/points", "PUT", list(points), **told)[0]

    @property
    def lines(self) -> list[str]:
        file = self.data / "point_labels" / "points.csv"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("label")
    video = write_video(folder / "walk.mp4", STAMPS, Fraction(1, 1000))
    arguments = ("label", video, "--data", folder / "data", "--classes", "wave, jump")
    with running(*arguments, env={**environment(), "XDG_CACHE_HOME": str(folder)}) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().endswith("points.csv, 0 so far\n")
        served = Served(folder / "data", video, process.stdout.readline().split()[1])
        served.ready()
        yield served
        process.terminate()
        assert (process.wait(PATIENCE_S), process.stderr.read()) == (0, "")


# ---- the file ----------------------------------------------------------------------------------


def test_training_reads_what_is_saved(served: Served) -> None:
    """A point lies in the snippet that its time lies in; behind the last whole one, in that."""
    assert served.put_points(("wave", 0.64), ("jump", 0.639), ("wave", 1.961), ("jump", 2.6)) == 204
    assert served.lines == [
        "class,video_id,point",
        "jump,walk,15.975",
        "wave,walk,16",
        "wave,walk,49.025",
        "jump,walk,65",
    ]
    features = served.data / "features" / "train" / "walk.npy"
    features.parent.mkdir(parents=True)
    np.save(features, np.zeros((4, 3), np.float32))
    (served.data / "split_train.txt").write_text("walk\n")
    (recording,) = read_training_split(served.data).recordings
    assert recording.point_index.tolist() == [0, 1, 3, 3]
    assert recording.point_label.tolist() == [1, 0, 0, 1]
    found = json.loads(hrpro("data", "check", served.data, "--json", status=1).stdout)
    assert found["points"] == 4
    # There is no test split here; of what is labelled nothing is wrong.
    assert {error.split(":")[0].rpartition("/")[2] for error in found["errors"]} == {
        "split_test.txt",
        "gt_full.json",
    }


def test_a_file_is_changed_by_one_program_alone(served: Served) -> None:
    said = refusal("label", served.video, "--data", served.data)
    assert "points.csv: is being labelled by the process with id" in said


def test_what_another_program_has_written_is_not_lost(served: Served) -> None:
    version = served.ask("api/videos/0/points")[2]["etag"]
    file = served.data / "point_labels" / "points.csv"
    file.write_text("class,video_id,point\njump,elsewhere,3\n")
    put = {"method": "PUT", "body": [("wave", 1.0)]}
    status, said, _ = served.ask("api/videos/0/points", **put, **{"If-Match": version})
    assert status == 412 and b"changed by another" in said
    assert served.put_points(("wave", 1.0)) == 204
    assert served.lines[1:] == ["jump,elsewhere,3", "wave,walk,25"]


def test_points_that_cannot_be_are_refused(served: Served) -> None:
    before = served.lines
    assert served.put_points(("swim", 1.0)) == 422
    assert served.put_points(("wave", -1.0)) == 422
    assert served.put_points(("wave", float("nan"))) == 422
    assert served.ask("api/classes", "PUT", ["a/b"])[0] == 409
    status, said, _ = served.ask("api/classes", "PUT", ["jump"])
    assert (status, said) == (409, b"there are points of wave")
    assert served.lines == before


def test_a_time_that_no_video_has_is_refused(served: Served) -> None:
    before = served.lines
    for seconds in (1e308, 1.1e7):
        assert served.put_points(("wave", seconds)) == 422
    assert served.lines == before


def test_a_video_that_is_gone(served: Served, tmp_path: Path) -> None:
    served.video.rename(tmp_path / "away")
    try:
        status, content, _ = served.ask("api/videos/0/media")
        assert (status, content.decode()) == (404, f"{served.video}: it is not there any more")
    finally:
        (tmp_path / "away").rename(served.video)
    assert served.ask("api/videos/0/media")[0] == 200


def test_frames_are_counted_at_the_rate_that_training_is_told(tmp_path: Path) -> None:
    from hrpro.clients.label.point_file import Mark, PointFile

    points = PointFile(tmp_path / "points.csv", {"walk": 30.0})
    points.replace("walk", [Mark("wave", 1.5)], points.marks("walk")[1])
    assert points.path.read_text().splitlines()[1] == "wave,walk,45"
    assert points.marks("walk")[0] == [Mark("wave", 1.5)]


def test_the_clock_of_the_features_is_insisted_on(tmp_path: Path) -> None:
    source = FeatureSource(
        extractor="e", extractor_id="0", frames_per_s=30, snippet_frames=16, feature_dim=4
    )
    write_feature_source(tmp_path, source)
    (tmp_path / "a.mp4").touch()
    said = refusal("label", tmp_path / "a.mp4", "--data", tmp_path)
    assert said.endswith("expected data.frames_per_s=30 data.snippet_frames=16")


# ---- who may come in ---------------------------------------------------------------------------


def test_only_the_page_itself_changes_anything(served: Served) -> None:
    before, port = served.lines, urlsplit(served.url).port
    for origin in (
        "http://evil.example",
        "null",
        "http://127.0.0.1:1",
        f"https://127.0.0.1:{port}",
    ):
        assert served.put_points(("wave", 1.2), Origin=origin) == 403
        assert served.ask("api/classes", "PUT", ["evil"], Origin=origin)[0] == 403
    assert served.lines == before
    assert served.ask("", Host="evil.example")[0] == 403  # whose name leads here by now
    assert served.ask("", Host=f"evil.example:{port}")[0] == 403
    assert served.ask("", Host=f"localhost:{port}")[0] == 200


def test_nothing_is_served_without_the_token(served: Served) -> None:
    line = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=PATIENCE_S)
    for path in ("/", "/api/session", "/static/main.js", "/api/videos/0/media", "/x/api/session"):
        line.request("GET", path)
        answer = line.getresponse()
        assert (answer.status, answer.read()) == (404, b"Not Found")
    line.close()
    assert served.ask("static/../server.py")[0] == 404
    assert served.ask("api/videos/1")[0] == 404


def test_a_browser_is_told_what_the_page_may_do(served: Served) -> None:
    headers = served.ask("")[2]
    assert headers["content-security-policy"].startswith("default-src 'self'; ")
    assert headers["referrer-policy"] == "no-referrer"  # an address has the token
    assert headers["cross-origin-resource-policy"] == "same-origin"


# ---- videos ------------------------------------------------------------------------------------


def test_a_video_is_served_in_ranges(served: Served) -> None:
    whole = served.video.read_bytes()
    status, content, headers = served.ask("api/videos/0/media")
    assert (status, content, headers["content-type"]) == (200, whole, "video/mp4")
    for asked, part in (("0-99", whole[:100]), ("500-", whole[500:]), ("-20", whole[-20:])):
        status, content, headers = served.ask("api/videos/0/media", Range=f"bytes={asked}")
        assert (status, content) == (206, part)
        assert headers["content-range"].endswith(f"/{len(whole)}")
    assert served.ask("api/videos/0/media", Range=f"bytes={len(whole)}-")[0] == 416
    times = np.frombuffer(served.ask("api/videos/0/times")[1], "<f8")
    np.testing.assert_allclose(times, np.array(STAMPS) / 1000, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "form", "codec", "pixels", "media_type"),
    [
        ("a.avi", "mp4", "libx264", "yuv420p", "video/mp4"),  # whatever it is called
        ("a.mp4", "mp4", "mpeg4", "yuv420p", None),
        ("a.mp4", "avi", "libx264", "yuv420p", None),
        ("b.mp4", "mp4", "libx264", "yuv444p", None),
        ("a.webm", "webm", "libvpx", "yuv420p", "video/webm"),
        ("b.webm", "webm", "libvpx-vp9", "yuv420p", "video/webm"),
        ("c.mp4", "mp4", "libsvtav1", "yuv420p", "video/mp4"),
    ],
)
def test_the_codec_tells_what_browsers_play(
    tmp_path: Path, name: str, form: str, codec: str, pixels: str, media_type: str | None
) -> None:
    path = write_video(tmp_path / name, range(3), codec=codec, pixels=pixels, form=form)
    assert playable_type(path) == media_type


def test_a_copy_has_the_frames_and_times_of_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = write_video(
        tmp_path / "a.mov", STAMPS, Fraction(1, 1000), codec="mjpeg", pixels="yuvj420p", rotation=90
    )
    shares: list[float] = []
    copy = playable_copy(path, shares.append)
    assert playable_type(copy) == "video/mp4"
    np.testing.assert_allclose(frame_times(copy, shares.append), np.array(STAMPS) / 1000, atol=1e-9)
    with av.open(str(copy)) as container:
        frames = list(container.decode(video=0))
    assert [number_of(frame) for frame in frames] == list(range(50))
    assert {frame.rotation for frame in frames} == {90}
    keys = [n for n, frame in enumerate(frames) if frame.key_frame]
    assert max(np.diff(keys)) <= 12
    assert 0.9 < max(shares) <= 1.0

    # Made once; after a month without use it goes.
    made_at = copy.stat().st_mtime_ns
    old = copy.with_name("old.mp4")
    old.touch()
    os.utime(old, (0, time.time() - 31 * 24 * 3600))
    assert playable_copy(path, shares.append) == copy
    assert copy.stat().st_mtime_ns >= made_at
    assert list(copy.parent.iterdir()) == [copy]


def test_frames_that_are_never_shown_have_no_time(tmp_path: Path) -> None:
    """VP8's alternative references; a step to one would show nothing new."""
    path = write_video(tmp_path / "a.webm", range(10), codec="libvpx")
    hidden = tmp_path / "b.webm"
    with av.open(str(path)) as source, av.open(str(hidden), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if not packet.size:
                continue
            content = bytearray(bytes(packet))
            content[0] &= ~0x10 if number == 4 else 0xFF
            copy = av.Packet(bytes(content))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.stream = stream
            output.mux(copy)
    shown = [n / 25 for n in range(10) if n != 4]
    np.testing.assert_allclose(frame_times(hidden, lambda _: None), shown, atol=1e-9)


def test_files_that_are_no_videos_are_named(tmp_path: Path) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("no video at all")
    with pytest.raises(VideoError, match=r"notes\.mp4: cannot be read as a video"):
        playable_type(text)
    data = tmp_path / "data"
    assert "film.mp4: expected a video file, there is none" in refusal(
        "label", tmp_path / "film.mp4", "--data", data
    )
    (tmp_path / "my film.mp4").touch()
    assert "expected a name without blanks" in refusal(
        "label", tmp_path / "my film.mp4", "--data", data
    )
    (tmp_path / "notes.avi").touch()
    said = refusal("label", text, tmp_path / "notes.avi", "--data", data)
    assert "both are the recording notes" in said
    preset = ("--preset", "mocap6", "--classes", "jump")
    assert "preset has classes of its own" in refusal("label", text, "--data", data, *preset)


def test_without_its_packages_it_says_which_extra_has_them(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['starlette'] = None\n"
        "sys.argv = ['hrpro', 'label', 'a.mp4', '--data', 'data']\n"
        "from hrpro.clients.cli import main; main()"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (said.returncode, said.stdout) == (1, "")
    assert "pip install 'hrpro-stream[label]'" in said.stderr
    assert len(said.stderr.splitlines()) == 1
