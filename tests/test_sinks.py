"""The sinks of `hrpro watch`: each is handed everything in order, and goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE_S, hrpro, refusal, running, wait_for
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from logged import action, notice
from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from serving import serving
from triton_server import free_port

from hrpro.clients import EventSubscriber, FeatureFeeder, sink_mqtt, sink_webhook, sinks
from hrpro.clients.watching import to_json
from hrpro.engine.event_log import EventLog
from hrpro.engine.messages import Publication
from hrpro.engine.server import Server


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    with EventLog(tmp_path / "state") as opened:
        yield opened


def several(count: int) -> list[Publication]:
    """Of two streams in turn."""
    return [notice("ab"[number % 2]) for number in range(count)]


def watch(server: Server, *options: object) -> str:
    """All that there is, or that is left; what the watcher has said on stderr."""
    said = hrpro(
        "watch", "--from", server.events_address, "--until-idle", 0.3, "--since", 0, *options
    )
    return said.stderr


@contextlib.contextmanager
def watching(server: Server, *options: object) -> Iterator[subprocess.Popen[str]]:
    with running("watch", "--from", server.events_address, "--since", 0, *options) as process:
        yield process


def soon(happened: Callable[[], bool]) -> None:
    """Waits for what other processes do."""

    def happened_by_now() -> bool:
        time.sleep(0.02)
        return happened()

    wait_for(happened_by_now)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    assert process.wait(PATIENCE_S) == -9


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def numbers(deliveries: list[dict[str, Any]]) -> list[int]:
    return [each["number"] for each in deliveries]


# ---- JSON lines --------------------------------------------------------------------------------


def test_json_lines_go_on_without_a_repeat(log: EventLog, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    log.commit(several(200))
    with serving(log=log) as server, watching(server, "--jsonl", file) as process:
        soon(lambda: file.exists() and file.stat().st_size > 0)
        kill(process)
    with file.open("a") as torn:
        torn.write('{"type": "stream", "stre')
    log.commit(several(10))
    with serving(log=log) as server:
        watch(server, "--jsonl", file)
    lines = read_lines(file)
    assert numbers(lines) == list(range(1, 211))
    assert {line["instance"] for line in lines} == {log.instance}


def test_json_lines_go_on_in_another_log_from_its_beginning(log: EventLog, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    log.commit(several(2))
    with serving(log=log) as server:
        watch(server, "--jsonl", file)
    with EventLog(tmp_path / "other") as other:
        other.commit(several(4))
        with serving(log=other) as server:
            watch(server, "--jsonl", file)
    assert numbers(read_lines(file)) == [1, 2, 1, 2, 3, 4]


def test_json_lines_go_on_where_nothing_was_wanted(log: EventLog, tmp_path: Path) -> None:
    """A watch that has written nothing yet begins where it was all the same."""
    file, position = tmp_path / "lines.jsonl", tmp_path / ".lines.jsonl.position"
    log.commit([notice("a"), notice("b")])
    with serving(log=log) as server:
        options = ("watch", "--from", server.events_address, "--until-idle", 0.1)
        sink = ("--stream", "a", "--jsonl", file)
        hrpro(*options, *sink)
        assert (file.read_text(), json.loads(position.read_text())["number"]) == ("", 2)
    log.commit([notice("a"), notice("b"), notice("b")])
    with serving(log=log) as server:
        options = ("watch", "--from", server.events_address, "--until-idle", 0.1)
        hrpro(*options, *sink)
        hrpro(*options, *sink)
        assert numbers(read_lines(file)) == [3]
        assert json.loads(position.read_text()) == {"instance": log.instance, "number": 5}
        file.unlink()  # and with it what it has come to
        hrpro(*options, *sink, "--since", 0)
        assert numbers(read_lines(file)) == [1, 3]


def test_json_lines_do_not_go_on_from_an_action_that_was_open(
    log: EventLog, tmp_path: Path
) -> None:
    file = tmp_path / "lines.jsonl"
    log.commit([action("start", 0), *several(3)])
    with serving(log=log) as server:
        options = ("watch", "--from", server.events_address, "--until-idle", 0.1, "--jsonl", file)
        hrpro(*options)
        hrpro(*options)
        lines = read_lines(file)
        assert [(each["number"], each["snapshot"]) for each in lines] == [(1, True)]
    log.commit(several(1))
    with serving(log=log) as server:
        watch(server, "--jsonl", file)
    assert numbers(read_lines(file)) == [1, 5]


A, B = "a" * 16, "b" * 16


@pytest.mark.parametrize(
    ("end", "kept", "begin"),
    [
        ((A, 3), (A, 9), (A, 9)),
        ((A, 9), (A, 3), (A, 9)),  # killed behind the line
        ((None, None), (A, 3), (A, 3)),
        ((A, 3), (None, None), (A, 3)),
        ((A, 3), (B, 9), (A, 3)),  # nothing of the other log was wanted, or it was before
        ((A, None), (B, 9), (A, None)),  # of an engine without a log
    ],
)
def test_where_json_lines_begin(
    end: tuple[str, int], kept: tuple[str, int], begin: tuple[str, int], tmp_path: Path
) -> None:
    file = tmp_path / "lines.jsonl"
    position = sinks.PositionFile(tmp_path / ".lines.jsonl.position")
    position.save(sinks.Position(*kept))
    position.close()
    line = json.loads(to_json(notice("a"), instance=end[0])) | {"number": end[1]}
    file.write_text(json.dumps(line) + "\n" if end[0] else "")
    with sinks.lines_in(file) as (_, _, found):
        assert found == sinks.Position(*begin)


def test_lines_are_on_the_disk_before_a_position_behind_them(
    log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int | None]] = []
    monkeypatch.setattr(sinks.os, "fsync", lambda _: done.append(("lines", None)))
    save = sinks.PositionFile.save

    def saved(kept: sinks.PositionFile, position: sinks.Position) -> None:
        done.append(("position", position.number))
        save(kept, position)

    monkeypatch.setattr(sinks.PositionFile, "save", saved)
    log.commit(several(3))
    with (
        serving(log=log) as server,
        EventSubscriber(server.events_address, since=0) as subscriber,
        sinks.lines_in(tmp_path / "lines.jsonl") as (sink, kept, _),
    ):
        subscriber.wait_connected()
        sinks.run(subscriber, sink, kept, until_idle_s=0.1)
    assert done == [("lines", None), ("position", 3)]


def test_what_keeps_nothing_has_no_position(log: EventLog, tmp_path: Path) -> None:
    log.commit(several(2))
    with serving(log=log) as server:
        watch(server, "--jsonl", "/dev/null")
        options = ("--until-idle", 0.1, "--since", 0, "--jsonl", "-")
        said = hrpro("watch", "--from", server.events_address, *options).stdout
    assert numbers([json.loads(line) for line in said.splitlines()]) == [1, 2]
    assert not Path("/dev/.null.position").exists()


def test_one_watch_has_a_file(log: EventLog, tmp_path: Path) -> None:
    lines, position = tmp_path / "lines.jsonl", tmp_path / "position"
    log.commit(several(2))
    with serving(log=log) as server:
        for file, options in (
            (lines, ("--jsonl", lines)),
            (position, ("--exec", "true", "--resume", position)),
        ):
            with watching(server, *options) as process:
                soon(lambda file=file: file.exists() and file.stat().st_size > 0)
                said = refusal("watch", "--from", server.events_address, *options)
                assert said == (
                    f"{file}: another hrpro watch has it; stop that one, or give this one another "
                    "file"
                )
                kill(process)
        watch(server, "--jsonl", lines)
    assert numbers(read_lines(lines)) == [1, 2]


@pytest.mark.parametrize(
    "text",
    ["a diary", "a diary\n", '{"type": "stream"}\n', "[1]\n", '{"number": 1, "instance": null}\n'],
)
def test_a_file_of_something_else_is_left_as_it_is(text: str, tmp_path: Path) -> None:
    file = tmp_path / "diary"
    file.write_text(text)
    said = refusal("watch", "--from", "tcp://127.0.0.1:1", "--jsonl", file)
    assert said == f"{file}: expected what hrpro watch writes, came something else"
    said = refusal("watch", "--from", "tcp://127.0.0.1:1", "--exec", "true", "--resume", file)
    assert said == f"{file}: expected a position that hrpro watch has noted, came another"
    assert file.read_text() == text
    assert [each.name for each in tmp_path.iterdir()] == ["diary"]


def test_neither_file_is_taken_for_the_other(log: EventLog, tmp_path: Path) -> None:
    lines, position = tmp_path / "lines", tmp_path / "position"
    log.commit(several(1))
    with serving(log=log) as server:
        watch(server, "--jsonl", lines)
        watch(server, "--exec", "true", "--resume", position)
    before = lines.read_text(), position.read_text()
    options = ("watch", "--from", "tcp://127.0.0.1:1")
    said = refusal(*options, "--exec", "true", "--resume", lines)
    assert said == f"{lines}: expected a position that hrpro watch has noted, came another"
    said = refusal(*options, "--jsonl", position)
    assert said == f"{position}: expected what hrpro watch writes, came something else"
    assert (lines.read_text(), position.read_text()) == before


def test_the_last_line_is_found_in_a_long_file(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    line = to_json(notice("a"), instance="0" * 16)
    long = json.dumps({**json.loads(line), "number": 8, "more": "x" * 200_000})
    file.write_text(f"{line}\n{long}\n" + line[:70_000])
    assert sinks.end_of_lines(file) == sinks.Position("0" * 16, 8)
    assert file.read_text() == f"{line}\n{long}\n"


def test_a_position_is_replaced_at_its_place(tmp_path: Path) -> None:
    file = tmp_path / "position"
    for number in (0, 2**53, 7):
        kept = sinks.PositionFile(file)
        kept.save(sinks.Position("0" * 16, number))
        kept.close()
        again = sinks.PositionFile(file)
        again.close()
        assert again.position == sinks.Position("0" * 16, number)
        assert file.stat().st_size == 80


# ---- TLS ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    """Of 127.0.0.1, signed by itself: for who trusts this very one."""

    file: Path
    key: Path

    def server_side(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.file, self.key)
        return context


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    folder, key = tmp_path_factory.mktemp("tls"), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "here")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, SHA256())
    )
    made = Certificate(folder / "certificate.pem", folder / "key.pem")
    made.file.write_bytes(signed.public_bytes(Encoding.PEM))
    made.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return made


# ---- HTTP --------------------------------------------------------------------------------------


@dataclass
class Receiver:
    """An HTTP server that answers as `answer` says: a status, or None for none."""

    answer: Callable[[dict[str, Any]], int | None]
    got: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""


@contextlib.contextmanager
def receiving(
    answer: Callable[[dict[str, Any]], int | None], certificate: Certificate | None = None
) -> Iterator[Receiver]:
    receiver = Receiver(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            receiver.headers.append({**self.headers, "path": self.path})
            receiver.got.append(body)
            status = receiver.answer(body)
            if status is not None:
                with contextlib.suppress(OSError):  # whoever asked was killed
                    self.send_response(status)
                    self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        scheme = "http"
        if certificate is not None:
            scheme = "https"
            server.socket = certificate.server_side().wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        receiver.url = f"{scheme}://127.0.0.1:{server.server_port}/hook?of=us"
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()


def test_a_webhook_goes_on_after_a_kill(log: EventLog, tmp_path: Path) -> None:
    position, go_on = tmp_path / "position", threading.Event()

    def answer(body: dict[str, Any]) -> int:
        if body["number"] == 11 and not go_on.is_set():
            assert go_on.wait(PATIENCE_S)
        return 204

    log.commit(several(20))
    with serving(log=log) as server, receiving(answer) as receiver:
        options = ("--webhook", receiver.url, "--resume", position)
        with watching(server, *options) as process:
            soon(lambda: len(receiver.got) == 11)
            kill(process)
        assert json.loads(position.read_text()) == {"instance": log.instance, "number": 10}
        go_on.set()
        watch(server, *options)
        assert numbers(receiver.got) == [*range(1, 12), *range(11, 21)]
        assert receiver.got[10] == receiver.got[11]  # all of it, so that it is known as a repeat
        assert receiver.got[0] == json.loads(to_json(notice("a"), instance=log.instance)) | {
            "number": 1,
            "previous": 0,
        }
        assert watch(server, *options).count("\n") == 1  # there is nothing more
        assert len(receiver.got) == 21
    assert json.loads(position.read_text())["number"] == 20
    assert {each["path"] for each in receiver.headers} == {"/hook?of=us"}
    assert {each["Content-Type"] for each in receiver.headers} == {"application/json"}


def test_a_webhook_by_https_is_one_that_is_trusted(
    log: EventLog, tmp_path: Path, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.commit(several(2))
    with serving(log=log) as server, receiving(lambda _: 204, certificate) as receiver:
        options = ("--webhook", receiver.url, "--retry-s", 0)
        said = watch(server, *options, "--resume", tmp_path / "unknown")
        assert said.count("certificate verify failed") == 2
        letters = read_lines(tmp_path / "unknown.dead.jsonl")
        assert [each["publication"]["number"] for each in letters] == [1, 2]
        assert receiver.got == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
        watch(server, *options, "--resume", tmp_path / "trusted")
    assert numbers(receiver.got) == [1, 2]
    assert not (tmp_path / "trusted.dead.jsonl").exists()


def test_what_is_refused_is_in_the_dead_letters(log: EventLog, tmp_path: Path) -> None:
    log.commit(several(4))
    refusing = receiving(lambda body: 404 if body["number"] == 2 else 200)
    with serving(log=log) as server, refusing as receiver:
        said = watch(server, "--webhook", receiver.url, "--resume", tmp_path / "position")
    assert numbers(receiver.got) == [1, 2, 3, 4]
    dead = tmp_path / "position.dead.jsonl"
    assert f"hrpro: webhook: answered 404; given up, see {dead}" in said
    assert read_lines(dead) == [
        {"reason": "answered 404", "attempts": 1, "publication": receiver.got[1]}
    ]


def test_a_webhook_is_tried_again_and_not_overtaken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_webhook, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(sink_webhook, "LONGEST_PAUSE_S", 0.1)
    statuses = iter([500, 408, 429, None, 503, 200, 200])
    with receiving(lambda _: next(statuses)) as receiver:
        sink = sink_webhook.Webhook(
            receiver.url.replace("//", "//me:a%40b@"), tmp_path / "dead", retry_s=PATIENCE_S
        )
        began_s = time.monotonic()
        sink.deliver(notice("a"), '{"number": 1}')
        assert time.monotonic() - began_s >= 0.02 + 0.04 + 0.08 + 0.1 + 0.1
        sink.deliver(notice("a"), '{"number": 2}')
    assert numbers(receiver.got) == [1] * 6 + [2]
    assert not (tmp_path / "dead").exists()
    basic = "Basic " + b64encode(b"me:a@b").decode()
    assert {each["Authorization"] for each in receiver.headers} == {basic}


@pytest.mark.parametrize(
    ("retry_s", "status", "attempts"), [(0, 503, 1), (0.05, 503, 2), (PATIENCE_S, 302, 1)]
)
def test_after_so_long_it_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retry_s: float, status: int, attempts: int
) -> None:
    monkeypatch.setattr(sink_webhook, "FIRST_PAUSE_S", 0.04)
    with receiving(lambda _: status) as receiver:
        sink_webhook.Webhook(receiver.url, tmp_path / "dead", retry_s).deliver(notice("a"), "{}")
    (letter,) = read_lines(tmp_path / "dead")
    assert letter["reason"] == f"answered {status}"
    assert letter["attempts"] == len(receiver.got) <= attempts


def test_an_attempt_is_over_in_time_however_slowly_the_answer_drips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_webhook, "ATTEMPT_S", 0.5)
    left, asked = threading.Event(), threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):  # the other one has left
            assert connection.recv(1)
            asked.set()
            connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while not left.wait(0.05):
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        began_s = time.monotonic()
        try:
            sink_webhook.Webhook(url, tmp_path / "dead", 0).deliver(notice("a"), "{}")
            assert 0.5 <= time.monotonic() - began_s < PATIENCE_S
        finally:
            left.set()
            thread.join()
    assert asked.is_set()
    (letter,) = read_lines(tmp_path / "dead")
    assert letter["reason"] == "no answer: TimeoutError('timed out')"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://[::1]/hook", ("::1", 80)),
        ("https://[::1]", ("::1", 443)),
        ("https://here:8443/", ("here", 8443)),
    ],
)
def test_where_a_receiver_is(
    url: str, address: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def connect(at: tuple[str, int], _timeout_s: float) -> None:
        asked.append(at)
        raise ConnectionRefusedError

    monkeypatch.setattr(sink_webhook.socket, "create_connection", connect)
    sink_webhook.Webhook(url, tmp_path / "dead", 0).deliver(notice("a"), "{}")
    assert asked == [address]


def test_what_a_path_may_not_have_is_encoded(tmp_path: Path) -> None:
    with receiving(lambda _: 200) as receiver:
        address = receiver.url.removesuffix("/hook?of=us")
        for path in ("/a b/é?q=ü d&e=[1]", "/a%20b%2F;c=1,2/~", "?only=query", ""):
            sink_webhook.Webhook(address + path, tmp_path / "dead", 0).deliver(notice("a"), "{}")
    assert [each["path"] for each in receiver.headers] == [
        "/a%20b/%C3%A9?q=%C3%BC%20d&e=[1]",
        "/a%20b%2F;c=1,2/~",
        "/?only=query",
        "/",
    ]
    assert not (tmp_path / "dead").exists()


def test_a_receiver_that_is_not_there(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    sink_webhook.Webhook(url, tmp_path / "dead", 0).deliver(notice("a"), "{}")
    (letter,) = read_lines(tmp_path / "dead")
    assert "refused" in letter["reason"]


# ---- a command ---------------------------------------------------------------------------------

# Kills its watcher, once, when it has done its work.
_COMMAND = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
line = sys.stdin.read()
with (folder / "done").open("a") as file:
    file.write(line)
number = json.loads(line)["number"]
if number == 3 and not (folder / "killed").exists():
    (folder / "killed").touch()
    os.kill(os.getppid(), 9)
sys.exit(7 if number == 5 else 0)
"""


def test_a_command_goes_on_after_a_kill(log: EventLog, tmp_path: Path) -> None:
    log.commit(several(6))
    command = shlex.join([sys.executable, "-c", _COMMAND, str(tmp_path)])
    options = ("--exec", command, "--resume", tmp_path / "position")
    with serving(log=log) as server:
        with watching(server, *options) as process:
            assert process.wait(PATIENCE_S) == -9
        said = watch(server, *options)
    assert numbers(read_lines(tmp_path / "done")) == [1, 2, 3, 3, 4, 5, 6]
    assert f"hrpro: {sys.executable}: exit code 7 for number 5 of stream a\n" in said
    assert "hrpro: 1 of 4 runs of the command failed\n" in said


def test_there_is_no_shell(log: EventLog, tmp_path: Path) -> None:
    log.commit(several(1))
    shown = tmp_path / "shown"
    command = shlex.join(
        [sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"]
    )
    with serving(log=log) as server:
        watch(server, "--exec", f"{command} {shown} $HOME", "--resume", tmp_path / "position")
    assert shown.read_text() == "$HOME"


# ---- what begins, and what cannot --------------------------------------------------------------


def test_open_actions_come_first_and_do_not_move_the_position(
    log: EventLog, tmp_path: Path
) -> None:
    log.commit([action("start", 0), action("start", 1), action("end", 0), notice("b")])
    position = tmp_path / "position"
    with serving(log=log) as server, receiving(lambda _: 200) as receiver:
        options = ("watch", "--from", server.events_address, "--until-idle", 0.3)
        sink = ("--webhook", receiver.url, "--resume", position)
        hrpro(*options, *sink)
        assert [(each["number"], each["snapshot"]) for each in receiver.got] == [(2, True)]
        assert json.loads(position.read_text()) == {"instance": log.instance, "number": 4}
    log.commit(several(1))
    with serving(log=log) as server, receiving(lambda _: 200) as receiver:
        watch(server, "--webhook", receiver.url, "--resume", position)
    assert numbers(receiver.got) == [5]


def test_an_engine_without_a_log_is_told(tmp_path: Path) -> None:
    position = tmp_path / "position"
    with serving() as server:
        options = ("watch", "--from", server.events_address, "--until-idle", 0.1)
        said = hrpro(*options, "--exec", "true", "--resume", position).stderr
    assert "the engine keeps no log" in said
    assert position.read_text() == ""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--webhook", "http://h", "--exec", "true"], "start one watch for each"),
        (["--jsonl", "x", "--exec", "true"], "expected one of --jsonl, --exec"),
        (["--exec", "true"], "expected --resume FILE"),
        (["--resume", "x"], "expected it with --webhook, --mqtt or --exec"),
    ],
)
def test_one_sink_a_watch(options: list[str], expected: str) -> None:
    said = hrpro("watch", "--from", "tcp://127.0.0.1:1", *options, status=2).stderr
    assert expected in said


@pytest.mark.parametrize("option", ["--until-idle", "--retry-s"])
@pytest.mark.parametrize("seconds", ["nan", "-1"])
def test_it_is_said_when_it_is_over(option: str, seconds: str) -> None:
    said = hrpro("watch", "--from", "tcp://127.0.0.1:1", option, seconds, status=2).stderr
    assert f"Invalid value for '{option}'" in said


def test_a_position_that_cannot_be_kept_is_refused_at_the_start(tmp_path: Path) -> None:
    position = tmp_path / "nowhere" / "position"
    said = refusal("watch", "--from", "tcp://127.0.0.1:1", "--exec", "true", "--resume", position)
    assert said == f"[Errno 2] No such file or directory: '{position}'"


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--webhook", "ftp://host/x", "--webhook: expected an address such as http://HOST:PORT"),
        ("--webhook", "http://me:secret@host:99999", "--webhook: expected an address such as"),
        ("--webhook", "http://[::1", "--webhook: expected an address such as"),
        ("--webhook", "http://me:secret[@host/", "--webhook: expected an address such as"),
        ("--webhook", "http://a b/", "--webhook: expected an address such as"),
        (
            "--webhook",
            f"http://me:secret@{'a' * 64}.org/",
            "--webhook: expected an address such as",
        ),
        ("--webhook", "http://a..b/", "--webhook: expected an address such as"),
        ("--mqtt", "host:1883", "--mqtt: expected an address such as mqtt://HOST:PORT"),
        ("--mqtt", "mqtt://me:secret[@host", "--mqtt: expected an address such as"),
        ("--mqtt", f"mqtt://me:secret@{'a' * 64}", "--mqtt: expected an address such as"),
        ("--mqtt", "mqtt://me:secret@host/home/+", "--mqtt: expected a prefix of topics"),
        ("--mqtt", "mqtt://me:secret@host/home%23", "--mqtt: expected a prefix of topics"),
        ("--mqtt", "mqtt://me:secret@host/home%00x", "--mqtt: expected a prefix of topics"),
        ("--mqtt", "mqtt://me:secret@host/home/a#b", "--mqtt: expected a prefix of topics"),
        ("--mqtt", "mqtt://me:secret@host/home/a?b", "--mqtt: expected a prefix of topics"),
        ("--exec", "no-such-command", "--exec: expected a command that can be run"),
        ("--exec", "'", "--exec: No closing quotation"),
    ],
)
def test_a_sink_that_cannot_be_used_is_refused(
    option: str, value: str, expected: str, tmp_path: Path
) -> None:
    options = (option, value, "--resume", tmp_path / "position")
    said = refusal("watch", "--from", "tcp://127.0.0.1:1", *options)
    assert said.startswith(expected)
    assert "secret" not in said


# ---- MQTT, with a real broker ------------------------------------------------------------------


@contextlib.contextmanager
def broker(
    folder: Path, port: int, users: str = "", certificate: Certificate | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if found is None:
        pytest.skip("no MQTT broker was run: there is no mosquitto; apt-get install mosquitto")
    config = folder / "mosquitto.conf"
    access = f"password_file {users}" if users else "allow_anonymous true"
    tls = f"certfile {certificate.file}\nkeyfile {certificate.key}\n" if certificate else ""
    config.write_text(f"listener {port} 127.0.0.1\nuser root\n{access}\n{tls}")
    with subprocess.Popen([found, "-c", str(config)], stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()


@dataclass
class Listener:
    """What a broker sends to who subscribes to all topics: (topic, payload, retained)."""

    got: list[tuple[str, str, bool]] = field(default_factory=list)

    def numbers(self) -> list[int]:
        found = [payload for _, payload, _ in self.got if payload.startswith("{")]
        return [json.loads(payload)["number"] for payload in found]

    def said(self) -> list[str]:
        return [payload for topic, payload, _ in self.got if topic == "home/tal/availability"]


@contextlib.contextmanager
def listening(port: int) -> Iterator[Listener]:
    listener, subscribed = Listener(), threading.Event()
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.on_connect = lambda *_: client.subscribe("#", qos=1)
    client.on_subscribe = lambda *_: subscribed.set()
    client.on_message = lambda _client, _data, message: listener.got.append(
        (message.topic, message.payload.decode(), message.retain)
    )
    client.reconnect_delay_set(1, 1)
    client.connect_async("127.0.0.1", port)
    client.loop_start()
    try:
        assert subscribed.wait(PATIENCE_S)
        yield listener
    finally:
        client.disconnect()
        client.loop_stop()


def test_mqtt_topics_payload_and_availability(log: EventLog, tmp_path: Path) -> None:
    port, position = free_port(), tmp_path / "position"
    url = f"mqtt://127.0.0.1:{port}/home/tal"
    log.commit([notice("cam", "opened"), action("start"), action("end", revision=1)])
    with broker(tmp_path, port), serving(log=log) as server, listening(port) as listener:
        with watching(server, "--mqtt", url, "--resume", position) as process:
            soon(lambda: position.exists() and '"number": 3' in position.read_text())
            soon(lambda: len(listener.got) == 4)
            assert [topic for topic, _, _ in listener.got] == [
                "home/tal/availability",
                "home/tal/cam/stream",
                "home/tal/cam/event/high",
                "home/tal/cam/event/high",
            ]
            assert listener.said() == ["online"]
            event = json.loads(listener.got[-1][1])
            assert (event["type"], event["kind"], event["label"]) == ("event", "end", "high")
            assert (event["number"], event["instance"]) == (3, log.instance)
            kill(process)
        soon(lambda: listener.said() == ["online", "offline"])  # its will
        with listening(port) as late:
            soon(lambda: len(late.got) == 3)
            assert {(topic, payload[:1], kept) for topic, payload, kept in late.got} == {
                ("home/tal/availability", "o", True),
                ("home/tal/cam/stream", "{", True),
                ("home/tal/cam/event/high", "{", True),
            }
            assert sorted(late.numbers()) == [1, 3]
        watch(server, "--mqtt", url, "--resume", position)
        soon(lambda: listener.said() == ["online", "offline"] * 2)
        assert listener.numbers() == [1, 2, 3]


def test_a_broker_that_goes_away_misses_nothing(log: EventLog, tmp_path: Path) -> None:
    port, position = free_port(), tmp_path / "position"
    log.commit(several(5))
    options = ("--mqtt", f"mqtt://127.0.0.1:{port}/home/tal", "--resume", position)
    with serving(log=log) as server, watching(server, *options) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said == (
            f"hrpro: MQTT broker at 127.0.0.1:{port}: does not answer: "
            "[Errno 111] Connection refused; trying again\n"
        )
        with broker(tmp_path, port), listening(port) as listener:
            soon(lambda: listener.numbers() == [1, 2, 3, 4, 5])
        with FeatureFeeder(server.feed_address, "cam", 2, timeout_s=PATIENCE_S) as feeder:
            feeder.end()  # two notices
        with broker(tmp_path, port), listening(port) as listener:
            soon(lambda: '"number": 7' in position.read_text())
            soon(lambda: 7 in listener.numbers())
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
            soon(lambda: listener.said() == ["online", "offline"])
        said = process.stderr.read()
        assert said.count("there again") == 2 and said.count("trying again") == 1


def test_mqtt_users_and_passwords(log: EventLog, tmp_path: Path) -> None:
    port, users = free_port(), tmp_path / "users"
    log.commit(several(2))
    with broker(tmp_path, port), listening(port):  # there is one
        pass
    subprocess.run(["mosquitto_passwd", "-b", "-c", users, "me", "p@ss"], check=True)
    with broker(tmp_path, port, str(users)), serving(log=log) as server:
        soon(lambda: _answers(port))
        options = ("--resume", tmp_path / "position")
        watch(server, "--mqtt", f"mqtt://me:p%40ss@127.0.0.1:{port}", *options)
        for url in (f"mqtt://me:wrong@127.0.0.1:{port}", f"mqtt://127.0.0.1:{port}"):
            said = refusal("watch", "--from", server.events_address, "--mqtt", url, *options)
            assert said == f"MQTT broker at 127.0.0.1:{port}: Not authorized"
    assert json.loads((tmp_path / "position").read_text())["number"] == 2


def test_mqtt_by_tls_is_with_a_broker_that_is_trusted(
    log: EventLog, tmp_path: Path, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, position = free_port(), tmp_path / "position"
    log.commit(several(2))
    with broker(tmp_path, port, certificate=certificate), serving(log=log) as server:
        soon(lambda: _answers(port))
        options = ("--mqtt", f"mqtts://127.0.0.1:{port}", "--resume", position)
        said = refusal("watch", "--from", server.events_address, *options)
        assert said.startswith(f"MQTT broker at 127.0.0.1:{port}: its certificate is not trusted: ")
        assert position.read_text() == ""
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
        watch(server, *options)
        assert json.loads(position.read_text())["number"] == 2
        # Of another host: the name has to be that of the certificate.
        options = ("--mqtt", f"mqtts://localhost:{port}", "--resume", position)
        said = refusal("watch", "--from", server.events_address, *options)
        assert "its certificate is not trusted: Hostname mismatch" in said


def test_mqtt_by_tls_where_the_broker_has_none(log: EventLog, tmp_path: Path) -> None:
    port = free_port()
    options = ("--mqtt", f"mqtts://127.0.0.1:{port}", "--resume", tmp_path / "position")
    with broker(tmp_path, port), serving(log=log) as server:
        soon(lambda: _answers(port))
        with watching(server, *options) as process:
            assert process.stderr is not None
            said = process.stderr.readline()  # the reason is the system's or that of TLS
            assert said.startswith(f"hrpro: MQTT broker at 127.0.0.1:{port}: does not answer: [")
            assert said.endswith("; trying again\n")
            assert process.poll() is None


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def test_wildcards_in_a_label_are_no_topics() -> None:
    assert sink_mqtt._level("a+b#c d") == "a_b_c d"
