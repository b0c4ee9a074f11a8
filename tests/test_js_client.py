"""The client in JavaScript, which was written from the protocol's document, against an engine."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from commands import MESSAGES, PATIENCE_S, engine, hrpro, hrpro_json, published_in_process
from driving import assert_same
from tiny_model import DIM, tiny_recording

from hrpro.clients import StreamNotice
from hrpro.engine.messages import Publication
from hrpro.export.bundle import Bundle

CLIENT = Path(__file__).resolve().parents[1] / "clients" / "js"
NODE = shutil.which("node")
RECORDING = tiny_recording(400)

pytestmark = [
    pytest.mark.skipif(NODE is None, reason="the JavaScript client was not tested: no node here"),
    pytest.mark.skipif(
        not (CLIENT / "node_modules" / "zeromq").is_dir(),
        reason="the JavaScript client was not tested: make js installs what it needs",
    ),
]


@contextlib.contextmanager
def client(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """The client as a process; killed if it is still there at the end, or hangs."""
    command = [str(NODE), str(CLIENT / "cli.mjs"), *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        too_late = threading.Timer(PATIENCE_S, process.kill)
        too_late.start()
        try:
            yield process
        finally:
            too_late.cancel()
            process.kill()


class Subscriber:
    """What a subscribing client prints."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.heard: list[Publication] = []

    def until(self, is_last: Callable[[Publication], bool]) -> list[Publication]:
        """All that was heard, with a new one of which this is true as the last."""
        assert self._process.stdout is not None and self._process.stderr is not None
        while not self.heard or not is_last(self.heard[-1]):
            line = self._process.stdout.readline()
            assert line, self._process.stderr.read()
            fields = json.loads(line)
            self.heard.append(MESSAGES[fields.pop("type")](**fields))
        return self.heard

    def until_ended(self, stream: str) -> list[Publication]:
        return self.until(
            lambda each: (
                isinstance(each, StreamNotice) and each.kind == "ended" and each.stream == stream
            )
        )


@contextlib.contextmanager
def subscribed(address: str, *options: object) -> Iterator[Subscriber]:
    with client("subscribe", address, *options) as process:
        yield Subscriber(process)
        process.kill()
        assert process.stderr is not None
        assert process.stderr.read() == b""


def feed(address: str, stream: str, *options: object, status: int = 0) -> str:
    """Feeds the recording; what the client prints."""
    with client("feed", address, stream, "-", DIM, *options) as process:
        stdout, stderr = process.communicate(RECORDING.tobytes(), PATIENCE_S)
    assert process.returncode == status, stderr
    return (stderr if status else stdout).decode()


def unnumbered(publications: list[Publication]) -> list[Publication]:
    return [replace(each, number=None, previous=None) for each in publications]


def of_stream(publications: list[Publication], stream: str) -> list[Publication]:
    return [each for each in publications if each.stream == stream]


def assert_complete(publications: list[Publication]) -> None:
    """Each number once, in order."""
    assert [each.number for each in publications] == list(range(1, len(publications) + 1))


def test_it_feeds_a_file_and_hears_what_came_of_it(bundle: Bundle, tmp_path: Path) -> None:
    expected = published_in_process(bundle.folder, {"a": RECORDING})["a"]
    recording = tmp_path / "a.f32"
    recording.write_bytes(RECORDING.tobytes())
    with (
        engine(bundle.folder, state=tmp_path / "state") as served,
        subscribed(served.events, "--since", 0) as live,
    ):
        with client("feed", served.feed, "a", recording, DIM) as process:
            ended = json.loads(process.communicate(timeout=PATIENCE_S)[0])
        assert (ended["type"], ended["next_index"]) == ("ended", len(RECORDING))
        feed(served.feed, "b")
        counters = hrpro_json("status", served.control)["counters"]
        sent = {name: counters[name] for name in ("snippets_in", "snippets_duplicate")}
        assert sent == {"snippets_in": 2 * len(RECORDING), "snippets_duplicate": 0}
        assert counters["chunks_refused"] == 0  # it has kept to its credit
        found = live.until_ended("b")
        assert_complete(found)
        assert_same(unnumbered(of_stream(found, "a")), expected)
        # From the log alone: what is behind a number, and one stream.
        middle = len(found) // 2
        with (
            subscribed(served.events, "--since", middle) as late,
            subscribed(served.events, "--since", 0, "--stream", "b") as one,
        ):
            assert late.until_ended("b") == found[middle:]
            assert one.until_ended("b") == of_stream(found, "b")


def test_it_goes_on_where_a_killed_engine_was(bundle: Bundle, tmp_path: Path) -> None:
    expected = published_in_process(bundle.folder, {"cam": RECORDING})["cam"]
    state, half = tmp_path / "state", len(RECORDING) // 2
    with (
        engine(bundle.folder, state=state) as first,
        subscribed(first.events, "--since", 0) as every,
        subscribed(first.events, "--since", 0, "--stream", "cam") as one,
        client("feed", first.feed, "cam", "-", DIM) as feeder,
    ):
        assert feeder.stdin is not None
        feeder.stdin.write(RECORDING[:half].tobytes())
        feeder.stdin.flush()
        every.until(lambda each: each.sequence == 5)
        first.kill()
        with engine(bundle.folder, addresses=first.addresses, state=state):
            stdout, stderr = feeder.communicate(RECORDING[half:].tobytes(), PATIENCE_S)
            assert feeder.returncode == 0, stderr
            assert json.loads(stdout)["next_index"] == len(RECORDING)
            found = every.until_ended("cam")
            assert one.until_ended("cam") == found
    assert_complete(found)
    assert_same(unnumbered(found), expected)


def test_without_a_log_it_hears_what_is_live(bundle: Bundle) -> None:
    expected = published_in_process(bundle.folder, {"cam": RECORDING})["cam"]
    with engine(bundle.folder) as served, subscribed(served.events) as live:
        # When it is subscribed only what it hears tells.
        done = threading.Event()

        def knock() -> None:
            while not done.is_set():
                feed(served.feed, "before")

        knocking = threading.Thread(target=knock)
        knocking.start()
        try:
            live.until(lambda each: each.stream == "before")
        finally:
            done.set()
            knocking.join()
        feed(served.feed, "cam")
        assert_same(of_stream(live.until_ended("cam"), "cam"), expected)


def test_with_keys(bundle: Bundle, tmp_path: Path) -> None:
    keys, roles = tmp_path / "keys", {"cams": "producer", "screen": "subscriber"}
    for name, role in roles.items():
        out = tmp_path / f"{name}.key"
        hrpro(
            "keys", "new", name, "--role", role, "--streams", "cam*", "--keys", keys, "--out", out
        )
    producer, viewer = (("--key", tmp_path / f"{name}.key") for name in roles)
    with (
        engine(bundle.folder, "--keys", keys, quiet=False, state=tmp_path / "state") as served,
        subscribed(served.events, "--since", 0, *viewer) as seen,
    ):
        assert feed(served.feed, "door", *producer, status=1).startswith("not_permitted: ")
        feed(served.feed, "cam1", *producer)
        assert_complete(seen.until_ended("cam1"))


class ScriptedEngine:
    """Hears what a feeder sends, and answers what the test says."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._peer = b""
        self.address = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"

    def hears(self) -> tuple[str, int, int]:
        """Type, first (or next) index and number of snippets of the next message."""
        assert self._socket.poll(PATIENCE_S * 1000)
        self._peer, header, *features = self._socket.recv_multipart()
        fields = msgpack.unpackb(header)
        snippets = fields.get("shape", [0])[0]
        assert sum(map(len, features)) == snippets * DIM * 4
        return fields["type"], fields.get("first_index", fields.get("next_index")), snippets

    def says(self, kind: str, next_index: int | None, **fields: Any) -> None:
        header = {"v": 1, "type": kind, "stream": "cam", "next_index": next_index, **fields}
        self._socket.send_multipart([self._peer, msgpack.packb(header)])

    def welcomes(self, next_index: int, send_until: int) -> None:
        self.says("welcome", next_index, send_until=send_until, max_chunk_snippets=4, needed_from=0)


def test_it_sends_again_what_is_missing_and_what_is_not_answered(tmp_path: Path) -> None:
    recording = tmp_path / "cam.f32"
    recording.write_bytes(RECORDING[:10].tobytes())
    lost = {"code": "unknown_stream", "message": "?"}
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        scripted = ScriptedEngine(socket)
        with client("feed", scripted.address, "cam", recording, DIM) as process:
            assert scripted.hears() == ("hello", 0, 0)
            scripted.says("error", None, **lost)  # of something older
            scripted.welcomes(0, send_until=6)
            assert [scripted.hears() for _ in range(2)] == [("chunk", 0, 4), ("chunk", 4, 2)]
            for _ in range(2):  # said twice, it is sent once
                scripted.says("ack", 2, send_until=6, missing_until=4, needed_from=0)
            assert scripted.hears() == ("chunk", 2, 2)
            scripted.says("ack", 6, send_until=9, needed_from=1)
            assert scripted.hears() == ("chunk", 6, 3)
            # Another engine, from a log: it needs what is acknowledged long since.
            scripted.says("error", None, **lost)
            assert scripted.hears() == ("hello", 1, 0)
            scripted.welcomes(1, send_until=10)
            assert [scripted.hears() for _ in range(3)] == [
                ("chunk", 1, 4), ("chunk", 5, 4), ("chunk", 9, 1),
            ]  # fmt: skip
            assert scripted.hears() == ("hello", 1, 0)  # nothing was heard for a while
            scripted.welcomes(10, send_until=10)
            assert [scripted.hears() for _ in range(2)] == [("end", 10, 0)] * 2  # the first is lost
            scripted.says("ended", 10, proposals=0, events=0)
            assert process.wait(PATIENCE_S) == 0


def test_its_own_hellos_of_a_line_before_do_not_shut_it_out(tmp_path: Path) -> None:
    """An engine that stood still reads them last, and takes the old line for the owner."""
    recording = tmp_path / "cam.f32"
    recording.write_bytes(RECORDING[:2].tobytes())
    not_owner = {"code": "not_owner", "message": "?"}
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        scripted = ScriptedEngine(socket)
        with client("feed", scripted.address, "cam", recording, DIM) as process:
            assert [scripted.hears() for _ in range(2)] == [("hello", 0, 0)] * 2  # over two lines
            scripted.says("error", None, **not_owner)  # of what was before
            scripted.welcomes(0, send_until=6)
            assert scripted.hears() == ("chunk", 0, 2)
            scripted.says("error", None, **not_owner)
            assert scripted.hears() == ("hello", 0, 0)
            scripted.welcomes(2, send_until=6)
            assert scripted.hears() == ("end", 2, 0)
            scripted.says("error", None, **not_owner)  # once more: it is another feeder
            assert process.wait(PATIENCE_S) == 1


def said_by(*arguments: object, given: bytes = b"", status: int = 1) -> str:
    """The one line on stderr of a client that gives up."""
    with client(*arguments) as process:
        stdout, stderr = process.communicate(given, PATIENCE_S)
    assert (process.returncode, stdout) == (status, b""), stderr
    assert stderr.count(b"\n") == 1, stderr
    return stderr.decode().rstrip()


def test_what_it_cannot_ask_for_is_refused() -> None:
    nowhere = "tcp://127.0.0.1:9"
    for number in ("abc", "-1", "1.5"):
        said = said_by("subscribe", nowhere, f"--since={number}")
        expected = {"abc": "NaN"}.get(number, number)
        assert said == f"expected since to be an integer of at least 0, got {expected}"
    refused = "expected a stream of 1 to 64 of A-Z a-z 0-9 . _ : -, got 'a b'"
    assert said_by("subscribe", nowhere, "--stream", "a b") == refused
    assert said_by("feed", nowhere, "a b", "-", DIM) == refused


def test_what_is_left_of_a_snippet_ends_the_stream_before_it(
    bundle: Bundle, tmp_path: Path
) -> None:
    expected = published_in_process(bundle.folder, {"cut": RECORDING[:20]})["cut"]
    given = RECORDING[:20].tobytes() + b"123"
    with engine(bundle.folder, state=tmp_path / "state") as served:
        said = said_by("feed", served.feed, "cut", "-", DIM, given=given)
        assert said == "-: 3 bytes are left of a snippet"
        with subscribed(served.events, "--since", 0) as live:
            assert_same(unnumbered(live.until_ended("cut")), expected)


def test_without_a_log_it_says_that_nothing_can_be_sent_again(bundle: Bundle) -> None:
    with engine(bundle.folder) as served, client("subscribe", served.events, "--since", 10) as own:
        assert own.stderr is not None
        assert own.stderr.readline() == b"there is no log: what followed number 10 is gone\n"


def test_who_reads_may_leave(bundle: Bundle, tmp_path: Path) -> None:
    with engine(bundle.folder, state=tmp_path / "state") as served:
        feed(served.feed, "cam")
        with client("subscribe", served.events, "--since", 0) as own:
            assert own.stdout is not None and own.stderr is not None
            assert own.stdout.readline().startswith(b"{")
            own.stdout.close()
            feed(served.feed, "more")
            assert (own.wait(PATIENCE_S), own.stderr.read()) == (0, b"")


def test_a_refusal_is_one_line(bundle: Bundle) -> None:
    with engine(bundle.folder, quiet=False) as served:
        said = feed(served.feed, "cam", "--snippet-frames", 8, status=1)
        assert said.startswith("wrong_clock: ") and said.count("\n") == 1
