"""What the tests of cameras share: videos whose frames can be told apart, extractors, cameras."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnx
import onnx.helper
import pytest
from commands import PATIENCE_S, running
from numpy.typing import NDArray
from onnx import TensorProto
from tiny_extractor import network, write_extractor

SYSTEM_PYTHON = "/usr/bin/python3"
SERVER = Path(__file__).with_name("rtsp_server.py")
PATTERN = (
    "videotestsrc is-live=true ! video/x-raw,width=320,height=240,framerate=25/1 "
    "! x264enc tune=zerolatency key-int-max=25 speed-preset=ultrafast "
    "! rtph264pay name=pay0 pt=96 config-interval=1"
)


# ---- extractors ----------------------------------------------------------------------------------


def colour_extractor(
    folder: Path,
    convolutions: int = 0,
    weights: NDArray[np.float32] | None = None,
    **changes: Any,
) -> Path:
    """Features: the mean colour (3,) in 0..1 of the frames that it looks at, times ``weights``
    (3, D), by default red and green alone. So many convolutions take time, and change nothing.
    """
    folder.mkdir(parents=True)
    weights = np.eye(3, dtype=np.float32)[:, :2] if weights is None else weights
    nodes = [
        onnx.helper.make_node("ReduceMean", ["images", "axes"], ["means"], keepdims=0),
        onnx.helper.make_node("MatMul", ["means", "weights"], ["colours"]),
    ]
    constants = {"axes": np.array([2, 3]), "weights": weights}
    tensors = [onnx.numpy_helper.from_array(each, name) for name, each in constants.items()]
    last = "images"
    for n in range(convolutions):
        kernel = np.zeros((128, 3 if n == 0 else 128, 7, 7), np.float32)
        tensors.append(onnx.numpy_helper.from_array(kernel, f"w{n}"))
        nodes.append(onnx.helper.make_node("Conv", [last, f"w{n}"], [f"y{n}"], pads=[3, 3, 3, 3]))
        last = f"y{n}"
    if convolutions:
        nodes.append(onnx.helper.make_node("ReduceMean", [last, "all"], ["nothing"], keepdims=0))
        tensors.append(onnx.numpy_helper.from_array(np.array([0, 1, 2, 3]), "all"))
        nodes.append(onnx.helper.make_node("Add", ["colours", "nothing"], ["features"]))
    else:
        nodes.append(onnx.helper.make_node("Identity", ["colours"], ["features"]))
    graph = onnx.helper.make_graph(
        nodes,
        "colours",
        [onnx.helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [onnx.helper.make_tensor_value_info("features", TensorProto.FLOAT, None)],
        tensors,
    )
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / "colours.onnx"
    )
    return write_extractor(folder, network("colours.onnx", features=weights.shape[1]), **changes)


# ---- videos --------------------------------------------------------------------------------------


def brightness(number: int) -> int:
    """Of frame ``number``: neighbours differ by a lot, and it does not repeat for a while."""
    return 40 + (number * 37) % 176


def write_video(
    path: Path,
    times_s: Sequence[Fraction],
    codec: str = "ffv1",
    size: tuple[int, int] = (64, 48),
    levels: Callable[[int], int] = brightness,
) -> Path:
    """A video of grey frames at these times, each of its own brightness."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 90_000)
        for number, time_s in enumerate(times_s):
            image = np.full((size[1], size[0], 3), levels(number), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(time_s * 90_000), Fraction(1, 90_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def steady(frames_per_s: int | Fraction, count: int) -> list[Fraction]:
    """The times of frames at that rate."""
    return [n / Fraction(frames_per_s) for n in range(count)]


def transcoded(recording: Path, path: Path, frames: int) -> Path:
    """The first frames of a recording as H.264, which cameras send."""
    with av.open(recording) as source, av.open(path, "w") as container:
        video = source.streams.video[0]
        options = {"preset": "ultrafast", "g": "25"}
        stream = container.add_stream("libx264", video.average_rate, options=options)
        stream.width, stream.height = video.width // 2 * 2, video.height // 2 * 2
        stream.pix_fmt = "yuv420p"
        for frame in itertools.islice(source.decode(video), frames):
            small = frame.reformat(stream.width, stream.height, "yuv420p")
            small.pict_type = av.video.frame.PictureType.NONE
            container.mux(stream.encode(small))
        container.mux(stream.encode())
    return path


# ---- RTSP ----------------------------------------------------------------------------------------


class RtspServer:
    """A server in a process of its own, on one port for as long as it is there."""

    def __init__(self, **pipelines: str) -> None:
        self._mounts = [f"/{path}={pipeline}" for path, pipeline in pipelines.items()]
        self.port = "0"
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [SYSTEM_PYTHON, str(SERVER), self.port, *self._mounts],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = self._process.stdout.readline().strip()
        assert self.port, "the RTSP server did not start"

    def kill(self) -> None:
        """As `kill -9` does; returns when it is gone."""
        assert self._process is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._process.stdout.close()

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def url(self, path: str, user: str = "") -> str:
        return f"rtsp://{user}127.0.0.1:{self.port}/{path}"


@contextlib.contextmanager
def rtsp(**pipelines: str) -> Iterator[RtspServer]:
    """A server of these pipelines; skips where GStreamer is not installed."""
    check = (
        "import gi; gi.require_version('GstRtspServer', '1.0'); gi.require_version('Gst', '1.0'); "
        "from gi.repository import Gst; Gst.init(None); "
        "assert all(map(Gst.ElementFactory.find, ('x264enc', 'rtph264pay', 'qtdemux')))"
    )
    try:
        subprocess.run([SYSTEM_PYTHON, "-c", check], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no GStreamer RTSP server here: cameras were not tested against a real one")
    server = RtspServer(**pipelines)
    try:
        yield server
    finally:
        server.kill()


# ---- the command ---------------------------------------------------------------------------------


class Feeding:
    """`hrpro feed camera --json` while it runs: what it says of each stream."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._said: dict[str, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._listen),
            threading.Thread(target=self._listen_to_errors),
        ]
        for thread in self._threads:
            thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            status = json.loads(line)
            with self._changed:
                self._said[status["stream"]] = status
                self._changed.notify_all()

    def _listen_to_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self._errors.append(line)
                self._changed.notify_all()

    @property
    def stderr(self) -> str:
        return "".join(self._errors)

    def status(self, stream: str) -> dict[str, Any]:
        """The newest line about a stream."""
        return self._said[stream]

    def wait(self, stream: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Until a line about a stream is as wanted; that line."""
        with self._changed:
            here = self._changed.wait_for(
                lambda: stream in self._said and wanted(self._said[stream]), PATIENCE_S
            )
            assert here, (self._said.get(stream), self.stderr)
            return self._said[stream]

    def wait_said(self, text: str) -> None:
        """Until it is on stderr."""
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.stderr, PATIENCE_S), self.stderr

    def leave(self, number: signal.Signals | None = signal.SIGTERM, status: int = 0) -> str:
        """Send it a signal, or wait for its own end; what it has said on stderr."""
        if number is not None:
            self.process.send_signal(number)
        assert self.process.wait(PATIENCE_S) == status, self.stderr
        for thread in self._threads:
            thread.join(PATIENCE_S)
        assert "Traceback" not in self.stderr
        return self.stderr


@contextlib.contextmanager
def feeding(*arguments: object, **options: Any) -> Iterator[Feeding]:
    """The command with `--json` while it runs."""
    with running("feed", "camera", *arguments, "--json", **options) as process:
        feed = Feeding(process)
        try:
            yield feed
        finally:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait(PATIENCE_S)
            for thread in feed._threads:
                thread.join(PATIENCE_S)


def red_of(received: Sequence[tuple[int, float]]) -> NDArray[np.float64]:
    """The first features, in levels of 0..255."""
    return np.array([each * 255 for _, each in received])
