"""The feeder over real sockets: nothing is lost, whatever happens to connection and engine."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import (
    DIM,
    PATIENCE_S,
    RawPeer,
    TinyPipeline,
    hello,
    open_files,
    rows,
    serving,
)

from hrpro.clients import (
    AsyncFeatureFeeder,
    FeatureFeeder,
    NoReplyError,
    SnippetClock,
    StreamError,
    request_status,
)
from hrpro.clients.chaos_link import Link
from hrpro.engine.client_key import KeyFileError
from hrpro.engine.protocol import Ended, Error, HrproError, Publication

RETRY_S = 0.1
_THREADS = Path("/proc/self/task")


pytestmark = pytest.mark.usefixtures("nothing_left_open")


def feeder_to(address: str, **options: object) -> FeatureFeeder:
    given = {"stream": "cam", "feature_dim": 2, "timeout_s": PATIENCE_S, "retry_s": RETRY_S}
    return FeatureFeeder(address, **{**given, **options})  # type: ignore[arg-type]


def expected(first: int, stop: int) -> list[tuple[int, float]]:
    """What a TinyPipeline has received when each snippet of `rows` has come once, in order."""
    return [(index, index + 1.0) for index in range(first, stop)]


# ---- the usual course --------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_sizes", [[1] * 30, [30], [7, 1, 22], [8, 8, 14], [0, 30, 0]])
def test_any_chunking_arrives_whole(chunk_sizes: list[int]) -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, feeder_to(server.feed_address) as feeder:
        assert feeder.welcome is not None and feeder.welcome.bundle_id == "tiny"
        for size in chunk_sizes:
            feeder.send(rows(feeder.next_index, feeder.next_index + size))
        assert feeder.next_index == 30
        assert feeder.end() == Ended("cam", 30, proposals=30, events=30)
        assert feeder.lag == 0
        assert feeder.end() == Ended("cam", 30, proposals=30, events=30)
    assert pipeline.received["cam"] == expected(0, 30)
    assert pipeline.streams == {}


def test_single_snippets_and_arrays_that_change_afterwards() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, feeder_to(server.feed_address) as feeder:
        features = np.zeros(2, np.float32)
        for index in range(5):
            features[:] = index + 1
            feeder.send(features)
        feeder.flush()
    assert pipeline.received["cam"] == expected(0, 5)


def test_only_as_much_is_kept_as_a_restarted_engine_needs() -> None:
    with serving() as server, feeder_to(server.feed_address) as feeder:
        feeder.send(rows(0, 500))
        feeder.flush()
        assert (feeder.lag, len(feeder._talk.kept)) == (0, 16 + 4 + 2 + 1)
    with serving() as server, feeder_to(server.feed_address, history_snippets=0) as feeder:
        feeder.send(rows(0, 500))
        feeder.flush()
        assert (feeder.lag, len(feeder._talk.kept)) == (0, 0)


def test_a_stream_may_begin_anywhere() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, feeder_to(server.feed_address, first_index=1000) as feeder:
        feeder.send(rows(1000, 1003))
        assert feeder.end() == Ended("cam", 1003, 3, 3)
    assert pipeline.received["cam"] == expected(1000, 1003)


def test_many_feeders_at_once() -> None:
    pipeline = TinyPipeline()
    names = [f"cam{number}" for number in range(20)]
    with serving(pipeline) as server:
        feeders = [feeder_to(server.feed_address, stream=name) for name in names]
        for first in range(0, 24, 6):
            for feeder in feeders:
                feeder.send(rows(first, first + 6))
        for feeder in feeders:
            assert feeder.end() == Ended(feeder.stream, 24, 24, 24)
            feeder.close()
    assert pipeline.received == {name: expected(0, 24) for name in names}


def test_feeders_share_a_context_and_close_apart() -> None:
    """Two files and no thread for each; closing one cuts off nothing of itself or another."""
    pipeline = TinyPipeline()
    with serving(pipeline) as server:
        threads, before = len(list(_THREADS.iterdir())), open_files()
        feeders = [feeder_to(server.feed_address, stream=f"cam{number}") for number in range(20)]
        for feeder in feeders:
            feeder.connect()
        own = [name for name in (open_files() - before).elements() if "socket" in name]
        assert len(own) == 2 * 20  # this process has the engine's end, too
        assert (open_files() - before).total() < 3 * 20 + 10
        assert len(list(_THREADS.iterdir())) - threads == 2  # of the one context
        for feeder in feeders:
            feeder.send(rows(0, 8))
            feeder.close()
            feeder.close()
        with feeder_to(server.feed_address, stream="last", first_index=8) as last:
            assert last.end().next_index == 8
        while sum(map(len, pipeline.received.values())) < 20 * 8:
            time.sleep(0.01)
    assert pipeline.received == {f"cam{number}": expected(0, 8) for number in range(20)}


_FORKING = """
import os, sys
import numpy as np
from hrpro.clients import FeatureFeeder

rows = np.ones((4, 2), np.float32)
with FeatureFeeder(sys.argv[1], "parent", 2) as feeder:
    feeder.send(rows)
    child = os.fork()
    if child == 0:
        feeder.close()
        with FeatureFeeder(sys.argv[1], "child", 2) as own:
            own.send(rows)
            os._exit(own.end().next_index)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    feeder.send(rows)
    assert feeder.end().next_index == 8
"""


def test_a_fork_has_feeders_of_its_own() -> None:
    """Also where it closes what it has of its parent."""
    with serving() as server:
        command = [sys.executable, "-W", "ignore", "-c", _FORKING, server.feed_address]
        subprocess.run(command, check=True, timeout=6 * PATIENCE_S)
        streams = request_status(server.control_address)["streams"]
    assert streams == ()


@pytest.mark.parametrize("client", [FeatureFeeder, AsyncFeatureFeeder])
def test_what_is_no_address_or_no_key(
    client: type[FeatureFeeder | AsyncFeatureFeeder], tmp_path: Path
) -> None:
    with pytest.raises(HrproError, match=r"^cannot use nonsense: Invalid argument$"):
        client("nonsense", "cam", DIM)
    with pytest.raises(KeyFileError, match=r"a\.key: cannot be read: No such file"):
        client("tcp://127.0.0.1:1", "cam", DIM, key=str(tmp_path / "a.key"))


# ---- what no engine would take -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "code", "message"),
    [
        (
            rows(0, 4, dim=3),
            "wrong_dimension",
            r"snippet 2: expected shape \(_, 2\), came \(4, 3\)",
        ),
        (np.zeros(3, np.float32), "wrong_dimension", r"expected shape \(_, 2\), came \(3,\)"),
        (np.zeros((1, 1, 2), np.float32), "wrong_dimension", r"came \(1, 1, 2\)"),
        (np.zeros((4, 2)), "wrong_dtype", "snippet 2: expected float32, came float64"),
        (np.array([[0, 0], [0, np.nan]], np.float32), "not_finite", "snippet 3: expected finite"),
        (np.array([np.inf, 0], np.float32), "not_finite", "snippet 2: expected finite"),
    ],
)
def test_bad_features_are_refused_before_any_is_taken(
    features: np.ndarray, code: str, message: str
) -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, feeder_to(server.feed_address) as feeder:
        feeder.send(rows(0, 2))
        with pytest.raises(StreamError, match=message) as caught:
            feeder.send(features)
        assert caught.value.code == code
        feeder.send(rows(2, 4))  # the feeder is as good as before
        assert feeder.end() == Ended("cam", 4, 4, 4)
        with pytest.raises(StreamError, match=r"expected no snippets after end\(\)"):
            feeder.send(rows(4, 5))
    assert pipeline.received["cam"] == expected(0, 4)


@pytest.mark.parametrize(
    ("options", "code"),
    [({"feature_dim": 3}, "wrong_dimension"), ({"clock": SnippetClock(30.0, 16)}, "wrong_clock")],
)
def test_a_stream_that_does_not_fit_is_refused_with_the_engines_words(
    options: dict[str, object], code: str
) -> None:
    with serving() as server:
        feeder = feeder_to(server.feed_address, **options)
        with pytest.raises(StreamError, match="stream 'cam': expected") as caught, feeder:
            pass
        assert caught.value.code == code


# ---- credit and time ---------------------------------------------------------------------------


def test_without_credit_send_waits_and_says_what_it_has_taken() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, feeder_to(server.feed_address) as feeder:
        pipeline.paused = True
        features = rows(0, 40)
        with pytest.raises(NoReplyError, match=r"stream 'cam' at .* expected credit within 0.3 s"):
            feeder.send(features, timeout_s=0.3)
        assert feeder.next_index == 24  # credit for 16, and a chunk of 8 that waits
        assert feeder.lag == 8
        with pytest.raises(NoReplyError):
            feeder.send(features[24:], timeout_s=0)  # nothing more is taken meanwhile
        assert feeder.next_index == 24
        pipeline.paused = False
        request_status(server.control_address)  # anything wakes the server
        feeder.send(features[feeder.next_index :])
        assert feeder.end() == Ended("cam", 40, 40, 40)
    assert pipeline.received["cam"] == expected(0, 40)


class SlowPipeline(TinyPipeline):
    """One snippet a step, which takes its time, as inference does."""

    step_snippets = 1
    step_s = 0.04

    def step(self) -> Iterator[Publication]:
        time.sleep(self.step_s)
        return super().step()


def test_a_slow_engine_may_take_longer_than_the_timeout_while_it_progresses() -> None:
    pipeline = SlowPipeline()
    timeout_s = 0.4  # 10 steps
    with (
        serving(pipeline) as server,
        feeder_to(server.feed_address, timeout_s=timeout_s) as feeder,
    ):
        started_s = time.monotonic()
        feeder.send(rows(0, 32))  # waits for credit for 16 of them
        assert time.monotonic() - started_s > timeout_s
        started_s = time.monotonic()
        assert feeder.end() == Ended("cam", 32, 32, 32)  # 16 are left to be processed
        assert time.monotonic() - started_s > timeout_s
    assert pipeline.received["cam"] == expected(0, 32)


def test_an_engine_that_answers_and_stands_still_runs_into_the_timeout() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, feeder_to(server.feed_address) as feeder:
        pipeline.paused = True
        feeder.send(rows(0, 16))
        feeder.flush()
        # Hello is said again and again meanwhile, and answered with the same Welcome.
        with pytest.raises(NoReplyError, match=r"expected Ended within 0\.5 s of the last"):
            feeder.end(timeout_s=0.5)
        with pytest.raises(NoReplyError):
            feeder.end(timeout_s=0)


def test_an_engine_that_is_not_there() -> None:
    with Link("tcp://127.0.0.1:1") as nowhere:
        feeder = feeder_to(nowhere.address, timeout_s=0.2)
        with pytest.raises(NoReplyError, match=r"expected a Welcome within 0\.2 s of the last"):
            feeder.connect()
        with pytest.raises(NoReplyError):
            feeder.send(rows(0, 1))
        assert feeder.next_index == 0
        feeder.close()


def test_a_feeder_may_be_there_before_its_engine() -> None:
    pipeline = TinyPipeline()
    with serving() as first:
        address = first.feed_address  # a port that is free again when `first` is closed
    feeder = feeder_to(address)
    with pytest.raises(NoReplyError):
        feeder.connect(timeout_s=0)
    with serving(pipeline, feed=address), feeder:
        feeder.send(rows(0, 9))
        assert feeder.end() == Ended("cam", 9, 9, 9)


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan")])
def test_a_timeout_that_is_none(timeout_s: float) -> None:
    with (
        serving() as server,
        feeder_to(server.feed_address) as feeder,
        pytest.raises(ValueError, match="timeout_s: expected None or at least 0"),
    ):
        feeder.flush(timeout_s=timeout_s)


# ---- lost connections --------------------------------------------------------------------------


def test_a_connection_that_is_cut_again_and_again_loses_nothing() -> None:
    pipeline = TinyPipeline()
    with (
        serving(pipeline) as server,
        Link(server.feed_address) as road,
        feeder_to(road.address) as feeder,
    ):
        for first in range(0, 200, 10):
            feeder.send(rows(first, first + 10))
            if first % 40 == 0:
                road.cut()
        road.cut()
        assert feeder.end() == Ended("cam", 200, 200, 200)
        assert road.accepted >= 5
    assert sorted(pipeline.received["cam"]) == expected(0, 200)  # some came before others


def test_a_line_that_is_lost_is_given_up_for_another() -> None:
    """Nobody is told that it is lost: it is silent, though the feeder asks."""
    pipeline = TinyPipeline()
    with (
        serving(pipeline) as server,
        Link(server.feed_address) as link,
        feeder_to(link.address) as feeder,
    ):
        feeder.send(rows(0, 4))
        feeder.flush()
        link.lose()
        feeder.send(rows(4, 12))
        feeder.flush()
    assert pipeline.received["cam"] == expected(0, 12)


class StalledPipeline(TinyPipeline):
    """Stands still for once, and the engine with it."""

    stall_s = 0.0

    def step(self) -> Iterator[Publication]:
        stall_s, self.stall_s = self.stall_s, 0.0
        time.sleep(stall_s)
        return super().step()


def test_an_engine_that_stood_still_reads_the_old_lines_after_the_new_one() -> None:
    """The Hellos that waited there take the stream from the newest one: no other feeder has."""
    for _ in range(5):
        pipeline = StalledPipeline()
        with serving(pipeline) as server, feeder_to(server.feed_address, retry_s=0.05) as feeder:
            feeder.send(rows(0, 8))
            feeder.flush()
            pipeline.stall_s = 0.5
            for first in range(8, 80, 8):
                feeder.send(rows(first, first + 8))
            assert feeder.end().next_index == 80
        assert sorted(pipeline.received["cam"]) == expected(0, 80)


def test_a_connection_that_is_cut_while_the_end_is_awaited() -> None:
    pipeline = TinyPipeline()
    with (
        serving(pipeline) as server,
        Link(server.feed_address) as road,
        feeder_to(road.address) as feeder,
    ):
        feeder.send(rows(0, 6))
        feeder.flush()
        pipeline.paused = True
        with pytest.raises(NoReplyError, match=r"expected Ended within 0\.2 s of the last"):
            feeder.end(timeout_s=0.2)
        road.cut()
        pipeline.paused = False
        request_status(server.control_address)  # the Ended now goes to nobody
        assert feeder.end() == Ended("cam", 6, 6, 6)
        assert pipeline.sessions == {"cam": 1}


# ---- restarted engines -------------------------------------------------------------------------


def test_a_restarted_engine_gets_its_context_and_all_that_it_missed() -> None:
    first, second = TinyPipeline(), TinyPipeline()
    with serving(first) as server:
        address = server.feed_address
        feeder = feeder_to(address)
        feeder.send(rows(0, 50))
        feeder.flush()
    with serving(second, feed=address), feeder:
        feeder.send(rows(50, 80))
        assert feeder.end() == Ended("cam", 80, 53, 53)
    assert first.received["cam"] == expected(0, 50)
    assert second.received["cam"] == expected(27, 80)  # 23 of history, then what is new


def test_an_engine_restarted_many_times_under_one_feeder() -> None:
    pipelines = [TinyPipeline() for _ in range(5)]
    given = 0
    with serving() as server:
        address = server.feed_address
    feeder = feeder_to(address)
    for pipeline in pipelines:
        with serving(pipeline, feed=address):
            feeder.send(rows(given, given + 20))
            given += 20
            feeder.flush()
    feeder.close()
    seen = {place for pipeline in pipelines for place in pipeline.received["cam"]}
    assert sorted(seen) == expected(0, 100)


def test_an_engine_that_dies_with_accepted_and_unsent_snippets() -> None:
    first, second = TinyPipeline(), TinyPipeline()
    with serving(first) as server:
        address = server.feed_address
        feeder = feeder_to(address)
        feeder.connect()
        first.paused = True
        with pytest.raises(NoReplyError):
            feeder.send(rows(0, 40), timeout_s=0.2)
    with serving(second, feed=address), feeder:
        feeder.send(rows(feeder.next_index, 40))
        feeder.end()
    assert second.received["cam"][-1] == (39, 40.0)
    assert sorted({*first.received["cam"], *second.received["cam"]}) == expected(0, 40)


# ---- other feeders -----------------------------------------------------------------------------


def test_a_stream_left_open_is_continued_by_a_later_feeder() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server:
        with feeder_to(server.feed_address) as feeder:
            feeder.send(rows(0, 10))
            feeder.flush()
        with feeder_to(server.feed_address, first_index=10) as feeder:
            feeder.send(rows(10, 20))
            assert feeder.end() == Ended("cam", 20, 20, 20)
    assert pipeline.received["cam"] == expected(0, 20)
    assert pipeline.sessions == {"cam": 1}


def test_what_the_engine_has_is_not_sent_again() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server:
        with feeder_to(server.feed_address) as feeder:
            feeder.send(rows(0, 10))
            feeder.flush()
        with feeder_to(server.feed_address) as feeder:  # plays the same film from its beginning
            feeder.send(rows(0, 20))
            feeder.flush()
            (stream,) = request_status(server.control_address)["streams"]
            assert stream["duplicates"] == 0
            assert feeder.end() == Ended("cam", 20, 20, 20)
    assert pipeline.received["cam"] == expected(0, 20)


def test_a_feeder_that_has_nothing_new_can_end_the_stream() -> None:
    with serving() as server:
        with feeder_to(server.feed_address) as feeder:
            feeder.send(rows(0, 10))
            feeder.flush()
        with feeder_to(server.feed_address) as feeder:
            feeder.send(rows(0, 3))
            assert feeder.end() == Ended("cam", 10, 10, 10)


def test_the_feeder_whose_stream_is_taken_over_is_told() -> None:
    with serving() as server, feeder_to(server.feed_address) as old:
        old.send(rows(0, 4))
        old.flush()
        with feeder_to(server.feed_address, first_index=4) as new:
            for _ in range(2):  # and again: it can only be closed now
                with pytest.raises(StreamError, match="expected the connection whose Hello") as got:
                    old.send(rows(4, 5))
                    old.flush()
                assert got.value.code == "not_owner"
            new.send(rows(4, 6))
            assert new.end() == Ended("cam", 6, 6, 6)


def test_a_drained_engine_ends_the_stream_for_its_feeder() -> None:
    with serving() as server, feeder_to(server.feed_address) as feeder:
        feeder.send(rows(0, 4))
        feeder.flush()
        server.drain()
        with pytest.raises(StreamError) as caught:
            while True:
                feeder.send(rows(feeder.next_index, feeder.next_index + 1))
        assert caught.value.code == "draining"


def test_a_peer_in_pieces_does_not_disturb_a_feeder() -> None:
    pipeline = TinyPipeline()
    stop = threading.Event()

    def rage(address: str) -> None:
        while not stop.is_set():
            with RawPeer(address) as peer:
                peer.say([b"\xc1"], [b"", b"", b""], hello("other"), [b"x"] * 50)
                assert isinstance(peer.hear(), Error)

    with serving(pipeline) as server, feeder_to(server.feed_address) as feeder:
        thread = threading.Thread(target=rage, args=(server.feed_address,))
        thread.start()
        for first in range(0, 400, 8):
            feeder.send(rows(first, first + 8))
        ended = feeder.end()
        stop.set()
        thread.join(PATIENCE_S)
    assert ended == Ended("cam", 400, 400, 400)
    assert pipeline.received["cam"] == expected(0, 400)
