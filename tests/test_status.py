"""`hrpro status`, `streams` and `drain`: what they show of a running engine, and its end."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from commands import (
    PATIENCE_S,
    Engine,
    Screen,
    engine,
    environment,
    hrpro,
    hrpro_json,
    refusal,
    running,
    wait_for,
)
from rich.console import Console
from serving import RawPeer, TinyPipeline, chunk, hello, serving
from tiny_model import DIM, LOOKAHEAD, tiny_recording

from hrpro.clients import EventSubscriber, FeatureFeeder, StreamNotice, request_status
from hrpro.clients.cli_shared import console
from hrpro.clients.status_table import Rates, status_lines, status_table, stream_lines

if TYPE_CHECKING:
    from hrpro.export.bundle import Bundle


@pytest.fixture(scope="module")
def fed(bundle: Bundle) -> Iterator[Engine]:
    """An engine with one stream that is open, after 40 snippets, and one that has ended."""
    with engine(bundle.folder) as served, FeatureFeeder(served.feed, "cam1", DIM) as feeder:
        with FeatureFeeder(served.feed, "before", DIM) as other:
            other.send(tiny_recording(10))
            other.end()
        feeder.send(tiny_recording(40))
        feeder.flush()
        # The others wait for what the model looks ahead.
        wait_for(lambda: processed(served) == 50 - LOOKAHEAD)
        yield served


def processed(served: Engine) -> int:
    return request_status(served.control, PATIENCE_S)["counters"]["snippets_processed"]


def rows(table: str) -> list[list[str]]:
    """The cells of a table's rows, without its heading."""
    lines = [line for line in table.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def replied(*streams: dict[str, Any], **counters: int) -> dict[str, Any]:
    """A StatusReply as a client has it."""
    entry = {
        "session": 1, "bundle_id": "tiny", "next_index": 0, "processed": 0, "lag_snippets": 0,
        "lag_ms": 0, "credit_snippets": 64, "open_actions": 0, "proposals": 0, "events": 0,
        "duplicates": 0, "dropped": 0, "missing": 0, "idle": False, "fed_by": True,
    }  # fmt: skip
    names = (
        "snippets_in", "snippets_processed", "snippets_duplicate", "proposals", "events",
        "ended_streams", "deploys", "deploys_refused", "gaps", "snippets_missing",
        "snippets_dropped_oldest", "snippets_dropped_newest",
    )  # fmt: skip
    return {
        "instance": "0" * 16,
        "bundle_id": "tiny",
        "previous_bundle_id": None,
        "canary_bundle_id": None,
        "state": "serving",
        "streams": tuple({**entry, **each} for each in streams),
        "counters": {**dict.fromkeys(names, 0), **counters},
    }


def shown(reply: dict[str, Any], rates: Rates | None = None) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(status_table(reply, rates))
    return captured.get()


# ---- once --------------------------------------------------------------------------------------


def test_status_once(fed: Engine, bundle: Bundle) -> None:
    said = hrpro("status", fed.control, "--once").stdout
    status = request_status(fed.control)
    (cam,) = status["streams"]
    counters = status["counters"]
    assert said.splitlines()[:8] == [
        "state     serving",
        f"bundle    {status['bundle_id']}; provider cpu",
        "streams   1 open, 1 ended, worst lag 0 (0.0 s)",
        f"snippets  50 in, {50 - LOOKAHEAD} processed, 0 waiting",
        f"actions   {cam['open_actions']} open, {counters['events']} events, "
        f"{counters['proposals']} final proposals",
        "refused   0 messages; 0 duplicate snippets",
        "lost      0 snippets dropped, 0 missing in 0 gaps",
        "deploys   0, 0 refused",
    ]
    assert [re.split("  +", line) for line in said.splitlines()[8:]] == [
        [""],
        ["stream", "snippets", "lag", "credit", "open", "drops", "events", "finals", "feeder"],
        ["cam1", "40", "0 (0.0 s)", str(cam["credit_snippets"]), str(cam["open_actions"]),
         "0", str(cam["events"]), str(cam["proposals"])],
    ]  # fmt: skip
    assert cam["credit_snippets"] > 60


def test_status_json_is_the_answer_of_the_protocol(fed: Engine) -> None:
    expected = request_status(fed.control)
    assert hrpro_json("status", fed.control) == json.loads(json.dumps(expected))


def test_streams(fed: Engine) -> None:
    (cam,) = request_status(fed.control)["streams"]
    heading, line = hrpro("streams", fed.control).stdout.splitlines()
    assert heading.split() == [
        "stream", "session", "next_index", "processed", "lag_snippets", "open_actions", "dropped",
        "missing", "bundle_id"
    ]  # fmt: skip
    opened = str(cam["open_actions"])
    at = ["40", str(40 - LOOKAHEAD), "0"]
    assert line.split() == ["cam1", "1", *at, opened, "0", "0", cam["bundle_id"]]
    assert hrpro_json("streams", fed.control) == {"streams": [cam]}


@pytest.mark.parametrize("command", ["status --once", "streams", "drain"])
def test_an_engine_that_is_not_there(command: str) -> None:
    at = "tcp://127.0.0.1:9"  # nobody may listen there
    options = [] if command == "drain" else ["--timeout", "0.1"]
    said = refusal(*command.split(), at, *options)
    assert said.startswith(f"engine at {at}: expected an answer to status within ")


# ---- what is shown -------------------------------------------------------------------------------


def test_who_lags_stands_first_and_refusals_have_their_reason() -> None:
    reply = replied(
        {"stream": "b"},
        {"stream": "a"},
        {"stream": "slow", "lag_snippets": 12, "lag_ms": 7680, "credit_snippets": 0},
        {"stream": "gone", "lag_snippets": 1, "lag_ms": 640, "fed_by": False},
        {"stream": "quiet", "idle": True, "dropped": 7},
        refused_too_large=2,
        refused_no_credit=40,
        snippets_duplicate=3,
        snippets_dropped_oldest=5,
        snippets_dropped_newest=2,
        snippets_missing=9,
        gaps=4,
    )
    reply |= {"canary_bundle_id": "new", "previous_bundle_id": "old", "state": "draining"}
    said = shown(reply)
    assert [row[0] for row in rows(said)] == ["slow", "gone", "a", "b", "quiet"]
    assert rows(said)[0][2:4] == ["12 (7.7 s)", "0"]
    assert [row[-1] for row in rows(said)] == ["", "gone", "", "", "idle"]
    assert [row[5] for row in rows(said)] == ["0", "0", "0", "0", "7"]
    lines = said.splitlines()
    assert lines[:2] == ["state     draining", "bundle    tiny, canary new, previous old"]
    assert "worst lag 12 (7.7 s)" in lines[2] and lines[3].endswith(" 13 waiting")
    reasons = "42 messages (no_credit 40, too_large 2); 3 duplicate snippets"
    assert lines[5] == f"refused   {reasons}"
    assert lines[6] == "lost      7 snippets dropped, 9 missing in 4 gaps"


def busy_reply() -> dict[str, Any]:
    """With numbers as after some days, and a name that would be a picture."""
    return replied(
        {
            "stream": "gate:key:3", "next_index": 1234567, "lag_snippets": 12, "lag_ms": 7680,
            "credit_snippets": 64, "open_actions": 2, "dropped": 12345, "events": 54321,
            "proposals": 98765, "fed_by": False,
        }
    )  # fmt: skip


def test_nothing_is_cut_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    reply, rates = busy_reply(), Rates()
    rates.take(reply, 1.0)
    rates.take(reply, 2.0)
    cells = ["gate:key:3", "1234567", "12 (7.7 s)", "64", "2", "12345", "54321", "98765", "gone"]
    screen = console()
    screen.width = 80
    screen.print(status_table(reply, rates))
    assert rows(capsys.readouterr().out) == [[*cells[:2], "0.0/s", *cells[2:]]]
    assert re.split("  +", status_lines(reply)[-1]) == cells


def test_a_rate_needs_two_answers_of_one_session() -> None:
    rates = Rates()
    first = replied({"stream": "a", "next_index": 100}, {"stream": "b", "next_index": 7})
    rates.take(first, 10.0)
    assert [row[2] for row in rows(shown(first, rates))] == ["", ""]
    second = replied(
        {"stream": "a", "next_index": 105},
        {"stream": "b", "next_index": 2, "session": 2},
        {"stream": "c", "next_index": 9},
    )
    rates.take(second, 12.0)
    assert [row[2] for row in rows(shown(second, rates))] == ["2.5/s", "", ""]
    rates.take({**second, "instance": "1" * 16}, 13.0)  # another engine
    assert [row[2] for row in rows(shown({**second, "instance": "1" * 16}, rates))] == ["", "", ""]


def test_no_streams() -> None:
    assert "0 open, 0 ended, worst lag none" in shown(replied())
    assert len(stream_lines([])) == 1


# ---- live --------------------------------------------------------------------------------------


def test_the_table_is_live_and_outlives_its_engine(bundle: Bundle) -> None:
    terminal, programs_end = pty.openpty()
    size = {"COLUMNS": "120", "LINES": "40", "TERM": "xterm-256color"}
    options = {"stdin": programs_end, "stdout": programs_end, "env": {**environment(), **size}}
    screen = Screen(terminal)
    try:
        with engine(bundle.folder) as first:
            arguments = ("status", first.control, "--interval", "0.1", "--timeout", "0.3")
            with running(*arguments, **options) as process:
                os.close(programs_end)
                wait_for(lambda: screen.shows("0 open, 0 ended"))
                with FeatureFeeder(first.feed, "cam1", DIM) as feeder:
                    feeder.send(tiny_recording(40))
                    feeder.flush()
                    wait_for(lambda: screen.shows(f"40 in, {40 - LOOKAHEAD} processed"))
                    wait_for(lambda: screen.shows("cam1"))
                    wait_for(lambda: screen.shows("0.0/s"))
                first.kill()
                wait_for(lambda: screen.shows(f"no answer from {first.control} for "))
                assert "it was, when it answered last:" in screen.text
                screen.text = ""
                with engine(bundle.folder, addresses=first.addresses):
                    wait_for(lambda: screen.shows("0 open, 0 ended"))
                    process.send_signal(signal.SIGINT)

                    def it_left() -> bool:
                        # Who writes to a terminal that nobody reads waits at some time.
                        screen.shows("")
                        return process.poll() is not None

                    wait_for(it_left)
                assert process.returncode == 0
                assert process.stderr is not None and process.stderr.read() == ""
                screen.shows("")
                assert screen.text.rstrip().endswith("\x1b[?25h")  # the cursor is back
    finally:
        os.close(terminal)


# ---- drain -------------------------------------------------------------------------------------


def test_drain_ends_streams_and_engine(bundle: Bundle) -> None:
    with (
        engine(bundle.folder) as served,
        EventSubscriber(served.events, stream="cam1") as subscriber,
        FeatureFeeder(served.feed, "cam1", DIM) as feeder,
    ):
        subscriber.wait_connected(PATIENCE_S)
        feeder.send(tiny_recording(40))
        feeder.flush()
        assert hrpro_json("drain", served.control) == {"drained_streams": 1}
        assert served.process.wait(PATIENCE_S) == 0
        heard = None
        while not (isinstance(heard, StreamNotice) and heard.kind == "ended"):
            heard = subscriber.receive(PATIENCE_S)
            assert heard is not None
        assert heard.next_index == 40


def test_a_drain_that_takes_longer_says_what_is_left() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, RawPeer(server.feed_address) as peer:
        for stream in ("one", "two"):
            peer.ask(hello(stream))
        pipeline.paused = True
        peer.ask(chunk(0, 8, "two"))
        assert refusal("drain", server.control_address, "--timeout", "0.2") == (
            f"engine at {server.control_address}: expected it to be drained within 0.2 s, 2 of 2 "
            "streams are left; it goes on with that"
        )
        assert request_status(server.control_address)["state"] == "draining"
