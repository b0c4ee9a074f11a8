"""Small pictures of streams over HTTP: which one is given, and who is given any."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from cameras import colour_extractor, feeding, steady, write_video
from commands import refusal
from serving import serving

from hrpro.clients.cameras.thumbnails import KEPT_S, ThumbnailRing, new_rings, thumbnail_server
from hrpro.engine.timebase import SnippetClock
from hrpro.engine.wire import HrproError

CLOCK = SnippetClock(25.0, 16)
TOKEN = "0123456789abcdef"


def frame(level: int, height: int = 90) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.full((height, 320, 3), level, np.uint8), format="rgb24")


def level_of(jpeg: bytes) -> tuple[float, tuple[int, int]]:
    """The brightness of a picture, and its width and height."""
    image = av.CodecContext.create("mjpeg", "r").decode(av.Packet(jpeg))[0]
    return float(image.to_ndarray(format="rgb24").mean()), (image.width, image.height)


def get(
    url: str, path: str, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:  # status, headers, body
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


# ---- the ring ------------------------------------------------------------------------------------


def test_the_nearest_picture_at_or_before_a_snippet() -> None:
    ring = ThumbnailRing(CLOCK)
    assert ring.at(5) is None
    for index in range(3, 12):
        for _ in range(16):
            ring.offer(index, frame(10 * index))
    # One in two snippets is about one a second.
    for index, kept in ((3, 3), (4, 3), (5, 5), (10, 9), (11, 11), (1000, 11)):
        found = ring.at(index)
        assert found is not None
        level, size = level_of(found[1])
        assert found[0] == kept and abs(level - 10 * kept) < 4 and size == (160, 44)
    assert ring.at(2) is None


def test_a_ring_keeps_some_minutes() -> None:
    clock = SnippetClock(1.0, 20)
    ring = ThumbnailRing(clock)
    for index in range(100):
        ring.offer(index, frame(index))
    kept = KEPT_S // 20
    assert ring.at(99 - kept) is None
    assert ring.at(100 - kept) is not None


def test_a_camera_that_changes_its_format() -> None:
    ring = ThumbnailRing(CLOCK)
    for index, height in ((0, 180), (2, 320), (4, 180)):
        ring.offer(index, frame(100, height))
        found = ring.at(index)
        assert found is not None and level_of(found[1])[1] == (160, height // 2)


# ---- over HTTP -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ring() -> ThumbnailRing:
    made = ThumbnailRing(CLOCK)
    made.offer(7, frame(200))
    return made


@pytest.fixture
def url(ring: ThumbnailRing) -> Iterator[str]:
    with thumbnail_server("127.0.0.1:0", {"cam:1": ring, "b": ThumbnailRing(CLOCK)}, None) as url:
        yield url


def test_what_is_answered(url: str) -> None:
    status, headers, body = get(url, "/streams")
    assert (status, json.loads(body)) == (200, ["cam:1", "b"])
    status, headers, body = get(url, "/thumbnail/cam%3A1/9.jpg")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert (headers["X-Snippet-Index"], headers["Cache-Control"]) == ("7", "no-store")
    assert abs(level_of(body)[0] - 200) < 4
    for path in ("/thumbnail/cam%3A1/6.jpg", "/thumbnail/b/9.jpg", "/thumbnail/c/9.jpg", "/",
                 "/thumbnail/cam%3A1/-1.jpg", "/thumbnail/cam%3A1/x.jpg",
                 f"/thumbnail/cam%3A1/{'9' * 5000}.jpg"):  # fmt: skip
        assert get(url, path)[0] == 404, path


def test_without_a_token_only_names_of_this_machine_are_served(url: str) -> None:
    port = url.rpartition(":")[2]
    for name in ("localhost", "127.0.0.1", "[::1]"):
        assert get(url, "/streams", Host=f"{name}:{port}")[0] == 200
    for name in ("evil.example", "evil.example:80", "localhost.evil.example", "["):
        assert get(url, "/streams", Host=name)[0] == 421


def test_the_address_that_it_listens_at_is_a_name_of_this_machine(ring: ThumbnailRing) -> None:
    with thumbnail_server("127.0.0.2:0", {"cam": ring}, None) as url:
        assert url.startswith("http://127.0.0.2:")
        assert get(url, "/streams")[0] == 200
        assert get(url, "/streams", Host="127.0.0.3")[0] == 421


def test_who_has_the_token_is_let_in(ring: ThumbnailRing) -> None:
    with thumbnail_server("127.0.0.1:0", {"cam": ring}, TOKEN) as url:
        for path in ("/streams", "/thumbnail/cam/9.jpg"):
            assert get(url, path)[0] == 401
            assert get(url, path, Authorization="Bearer " + TOKEN[:-1])[0] == 401
            assert get(url, path, Authorization="Basic " + TOKEN)[0] == 401
            assert get(url, path, Authorization="Bearer " + TOKEN, Host="any.example")[0] == 200
        assert get(url, "/streams")[1]["WWW-Authenticate"] == "Bearer"


def test_addresses_that_are_refused() -> None:
    rings = new_rings(["cam"], CLOCK)
    with thumbnail_server("127.0.0.1:0", rings, None) as url:
        for address, complaint in (
            ("0.0.0.0:0", "others could reach it; give a token"),
            ("here", "expected HOST:PORT, such as"),
            (url.removeprefix("http://"), "cannot listen there: Address already in use"),
        ):
            with pytest.raises(HrproError, match=complaint), thumbnail_server(address, rings, None):
                pass


# ---- the command ---------------------------------------------------------------------------------


def test_pictures_of_what_is_fed(tmp_path: Path) -> None:
    video = write_video(tmp_path / "yard.mkv", steady(25, 100), levels=lambda n: 50 + n)
    extractor = colour_extractor(tmp_path / "colours")
    token_file = tmp_path / "token"
    token_file.write_text(f"{TOKEN}\n")
    with (
        serving() as server,
        feeding(
            video, "--to", server.feed_address, "--extractor", extractor, "--speed", "0.2",
            "--thumbnails", "127.0.0.1:0", "--thumbnails-token-file", token_file,
        ) as feed,
    ):  # fmt: skip
        feed.wait("yard", lambda it: it["sent"] >= 3)
        url = feed.stderr.split()[-1]
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert json.loads(get(url, "/streams", **bearer)[2]) == ["yard"]
        # The first frame of snippet 2 is number 32.
        status, headers, body = get(url, "/thumbnail/yard/3.jpg", **bearer)
        assert (status, headers["X-Snippet-Index"]) == (200, "2")
        assert abs(level_of(body)[0] - 82) < 4
        feed.leave()


def test_a_token_that_is_too_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = write_video(tmp_path / "yard.mkv", steady(25, 2))
    command = ("feed", "camera", video, "--to", "ipc://nobody", "--extractor", "x")
    (tmp_path / "token").write_text("short")
    said = refusal(*command, "--thumbnails-token-file", tmp_path / "token")
    assert f"{tmp_path / 'token'}: expected a token of at least 16 ASCII characters" in said
    monkeypatch.setenv("HRPRO_THUMBNAILS_TOKEN", "short")
    assert refusal(*command).startswith("HRPRO_THUMBNAILS_TOKEN: expected a token of at least 16")
