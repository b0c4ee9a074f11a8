"""Sessions in a file: what was live comes again, from an engine and from the pipeline alone."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import hrpro, refusal, running, wait_for
from driving import PATIENCE_S, assert_same, of_stream
from serving import ANY_PORT, DIM, RawPeer, TinyPipeline, chunk, hello, rows, serving
from tiny_model import tiny_recording

from hrpro.clients import EventSubscriber, FeatureFeeder, request_status
from hrpro.clients.chaos_link import Link
from hrpro.clients.recording import Fed, Recording, RecordingError, RecordingWriter
from hrpro.clients.relay import AcceptanceLog, FeedRelay
from hrpro.clients.replaying import differences, run_recording
from hrpro.engine.deployment import Deployment
from hrpro.engine.messages import (
    Ack,
    Chunk,
    End,
    Ended,
    Error,
    FinalProposal,
    Gap,
    Hello,
    Message,
    Publication,
    StreamNotice,
    Welcome,
)
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.serve import load_engine_config, new_deployment
from hrpro.engine.server import Server
from hrpro.engine.wire import HrproError
from hrpro.export.bundle import Bundle

LENGTH = 150
SETTINGS = ("threads=1", "gap_wait_s=60", "idle_s=600")


def deployed(bundle: Bundle) -> Deployment:
    return new_deployment(bundle, load_engine_config(bundle, None, SETTINGS))


@contextlib.contextmanager
def recorder(file: Path, server: Server, kill: bool = False) -> Iterator[str]:
    """`hrpro record` in front of a server; yields the address for feeders."""
    sides = "--from", server.feed_address, "--events", server.events_address, "--feed", ANY_PORT
    with running("record", file, *sides, "--json") as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield json.loads(line)["feed"]
        if kill:
            process.kill()
        else:
            process.terminate()
        _, stderr = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, stderr) == (-9 if kill else 0, "")


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Recording]:
    recording = Recording(file)
    try:
        yield recording
    finally:
        recording.close()


def fed_in(file: Path) -> list[Fed]:
    with opened(file) as recording:
        return list(recording.fed())


def outline(fed: list[Fed]) -> list[tuple[str, int, int]]:
    return [(each.kind, each.first_index, each.next_index) for each in fed]


def until_ended(subscriber: EventSubscriber, streams: int) -> list[Publication]:
    """What comes until so many streams have ended for good."""
    heard: list[Publication] = []
    while streams:
        publication = subscriber.receive(PATIENCE_S)
        assert publication is not None
        heard.append(publication)
        is_end = isinstance(publication, StreamNotice) and publication.kind == "ended"
        streams -= is_end
    return heard


# ---- live = replay = offline ---------------------------------------------------------------------


def feed_two_streams(address: str) -> None:
    """Side by side, in chunks of 5 and of 1 to 7; a gap in one session, and one between two."""
    left, right = tiny_recording(LENGTH, seed=1), tiny_recording(LENGTH, seed=2)
    with (
        FeatureFeeder(address, "left", left.shape[1]) as one,
        FeatureFeeder(address, "right", right.shape[1], first_index=1000) as other,
    ):
        sizes = iter([1, 2, 3, 4, 5, 6, 7] * 10)
        for at in range(0, LENGTH, 5):
            if at == 50:
                one.skip(3)
            if at == 100:
                one.skip(500)
            one.send(left[at : at + 5])
            start = other.next_index - 1000
            other.send(right[start : start + next(sizes)]) if start < LENGTH else None
        other.send(right[other.next_index - 1000 :]) if other.next_index < 1000 + LENGTH else None
        one.end()
        other.end()


def test_what_was_live_comes_again(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "session.hrpro"
    with (
        serving(Pipeline(deployed(bundle))) as server,  # type: ignore[arg-type]
        EventSubscriber(server.events_address) as subscriber,
        recorder(file, server) as address,
    ):
        subscriber.wait_connected()
        feed_two_streams(address)
        live = until_ended(subscriber, 3)
    assert [each.name for each in tmp_path.iterdir()] == [file.name]
    check_recorded(file, live)

    with (
        serving(Pipeline(deployed(bundle))) as server,  # type: ignore[arg-type]
        EventSubscriber(server.events_address) as subscriber,
    ):
        subscriber.wait_connected()
        hrpro("replay", file, "--to", server.feed_address, "--speed", "max")
        replayed = until_ended(subscriber, 3)

    with opened(file) as recording:
        offline = list(run_recording(recording, deployed(bundle)))
    for stream in ("left", "right"):
        expected = of_stream(live, stream)
        assert len(expected) > 20
        assert_same(of_stream(replayed, stream), expected)
        assert_same(of_stream(offline, stream), expected)

    folder, assigned = bundle.folder, [p for each in SETTINGS for p in ("--set", each)]
    assert hrpro("replay", file, "--bundle", folder, "--compare", *assigned).stdout == ""
    other = [*assigned, "--set", "lookahead_s=20"]
    differs = hrpro("replay", file, "--bundle", folder, "--compare", *other, status=1).stdout
    assert {line[:2] for line in differs.splitlines()} == {"- ", "+ "}
    one = hrpro("replay", file, "--bundle", folder, "--stream", "right", *assigned).stdout
    assert [json.loads(line)["sequence"] for line in one.splitlines()] == [
        each.sequence for each in of_stream(live, "right")
    ]


def check_recorded(file: Path, live: list[Publication]) -> None:
    """The snippets that were fed, bit by bit, the gaps and the ends, and all publications."""
    with opened(file) as recording:
        takes = {take.hello.stream: take for take in recording.takes.values()}
        assert [takes[name].hello.first_index for name in ("left", "right")] == [0, 1000]
        assert {take.welcome.bundle_id for take in takes.values()} == {
            each.bundle_id for each in live if not isinstance(each, StreamNotice)
        }
        for name, seed in (("left", 1), ("right", 2)):
            fed = list(recording.fed(name))
            assert fed[0].first_index == takes[name].hello.first_index
            assert [one.next_index for one in fed[:-1]] == [each.first_index for each in fed[1:]]
            came = np.concatenate([each.features for each in fed if each.features is not None])
            assert came.tobytes() == tiny_recording(LENGTH, seed=seed).tobytes()
            gaps = [(each.first_index, each.next_index) for each in fed if each.kind == "gap"]
            assert gaps == ([(50, 53), (103, 603)] if name == "left" else [])
            assert fed[-1].kind == "end"
        sizes = [len(each.features) for each in recording.fed("right") if each.features is not None]
        assert sizes[:7] == [1, 2, 3, 4, 5, 6, 7]
        assert next(recording.fed()).at_s > 0
        for name in takes:
            assert recording.published(name) == of_stream(live, name)
        assert recording.ended_streams() == {"left", "right"}


def test_a_killed_recorder_leaves_what_it_had(bundle: Bundle, tmp_path: Path) -> None:
    file, features = tmp_path / "session.hrpro", tiny_recording(60, seed=3)

    def is_written() -> bool:
        with opened(file) as recording:
            return [each.next_index for each in recording.fed()][-1:] == [60] and bool(
                recording.published()
            )

    with (
        serving(Pipeline(deployed(bundle))) as server,  # type: ignore[arg-type]
        recorder(file, server, kill=True) as address,
        FeatureFeeder(address, "cam", features.shape[1]) as feeder,
    ):
        feeder.send(features)
        feeder.flush()
        wait_for(is_written)
    came = np.concatenate([each.features for each in fed_in(file) if each.features is not None])
    assert came.tobytes() == features.tobytes()
    assert [each.name for each in tmp_path.iterdir()] == [file.name]  # reading has tidied up
    with opened(file) as recording:
        assert recording.ended_streams() == set()
        offline = list(run_recording(recording, deployed(bundle)))
        recorded = recording.published()
    assert recorded
    assert differences(recorded, offline, ()) == []
    assert len(differences(recorded, offline, {"cam"})) == len(offline) - len(recorded)


def write_recording(file: Path, ends: bool = True) -> None:
    """Of the stream cam: 16 snippets in chunks of 2, one each second."""
    writer = RecordingWriter(file)
    take = writer.begin_take(0.0, hello(), welcome())
    for at in range(0, 16, 2):
        writer.add_snippets(at / 2, take, at, rows(at, at + 2))
    if ends:
        writer.add_end(8.0, take, 16)
    writer.close()


def test_a_stream_that_is_open_already_is_told(tmp_path: Path) -> None:
    file, pipeline = tmp_path / "session.hrpro", TinyPipeline()
    write_recording(file)
    replay = ("replay", file, "--speed", "max", "--to")
    with serving(pipeline) as server:
        with FeatureFeeder(server.feed_address, "cam", DIM) as feeder:
            feeder.send(-rows(0, 5))
            feeder.flush()
        said = hrpro(*replay, server.feed_address).stderr
        assert said == (
            "hrpro: stream 'cam': the engine has 5 snippets of it already; continuing behind them\n"
        )
        firsts = [first for _, first in pipeline.received["cam"]]
        assert firsts == [*range(-1, -6, -1), *range(6, 17)]
        assert hrpro(*replay, server.feed_address).stderr == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_replay_that_is_left_ends_its_streams(tmp_path: Path, number: signal.Signals) -> None:
    file, pipeline = tmp_path / "session.hrpro", TinyPipeline()
    write_recording(file)
    with (
        serving(pipeline) as server,
        EventSubscriber(server.events_address) as subscriber,
        running("replay", file, "--to", server.feed_address) as process,
    ):
        subscriber.wait_connected()
        wait_for(lambda: isinstance(subscriber.receive(0.1), FinalProposal))
        process.send_signal(number)
        assert process.wait(PATIENCE_S) != 0
        ended = until_ended(subscriber, 1)[-1]
    assert isinstance(ended, StreamNotice)
    assert 0 < ended.next_index < 16


def test_a_stream_whose_end_was_not_recorded_stays_open(tmp_path: Path) -> None:
    file, pipeline = tmp_path / "session.hrpro", TinyPipeline()
    write_recording(file, ends=False)
    with serving(pipeline) as server:
        hrpro("replay", file, "--speed", "max", "--to", server.feed_address)
        (cam,) = request_status(server.control_address)["streams"]
    assert (cam["stream"], cam["next_index"]) == ("cam", 16)


def test_who_stops_reading_a_replay_hears_no_more(bundle: Bundle, tmp_path: Path) -> None:
    file, features = tmp_path / "session.hrpro", tiny_recording(LENGTH, seed=1)
    writer = RecordingWriter(file)
    shape = bundle.manifest.clock
    opened = replace(
        hello(dim=features.shape[1]),
        frames_per_s=shape.frames_per_s,
        snippet_frames=shape.snippet_frames,
    )
    take = writer.begin_take(0.0, opened, welcome())
    for at in range(0, LENGTH, 2):
        writer.add_snippets(0.0, take, at, features[at : at + 2])
    writer.close()
    with running("replay", file, "--bundle", bundle.folder) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert said == ""


def test_a_recorder_that_cannot_start_leaves_no_file(tmp_path: Path) -> None:
    file = tmp_path / "session.hrpro"
    with serving() as server:
        sides = ("--from", server.feed_address, "--events", server.events_address)
        said = refusal("record", file, *sides, "--feed", "tcp://0.0.0.0:0")
        assert "expected an address that only this machine reaches" in said
        said = refusal("record", file, *sides, "--feed", server.control_address)
        assert "Address already in use" in said
        assert list(tmp_path.iterdir()) == []
        with recorder(file, server):
            pass
    assert fed_in(file) == []


# ---- the relay -----------------------------------------------------------------------------------


def talk(address: str) -> list[Message]:
    """What two feeders hear, one by one, of all kinds of answers."""
    with RawPeer(address, b"one") as one, RawPeer(address) as other:
        heard = [one.ask(chunk(0, 2)), one.ask(hello(dim=DIM + 1)), one.ask([b"no header"])]
        heard += [one.ask(hello()), one.ask(Gap("cam", 5, 6)), one.ask(chunk(40, 42))]
        heard += [other.ask(hello()), one.ask(chunk(0, 2)), one.ask([b"", b""])]
        other.say(chunk(0, 4), Gap("cam", 4, 6))
        heard.append(hear_until_accepted(other, 6))
        return [*heard, hear_the_end(other, End("cam", 6))]


def hear_until_accepted(peer: RawPeer, until: int) -> Message:
    """The Ack of so much, behind others of which there may be any number."""
    heard = peer.hear()
    while not (isinstance(heard, Ack) and heard.next_index == until):
        heard = peer.hear()
    return heard


def hear_the_end(peer: RawPeer, end: End) -> Message:
    """Ended, behind Acks of which there may be any number."""
    peer.say(end)
    heard = peer.hear()
    while isinstance(heard, Ack):
        heard = peer.hear()
    return heard


def test_feeders_hear_what_the_engine_says(tmp_path: Path) -> None:
    file = tmp_path / "session.hrpro"
    with serving() as server:
        direct = talk(server.feed_address)
    with serving() as server, recorder(file, server) as address:
        relayed = talk(address)
    accepted = -2  # an Ack, whose credit depends on what was processed by then
    codes = [each.code for each in direct if isinstance(each, Error)]
    assert codes == [
        "unknown_stream",
        "wrong_dimension",
        "bad_message",
        "out_of_order",
        "no_credit",
        "not_owner",
        "bad_message",
    ]
    assert isinstance(direct[-1], Ended)
    del direct[accepted], relayed[accepted]
    assert relayed == direct
    fed = fed_in(file)
    assert outline(fed) == [("snippets", 0, 4), ("gap", 4, 6), ("end", 6, 6)]
    assert fed[0].features is not None
    np.testing.assert_array_equal(fed[0].features, rows(0, 4))


def test_a_feeder_that_reconnects(tmp_path: Path) -> None:
    file = tmp_path / "session.hrpro"
    with serving() as server, recorder(file, server) as address, Link(address) as road:
        with FeatureFeeder(road.address, "cam", DIM, retry_s=0.2) as feeder:
            for at in range(0, 40, 4):
                if at in (12, 28):
                    road.cut()
                feeder.send(rows(at, at + 4))
            feeder.end()
        assert road.accepted >= 3
    fed = fed_in(file)
    assert {each.kind for each in fed[:-1]} == {"snippets"} and fed[-1].kind == "end"
    came = np.concatenate([each.features for each in fed if each.features is not None])
    np.testing.assert_array_equal(came, rows(0, 40))
    with opened(file) as recording:
        assert len(recording.takes) == 1


def test_a_feeder_keeps_its_name_behind_a_relay(tmp_path: Path) -> None:
    """It still owns its stream when another relay takes the place of the first."""
    writer = RecordingWriter(tmp_path / "session.hrpro")

    def answer(relay: FeedRelay, peer: RawPeer, said: Message) -> Message:
        peer.say(said)
        wait_for(lambda: relay.turn(20) is None and peer.socket.poll(0) > 0)
        return peer.hear()

    with serving() as server:
        first = FeedRelay(ANY_PORT, server.feed_address, AcceptanceLog(writer))
        with RawPeer(first.address, b"one") as peer:
            heard = [answer(first, peer, hello())]
            first.close()
            second = FeedRelay(first.address, server.feed_address, AcceptanceLog(writer))
            heard.append(answer(second, peer, chunk(0, 2)))
        second.close()
    writer.close()
    assert [type(each) for each in heard] == [Welcome, Ack]


def test_only_this_machine_feeds_a_relay(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path / "session.hrpro")
    with pytest.raises(HrproError, match="only this machine"):
        FeedRelay("tcp://0.0.0.0:0", "tcp://127.0.0.1:1", AcceptanceLog(writer))
    writer.close()


# ---- what is accepted ----------------------------------------------------------------------------

ONE, TWO = b"one", b"two"


def welcome(next_index: int = 0, send_until: int = 16) -> Welcome:
    return Welcome(
        "cam", next_index, send_until, 8, DIM, 25.0, 16, ("jump",), 8, 1, 0, 0, 0.0, "tiny"
    )


@pytest.mark.parametrize(
    ("talk", "expected"),
    [
        pytest.param(  # not acknowledged
            [(ONE, hello()), (ONE, welcome()), (ONE, chunk(0, 4))], [], id="unacknowledged"
        ),
        pytest.param(  # an Ack of a part, and again what is known
            [
                (ONE, hello()),
                (ONE, welcome()),
                (ONE, chunk(0, 4)),
                (ONE, Ack("cam", 2, 16)),
                (ONE, chunk(0, 4)),
                (ONE, Ack("cam", 4, 16)),
            ],
            [("snippets", 0, 2), ("snippets", 2, 4)],
            id="twice",
        ),
        pytest.param(  # in another order, and one that never came
            [
                (ONE, hello()),
                (ONE, welcome()),
                (ONE, chunk(3, 5)),
                (ONE, chunk(0, 2)),
                (ONE, Ack("cam", 5, 16)),
            ],
            [("snippets", 0, 2), ("gap", 2, 3), ("snippets", 3, 5)],
            id="order",
        ),
        pytest.param(  # refused: of the owner before, sent earlier and later
            [
                (ONE, hello()),
                (ONE, welcome()),
                (ONE, chunk(0, 2)),
                (ONE, chunk(2, 4)),
                (TWO, hello()),
                (TWO, welcome(2)),
                (ONE, chunk(4, 6)),
                (TWO, chunk(6, 8)),
                (TWO, Ack("cam", 8, 16)),
            ],
            [("snippets", 0, 2), ("gap", 2, 6), ("snippets", 6, 8)],
            id="owners",
        ),
        pytest.param(  # the Ended of a session that another feeder has followed
            [
                (ONE, hello()),
                (ONE, welcome()),
                (ONE, chunk(0, 2)),
                (TWO, hello()),
                (TWO, welcome(2)),
                (ONE, Ended("cam", 2, 0, 0)),
                (TWO, chunk(2, 4)),
                (TWO, Ended("cam", 4, 0, 0)),
            ],
            [("snippets", 0, 2), ("snippets", 2, 4), ("end", 4, 4)],
            id="late",
        ),
        pytest.param(  # far beyond the credit; of another dimension
            [
                (ONE, hello()),
                (ONE, welcome()),
                (ONE, chunk(100, 102)),
                (ONE, Chunk("cam", 0, rows(0, 2, DIM + 1))),
                (ONE, Ack("cam", 110, 126)),
            ],
            [("gap", 0, 110)],
            id="beyond",
        ),
        pytest.param(  # a stream that begins late, and once more
            [
                (ONE, hello()),
                (ONE, welcome(7)),
                (ONE, Ended("cam", 7, 0, 0)),
                (ONE, Ended("cam", 7, 0, 0)),
                (ONE, hello()),
                (ONE, welcome()),
                (ONE, chunk(0, 1)),
                (ONE, Ack("cam", 1, 16)),
            ],
            [("end", 7, 7), ("snippets", 0, 1)],
            id="again",
        ),
    ],
)
def test_what_is_accepted_is_written(
    tmp_path: Path, talk: list[tuple[bytes, Message]], expected: list[tuple[str, int, int]]
) -> None:
    writer = RecordingWriter(tmp_path / "session.hrpro")
    log = AcceptanceLog(writer)
    for feeder, message in talk:
        if isinstance(message, (Hello, Chunk, Gap, End)):
            log.on_message(feeder, message)
        else:
            assert isinstance(message, (Welcome, Ack, Ended, Error))
            log.on_reply(feeder, message)
    writer.close()
    fed = fed_in(writer.file)
    assert outline(fed) == expected
    for each in fed:
        if each.features is not None:
            np.testing.assert_array_equal(each.features, rows(each.first_index, each.next_index))


# ---- files and differences -----------------------------------------------------------------------


def test_files_that_are_no_recording(tmp_path: Path) -> None:
    missing, text = tmp_path / "missing", tmp_path / "text"
    database, cut = tmp_path / "other.db", tmp_path / "cut"
    text.write_text("no recording, but longer than the header of a database" * 4)
    with contextlib.closing(sqlite3.connect(database)) as other:
        other.execute("CREATE TABLE takes (number)")
    writer = RecordingWriter(cut)
    take = writer.begin_take(0.0, hello(), welcome())
    for at in range(0, 4000, 8):
        writer.add_snippets(0.0, take, at, rows(at, at + 8))
    writer.close()
    cut.write_bytes(cut.read_bytes()[:-5000])
    for file in (missing, text, database, cut):
        with pytest.raises(RecordingError, match=f"{file.name}: expected a"):
            fed_in(file)
    assert not missing.exists()
    assert str(text) in refusal("replay", text, "--to", "tcp://127.0.0.1:1")
    with pytest.raises(RecordingError, match="not there yet"):
        RecordingWriter(text)


def test_differences_are_told(tmp_path: Path) -> None:
    def notice(sequence: int, session: int = 1, proposals: int = 0) -> StreamNotice:
        return StreamNotice("cam", session, sequence, "gap", 0, 9, proposals, 0)

    recorded = [replace(notice(n, session=7), number=n + 5, previous=n) for n in range(3)]
    assert differences(recorded, [notice(n) for n in range(3)], {"cam"}) == []
    missing = differences(recorded, [notice(0), notice(1)], {"cam"})
    assert [line[0] for line in missing] == ["-"]
    changed = differences(recorded, [notice(0), notice(1, proposals=1), notice(2)], {"cam"})
    assert [line[0] for line in changed] == ["-", "+"]
    longer = [notice(n) for n in range(4)]
    assert [line[0] for line in differences(recorded, longer, {"cam"})] == ["+"]
    assert differences(recorded, longer, ()) == []
