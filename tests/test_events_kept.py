"""The engine as a process with a state folder: restarts, a full disk, and its log read."""

from __future__ import annotations

import json
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from commands import (
    PATIENCE_S,
    Engine,
    engine,
    hrpro,
    published_in_process,
    read_json_lines,
    refusal,
    running,
    wait_for,
)
from driving import assert_same
from logged import logged_in, notice, numbers
from tiny_model import tiny_recording

from hrpro.clients import (
    EventSubscriber,
    FeatureFeeder,
    FinalProposal,
    StreamNotice,
    request_drain,
    request_status,
)
from hrpro.clients.watching import LOG_COLUMNS, to_json
from hrpro.engine.config import LogConfig
from hrpro.engine.event_log import EventLog
from hrpro.engine.event_reader import FILE
from hrpro.engine.protocol import Publication, StreamError
from hrpro.engine.serve import Addresses

if TYPE_CHECKING:
    from hrpro.export.bundle import Bundle

RECORDING = tiny_recording(150, seed=3)
DIM = RECORDING.shape[1]


def feed(served: Engine, stream: str, stop: int | None = None) -> None:
    """A recording, or its beginning without an end."""
    with FeatureFeeder(served.feed, stream, DIM, timeout_s=PATIENCE_S) as feeder:
        feeder.send(RECORDING[:stop])
        if stop is None:
            feeder.end()
        else:
            feeder.flush()


def unnumbered(publications: list[Publication]) -> list[Publication]:
    """As an engine without a log publishes them."""
    return [replace(each, number=None, previous=None) for each in publications]


def heard_until_ended(by: EventSubscriber, stream: str) -> list[Publication]:
    found: list[Publication] = []
    while not (found and isinstance(found[-1], StreamNotice) and found[-1].kind == "ended"):
        publication = by.receive(PATIENCE_S)
        assert publication is not None
        found.append(publication)
    assert found[-1].stream == stream
    return found


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_the_log_goes_on_after_each_end_of_the_engine(bundle: Bundle, state: Path) -> None:
    expected = published_in_process(bundle.folder, {"a": RECORDING})["a"]
    with engine(bundle.folder, state=state) as first, EventSubscriber(first.events) as by:
        by.wait_connected(PATIENCE_S)
        feed(first, "a")
        found = heard_until_ended(by, "a")
        assert_same(unnumbered(found), expected)
        feed(first, "left", stop=60)  # nobody ends it
        while not isinstance(found[-1], FinalProposal) or found[-1].stream != "left":
            publication = by.receive(PATIENCE_S)
            assert publication is not None
            found.append(publication)
        first.kill()  # as kill -9
        # Whatever was sent is in the log, as it was sent.
        while (publication := by.receive(timeout_s=0.2)) is not None:
            found.append(publication)
        logged = logged_in(state)
        assert logged[: len(found)] == found
        with engine(bundle.folder, addresses=first.addresses, state=state) as second:
            instance = request_status(second.control, PATIENCE_S)["instance"]
            assert instance == by.instance
            feed(second, "b")
            found += heard_until_ended(by, "b")
    logged = logged_in(state)
    assert numbers(logged) == list(range(1, len(logged) + 1))
    assert found == logged


def test_streams_go_on_when_the_engine_is_started_again(bundle: Bundle, state: Path) -> None:
    """A signal ends the engine alone: the feeder notices no more than that its line was cut."""
    expected = published_in_process(bundle.folder, {"cam": RECORDING})["cam"]
    with (
        engine(bundle.folder, state=state) as first,
        FeatureFeeder(first.feed, "cam", DIM, timeout_s=PATIENCE_S, retry_s=0.2) as feeder,
    ):
        feeder.send(RECORDING[:50])
        feeder.flush()
        first.process.terminate()
        assert first.process.wait(PATIENCE_S) == 0
        before = logged_in(state)
        assert before and not any(is_ended(each) for each in before)
        with engine(bundle.folder, addresses=first.addresses, state=state) as second:
            streams = request_status(second.control, PATIENCE_S)["streams"]
            assert [each["stream"] for each in streams] == ["cam"]
            feeder.send(RECORDING[50:])
            feeder.end()
    logged = logged_in(state)
    assert logged[: len(before)] == before
    assert_same(unnumbered(logged), expected)


def is_ended(publication: Publication) -> bool:
    return isinstance(publication, StreamNotice) and publication.kind == "ended"


def test_the_log_is_read_while_the_engine_runs_and_after(
    bundle: Bundle, state: Path, tmp_path: Path
) -> None:
    with engine(bundle.folder, state=state) as served:
        for stream in ("a", "b"):
            feed(served, stream)
        said = hrpro("events", "--state", state, "--jsonl")
        logged = logged_in(state)
        assert said.stdout.splitlines() == [to_json(each) for each in logged]
        assert said.stderr == ""
        of_b = hrpro("events", "--state", state, "--jsonl", "--stream", "b", "--since", 10).stdout
        assert [json.loads(line)["number"] for line in of_b.splitlines()] == [
            each.number for each in logged if each.stream == "b" and (each.number or 0) > 10
        ]
        assert refusal("serve", bundle.folder, *anywhere(), "--state", state) == (
            f"state folder {state}: the engine with process id {served.process.pid} has it; each "
            "engine needs one of its own"
        )
        lines = tmp_path / "since.jsonl"
        options = ("--from", served.events, "--jsonl", lines, "--since", 5, "--until-idle", 0.5)
        assert "hrpro: watching" in hrpro("watch", *options).stderr
        assert read_json_lines(lines) == logged[5:]
    table = hrpro("events", "--state", state, "--since", 3, "--stream", "a").stdout
    rows = [line for line in table.splitlines() if " a " in line]
    assert len(rows) == sum(each.stream == "a" for each in logged[3:])
    assert "ended" in rows[-1]
    heading, *_, last = table.splitlines()
    assert heading.split() == list(LOG_COLUMNS)
    number, day, hour, *others = last.split()
    ended = [each for each in logged if each.stream == "a"][-1]
    assert isinstance(ended, StreamNotice)
    assert [number, *others] == [
        str(ended.number), "a", "ended", f"#{ended.first_index}", f"#{ended.next_index}", "1"
    ]  # fmt: skip
    assert last[heading.index("session") :] == "1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", f"{day} {hour}")
    said = refusal("events", "--state", tmp_path)
    assert said == f"state folder {tmp_path}: expected the event log {FILE}, found none"


def test_what_is_gone_from_the_log_is_told(state: Path) -> None:
    with EventLog(state, LogConfig(mb=1)) as log:
        for _ in range(10):
            log.commit([notice()] * 1000)
            log.trim()
        oldest = log.oldest
    assert oldest > 2
    said = hrpro("events", "--state", state, "--since", 1, "--jsonl")
    assert said.stderr == f"hrpro: {oldest - 2} of the numbers asked for are no longer in the log\n"
    assert len(said.stdout.splitlines()) == 10_001 - oldest


def anywhere() -> list[str]:
    return [
        part
        for side in ("feed", "events", "control")
        for part in (f"--{side}", "tcp://127.0.0.1:*")
    ]


def test_the_engine_says_whether_it_keeps_a_log(bundle: Bundle, state: Path) -> None:
    for given, expected in (
        (state, f"log      {state}"),
        ("none", "log      none: who does not listen when it is published has missed it"),
    ):
        with running("serve", bundle.folder, *anywhere(), "--state", given) as process:
            assert process.stdout is not None
            lines = iter(lambda: process.stdout.readline().rstrip("\n"), "READY")  # type: ignore[union-attr]
            assert expected in list(lines)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0


@pytest.fixture
def full_disk(bundle: Bundle, state: Path) -> Iterator[Engine]:
    """An engine whose log cannot grow: `limit_files` of it lets it."""
    with engine(bundle.folder, state=state, quiet=False) as served:
        feed(served, "before")
        limit_files(served, (state / f"{FILE}-wal").stat().st_size)
        yield served


def limit_files(served: Engine, size_bytes: int) -> None:
    """No file of the process can be larger, as on a disk without room."""
    _, hard = resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (size_bytes, hard))


def test_a_full_disk_holds_the_streams_and_loses_nothing(
    bundle: Bundle, state: Path, full_disk: Engine
) -> None:
    before = logged_in(state)
    with EventSubscriber(full_disk.events) as by:
        by.wait_connected(PATIENCE_S)
        with FeatureFeeder(full_disk.feed, "cam", DIM, timeout_s=PATIENCE_S) as feeder:
            feeder.send(RECORDING[:40])

            def holds() -> bool:
                assert by.receive(timeout_s=0.05) is None  # nothing that is not logged
                return request_status(full_disk.control, PATIENCE_S)["state"] == "waiting"

            wait_for(holds)
            reason = request_status(full_disk.control, PATIENCE_S)["waits_for"]
            assert reason.startswith(f"{state / FILE}: cannot be written: ")
            assert by.receive(timeout_s=1.2) is None  # it has been tried again
            assert logged_in(state) == before
            limit_files(full_disk, resource.RLIM_INFINITY)
            feeder.send(RECORDING[40:])
            feeder.end()
        found = heard_until_ended(by, "cam")
        status = request_status(full_disk.control, PATIENCE_S)
        assert (status["state"], status["waits_for"]) == ("serving", None)
    expected = published_in_process(bundle.folder, {"cam": RECORDING})["cam"]
    assert_same(unnumbered(found), expected)
    logged = logged_in(state)
    assert logged == before + found
    assert numbers(logged) == list(range(1, len(logged) + 1))


@pytest.mark.parametrize("is_begun_again", [False, True])
def test_a_stream_that_ends_while_the_disk_is_full_has_ended_when_it_is_not(
    bundle: Bundle, state: Path, is_begun_again: bool
) -> None:
    # Nothing is found: the first that cannot be logged is that a stream has ended.
    blind = [f"localization.{name}=0.999" for name in ("event_start", "event_end")]
    settings = ["localization.thresholds=[0.999]", *blind]
    options = [each for setting in settings for each in ("--set", setting)]
    with (
        engine(bundle.folder, *options, state=state, quiet=False) as served,
        FeatureFeeder(served.feed, "cam", DIM, timeout_s=PATIENCE_S) as feeder,
    ):
        feeder.send(RECORDING[:6])
        feeder.flush()
        wait_for(lambda: len(logged_in(state)) == 1)
        limit_files(served, (state / f"{FILE}-wal").stat().st_size)
        ending = threading.Thread(target=feeder.end)
        ending.start()
        wait_for(lambda: request_status(served.control, PATIENCE_S)["state"] == "waiting")
        again = threading.Thread(target=feed, args=(served, "cam"))
        if is_begun_again:  # it has to wait for the end of the session before
            again.start()
        time.sleep(0.5)  # the loop turns, and whoever is there asks again
        assert request_status(served.control, PATIENCE_S)["streams"] == ()
        limit_files(served, resource.RLIM_INFINITY)
        ending.join(PATIENCE_S)
        assert not ending.is_alive()
        if is_begun_again:
            again.join(PATIENCE_S)
            assert not again.is_alive()
    logged = logged_in(state)
    assert all(isinstance(each, StreamNotice) for each in logged)
    told = [(each.session, each.kind, each.next_index) for each in logged]  # type: ignore[union-attr]
    first = [(1, "opened", 0), (1, "ended", 6)]
    assert told == ([*first, (2, "opened", 0), (2, "ended", 150)] if is_begun_again else first)
    assert numbers(logged) == list(range(1, len(logged) + 1))


def test_a_drain_waits_until_it_can_be_logged(full_disk: Engine, state: Path) -> None:
    before = logged_in(state)
    feed(full_disk, "cam", stop=40)
    drain = threading.Thread(target=request_drain, args=(full_disk.control,))
    drain.start()

    def drains() -> bool:
        return request_status(full_disk.control, PATIENCE_S)["state"] == "draining"

    wait_for(drains)
    assert request_status(full_disk.control, PATIENCE_S)["waits_for"] is not None
    assert logged_in(state) == before
    limit_files(full_disk, resource.RLIM_INFINITY)
    drain.join(PATIENCE_S)
    assert full_disk.process.wait(PATIENCE_S) == 0
    logged = logged_in(state)
    assert logged[: len(before)] == before
    last = logged[-1]
    assert isinstance(last, StreamNotice) and (last.kind, last.next_index) == ("ended", 40)


def test_a_drain_that_is_given_up_says_that_nothing_could_be_logged(
    bundle: Bundle, state: Path
) -> None:
    options = ("--state", state, "--set", "drain_s=0.3", "--json")
    with running("serve", bundle.folder, *anywhere(), *options) as process:
        assert process.stdout is not None and process.stderr is not None
        ready = json.loads(process.stdout.readline())
        addresses = Addresses(ready["feed"], ready["events"], ready["control"])
        limit_files(Engine(process, addresses), 0)
        feed(Engine(process, addresses), "cam", stop=40)
        with pytest.raises(StreamError, match="the drain was given up"):
            request_drain(addresses.control)
        assert process.wait(PATIENCE_S) == 1
        last = process.stderr.read().splitlines()[-1]
    assert last.startswith("hrpro: the drain was given up after 0.3 s (drain_s): 1 streams are not")
    assert f"{FILE}: cannot be written: " in last
