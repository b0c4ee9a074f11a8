"""The dashboard's server: who is let in, what is passed on, and that nobody holds up others."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import pytest
from commands import PATIENCE_S, Engine, engine, environment, hrpro, refusal, wait_for
from dashboards import (
    JPEG,
    ONE,
    TOKEN,
    Reply,
    action,
    ask,
    camera_client,
    dashboard,
    live_page,
    request,
    websocket_headers,
)
from serving import rows
from serving import serving as engine_in_thread
from tiny_model import DIM, tiny_recording

from hrpro.clients import FeatureFeeder
from hrpro.clients.chaos_link import Link
from hrpro.clients.dashboard import watch
from hrpro.clients.dashboard.app import create_app
from hrpro.clients.dashboard.board import Board
from hrpro.clients.dashboard.door import Door
from hrpro.clients.dashboard.server import new_server
from hrpro.clients.dashboard.thumbnails import (
    LONGEST_PICTURE_BYTES,
    CameraClient,
    ThumbnailError,
    Thumbnails,
)
from hrpro.clients.dashboard.watch import EngineWatch
from hrpro.clients.web import checked_token, parse_http_address, read_token
from hrpro.engine.event_log import EventLog
from hrpro.engine.protocol import HrproError
from hrpro.engine.serve import Addresses

if TYPE_CHECKING:
    from hrpro.export.bundle import Bundle

NOWHERE = "tcp://127.0.0.1:9"
SIDES = ("--events", NOWHERE, "--control", NOWHERE)


@contextlib.contextmanager
def serving(
    board: Board | None = None, token: str | None = None, cameras: Thumbnails | None = None
) -> Iterator[str]:
    """The application in this process, without an engine; yields HOST:PORT."""
    app = create_app(board or Board(), Door("127.0.0.1", token), cameras or Thumbnails([]))
    server = new_server(app)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def open_address() -> Iterator[str]:
    with serving() as address:
        yield address


@pytest.fixture(scope="module")
def guarded_address() -> Iterator[str]:
    with serving(token=TOKEN) as address:
        yield address


# ---- the command -------------------------------------------------------------------------------


def test_nobody_else_is_let_in_without_a_token() -> None:
    said = refusal("dashboard", *SIDES, "--http", "0.0.0.0:0")
    assert said.startswith("--http 0.0.0.0: others could reach it; give a token by --token-file")
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org", "localhost.example.org"):
        with pytest.raises(HrproError, match="others could reach it"):
            Door(host, None)
        assert not Door(host, TOKEN).is_open
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert Door(host, None).is_open


def test_an_address_is_host_and_port() -> None:
    for http in ("8080", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:65536"):
        with pytest.raises(HrproError, match=f"expected HOST:PORT, .* came {http}"):
            parse_http_address(http, "--http")
    assert parse_http_address("[::1]:80", "--http") == ("::1", 80)
    assert parse_http_address(":0", "--http") == ("127.0.0.1", 0)


def test_a_port_that_is_taken(open_address: str) -> None:
    said = refusal("dashboard", *SIDES, "--http", open_address)
    assert said == f"--http {open_address}: cannot listen there: Address already in use"


def test_a_host_that_is_nowhere() -> None:
    said = refusal("dashboard", *SIDES, "--http", "nosuchhost.invalid:0", "--token-file", __file__)
    assert said.startswith("--http nosuchhost.invalid:0: cannot listen there: ")
    assert not re.search(r"Unknown error|\(", said)


def test_a_token_is_text(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(b"\xff\xfe" + TOKEN.encode("utf-16-le"))
    said = refusal("dashboard", *SIDES, "--token-file", file)
    assert said == f"{file}: expected text in UTF-8, came other bytes"
    file.write_text(f"\ufeff{TOKEN}\n", encoding="utf-8")
    assert read_token(file, "--token-file") == TOKEN


def test_a_token_is_long(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("short\n")
    said = refusal("dashboard", *SIDES, "--token-file", file)
    assert said.startswith(f"--token-file {file}: expected a token of at least 16 ASCII")
    for token in ("", "ünüsüällyünüsüäl", "control\tcharacters\t"):
        with pytest.raises(HrproError, match="expected a token of at least 16"):
            checked_token(token, "here")


def test_a_camera_client_is_a_url() -> None:
    for url in (
        "127.0.0.1:80", "https://127.0.0.1:80", "http://", "http://a:b", "http://a/path",
        "http://[::1", f"http://{'a' * 64}.org",
    ):  # fmt: skip
        with pytest.raises(HrproError, match="--thumbnails: expected http://HOST:PORT, came "):
            CameraClient(url, None)


def test_an_address_of_no_engine() -> None:
    said = refusal("dashboard", "--events", "nowhere", "--control", NOWHERE, "--http", ":0")
    assert "cannot use nowhere" in said


def test_without_the_extra_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['starlette'] = None; sys.modules['starlette.datastructures'] = "
        "None; from hrpro.clients.cli import main; sys.argv[0] = 'hrpro'; main()"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, "dashboard", *SIDES],
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE_S,
    )
    assert said.returncode == 1
    assert said.stderr.startswith("hrpro: the dashboard needs the package starlette")
    assert "pip install 'hrpro-stream[dashboard]'" in said.stderr


def test_without_an_engine_there_is_a_page() -> None:
    assert "HOST:PORT" in hrpro("dashboard", "--help").stdout
    nowhere = Engine(None, Addresses(NOWHERE, NOWHERE, NOWHERE))  # type: ignore[arg-type]
    with dashboard(nowhere) as served:
        page = ask(served.address, "/")
        assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        with live_page(served.address) as live:
            told = live.receive()["engine"]
        assert told["status"] is None


# ---- who is let in -----------------------------------------------------------------------------


def test_every_answer_says_what_the_page_may_do(open_address: str) -> None:
    for path in ("/", "/static/main.js", "/login", "/nothing", "/thumbnail/cam/1.jpg"):
        headers = ask(open_address, path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'; ")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"


def test_nothing_can_be_changed(open_address: str) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert ask(open_address, "/", method).status == 405
        assert ask(open_address, "/live", method).status == 404


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[", "evil@x:1"])
def test_without_a_token_only_names_of_this_machine_are_served(
    open_address: str, host: str
) -> None:
    assert ask(open_address, "/", host=host).status in (400, 403)
    headers = websocket_headers(open_address, host=host, origin=f"http://{host}")
    assert ask(open_address, "/live", **headers).status in (400, 403)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]"])
def test_names_of_this_machine(open_address: str, name: str) -> None:
    host = f"{name}:{open_address.rpartition(':')[2]}"
    assert ask(open_address, "/", host=host).status == 200


def test_an_index_that_is_none_is_no_picture(open_address: str, guarded_address: str) -> None:
    for index in ("9" * 5000, "9" * 19, "-1", "x"):
        assert ask(open_address, f"/thumbnail/x/{index}.jpg").status == 404
        assert ask(guarded_address, f"/thumbnail/x/{index}.jpg").status == 401


def test_an_origin_that_is_none_is_another_page(open_address: str, guarded_address: str) -> None:
    for address in (open_address, guarded_address):
        assert ask(address, "/login", method="POST", origin="http://[").status == 403


def test_pages_of_others_get_no_websocket(open_address: str, guarded_address: str) -> None:
    cookie = log_in(guarded_address)
    for address, more in ((open_address, {}), (guarded_address, {"cookie": cookie})):
        for origin in ("http://evil.example", "null", f"http://{address}.evil.example"):
            headers = websocket_headers(address, **{**more, "origin": origin})
            assert ask(address, "/live", **headers).status == 403
        with live_page(address, **more) as live:
            assert live.receive()["is_snapshot"]


def log_in(address: str, token: str = TOKEN) -> str:
    form = urlencode({"token": token}).encode()
    answer = ask(address, "/login", "POST", form, origin=f"http://{address}")
    assert (answer.status, answer.headers["location"]) == (303, "/")
    cookie, *attributes = answer.headers["set-cookie"].split("; ")
    assert {"httponly", "samesite=strict"} <= set(attributes)
    assert TOKEN not in cookie
    return cookie


def test_with_a_token_nothing_is_told_without_it(guarded_address: str) -> None:
    page = ask(guarded_address, "/")
    assert (page.status, page.headers["location"]) == (303, "/login")
    for headers in (
        {},
        {"cookie": "hrpro_dashboard=0"},
        {"cookie": "hrpro_dashboard=é"},
        {"authorization": f"Bearer {TOKEN}0"},
        {"authorization": f"Basic {TOKEN}"},
    ):
        assert ask(guarded_address, "/thumbnail/cam/1.jpg", **headers).status == 401
        opening = websocket_headers(guarded_address, **headers)
        assert ask(guarded_address, "/live", **opening).status == 403
    assert ask(guarded_address, "/static/main.js").status == 200  # nothing to hide


def test_the_token_is_accepted_once_by_the_form_and_as_a_bearer(guarded_address: str) -> None:
    cookie = log_in(guarded_address)
    assert ask(guarded_address, "/", cookie=f"other=1; {cookie}").status == 200
    bearer = f"Bearer {TOKEN}"
    assert ask(guarded_address, "/thumbnail/cam/1.jpg", authorization=bearer).status == 404
    with live_page(guarded_address, authorization=bearer) as live:
        assert live.receive()["needs_token"]


@pytest.mark.parametrize(
    "form",
    [
        b"",
        b"token=",
        b"token=wrong",
        b"token=" + b"x" * 5000,
        b"\xff\xfe",
        b"other=0123456789abcdef",
    ],
)
def test_another_token_is_refused(guarded_address: str, form: bytes) -> None:
    answer = ask(guarded_address, "/login", "POST", form)
    assert (answer.status, answer.headers["location"]) == (303, "/login?refused")
    assert "set-cookie" not in answer.headers


def test_forms_of_other_pages_are_refused(guarded_address: str) -> None:
    form = urlencode({"token": TOKEN}).encode()
    for origin in ("http://evil.example", "null"):
        assert ask(guarded_address, "/login", "POST", form, origin=origin).status == 403


def test_a_key_shows_its_streams_and_no_more(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    for name, *options in (("producer", "--streams", "*"), ("subscriber", "--streams", "mine")):
        out = ("--keys", folder, "--out", tmp_path / f"{name}.key")
        hrpro("keys", "new", name, "--role", name, *options, *out)
    key = tmp_path / "subscriber.key"
    with (
        engine(bundle.folder, "--keys", folder, quiet=False) as served,
        dashboard(served, "--key", key) as shown,
    ):
        shown.wait_subscribed()
        for stream in ("others", "mine"):
            key = tmp_path / "producer.key"
            with FeatureFeeder(served.feed, stream, DIM, key=key) as feeder:
                feeder.send(tiny_recording(20))
                feeder.end()
        seen: set[str] = set()
        problem = None
        with live_page(shown.address) as live:
            while seen != {"opened", "ended"} or problem is None:
                message = live.receive()
                seen |= {each["state"] for each in message["events"] if each["type"] == "notice"}
                problem = message.get("engine", {}).get("problem", problem)
                assert {each["stream"] for each in message["rows"]} <= {"mine"}
    assert problem == "expected the key of an operator, came key 'subscriber', of a subscriber"


def test_a_key_file_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "none.key"
    said = refusal("dashboard", *SIDES, "--http", "127.0.0.1:0", "--key", file)
    assert said == f"{file}: cannot be read: No such file or directory"


def test_a_line_of_events_that_is_cut_is_noticed_and_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "EVENTS_LOST_S", 1.5)  # a sign of life comes each second
    board = Board()
    with (
        EventLog(tmp_path / "state") as log,
        engine_in_thread(log=log) as server,
        Link(server.events_address) as road,
        EngineWatch(board, road.address, server.control_address).running(),
    ):

        def engine_is(**wanted: object) -> bool:
            time.sleep(0.02)
            told = board.changes(0)["engine"]
            return all(told[name] == value for name, value in wanted.items())

        wait_for(lambda: len(board.changes(0)["engine"]["hears"]) == 2)
        there, road.target = road.target, NOWHERE
        road.cut()
        wait_for(lambda: engine_is(events_problem=f"no answer from {road.address}"))
        assert engine_is(away_since=None)  # the status comes another way
        with FeatureFeeder(server.feed_address, "cam", 2) as feeder:
            feeder.send(rows(0, 8))
            feeder.end()
        assert board.changes(0)["events"] == []
        road.target = there
        wait_for(lambda: engine_is(events_problem=None))
        wait_for(lambda: len(board.changes(0)["events"]) == 8 + 2)
        (told,) = board.changes(0)["rows"]
        assert told["state"] == "ended"


# ---- many pages, and slow ones -----------------------------------------------------------------


def test_a_page_that_does_not_read_holds_up_nobody() -> None:
    board = Board()
    with serving(board) as address, live_page(address), live_page(address) as quick:
        quick.receive()
        # Far more than the sockets between them hold, for the page that reads nothing.
        for n in range(120):
            for stream in range(20):
                board.take(action(f"cam{stream}", number=n, kind="end", end_s=2.0), ONE)
            revision = board.revision
            if n % 20 == 19:
                while quick.receive()["revision"] < revision:
                    pass
        with live_page(address) as late:
            told = late.receive()
        assert told["revision"] == board.revision
        assert len(told["events"]) == 120 * 20


def test_there_is_a_limit_of_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrpro.clients.dashboard.app.MOST_PAGES", 1)
    with serving() as address:
        with live_page(address) as first:
            first.receive()
            headers = websocket_headers(address)
            with request(address, "/live", **headers) as connection:
                came = b""
                while b"too many pages" not in came:
                    part = connection.recv(4096)
                    assert part, came
                    came += part

        def is_free() -> bool:
            with live_page(address) as again:
                try:
                    return again.receive()["is_snapshot"]
                except AssertionError:
                    time.sleep(0.05)
                    return False

        wait_for(is_free)


# ---- thumbnails --------------------------------------------------------------------------------


@contextlib.contextmanager
def passing_on(
    url: str, token: str | None = None
) -> Iterator[tuple[str, Callable[[str], tuple[int, bytes]]]]:
    """A server that has asked the camera client; what it answers to a path."""
    thumbnails = Thumbnails([CameraClient(url, token)])
    with serving(cameras=thumbnails) as address, thumbnails.running():
        wait_for(lambda: bool(thumbnails.streams) or bool(time.sleep(0.01)))

        def get(path: str) -> tuple[int, bytes]:
            answer = ask(address, path)
            return answer.status, answer.body

        yield address, get


def test_pictures_are_passed_on_for_streams_that_are_listed() -> None:
    with camera_client() as (url, cameras):
        cameras.answers["/thumbnail/cam1/7.jpg"] = (200, JPEG)
        cameras.answers["/thumbnail/cam9/7.jpg"] = (200, JPEG)
        with passing_on(url, TOKEN) as (address, get):
            assert get("/thumbnail/cam1/7.jpg") == (200, JPEG)
            assert get("/thumbnail/cam1/8.jpg")[0] == 404
            assert get("/thumbnail/cam9/7.jpg")[0] == 404
            for path in (
                "/thumbnail/cam1/x.jpg",
                "/thumbnail/cam1/-1.jpg",
                "/thumbnail/..%2F7.jpg",
            ):
                assert get(path)[0] == 404
            with live_page(address) as live:
                assert live.receive()["thumbnails"] == ["cam1", "cam2"]
            answer = ask(address, "/thumbnail/cam1/7.jpg")
            assert answer.headers["content-type"] == "image/jpeg"
            assert answer.headers["cache-control"] == "private, max-age=300"
        assert {path for path, _ in cameras.asked} == {
            "/streams", "/thumbnail/cam1/7.jpg", "/thumbnail/cam1/8.jpg"
        }  # fmt: skip
        assert {token for _, token in cameras.asked} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    "answer",
    [
        (200, b"<script>"),
        (200, JPEG + bytes(LONGEST_PICTURE_BYTES)),
        (302, b""),
        (500, JPEG),
    ],
)
def test_only_pictures_are_passed_on(answer: Reply) -> None:
    with camera_client() as (url, cameras):
        cameras.answers["/thumbnail/cam1/7.jpg"] = answer
        cameras.answers["/thumbnail/cam1/1.jpg"] = (200, JPEG)
        with passing_on(url) as (_, get):
            status, body = get("/thumbnail/cam1/7.jpg")
            assert status == 502
            assert b"\xff" not in body
            assert get("/thumbnail/cam1/1.jpg") == (200, JPEG)


@pytest.mark.parametrize("listed", [b"", b"{}", b"[" * 2000, json.dumps(["a"] * 10_001).encode()])
def test_a_list_of_streams_that_is_none(listed: bytes) -> None:
    with camera_client() as (url, cameras):
        cameras.answers["/streams"] = (200, listed)
        with pytest.raises(ThumbnailError, match="expected a list of stream ids"):
            CameraClient(url, None).streams()
        cameras.answers["/streams"] = (200, b'["cam1", "../cam2", 3, null]')
        assert CameraClient(url, None).streams() == {"cam1"}


def test_a_camera_client_that_is_away() -> None:
    with camera_client() as (url, _):
        pass
    with pytest.raises(ThumbnailError, match="no answer"):
        CameraClient(url, None).picture("cam1", 1)
