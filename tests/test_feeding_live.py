"""`hrpro feed features` of files that grow and of stdin: real files, pipes and processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pytest
from commands import (
    HRPRO,
    Floats,
    engine,
    environment,
    one_line,
    published_in_process,
    running,
    wait_for,
)
from driving import assert_same
from hypothesis import given
from hypothesis import strategies as st
from serving import PATIENCE_S, TinyPipeline, rows, serving
from tiny_model import tiny_recording
from typer.testing import CliRunner

from hrpro.clients import EventSubscriber, StreamNotice, request_status
from hrpro.clients.cli import app
from hrpro.clients.feeding import FeatureFileError
from hrpro.clients.feeding_live import FeatureDecoder
from hrpro.engine.protocol import Publication

if TYPE_CHECKING:
    from hrpro.export.bundle import Bundle

DIM = 2


def npy(features: np.ndarray, count: int | None = None) -> bytes:
    """An array's file, with a header that says another number of rows."""
    file = io.BytesIO()
    shape = (len(features) if count is None else count, *features.shape[1:])
    header = {"descr": features.dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + features.tobytes()


# ---- bytes to features -------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 100), max_size=40),
    form=st.sampled_from(["raw", "<f4", ">f4", "<f2", "<f8"]),
)
def test_any_pieces_make_the_same_rows(sizes: list[int], form: str) -> None:
    features = rows(0, 40)
    data = features.tobytes() if form == "raw" else npy(features.astype(form), count=3)
    decoder = FeatureDecoder("it", DIM if form == "raw" else None)
    found = []
    for size in [*sizes, len(data)]:
        found.append(decoder.rows(data[:size]))
        data = data[size:]
    decoder.finish()
    assert decoder.dim == DIM
    np.testing.assert_array_equal(
        np.concatenate([each.reshape(-1, DIM) for each in found]), features
    )
    assert all(each.dtype == np.float32 for each in found)


@pytest.mark.parametrize(
    ("data", "dim", "message"),
    [
        (rows(0, 3).tobytes()[:-3], 2, "it: expected whole rows of 8 bytes, .* 5 bytes over"),
        (npy(rows(0, 3)) + b"xyz", None, "expected whole rows of 8 bytes, .* 3 bytes over"),
        (rows(0, 3).tobytes(), None, "it: expected a .npy header, or --dim for raw float32 rows"),
        (npy(rows(0, 3)), 3, "it: expected D = 3, came 2"),
        (npy(rows(0, 3))[:50], None, "expected a .npy header, .* came an end after 50 bytes"),
        (b"", None, "expected a .npy header, .* came an end after 0 bytes"),
        (npy(rows(0, 3).astype(np.int32)), None, "expected floats of shape .* came int32"),
        (npy(np.zeros(3, np.float32)), None, r"expected floats of shape .* came float32 \(3,\)"),
        (npy(np.zeros((3, 0), np.float32)), None, r"came float32 \(3, 0\)"),
        (b"\x93NUMPY\x09\x00" + b"x" * 100, None, "expected .npy format 1 or 2, came 9"),
        (b"\x93NUMPY\x01\x00\x04\x00{1:}", None, "it: not a .npy header"),
    ],
)
def test_what_are_no_features(data: bytes, dim: int | None, message: str) -> None:
    decoder = FeatureDecoder("it", dim)
    with pytest.raises(FeatureFileError, match=message):
        decoder.rows(data)
        decoder.finish()


def test_an_array_that_is_not_row_by_row() -> None:
    file = io.BytesIO()
    np.save(file, np.asfortranarray(rows(0, 3)))
    with pytest.raises(FeatureFileError, match=r"row by row, .* in Fortran order"):
        FeatureDecoder("it", None).rows(file.getvalue())


# ---- a producer, hrpro feed, an engine ---------------------------------------------------------


class Feeding:
    """`hrpro feed features`, running; its stdin may be written to."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    @property
    def pipe(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    def write(self, features: Floats) -> None:
        self.pipe.write(features.tobytes())
        self.pipe.flush()

    def over(self, status: int = 0) -> tuple[str, str]:
        """What it has said, once it has left by itself; stdin ends."""
        stdout, stderr = self.process.communicate(timeout=PATIENCE_S * 6)
        assert self.process.returncode == status, stderr
        assert b"Traceback" not in stderr
        return stdout.decode(), stderr.decode()


@contextlib.contextmanager
def feeding(address: str, *arguments: object, **options: Any) -> Iterator[Feeding]:
    given = {"stdin": subprocess.PIPE, **options}
    command = ("feed", "features", *arguments, "--to", address)
    with running(*command, text=False, **given) as process:
        yield Feeding(process)


@pytest.fixture
def pipeline() -> TinyPipeline:
    return TinyPipeline()


def received(pipeline: TinyPipeline, stream: str) -> list[tuple[int, float]]:
    return list(pipeline.received.get(stream, []))


def expected(first: int, stop: int) -> list[tuple[int, float]]:
    return [(index, index + 1.0) for index in range(first, stop)]


def pausing(happened: Callable[[], bool]) -> Callable[[], bool]:
    def look() -> bool:
        time.sleep(0.01)
        return happened()

    return look


def wait_for_snippets(pipeline: TinyPipeline, stream: str, count: int) -> None:
    wait_for(pausing(lambda: len(received(pipeline, stream)) >= count))


def test_raw_rows_through_a_pipe_as_they_come(pipeline: TinyPipeline) -> None:
    with (
        serving(pipeline) as server,
        feeding(server.feed_address, "-", "--dim", DIM, "--stream", "cam1", "--json") as fed,
    ):
        data = rows(0, 50).tobytes()
        for first in range(0, len(data), 11):  # rows come in pieces
            fed.pipe.write(data[first : first + 11])
            fed.pipe.flush()
        wait_for_snippets(pipeline, "cam1", 50)  # though the pipe is open
        fed.write(rows(50, 60))
        stdout, stderr = fed.over()
        assert json.loads(stdout) == {"streams": {"cam1": 60}, "snippets": 60}
        assert stderr == ""
    assert received(pipeline, "cam1") == expected(0, 60)


def test_an_array_on_stdin_from_a_file(pipeline: TinyPipeline, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(0, 3000).astype(np.float64))
    with (
        serving(pipeline) as server,
        (tmp_path / "x.npy").open("rb") as file,
        feeding(server.feed_address, "-", "--stream", "cam1", stdin=file) as fed,
    ):
        assert fed.over() == ("cam1: 3000 snippets, 3000 proposals, 3000 events\n", "")
    assert received(pipeline, "cam1") == expected(0, 3000)


def test_a_row_that_is_cut_off_is_an_error_and_the_others_are_fed(pipeline: TinyPipeline) -> None:
    with (
        serving(pipeline) as server,
        feeding(server.feed_address, "-", "--dim", DIM, "--stream", "cam1") as fed,
    ):
        fed.pipe.write(rows(0, 5).tobytes()[:-3])
        assert one_line(fed.over(status=1)[1]) == (
            "stdin: expected whole rows of 8 bytes, came an end with 5 bytes over"
        )
        assert pipeline.streams == {}  # it has been ended where it was
    assert received(pipeline, "cam1") == expected(0, 4)


def test_what_is_not_finite_is_refused(pipeline: TinyPipeline) -> None:
    with (
        serving(pipeline) as server,
        feeding(server.feed_address, "-", "--dim", DIM, "--stream", "cam1") as fed,
    ):
        bad = rows(0, 5)
        bad[3, 1] = np.nan
        fed.write(bad)
        assert one_line(fed.over(status=1)[1]) == (
            "stream 'cam1', snippet 3: expected finite features, came NaN or infinity"
        )


def test_a_fast_producer_is_held_by_the_pipe(pipeline: TinyPipeline) -> None:
    """And what is read ahead is bounded: a block, and what the pipe holds."""
    total = 400_000  # 3.2 MB
    written = 0

    def produce(pipe: IO[bytes]) -> None:
        nonlocal written
        data = rows(0, total).tobytes()
        with contextlib.suppress(BrokenPipeError):
            for first in range(0, len(data), 4096):
                pipe.write(data[first : first + 4096])
                written = first + 4096

    pipeline.paused = True
    with (
        serving(pipeline) as server,
        feeding(server.feed_address, "-", "--dim", DIM, "--stream", "cam1") as fed,
    ):
        producer = threading.Thread(target=produce, args=(fed.pipe,))
        producer.start()
        wait_for_snippets(pipeline, "cam1", 16)  # its credit
        before = -1
        while before != written:
            before = written
            time.sleep(0.2)
        assert written < 2 * 2**18
        fed.process.kill()
        producer.join(PATIENCE_S)


def test_what_comes_on_stdin_follows_what_the_engine_has(pipeline: TinyPipeline) -> None:
    with serving(pipeline) as server:
        command = (server.feed_address, "-", "--dim", DIM, "--stream", "cam1")
        with feeding(*command) as killed:
            killed.write(rows(0, 5))
            wait_for_snippets(pipeline, "cam1", 5)
            killed.process.kill()
        with feeding(*command) as fed:
            fed.write(rows(5, 9))
            stdout, stderr = fed.over()
        assert stdout == "cam1: 9 snippets, 9 proposals, 9 events\n"
        assert one_line(stderr) == (
            "stream 'cam1': the engine has 5 snippets of it already; what comes follows them"
        )
    assert received(pipeline, "cam1") == expected(0, 9)


def test_an_engine_that_is_killed_between_rows_loses_none(bundle: Bundle, tmp_path: Path) -> None:
    recording = tiny_recording(90, seed=3)
    parts, options = np.array_split(recording, 3), {"state": tmp_path / "state", "quiet": False}
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(engine(bundle.folder, **options))
        dim, control = ("--dim", recording.shape[1]), served.control  # of all of them
        fed = stack.enter_context(feeding(served.feed, "-", *dim, "--stream", "cam1"))
        for stop, part in zip((30, 60, 90), parts, strict=True):
            fed.write(part)
            wait_for(lambda stop=stop: accepted(control) == stop)
            if stop < 90:
                served.kill()
                again = engine(bundle.folder, addresses=served.addresses, **options)
                served = stack.enter_context(again)
        assert fed.over()[0].startswith("cam1: 90 snippets")
        with EventSubscriber(served.events, since=0) as subscriber:
            heard: list[Publication] = []
            while not heard or short(heard[-1]) != "ended":
                publication = subscriber.receive(PATIENCE_S)
                assert publication is not None
                heard.append(publication)
    undisturbed = published_in_process(bundle.folder, {"cam1": recording})["cam1"]
    assert_same([replace(each, number=None, previous=None) for each in heard], undisturbed)


def accepted(control: str) -> int:
    """How many snippets an engine has of its one stream."""
    streams = request_status(control)["streams"]
    return int(streams[0]["next_index"]) if streams else 0


def short(publication: Publication) -> str:
    return publication.kind if isinstance(publication, StreamNotice) else publication.TYPE


# ---- files that grow -----------------------------------------------------------------------------


def append(file: Path, data: bytes) -> None:
    with file.open("ab") as opened:
        opened.write(data)


def test_files_that_grow_are_followed(pipeline: TinyPipeline, tmp_path: Path) -> None:
    array, raw = tmp_path / "array.npy", tmp_path / "raw.npy"
    whole = npy(rows(0, 20), count=0)
    array.write_bytes(whole[:40])  # not even its header is there
    raw.write_bytes(npy(rows(0, 20), count=10**6))
    with (
        serving(pipeline) as server,
        feeding(server.feed_address, array, raw, "--follow", "--json") as fed,
    ):
        wait_for_snippets(pipeline, "raw", 20)
        append(array, whole[40:-3])
        wait_for_snippets(pipeline, "array", 19)
        append(array, whole[-3:])
        wait_for_snippets(pipeline, "array", 20)
        append(raw, rows(20, 21).tobytes()[:-1])  # never complete
        append(array, rows(20, 40).tobytes())
        wait_for_snippets(pipeline, "array", 40)
        fed.process.send_signal(signal.SIGINT)
        stdout, stderr = fed.over()
        assert json.loads(stdout) == {"streams": {"array": 40, "raw": 20}, "snippets": 60}
        assert stderr == ""
        assert pipeline.streams == {}
    assert received(pipeline, "array") == expected(0, 40)
    assert received(pipeline, "raw") == expected(0, 20)


def test_a_file_that_does_not_grow_any_more_ends(pipeline: TinyPipeline, tmp_path: Path) -> None:
    file = tmp_path / "cam.f32"
    file.write_bytes(rows(0, 12).tobytes())
    options = ("--follow", "--dim", DIM, "--end-after", 0.3, "--stream", "door")
    with serving(pipeline) as server, feeding(server.feed_address, file, *options) as fed:
        wait_for_snippets(pipeline, "door", 12)
        append(file, rows(12, 13).tobytes())
        assert fed.over() == ("door: 13 snippets, 13 proposals, 13 events\n", "")
    assert received(pipeline, "door") == expected(0, 13)


def cut(file: Path) -> None:
    os.truncate(file, 20)


def replace_by_another(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    other.replace(file)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, r"expected it to grow, it was cut to 20 bytes after 96 were read"),
        (replace_by_another, "expected it to grow, it was replaced by another"),
        (Path.unlink, "expected it to stay, came .* No such file or directory"),
    ],
)
def test_a_file_that_is_not_only_appended_to_is_an_error(
    pipeline: TinyPipeline, tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    file, other = tmp_path / "cam.f32", tmp_path / "cam2.f32"
    for each in (file, other):
        each.write_bytes(rows(0, 12).tobytes())
    with (
        serving(pipeline) as server,
        feeding(server.feed_address, file, other, "--follow", "--dim", DIM) as fed,
    ):
        for name in ("cam", "cam2"):
            wait_for_snippets(pipeline, name, 12)
        harm(file)
        said = one_line(fed.over(status=1)[1])
        assert said.startswith(f"{file}: ")
        assert re.search(message, said), said
        assert pipeline.streams == {}  # both have been ended
    assert received(pipeline, "cam") == received(pipeline, "cam2") == expected(0, 12)


def test_the_second_signal_ends_it_at_once(pipeline: TinyPipeline, tmp_path: Path) -> None:
    file = tmp_path / "cam.f32"
    file.write_bytes(rows(0, 40).tobytes())
    pipeline.paused = True
    with (
        serving(pipeline) as server,
        feeding(server.feed_address, file, "--follow", "--dim", DIM) as fed,
    ):
        wait_for_snippets(pipeline, "cam", 16)
        fed.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            fed.process.wait(0.3)  # it waits for credit
        fed.process.send_signal(signal.SIGTERM)
        assert fed.process.wait(PATIENCE_S) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-", "x.npy"), "expected - alone"),
        (("-", "--stream", "a", "--follow"), "expected files; stdin ends by itself"),
        (("-",), "expected the name of the stream of stdin"),
        (("a.npy", "b.npy", "--follow", "--stream", "a"), "expected one file"),
        (("a.npy", "--follow", "--speed", "2"), "another program sets the pace"),
        (("a.npy", "--end-after", "2"), "expected it with --follow"),
        (("a.npy", "--dim", "2"), "expected --follow or stdin"),
    ],
)
def test_options_that_do_not_go_together(arguments: tuple[str, ...], message: str) -> None:
    command = ["feed", "features", *arguments, "--to", "tcp://127.0.0.1:1"]
    said = CliRunner().invoke(app, command, env={"COLUMNS": "500"})
    assert said.exit_code == 2
    assert message in said.output


def test_files_that_are_not_there_or_would_be_one_stream(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.npy").touch()
    with feeding("tcp://127.0.0.1:1", tmp_path / "none.npy", "--follow") as fed:
        assert "No such file or directory" in one_line(fed.over(status=1)[1])
    with feeding("tcp://127.0.0.1:1", tmp_path, "--follow") as fed:
        said = one_line(fed.over(status=1)[1])
        assert said == f"{tmp_path}: expected a file that grows, came a folder"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with feeding("tcp://127.0.0.1:1", pipe, "--follow") as fed:
        said = one_line(fed.over(status=1)[1])
        assert said == (
            f"{pipe}: expected a regular file that grows; a pipe is read from stdin, as in hrpro"
            f" feed features - --stream NAME < {pipe}"
        )
    files = (tmp_path / "a" / "x.npy", tmp_path / "b" / "x.npy")
    with feeding("tcp://127.0.0.1:1", *files, "--follow") as fed:
        assert one_line(fed.over(status=1)[1]).startswith("two files would be the stream 'x'")


def test_a_stdin_that_is_closed() -> None:
    options = ("-", "--stream", "a", "--dim", "2", "--to", "tcp://127.0.0.1:1")
    command = shlex.join([*HRPRO, "feed", "features", *options])
    said = subprocess.run(
        ["sh", "-c", f"exec {command} <&-"],
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert (said.returncode, said.stdout) == (1, "")
    assert one_line(said.stderr) == "stdin: expected a pipe or a file, it is closed"
