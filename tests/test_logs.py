"""Log lines: their form, their level, and that no peer can make too many of them."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest
from commands import engine, hrpro, refusal
from serving import RawPeer, chunk, hello
from tiny_model import DIM, tiny_recording

from hrpro.clients import FeatureFeeder, request_status
from hrpro.engine.logs import LINES_PER_S, HumanFormatter, JsonFormatter, PeerLog, fact

if TYPE_CHECKING:
    from pathlib import Path

    from hrpro.export.bundle import Bundle


def record(message: str, *arguments: object, **more: Any) -> logging.LogRecord:
    made = logging.LogRecord("x", logging.WARNING, "x.py", 1, message, arguments, None)
    vars(made).update(more)
    return made


# ---- form --------------------------------------------------------------------------------------


def test_a_line_of_json() -> None:
    extra = fact("refused", stream="cam", code="no_credit", session=None)
    said = json.loads(JsonFormatter().format(record("%d refused", 3, created=0.25, **extra)))
    assert said == {
        "time": "1970-01-01T00:00:00.250+00:00", "level": "warning", "message": "3 refused",
        "event": "refused", "stream": "cam", "code": "no_credit",
    }  # fmt: skip


def test_what_a_peer_says_stays_in_one_line() -> None:
    message = "refused\nhrpro: stream 'cam': ended\x1b[2J\u2028\x85."
    assert HumanFormatter().format(record("%s", message)) == (
        "hrpro: refused hrpro: stream 'cam': ended [2J ."
    )
    assert "\n" not in JsonFormatter().format(record("%s", message))


def test_a_traceback_is_kept() -> None:
    try:
        raise KeyError("x")
    except KeyError:
        failed = record("failed", exc_info=sys.exc_info())
    assert HumanFormatter().format(failed).splitlines()[-1] == "KeyError: 'x'"
    failed.exc_text = None
    assert json.loads(JsonFormatter().format(failed))["traceback"].endswith("KeyError: 'x'")


# ---- how many ----------------------------------------------------------------------------------


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_of_each_event_so_many_lines_a_second(caplog: pytest.LogCaptureFixture) -> None:
    clock, log = Clock(), logging.getLogger("hrpro.engine.test")
    caplog.set_level(logging.WARNING, "hrpro.engine.test")
    peers = PeerLog(log, clock)
    for number in range(LINES_PER_S + 5):
        peers.say(logging.WARNING, "refused", f"refused {number}")
    peers.say(logging.WARNING, "other", "another event has lines of its own")
    peers.say(logging.INFO, "stream_opened", "below the level")
    said = [*(f"refused {n}" for n in range(LINES_PER_S)), "another event has lines of its own"]
    assert caplog.messages == said
    clock.now_s += 0.25
    assert peers.due_in_s() == 0.75
    peers.say_left_out()  # not yet
    clock.now_s += 0.75
    assert peers.due_in_s() == 0
    peers.say_left_out()
    assert caplog.messages == [*said, "refused: 5 lines more left out"]
    assert peers.due_in_s() is None
    peers.say(logging.WARNING, "refused", "again")
    assert caplog.messages[-1] == "again"


def test_the_count_comes_before_the_next_line_and_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, log = Clock(), logging.getLogger("hrpro.engine.test")
    caplog.set_level(logging.WARNING, "hrpro.engine.test")
    peers = PeerLog(log, clock)
    for _ in range(2):
        for number in range(LINES_PER_S + 2):
            peers.say(logging.WARNING, "refused", str(number))
        clock.now_s += 1.5
    assert caplog.messages[LINES_PER_S : LINES_PER_S + 2] == ["refused: 2 lines more left out", "0"]
    peers.say_left_out(now=True)
    assert caplog.messages[-1] == "refused: 2 lines more left out"
    assert len(caplog.messages) == 2 * LINES_PER_S + 2


# ---- of a real engine ---------------------------------------------------------------------------


def test_json_lines_of_an_engine(bundle: Bundle, tmp_path: Path) -> None:
    with engine(bundle.folder, "--log-format", "json", quiet=False) as served:
        with FeatureFeeder(served.feed, "cam1", DIM) as feeder:
            feeder.send(tiny_recording(20))
            ended = feeder.end()
        with RawPeer(served.feed) as peer:
            peer.ask(hello("cam2", dim=DIM + 1))
            peer.ask(chunk(0, 1, "cam3"))
        refusal("deploy", tmp_path / "nowhere", "--to", served.control)
        hrpro("deploy", bundle.folder, "--to", served.control)
        bundle_id = request_status(served.control)["bundle_id"]
    lines = [json.loads(line) for line in served.said]
    assert all(line.pop("time").endswith("+00:00") for line in lines)
    messages = [line.pop("message") for line in lines]
    assert lines == [
        {"level": "info", "event": "serving", "bundle_id": bundle_id},
        {"level": "info", "event": "stream_opened", "stream": "cam1", "session": 1},
        {"level": "info", "event": "stream_ended", "stream": "cam1", "session": 1},
        {
            "level": "warning",
            "event": "refused",
            "stream": "cam2",
            "code": "wrong_dimension",
            "peer": "address 127.0.0.1",
        },
        {
            "level": "info",
            "event": "refused_recoverable",
            "stream": "cam3",
            "code": "unknown_stream",
            "peer": "address 127.0.0.1",
        },
        {"level": "warning", "event": "deploy_refused", "code": "deploy_refused"},
        {"level": "info", "event": "deployed", "bundle_id": bundle_id, "changed_streams": 0},
        {"level": "info", "event": "draining", "streams": 0},
        {"level": "info", "event": "drained"},
    ]
    assert messages[1:4] == [
        "stream 'cam1': opened session 1 from snippet 0",
        f"stream 'cam1': ended session 1 at snippet 20, {ended.proposals} proposals, "
        f"{ended.events} events",
        f"refused, wrong_dimension: stream 'cam2': expected feature dimension {DIM}, "
        f"came {DIM + 1} (address 127.0.0.1)",
    ]


@pytest.mark.parametrize(
    ("options", "beginnings"),
    [
        ((), ["refused, bad_message: "]),
        (("--log-level", "info"), ["serving: bundle ", "stream 'cam': opened session 1 ",
         "refused, bad_message: ", "draining: 1 open streams", "stream 'cam': ended session 1 ",
         "drained"]),
    ],
)  # fmt: skip
def test_people_see_warnings_unless_they_want_more(
    bundle: Bundle, options: tuple[str, ...], beginnings: list[str]
) -> None:
    with engine(bundle.folder, *options, quiet=False) as served, RawPeer(served.feed) as peer:
        peer.ask(hello(dim=DIM))
        # "opened" is said later in the turn of the Welcome; the second answer is of another turn.
        for _ in range(2):
            request_status(served.control)
        peer.ask([b"\xc1"])
    assert len(served.said) == len(beginnings)
    for line, beginning in zip(served.said, beginnings, strict=True):
        assert line.startswith(f"hrpro: {beginning}")


def test_a_flood_makes_some_lines_and_a_count(bundle: Bundle) -> None:
    count = 500
    with engine(bundle.folder, "--log-format", "json", quiet=False) as served:
        with RawPeer(served.feed) as peer:
            for _ in range(count):
                peer.say([b"\xc1"])
            for _ in range(count):
                peer.hear_frames()
        refused = request_status(served.control)["counters"]["refused_bad_message"]
    lines = [json.loads(line) for line in served.said]
    said = [line for line in lines if line["event"] == "refused"]
    left_out = [line for line in lines if line["event"] == "left_out"]
    assert refused == count
    assert len(said) + sum(line["count"] for line in left_out) == count
    # A second or two, on a busy machine some more.
    assert LINES_PER_S <= len(said) < count / 2
    assert {line["of"] for line in left_out} == {"refused"}
