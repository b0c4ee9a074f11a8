"""The server over real sockets on loopback, with a bare DEALER as the peer."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import zmq
from commands import wait_for
from serving import (
    PATIENCE_S,
    RawPeer,
    TinyPipeline,
    chunk,
    hear_until,
    hello,
    new_server,
    open_files,
    serving,
)

from hrpro.clients import request_drain, request_status
from hrpro.engine import protocol
from hrpro.engine.event_log import EventLog
from hrpro.engine.event_reader import FILE
from hrpro.engine.protocol import (
    Ack,
    End,
    Ended,
    Error,
    StatusReply,
    StatusRequest,
    Welcome,
)
from hrpro.engine.serve import _freeze

pytestmark = pytest.mark.usefixtures("nothing_left_open")


def hear_first(peer: RawPeer, kind: type[protocol.Message]) -> protocol.Message:
    """The first message of a kind; passes over Acks."""
    while True:
        message = peer.hear()
        if isinstance(message, kind):
            return message
        assert isinstance(message, Ack), message


# ---- the usual course --------------------------------------------------------------------------


def test_hello_is_answered_with_what_the_engine_is() -> None:
    with serving() as server, RawPeer(server.feed_address) as peer:
        assert peer.ask(hello("cam", first_index=100)) == Welcome(
            stream="cam",
            next_index=100,
            send_until=116,
            max_chunk_snippets=8,
            feature_dim=2,
            frames_per_s=25.0,
            snippet_frames=16,
            classes=("high", "low"),
            window_snippets=4,
            hop_snippets=1,
            context_snippets=3,
            lookahead_snippets=0,
            lookahead_s=0.64,
            bundle_id="tiny",
        )


def test_a_chunk_is_acknowledged_and_processing_gives_credit() -> None:
    with serving() as server, RawPeer(server.feed_address) as peer:
        peer.ask(hello())
        assert peer.ask(chunk(0, 8)) == Ack("cam", 8, 20)  # 4 of 8 are processed in this turn
        assert peer.hear() == Ack("cam", 8, 24)  # and 4 in the next


def test_chunks_of_one_turn_share_an_acknowledgement() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, RawPeer(server.feed_address) as peer:
        peer.ask(hello())
        pipeline.paused = True
        peer.say(*(chunk(at, at + 1) for at in range(16)))
        heard = hear_until(peer, Ack("cam", 16, 16))
        assert all(isinstance(each, Ack) and each.send_until == 16 for each in heard)
        reached = [each.next_index for each in heard if isinstance(each, Ack)]
        assert reached == sorted(set(reached))


def test_the_end_is_confirmed_when_all_is_published_and_again_when_asked_again() -> None:
    with serving() as server, RawPeer(server.feed_address) as peer:
        peer.ask(hello())
        peer.say(chunk(0, 6), End("cam", 6))
        ended = Ended("cam", 6, proposals=6, events=6)
        hear_until(peer, ended)
        assert peer.ask(End("cam", 6)) == ended
        assert peer.ask(End("cam", 7)) == Error(
            "cam", "unknown_stream", "stream 'cam': expected a Hello first, came end", None
        )


def test_a_stream_without_snippets_ends_too() -> None:
    with serving() as server, RawPeer(server.feed_address) as peer:
        peer.ask(hello(first_index=5))
        assert peer.ask(End("cam", 5)) == Ended("cam", 5, 0, 0)


def test_a_second_session_counts_from_the_beginning() -> None:
    with serving() as server, RawPeer(server.feed_address) as peer:
        for session in (1, 2):
            welcome = peer.ask(hello(first_index=40))
            assert isinstance(welcome, Welcome) and welcome.next_index == 40
            status = request_status(server.control_address)
            assert status["streams"][0]["session"] == session
            peer.say(chunk(40, 43), End("cam", 43))
            hear_until(peer, Ended("cam", 43, 3, 3))


def test_snippets_that_came_before_are_dropped_and_acknowledged_again() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, RawPeer(server.feed_address) as peer:
        peer.ask(hello())
        pipeline.paused = True
        assert peer.ask(chunk(0, 8)) == Ack("cam", 8, 16)
        assert peer.ask(chunk(0, 8)) == Ack("cam", 8, 16)  # whoever repeats it lost the Ack
        assert peer.ask(chunk(4, 12)) == Ack("cam", 12, 16)
        status = request_status(server.control_address)
        assert status["streams"][0]["duplicates"] == 12
        assert status["counters"]["chunks_in"] == 3
        assert status["counters"]["chunks_duplicate"] == 1
        assert status["counters"]["snippets_in"] == 12
    assert pipeline.received["cam"] == [(index, index + 1.0) for index in range(12)]


# ---- ownership and sessions --------------------------------------------------------------------


def test_the_last_hello_owns_the_stream() -> None:
    with (
        serving() as server,
        RawPeer(server.feed_address) as first,
        RawPeer(server.feed_address) as second,
    ):
        first.ask(hello())
        assert first.ask(chunk(0, 4)) == Ack("cam", 4, 20)
        welcome = second.ask(hello(first_index=2))
        assert isinstance(welcome, Welcome)
        assert (welcome.next_index, welcome.send_until) == (4, 20)
        for message in (chunk(4, 5), End("cam", 4)):
            error = first.ask(message)
            assert isinstance(error, Error) and error.code == "not_owner"
        assert second.ask(chunk(4, 5)) == Ack("cam", 5, 21)


def test_a_hello_beyond_the_next_snippet_begins_another_session() -> None:
    with (
        serving() as server,
        RawPeer(server.feed_address) as first,
        RawPeer(server.feed_address) as second,
    ):
        first.ask(hello())
        first.ask(chunk(0, 4))
        welcome = second.ask(hello(first_index=50))
        assert isinstance(welcome, Welcome)
        assert (welcome.next_index, welcome.send_until) == (50, 66)
        assert first.hear() == Ended("cam", 4, 4, 4)
        (stream,) = request_status(server.control_address)["streams"]
        assert (stream["session"], stream["next_index"]) == (2, 50)


def test_a_hello_to_an_ending_stream_waits_for_the_next_session() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, RawPeer(server.feed_address) as peer:
        peer.ask(hello())
        pipeline.paused = True
        peer.ask(chunk(0, 8))
        peer.say(End("cam", 8), End("cam", 8), hello(first_index=0))
        late = peer.ask(chunk(8, 9))
        assert isinstance(late, Error) and late.code == "unknown_stream"
        pipeline.paused = False
        request_status(server.control_address)  # anything wakes the server
        hear_until(peer, Ended("cam", 8, 8, 8))
        welcome = hear_first(peer, Welcome)
        assert isinstance(welcome, Welcome) and welcome.next_index == 0
        assert request_status(server.control_address)["streams"][0]["session"] == 2


def test_a_feeder_that_is_gone_is_noticed_and_harms_nobody() -> None:
    with serving() as server, RawPeer(server.feed_address) as good:
        good.ask(hello("good"))
        with RawPeer(server.feed_address) as gone:
            gone.ask(hello())
            gone.ask(chunk(0, 4))
            assert request_status(server.control_address)["streams"][1]["fed_by"] is True
            gone.say(chunk(4, 8), hello(), chunk(8, 9))
        good.say(chunk(0, 8, "good"), End("good", 8))
        hear_until(good, Ended("good", 8, 8, 8))


# ---- control -----------------------------------------------------------------------------------


def test_status() -> None:
    with serving() as server, RawPeer(server.feed_address) as peer:
        peer.ask(hello(first_index=10))
        peer.say(chunk(10, 16))
        hear_until(peer, Ack("cam", 16, 32))
        status = request_status(server.control_address)
        assert status == {
            "instance": server.instance,
            "bundle_id": "tiny",
            "previous_bundle_id": None,
            "canary_bundle_id": None,
            "state": "serving",
            "streams": (
                {
                    "stream": "cam",
                    "session": 1,
                    "bundle_id": "tiny",
                    "next_index": 16,
                    "processed": 16,
                    "lag_snippets": 0,
                    "lag_ms": 0,
                    "credit_snippets": 16,
                    "open_actions": 0,
                    "proposals": 6,
                    "events": 6,
                    "duplicates": 0,
                    "dropped": 0,
                    "missing": 0,
                    "policy": "wait",
                    "idle": False,
                    "fed_by": True,
                },
            ),
            "counters": {
                "snippets_in": 6,
                "snippets_processed": 6,
                "batches": 2,  # of 4 and of 2; that the stream is opened and ended needs none
                "chunks_in": 1,
                "chunks_duplicate": 0,
                "chunks_refused": 0,
                "messages_refused": 0,
                "proposals": 6,
                "events": 6,
                "ended_streams": 0,
                "gaps": 0,
                "snippets_missing": 0,
                "snippets_duplicate": 0,
                "snippets_dropped_oldest": 0,
                "snippets_dropped_newest": 0,
                "deploys": 0,
                "deploys_refused": 0,
                "connections_refused": 0,
                "subscriptions_refused": 0,
            },
            "waits_for": None,
            "provider": "cpu",
        }


def test_a_req_socket_gets_its_reply() -> None:
    with serving() as server, zmq.Context() as context, context.socket(zmq.REQ) as peer:
        peer.linger = 0
        peer.connect(server.control_address)
        for _ in range(2):
            peer.send_multipart(protocol.encode(StatusRequest()))
            assert peer.poll(PATIENCE_S * 1000)
            reply = protocol.decode_control_reply(peer.recv_multipart())
            assert isinstance(reply, StatusReply) and reply.instance == server.instance


def test_drain_publishes_everything_and_stops() -> None:
    pipeline = TinyPipeline()
    with new_server(pipeline) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        with RawPeer(server.feed_address) as first, RawPeer(server.feed_address) as second:
            first.ask(hello("first"))
            second.ask(hello("second"))
            first.say(chunk(0, 8, "first"))
            second.say(chunk(0, 8, "second"), End("second", 8))
            hear_until(second, Ended("second", 8, 8, 8))
            hear_until(first, Ack("first", 8, 24))
            request_drain(server.control_address, PATIENCE_S)
            assert first.hear() == Ended("first", 8, 8, 8)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        assert pipeline.streams == {}
        assert server.counters.ended_streams == 2
        assert server.counters.proposals == 16


def test_what_comes_while_draining_is_refused() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, RawPeer(server.feed_address) as peer:
        peer.ask(hello())
        pipeline.paused = True  # so that the drain cannot complete
        peer.ask(chunk(0, 4))
        server.drain()
        with RawPeer(server.control_address) as control:
            state = ""
            while state != "draining":
                control.say(StatusRequest())
                reply = protocol.decode_control_reply(control.hear_frames())
                assert isinstance(reply, StatusReply)
                state = reply.state
        for message in (hello("new"), hello(), chunk(4, 5)):
            error = peer.ask(message)
            assert isinstance(error, Error)
            assert (error.stream, error.code) == (message.stream, "draining")
        pipeline.paused = False
        peer.say(End("cam", 4))  # the end that the drain has brought already
        assert hear_first(peer, Ended) == Ended("cam", 4, 4, 4)


def test_a_hello_that_waits_is_refused_by_a_drain() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, RawPeer(server.feed_address) as peer:
        peer.ask(hello())
        pipeline.paused = True
        peer.ask(chunk(0, 4))
        peer.say(End("cam", 4), hello())
        server.drain()
        error = hear_first(peer, Error)
        assert isinstance(error, Error) and error.code == "draining"
        pipeline.paused = False


# ---- life cycle --------------------------------------------------------------------------------


def test_stop_is_heard_while_nothing_happens() -> None:
    with new_server(TinyPipeline()) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        request_status(server.control_address)
        server.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    server.stop()  # harmless when it is closed
    server.drain()


def test_a_signal_ends_the_wait_whichever_thread_receives_it() -> None:
    handled = threading.Event()
    in_time: list[bool] = []

    with new_server(TinyPipeline()) as server:

        def on_signal(*_: object) -> None:
            handled.set()
            server.drain()

        def send_signal() -> None:
            request_status(server.control_address)
            # Here it interrupts nothing of the main thread, which alone runs handlers.
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            in_time.append(handled.wait(PATIENCE_S))
            server.stop()

        before = signal.signal(signal.SIGUSR1, on_signal)
        thread = threading.Thread(target=send_signal)
        thread.start()
        try:
            server.run()
        finally:
            thread.join()
            signal.signal(signal.SIGUSR1, before)
    assert in_time == [True]


_POLICIES = """
import os, sys
from pathlib import Path
from hrpro.engine.sockets import new_context

def forbid(*_):
    raise PermissionError

policy_of, threads = os.sched_getscheduler, Path("/proc/self/task")
os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
if sys.argv[1] == "forbidden":
    os.sched_setscheduler = forbid
elif sys.argv[1] == "chosen":
    os.sched_getscheduler = lambda _: os.SCHED_RR
before = set(threads.iterdir())
with new_context():
    new = {policy_of(int(each.name)) for each in set(threads.iterdir()) - before}
print(*new, policy_of(0))
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux alone has this policy")
@pytest.mark.parametrize("instead", ["usual", "forbidden", "chosen"])
def test_the_thread_of_a_context_interrupts_none(instead: str) -> None:
    """Unless a sandbox forbids that, or another policy was chosen for the engine."""
    # A process of its own: an encoder of video may have given this one's thread a policy.
    command = [sys.executable, "-c", _POLICIES, instead]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    of_context = os.SCHED_BATCH if instead == "usual" else os.SCHED_OTHER
    assert told == f"{of_context} {os.SCHED_OTHER}\n"


def test_what_was_looked_at_for_cycles_is_left_alone() -> None:
    callbacks = list(gc.callbacks)
    try:
        gc.callbacks.append(_freeze)
        gc.collect(1)
        assert gc.get_freeze_count() == 0
        gc.collect()
        assert gc.get_freeze_count() > 1000
        assert not gc.get_objects(2)
    finally:
        gc.callbacks[:] = callbacks
        gc.unfreeze()


def test_an_address_in_use_is_an_error_that_leaves_nothing_open() -> None:
    with new_server(TinyPipeline()) as server:
        before = open_files()
        with pytest.raises(zmq.ZMQError, match="Address already in use"):
            new_server(TinyPipeline(), control=server.control_address)
        assert not open_files() - before
        assert server.feed_address.startswith("tcp://127.0.0.1:")
        assert not server.feed_address.endswith((":0", ":*"))


def test_a_failure_of_the_pipeline_ends_the_server_loudly() -> None:
    class Broken(TinyPipeline):
        def append(self, stream: str, first_index: int, features: np.ndarray) -> None:
            raise RuntimeError("the backend is gone")

    with (
        new_server(Broken()) as server,
        RawPeer(server.feed_address) as peer,
    ):
        peer.say(hello(), chunk(0, 1))
        with pytest.raises(RuntimeError, match="the backend is gone"):
            server.run()


def test_a_folder_whose_name_is_no_text_can_be_told_of(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"state\xff")
    with EventLog(folder) as log:
        with contextlib.closing(sqlite3.connect(folder / FILE)) as other:
            other.execute("DROP TABLE events")
        with serving(log=log) as server, RawPeer(server.feed_address) as peer:
            assert isinstance(peer.ask(hello()), Welcome)
            wait_for(
                lambda: request_status(server.control_address, PATIENCE_S)["state"] == "waiting"
            )
            reason = request_status(server.control_address, PATIENCE_S)["waits_for"]
    assert reason == f"{tmp_path}/state\\udcff/{FILE}: cannot be written: no such table: events"
