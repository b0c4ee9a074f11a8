"""Readers of sources: back-off, threads that are stuck, HTTP cameras, what waits to be taken."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from cameras import brightness, steady, write_video

from hrpro.clients.cameras import reader as reading
from hrpro.clients.cameras.frames import Snippet, SnippetAssembler
from hrpro.clients.cameras.reader import Outlet, SourceReader
from hrpro.clients.cameras.sources import Source, SourceError, parse_source, read_frames
from hrpro.engine.timebase import SnippetClock

CLOCK = SnippetClock(25.0, 16)
PATIENCE_S = 30.0


def assembler() -> SnippetAssembler[av.VideoFrame]:
    """Keeps the brightness of each frame."""
    return SnippetAssembler(
        CLOCK, range(16), lambda frame: frame.to_ndarray(format="rgb24")[:1, :1]
    )


def snippet(index: int) -> Snippet:
    return Snippet(index, np.zeros((1, 1, 1, 3), np.uint8))


# ---- what waits to be taken ----------------------------------------------------------------------


def test_the_newest_of_a_live_source_are_kept() -> None:
    changed = threading.Condition()
    outlet = Outlet(2, keep_all=False, changed=changed)
    for index in range(5):
        outlet.put(snippet(index))
    with changed:
        assert (len(outlet), outlet.skipped) == (2, 3)
        assert [outlet.take().index for _ in range(2)] == [3, 4]


def test_a_recording_waits_for_room() -> None:
    changed = threading.Condition()
    outlet = Outlet(2, keep_all=True, changed=changed)
    thread = threading.Thread(target=lambda: [outlet.put(snippet(n)) for n in range(6)])
    thread.start()
    for index in range(6):
        with changed:
            assert changed.wait_for(lambda: len(outlet) > 0, PATIENCE_S)
            assert len(outlet) <= 2
            assert outlet.take().index == index
    thread.join(PATIENCE_S)
    assert outlet.skipped == 0


def test_a_closed_outlet_lets_go_of_who_waits() -> None:
    changed = threading.Condition()
    outlet = Outlet(1, keep_all=True, changed=changed)
    outlet.put(snippet(0))
    thread = threading.Thread(target=lambda: outlet.put(snippet(1)))
    thread.start()
    outlet.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert outlet.ended and not len(outlet)


# ---- lost and found ------------------------------------------------------------------------------


class Hasty(SourceReader):
    """Does not wait, but notes for how long it should have, and stops after seven pauses."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, assembler(), Outlet(2, False, threading.Condition()))
        self.pauses_s: list[float] = []

    def _wait(self, wait_s: float) -> None:
        self.pauses_s.append(wait_s)
        if len(self.pauses_s) == 7:
            self.stop()


def test_pauses_grow_to_half_a_minute() -> None:
    reader = Hasty(parse_source("rtsp://user:pw@127.0.0.1:9/x"))
    reader.start()
    reader.join(PATIENCE_S)
    assert reader.pauses_s == [1, 2, 4, 8, 16, 30, 30]
    assert reader.reason == "rtsp://127.0.0.1:9/x: Connection refused"
    assert reader.state == "away" and reader.frames == 0


def test_a_thread_that_the_system_does_not_let_go_of_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open a pipe that nobody writes to takes for ever, and FFmpeg cannot be interrupted."""
    monkeypatch.setattr(reading, "_STUCK_S", 0.05)
    monkeypatch.setattr(reading, "FIRST_PAUSE_S", 0.01)
    video = write_video(tmp_path / "video.mkv", steady(25, 60))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = SourceReader(
        Source("http", f"file:{pipe}", "the pipe", "pipe"),
        assembler(),
        Outlet(9, False, threading.Condition()),
        stall_s=0.3,
    )
    threads = threading.active_count()
    reader.start()
    watch_until(reader, lambda: reader.reconnects == 2)
    for _ in range(20):
        reader.watch()
        time.sleep(0.01)
    assert reader.state == "stuck" and reader.reason == "the pipe: the system does not answer"
    assert threading.active_count() == threads + 3  # and no more
    pipe.rename(tmp_path / "old")
    video.rename(pipe)
    with (tmp_path / "old").open("wb"):  # lets them all go
        watch_until(reader, lambda: reader.frames >= 20)
    assert reader.state == "reading"
    reader.stop()
    reader.join(PATIENCE_S)


def watch_until(reader: SourceReader, happened: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < until_s, reader.state
        reader.watch()
        time.sleep(0.005)


def test_an_error_that_nobody_has_foreseen_ends_the_source(tmp_path: Path) -> None:
    def fail(_: av.VideoFrame) -> np.ndarray:
        raise ZeroDivisionError

    changed = threading.Condition()
    outlet = Outlet(2, True, changed)
    video = write_video(tmp_path / "video.mkv", steady(25, 20))
    failing = SnippetAssembler(CLOCK, range(16), fail)
    reader = SourceReader(parse_source(str(video)), failing, outlet, speed=None)
    seen: list[object] = []
    hook, threading.excepthook = threading.excepthook, seen.append
    try:
        reader.start()
        with changed:
            assert changed.wait_for(lambda: outlet.ended, PATIENCE_S)
        reader.join(PATIENCE_S)
    finally:
        threading.excepthook = hook
    assert (reader.state, reader.reason) == ("failed", "it cannot be read any more")
    assert len(seen) == 1


def test_frames_that_come_all_at_once_at_the_beginning_are_left_out() -> None:
    """Of 20 that had been kept, and were given with a pause in between, and 12 at their pace."""

    def frames() -> Iterator[tuple[int, Fraction]]:
        began_s = time.monotonic()
        for number in range(20):
            if number == 10:
                time.sleep(0.06)  # longer than a frame is shown: the machine is busy
            yield number, 5 + number * Fraction(1, 25)
        for number in range(20, 32):
            time.sleep(max(0.0, began_s + 0.1 + (number - 19) / 25 - time.monotonic()))
            yield number, 5 + number * Fraction(1, 25)

    came = [number for number, _ in reading._from_now_on(frames())]  # type: ignore[arg-type]
    assert came and came == list(range(came[0], 32))
    assert 20 < came[0] < 30


# ---- formats without time stamps -----------------------------------------------------------------


def test_a_recording_without_time_stamps_has_the_rate_of_its_format(tmp_path: Path) -> None:
    raw = write_video(tmp_path / "raw.h264", steady(25, 30), "libx264")
    times_s = [time_s for _, time_s in read_frames(parse_source(str(raw)))]
    assert times_s == steady(25, 30)


def test_a_truncated_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mkv", steady(25, 100))
    (tmp_path / "part.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    times_s = []
    with contextlib.suppress(SourceError):
        for _, time_s in read_frames(parse_source(str(tmp_path / "part.mkv"))):
            times_s.append(time_s)
    assert 10 < len(times_s) < 90
    assert times_s == [Fraction(n * 40, 1000) for n in range(len(times_s))]


# ---- HTTP ----------------------------------------------------------------------------------------


class MotionJpeg(BaseHTTPRequestHandler):
    """A camera of 20 frames a second that closes each connection after 30 frames."""

    connections = 0

    def do_GET(self) -> None:
        type(self).connections += 1
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
        self.end_headers()
        encoder = av.VideoCodecContext.create("mjpeg", "w")
        encoder.width, encoder.height, encoder.pix_fmt = 64, 48, "yuvj420p"
        encoder.time_base = Fraction(1, 20)
        began_s = time.monotonic()
        for number in range(30):
            image = np.full((48, 64, 3), brightness(number), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuvj420p")
            frame.pts, frame.time_base = number, encoder.time_base
            jpeg = b"".join(bytes(packet) for packet in encoder.encode(frame))
            head = f"--next\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            time.sleep(max(0.0, began_s + number / 20 - time.monotonic()))
            self.wfile.write(head.encode() + jpeg + b"\r\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def jpeg_camera() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), MotionJpeg) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/video"
        finally:
            server.shutdown()
            thread.join()


def test_motion_jpeg_is_on_the_clock_by_when_it_comes(
    jpeg_camera: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FIRST_PAUSE_S", 0.2)
    changed = threading.Condition()
    outlet = Outlet(20, False, changed)
    reader = SourceReader(parse_source(jpeg_camera), assembler(), outlet)
    began_s = time.monotonic()
    reader.start()
    with changed:
        assert changed.wait_for(lambda: len(outlet) >= 4, PATIENCE_S)
        indices = [outlet.take().index for _ in range(len(outlet))]
    took_s = time.monotonic() - began_s
    reader.stop()
    reader.join(PATIENCE_S)
    assert indices == sorted(set(indices))
    # Four snippets are 2.56 s, of connections of 1.5 s: the clock went on between them.
    assert reader.reconnects >= 1 and MotionJpeg.connections >= 2
    assert CLOCK.seconds(indices[-1] + 1) < took_s + 0.1
    assert CLOCK.seconds(indices[-1] + 1) > took_s - 1.5
