"""What the server refuses, over real sockets: an Error for the sender, and nothing for others."""

from __future__ import annotations

import socket
import threading

import msgpack
import numpy as np
import pytest
import zmq
from serving import (
    ANY_PORT,
    PATIENCE_S,
    RawPeer,
    TinyPipeline,
    chunk,
    hear_until,
    hello,
    new_server,
    rows,
    serving,
)

from hrpro.clients import NoReplyError, request_status
from hrpro.engine import protocol, sockets
from hrpro.engine.protocol import (
    Ack,
    Chunk,
    DrainRequest,
    End,
    Ended,
    Error,
    Hello,
    Welcome,
)
from hrpro.engine.server import MESSAGES_PER_TURN
from hrpro.engine.sockets import messages_to_read

pytestmark = pytest.mark.usefixtures("nothing_left_open")


# ---- refusals ----------------------------------------------------------------------------------

REFUSED_CHUNKS: dict[str, tuple[Chunk, str]] = {
    "wrong dimension": (Chunk("cam", 0, rows(0, 4, dim=3)), "wrong_dimension"),
    "NaN": (Chunk("cam", 0, np.array([[0.0, np.nan]], np.float32)), "not_finite"),
    "infinity": (Chunk("cam", 0, np.array([[np.inf, 0.0]], np.float32)), "not_finite"),
    "too many snippets": (chunk(0, 9), "too_large"),
    "stream without a hello": (chunk(0, 4, stream="other"), "unknown_stream"),
}


@pytest.mark.parametrize("case", REFUSED_CHUNKS)
def test_a_refused_chunk_changes_nothing(case: str) -> None:
    refused, code = REFUSED_CHUNKS[case]
    pipeline = TinyPipeline()
    with serving(pipeline) as server, RawPeer(server.feed_address) as peer:
        peer.ask(hello())
        error = peer.ask(refused)
        assert isinstance(error, Error)
        assert (error.stream, error.code) == (refused.stream, code)
        assert error.next_index == (None if code == "unknown_stream" else 0)
        assert pipeline.received == {}
        assert peer.ask(chunk(0, 4)) == Ack("cam", 4, 20)
        counters = request_status(server.control_address)["counters"]
        assert (counters["chunks_refused"], counters["chunks_in"]) == (1, 1)


def test_a_chunk_beyond_the_credit_is_refused() -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, RawPeer(server.feed_address) as peer:
        peer.ask(hello())
        pipeline.paused = True
        assert peer.ask(chunk(0, 8)) == Ack("cam", 8, 16)
        assert peer.ask(chunk(8, 15)) == Ack("cam", 15, 16)
        error = peer.ask(chunk(15, 17))
        assert isinstance(error, Error) and (error.code, error.next_index) == ("no_credit", 15)


@pytest.mark.parametrize(
    ("refused", "code", "message"),
    [
        (hello(dim=3), "wrong_dimension", "expected feature dimension 2, came 3"),
        (Hello("cam", 2, 30.0, 16, 0), "wrong_clock", "expected 25.0 frames/s and 16 frames per"),
        (Hello("cam", 2, 25.0, 8, 0), "wrong_clock", "came 25.0 and 8"),
        (
            hello(first_index=2**40 + 1),
            "bad_message",
            "first_index of at most 1099511627776, came 1099511627777",
        ),
        (hello(first_index=2**53), "bad_message", "came 9007199254740992"),
    ],
)
def test_a_hello_that_does_not_fit_opens_nothing(refused: Hello, code: str, message: str) -> None:
    pipeline = TinyPipeline()
    with serving(pipeline) as server, RawPeer(server.feed_address) as peer:
        error = peer.ask(refused)
        assert isinstance(error, Error)
        assert (error.stream, error.code) == ("cam", code)
        assert message in error.message
        assert pipeline.streams == {}


def test_the_largest_first_index_is_taken() -> None:
    with serving() as server, RawPeer(server.feed_address) as peer:
        assert isinstance(peer.ask(hello(first_index=2**40)), Welcome)
        assert peer.ask(chunk(2**40, 2**40 + 4)) == Ack("cam", 2**40 + 4, 2**40 + 20)


def test_a_stream_that_cannot_be_welcomed_does_not_stay_open() -> None:
    pipeline = TinyPipeline()
    pipeline.max_chunk_snippets = 0
    with serving(pipeline) as server, RawPeer(server.feed_address) as peer:
        for session in (1, 2):  # the second Hello would find the first session if it were open
            error = peer.ask(hello())
            assert isinstance(error, Error) and error.code == "bad_message"
            assert error.message.startswith(
                "welcome.max_chunk_snippets: expected an integer of 1.."
            )
            assert pipeline.sessions == {"cam": session}


def test_an_end_at_another_snippet_is_refused() -> None:
    with serving() as server, RawPeer(server.feed_address) as peer:
        peer.ask(hello())
        assert peer.ask(End("cam", 3)) == Error(
            "cam",
            "out_of_order",
            "stream 'cam': expected snippet 0 or the end there, came the end at 3",
            0,
        )


# ---- not readable ------------------------------------------------------------------------------

GOOD = protocol.encode(chunk(0, 4))
BAD_MESSAGES: dict[str, list[bytes]] = {
    "one empty frame": [b""],
    "only empty frames": [b"", b"", b""],
    "garbage": [b"\xc1" * 100, b"\xff" * 16],
    "features without header": GOOD[1:],
    "header without features": GOOD[:1],
    "truncated features": [GOOD[0], GOOD[1][:-1]],
    "a frame more": [*GOOD, b""],
    "a thousand frames": [*GOOD, *[b"x"] * 1000],
    "an envelope": [b"", *GOOD],
    "a reply": protocol.encode(Ack("cam", 0, 0)),
    "an error": protocol.encode(Error(None, "bad_message", "no", None)),
    "a control request": protocol.encode(DrainRequest()),
    "a huge shape": [
        msgpack.packb(
            {"v": 1, "type": "chunk", "stream": "cam", "first_index": 0, "dtype": "float32"}
            | {"shape": [2**31 - 1, 2**31 - 1]}
        ),
        GOOD[1],
    ],
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_a_malformed_message_gets_an_error_and_disturbs_nobody(case: str) -> None:
    with (
        serving() as server,
        RawPeer(server.feed_address) as good,
        RawPeer(server.feed_address) as bad,
    ):
        good.ask(hello("good"))
        bad.ask(hello("cam"))
        error = bad.ask(BAD_MESSAGES[case])
        assert isinstance(error, Error)
        assert (error.stream, error.code) == (None, "bad_message")
        good.say(chunk(0, 4, "good"), End("good", 4))
        hear_until(good, Ended("good", 4, 4, 4))
        assert bad.ask(chunk(0, 4)) == Ack("cam", 4, 20)
        counters = request_status(server.control_address)["counters"]
        assert counters["messages_refused"] == 1


def test_another_version_is_refused() -> None:
    with serving() as server, RawPeer(server.feed_address) as peer:
        error = peer.ask([msgpack.packb({"v": 2, "type": "hello"})])
        assert error == Error(None, "version", "version: expected 1, came 2 (int)", None)


def test_a_frame_beyond_all_bounds_cuts_the_connection_alone() -> None:
    with (
        serving() as server,
        RawPeer(server.feed_address) as good,
        RawPeer(server.feed_address, b"huge") as bad,
    ):
        good.ask(hello("good"))
        bad.ask(hello("cam"))
        with bad.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
            bad.say([GOOD[0], bytes(2**20)])
            assert monitor.poll(PATIENCE_S * 1000), "the connection was not cut"
        bad.socket.disable_monitor()
        assert good.ask(chunk(0, 4, "good")) == Ack("good", 4, 20)
        # ZeroMQ connects again, under the same name: the stream is still this peer's.
        assert bad.ask(chunk(0, 4)) == Ack("cam", 4, 20)


@pytest.mark.parametrize(
    ("frame_bytes", "messages"),
    [(4096, 16384), (2**17, 512), (2**18, 256), (2**20, 256), (2**18 - 1, 256), (2**27, 256)],
)
def test_what_waits_of_one_peer_is_bounded_in_bytes(frame_bytes: int, messages: int) -> None:
    assert messages_to_read(frame_bytes) == messages
    with zmq.Context() as context, sockets.bind_router(context, ANY_PORT, frame_bytes) as router:
        assert router.get(zmq.RCVHWM) == messages
        assert router.get(zmq.MAXMSGSIZE) == frame_bytes


def test_a_peer_that_dies_at_its_receive_limit_disturbs_nobody() -> None:
    # Frames of 1 MiB, so that 256 messages are the limit.
    wide = TinyPipeline(max_chunk_snippets=2**16)
    sent_bytes = 0
    with (
        new_server(wide) as server,
        RawPeer(server.feed_address) as good,
    ):
        with RawPeer(server.feed_address, messages_to_send=1) as bad:
            # Nobody reads yet: it can send until its 256 messages and TCP's buffers are full.
            while bad.socket.poll(200, zmq.POLLOUT):
                bad.say([bytes(2**16)])
                sent_bytes += 2**16
                assert sent_bytes < 2**26
        assert sent_bytes >= 256 * 2**16
        thread = threading.Thread(target=server.run)
        thread.start()
        assert isinstance(good.ask(hello()), Welcome)
        assert good.ask(chunk(0, 4)) == Ack("cam", 4, 20)
        server.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_bytes_that_are_not_zeromq_disturb_nobody() -> None:
    with serving() as server, RawPeer(server.feed_address) as good:
        good.ask(hello())
        for address in (server.feed_address, server.events_address, server.control_address):
            port = int(address.rsplit(":", 1)[1])
            with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        assert good.ask(chunk(0, 4)) == Ack("cam", 4, 20)


def test_a_flood_of_nonsense_leaves_room_for_others() -> None:
    with (
        serving() as server,
        RawPeer(server.feed_address) as good,
        RawPeer(server.feed_address) as bad,
    ):
        good.ask(hello())
        for _ in range(3 * MESSAGES_PER_TURN):
            bad.say([b"\xc1"])
        good.say(chunk(0, 8), End("cam", 8))
        hear_until(good, Ended("cam", 8, 8, 8))


def test_a_turn_ends_its_reading_after_some_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrpro.engine.server.REFUSING_S", 0.0)
    with new_server(TinyPipeline()) as server, RawPeer(server.feed_address) as bad:
        bad.say(*[[b"\xc1"]] * 50)
        for turn in range(50):
            assert server.counters.messages_refused == turn
            assert server._feed.poll(PATIENCE_S * 1000)
            server._turn({server._feed})
        assert server.counters.messages_refused == 50


# ---- control -----------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [[b""], [b"", b""], [b"x"], GOOD, protocol.encode(hello())])
def test_a_bad_control_request_gets_an_error(frames: list[bytes]) -> None:
    with serving() as server, RawPeer(server.control_address) as peer:
        peer.say(frames)
        answer = peer.hear_frames()
        error = protocol.decode_control_reply(answer[-1:])
        assert isinstance(error, Error) and error.code == "bad_message"
        assert request_status(server.control_address)["counters"]["messages_refused"] == 1


def test_no_answer_in_time_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(NoReplyError, match=r"expected an answer to status within 0\.05 s"):
            request_status(address, timeout_s=0.05)
