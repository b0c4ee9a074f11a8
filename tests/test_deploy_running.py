"""A running engine goes on with another bundle: by command, from a folder, and under load."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import (
    ANYWHERE,
    PATIENCE_S,
    Engine,
    hrpro,
    hrpro_json,
    refusal,
    running,
    wait_for,
)
from driving import finals, of_stream
from other_bundles import changed_bundle, renamed_bundle, reweighted_bundle
from serving import RawPeer
from tiny_model import DIM, tiny_recording

from hrpro.clients import EventSubscriber, FeatureFeeder, StreamError, StreamNotice, request_status
from hrpro.clients.control import request_deploy, request_roll_back
from hrpro.engine import protocol
from hrpro.engine.messages import (
    ActionEvent,
    DeployReply,
    DeployRequest,
    DrainReply,
    DrainRequest,
    Ended,
    Error,
    Publication,
)
from hrpro.engine.serve import Addresses
from hrpro.engine.wire import ProtocolError
from hrpro.export.bundle import GOLDEN, Bundle, read_bundle, sha256, write_manifest

# The tiny model looks 3 snippets ahead.
TINY = ("--set", "lookahead_s=5.12")


@dataclass(frozen=True)
class Deploying(Engine):
    """An engine, and what it has said when it is gone."""

    said: list[str] = field(default_factory=list)

    @property
    def control(self) -> str:
        return self.addresses.control

    def status(self) -> dict[str, Any]:
        return request_status(self.control, PATIENCE_S)

    def counted(self, name: str) -> int:
        return self.status()["counters"][name]

    def deploy(self, folder: Path, *canary_streams: str) -> DeployReply:
        return request_deploy(self.control, folder, canary_streams, PATIENCE_S)

    def refuses(self, folder: Path) -> str:
        """The message; all else stays as it was."""
        before = self.status()
        with pytest.raises(StreamError) as refused:
            self.deploy(folder)
        assert refused.value.code == "deploy_refused"
        before["counters"]["deploys_refused"] += 1
        assert self.status() == before
        return str(refused.value)


@contextlib.contextmanager
def deploying(bundle: Path, *options: object) -> Iterator[Deploying]:
    """An engine as a process; leaves in peace, but what it says may be anything."""
    sides = [part for side, at in vars(ANYWHERE).items() for part in (f"--{side}", at)]
    sides += ["--state", "none"]
    arguments = (bundle, "--json", *sides, "--set", "threads=1", *TINY, *options)
    with running("serve", *arguments) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        ready = json.loads(line)
        served = Deploying(process, Addresses(*(ready[side] for side in vars(ANYWHERE))))
        yield served
        process.terminate()
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
        served.said.extend(line.removeprefix("hrpro: ") for line in stderr.splitlines())
        assert stdout == ""
        assert process.returncode == 0, stderr
        assert "Traceback" not in stderr


@dataclass(frozen=True)
class Shelf:
    """Bundles in folders, and their ids."""

    folders: Mapping[str, Path]

    def id(self, name: str) -> str:
        return read_bundle(self.folders[name]).manifest.bundle_id

    def __getitem__(self, name: str) -> Path:
        return self.folders[name]


@pytest.fixture(scope="module")
def shelf(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder, source = tmp_path_factory.mktemp("shelf"), bundle.folder
    made = [
        renamed_bundle(source, folder / "renamed"),
        reweighted_bundle(source, folder / "reweighted", seed=1),
        changed_bundle(source, folder / "set", "localization.score_floor=0.05"),
        changed_bundle(source, folder / "hop", "window.hop_snippets=2"),
    ]
    return Shelf({"first": source} | {each.folder.name: each.folder for each in made})


@pytest.fixture(scope="module")
def served(shelf: Shelf) -> Iterator[Deploying]:
    """One engine for all tests that leave it as it was."""
    with deploying(shelf["first"]) as engine:
        yield engine


# ---- commands ----------------------------------------------------------------------------------


def test_deploy_canary_and_rollback_by_command(shelf: Shelf) -> None:
    first, second, third = map(shelf.id, ("first", "renamed", "reweighted"))
    with (
        deploying(shelf["first"], "--log-level", "info") as engine,
        FeatureFeeder(engine.feed, "cam1", DIM) as one,
        FeatureFeeder(engine.feed, "cam2", DIM) as two,
    ):
        to = ("--to", engine.control)
        said = hrpro("deploy", shelf["renamed"], *to, "--canary", "cam2", "--canary", "cam3").stdout
        assert said == f"bundle    {first}\ncanary    {second}\nchanged   1 open streams\n"
        streams = {each["stream"]: each["bundle_id"] for each in engine.status()["streams"]}
        assert streams == {"cam1": first, "cam2": second}
        assert hrpro_json("deploy", "--rollback", *to) == {
            "bundle_id": first, "previous_bundle_id": None,
            "canary_bundle_id": None, "changed_streams": 1,
        }  # fmt: skip
        said = hrpro("deploy", shelf["reweighted"], *to).stdout
        assert said == (
            f"bundle    {third}\nprevious  {first}, for --rollback\nchanged   2 open streams\n"
        )
        status = engine.status()
        assert (status["bundle_id"], status["previous_bundle_id"]) == (third, first)
        assert hrpro_json("deploy", "--rollback", *to) == {
            "bundle_id": first, "previous_bundle_id": third,
            "canary_bundle_id": None, "changed_streams": 2,
        }  # fmt: skip
        assert engine.counted("deploys") == 4
        for feeder in (one, two):
            assert feeder.welcome is not None and feeder.welcome.bundle_id == first
            feeder.send(tiny_recording(30))
            assert feeder.end().next_index == 30
    deployed = "deployed: bundle {}, previous {}, canary {}, changed {} open streams"
    assert [line for line in engine.said if "deployed" in line] == [
        deployed.format(first, None, second, 1),
        deployed.format(first, None, None, 1),
        deployed.format(third, first, None, 2),
        deployed.format(first, third, None, 2),
    ]


def test_a_relative_folder_is_that_of_the_command(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    with deploying(shelf["first"]) as engine:
        monkeypatch.chdir(shelf["renamed"])
        said = hrpro_json("deploy", "../renamed", "--to", engine.control)
        assert said["bundle_id"] == shelf.id("renamed")


@pytest.mark.parametrize(
    "arguments", [(), ("BUNDLE", "--rollback"), ("--rollback", "--canary", "cam")]
)
def test_a_command_that_says_too_little_or_too_much(
    served: Deploying, arguments: tuple[str, ...]
) -> None:
    said = refusal("deploy", *arguments, "--to", served.control)
    assert said == "deploy: expected a bundle, with or without --canary, or --rollback alone"


def test_a_command_that_reaches_no_engine() -> None:
    said = refusal("deploy", "--rollback", "--to", "tcp://127.0.0.1:9", "--timeout", "0.2")
    assert said == (
        "engine at tcp://127.0.0.1:9: expected an answer to roll_back within 0.2 s, none came"
    )


# ---- refusals ----------------------------------------------------------------------------------


def corrupt(folder: Path) -> str:
    graph = folder / "snippet.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    expected = read_bundle(folder).manifest.files["snippet.onnx"]
    graph.write_bytes(content)
    return f"{graph}: expected SHA-256 {expected}, got {sha256(graph)}"


def computed_otherwise(folder: Path) -> str:
    with np.load(folder / GOLDEN) as golden:
        arrays = dict(golden)
    arrays["scores"][1, 5, 2] += 0.01
    np.savez(folder / GOLDEN, **arrays)
    write_manifest(folder, json.loads((folder / "bundle.json").read_text()))
    return (
        f"{folder}: golden windows: scores differ by 0.01 from those of the export, expected at "
        "most 0.0001: this machine computes otherwise"
    )


def missing(folder: Path) -> str:
    shutil.rmtree(folder)
    return f"{folder}/bundle.json: file is missing; expected a bundle made by hrpro export"


def without_golden_windows(folder: Path) -> str:
    (folder / GOLDEN).unlink()
    return f"{folder / GOLDEN}: cannot be read: [Errno 2] No such file or directory: "


SPOILT: dict[str, Callable[[Path], str]] = {
    "missing": missing,
    "corrupt": corrupt,
    "computed otherwise": computed_otherwise,
    "without golden windows": without_golden_windows,
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_bundle_that_cannot_work_is_refused(
    served: Deploying, shelf: Shelf, tmp_path: Path, case: str
) -> None:
    folder = Path(shutil.copytree(shelf["renamed"], tmp_path / "spoilt"))
    expected = SPOILT[case](folder)
    assert served.refuses(folder).startswith(expected)


def test_a_bundle_with_another_hop_is_refused(served: Deploying, shelf: Shelf) -> None:
    expected = (
        f"bundle {shelf.id('hop')} cannot take over the streams of this engine: "
        "window: expected 17, got 18; hop: expected 1, got 2; an engine of its own can serve it"
    )
    assert served.refuses(shelf["hop"]) == expected
    assert refusal("deploy", shelf["hop"], "--to", served.control) == expected


def test_a_refusal_disturbs_no_stream(served: Deploying, shelf: Shelf) -> None:
    with EventSubscriber(served.events, stream="cam") as subscriber:
        subscriber.wait_connected(PATIENCE_S)
        with FeatureFeeder(served.feed, "cam", DIM) as feeder:
            for part in np.split(tiny_recording(40), 4):
                feeder.send(part)
                with pytest.raises(StreamError):
                    served.deploy(shelf["hop"])
            ended = feeder.end()
        heard = hear_until_ended(subscriber, "cam")
    assert ended.next_index == 40
    assert numbered(heard, "cam", ended)
    assert bundle_ids(heard) == {shelf.id("first")}


def test_without_a_bundle_before_there_is_no_way_back(served: Deploying, shelf: Shelf) -> None:
    said = refusal("deploy", "--rollback", "--to", served.control)
    assert said == f"roll back: expected a bundle before {shelf.id('first')}, there was none"


def test_more_canaries_than_fit_a_request_are_refused(served: Deploying, shelf: Shelf) -> None:
    before = served.status()
    many = [f"camera-{number:05}" for number in range(2000)]
    with pytest.raises(ProtocolError, match=r"^deploy: expected at most \d+ bytes, got \d+; fewer"):
        served.deploy(shelf["renamed"], *many)
    assert served.status() == before


def test_a_trusted_key_is_asked_of_every_bundle(shelf: Shelf, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    from hrpro.export.signing import sign_bundle

    key, private, public = Ed25519PrivateKey.generate(), tmp_path / "private", tmp_path / "public"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    for name in ("first", "renamed"):
        shutil.copytree(shelf[name], tmp_path / name)
    sign_bundle(tmp_path / "first", private)
    with deploying(tmp_path / "first", "--trusted-key", public) as engine:
        assert engine.refuses(tmp_path / "renamed") == (
            f"{tmp_path}/renamed/bundle.sig: No such file or directory; "
            f"expected a bundle signed by {public}"
        )
        sign_bundle(tmp_path / "renamed", private)
        assert engine.deploy(tmp_path / "renamed").bundle_id == shelf.id("renamed")


# ---- orders that wait --------------------------------------------------------------------------


@contextlib.contextmanager
def stuck(folder: Path) -> Iterator[Path]:
    """A bundle whose loading does not go on before the block is left."""
    folder.mkdir()
    os.mkfifo(folder / "bundle.json")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # nobody reads any more
            os.close(os.open(folder / "bundle.json", os.O_WRONLY | os.O_NONBLOCK))


def hear(peer: RawPeer) -> object:
    return protocol.decode_control_reply(peer.hear_frames())


def test_while_one_bundle_loads_others_wait_in_order(shelf: Shelf, tmp_path: Path) -> None:
    with deploying(shelf["first"]) as engine, RawPeer(engine.control) as peer:
        with stuck(tmp_path / "stuck") as folder:
            peer.say(DeployRequest(str(folder), ()))
            # The engine goes on meanwhile: it answers, and streams flow.
            with FeatureFeeder(engine.feed, "cam", DIM) as feeder:
                feeder.send(tiny_recording(30))
                assert feeder.end().proposals > 0
            names = ["renamed", "reweighted"] * 8
            peer.say(*(DeployRequest(str(shelf[name]), ()) for name in names))
            peer.say(DeployRequest(str(shelf["set"]), ()))
            assert hear(peer) == Error(
                None, "deploy_refused",
                "expected at most 16 bundles to wait to be loaded, they do already", None,
            )  # fmt: skip
            assert engine.counted("deploys") == 0
        failed = hear(peer)
        assert isinstance(failed, Error)
        assert failed.message.startswith(f"{tmp_path}/stuck/bundle.json: expected JSON: ")
        ids = [shelf.id("first"), *map(shelf.id, names)]
        for before, after in itertools.pairwise(ids):
            assert hear(peer) == DeployReply(after, before, None, 0)
        assert engine.counted("deploys") == 16


def test_orders_that_wait_at_the_end_are_answered(shelf: Shelf, tmp_path: Path) -> None:
    with deploying(shelf["first"]) as engine, RawPeer(engine.control) as peer:
        with stuck(tmp_path / "stuck") as folder:
            peer.say(DeployRequest(str(folder), ()), DeployRequest(str(shelf["renamed"]), ()))
            peer.say(protocol.StatusRequest())
            assert isinstance(hear(peer), protocol.StatusReply)  # so the orders have come
            engine.process.send_signal(signal.SIGTERM)
            draining = Error(None, "deploy_refused", "the engine is draining", None)
            assert [hear(peer), hear(peer)] == [draining, draining]
        assert engine.process.wait(PATIENCE_S) == 0
    assert engine.said == ["not deployed: the engine is draining"] * 2


def test_a_draining_engine_takes_no_bundle(shelf: Shelf) -> None:
    with deploying(shelf["first"]) as engine, RawPeer(engine.control) as peer:
        peer.say(DrainRequest(), DeployRequest(str(shelf["renamed"]), ()))
        answers = [hear(peer), hear(peer)]
        assert DrainReply() in answers
        assert Error(None, "deploy_refused", "the engine is draining", None) in answers
        assert engine.process.wait(PATIENCE_S) == 0


def test_a_client_that_goes_away_changes_nothing(shelf: Shelf, tmp_path: Path) -> None:
    with deploying(shelf["first"]) as engine:
        with stuck(tmp_path / "stuck") as folder, RawPeer(engine.control) as peer:
            peer.say(DeployRequest(str(folder), ()), DeployRequest(str(shelf["renamed"]), ()))
            peer.say(protocol.StatusRequest())
            assert isinstance(hear(peer), protocol.StatusReply)  # so the orders have come
            # The engine has opened the file: whoever opens it later waits for ever.
            os.close(os.open(folder / "bundle.json", os.O_WRONLY))
        wait_for(lambda: engine.counted("deploys") == 1)
        status = engine.status()
        assert status["bundle_id"] == shelf.id("renamed")
        assert status["counters"]["deploys_refused"] == 1


def test_a_command_that_is_killed_changes_nothing(shelf: Shelf, tmp_path: Path) -> None:
    with deploying(shelf["first"]) as engine, stuck(tmp_path / "stuck") as folder:
        with running("deploy", folder, "--to", engine.control) as command:
            # The engine has opened the file: the request has come.
            os.close(os.open(folder / "bundle.json", os.O_WRONLY))
            command.kill()
            command.wait(PATIENCE_S)
        wait_for(lambda: engine.counted("deploys_refused") == 1)
        assert engine.deploy(shelf["renamed"]).bundle_id == shelf.id("renamed")


def test_a_bundle_works_on_when_its_folder_is_gone(shelf: Shelf, tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(shelf[n], tmp_path / n)) for n in ("first", "reweighted")]
    with deploying(copies[0]) as engine, FeatureFeeder(engine.feed, "cam", DIM) as feeder:
        assert engine.deploy(copies[1]).changed_streams == 1
        for copy in copies:
            shutil.rmtree(copy)
        feeder.send(tiny_recording(20))
        reply = request_roll_back(engine.control)
        assert (reply.bundle_id, reply.previous_bundle_id) == (
            shelf.id("first"), shelf.id("reweighted"),
        )  # fmt: skip
        feeder.send(tiny_recording(20))
        assert feeder.end().next_index == 40


# ---- a folder that is followed -----------------------------------------------------------------


def test_bundles_that_appear_in_a_folder_are_deployed(shelf: Shelf, tmp_path: Path) -> None:
    followed = tmp_path / "followed"
    shutil.copytree(shelf["first"], followed / "first")
    with (
        deploying(followed / "first", "--follow", followed) as engine,
        FeatureFeeder(engine.feed, "cam", DIM) as feeder,
    ):
        feeder.send(tiny_recording(20))

        def at_work(name: str) -> None:
            wait_for(lambda: engine.status()["bundle_id"] == shelf.id(name))

        # File by file, the manifest first: it is not complete before the last one.
        (followed / "copied").mkdir()
        for file in sorted(shelf["renamed"].iterdir()):
            shutil.copy(file, followed / "copied" / file.name)
        at_work("renamed")
        # In the place of another one.
        shutil.copytree(shelf["reweighted"], followed / ".part")
        shutil.rmtree(followed / "copied")
        (followed / ".part").rename(followed / "copied")
        at_work("reweighted")
        shutil.copytree(shelf["hop"], followed / "hop")
        wait_for(lambda: engine.counted("deploys_refused") > 0)
        # By then the folder has been looked at again, and again.
        shutil.copytree(shelf["set"], followed / "set")
        at_work("set")
        assert engine.counted("deploys") == 3
        feeder.send(tiny_recording(20))
        assert feeder.end().next_index == 40
    refused = [line for line in engine.said if line.startswith("not deployed: ")]
    hop = f"not deployed: bundle {shelf.id('hop')} cannot take over the streams of this "
    assert len(refused) == 1 and refused[0].startswith(hop)
    assert "hop: expected 1, got 2" in refused[0]


def test_a_folder_to_follow_must_be_there(shelf: Shelf, tmp_path: Path) -> None:
    sides = [part for side, at in vars(ANYWHERE).items() for part in (f"--{side}", at)]
    sides += ["--state", "none"]
    said = refusal("serve", shelf["first"], *sides, *TINY, "--follow", tmp_path / "absent")
    assert said == f"{tmp_path}/absent: expected a folder to follow"


# ---- a hundred swaps under load ----------------------------------------------------------------

SWAPS = 100
STREAMS = ("cam1", "cam2", "cam3", "cam4")
# Fifty swaps leave less than 1 MB more; bundles that all stayed took 108 MB.
MEMORY_BOUND_BYTES = 6 * 2**20


def hear_until_ended(subscriber: EventSubscriber, *streams: str) -> list[Publication]:
    heard: list[Publication] = []
    left = set(streams)
    while left:
        publication = subscriber.receive(PATIENCE_S)
        assert publication is not None, f"{left} did not end"
        heard.append(publication)
        if isinstance(publication, StreamNotice) and publication.kind == "ended":
            left.remove(publication.stream)
    assert (subscriber.gaps, subscriber.repeats) == (0, 0)
    return heard


def bundle_ids(heard: list[Publication]) -> set[str]:
    return {each.bundle_id for each in heard if not isinstance(each, StreamNotice)}


def numbered(heard: list[Publication], stream: str, ended: Ended) -> bool:
    """One session; sequence, proposals and actions count from 0 without a gap."""
    told = of_stream(heard, stream)
    assert {each.session for each in told} == {1}
    assert [each.sequence for each in told] == list(range(len(told)))
    assert [each.id for each in finals(told)] == list(range(ended.proposals))
    events = [each for each in told if isinstance(each, ActionEvent)]
    assert len(events) == ended.events
    started = [each.id for each in events if each.kind == "start"]
    assert started == list(range(len(started)))
    assert sorted(each.id for each in events if each.is_last) == started
    revisions: dict[int, list[int]] = {}
    for event in events:
        revisions.setdefault(event.id, []).append(event.revision)
    return all(each == list(range(len(each))) for each in revisions.values())


@dataclass(frozen=True)
class Footprint:
    """What a process has: resident bytes, open files, threads."""

    resident_bytes: int
    files: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        process = Path(f"/proc/{pid}")
        pages = int((process / "statm").read_text().split()[1])
        return cls(
            pages * os.sysconf("SC_PAGE_SIZE"),
            len(list((process / "fd").iterdir())),
            len(list((process / "task").iterdir())),
        )


def feed(engine: Deploying, stream: str, done: threading.Event) -> tuple[int, Ended]:
    """Four snippets a hundredth of a second, until it is done; returns how many there were."""
    rows = itertools.cycle(np.split(tiny_recording(400, len(stream)), 100))
    with FeatureFeeder(engine.feed, stream, DIM) as feeder:
        while not done.wait(0.01):
            feeder.send(next(rows))
        return feeder.next_index, feeder.end()


def swap(engine: Deploying, shelf: Shelf) -> tuple[list[str], list[Footprint]]:
    """The bundles that were at work, in order, and what the engine had after each change."""
    at_work, footprints = [shelf.id("first")], []
    to_deploy = itertools.cycle(["reweighted", "set", "first", "renamed"])
    for number in range(SWAPS):
        if number % 5 == 4:
            reply = request_roll_back(engine.control, PATIENCE_S)
            assert reply.bundle_id == at_work[-2]
        else:
            name = next(to_deploy)
            reply = engine.deploy(shelf[name])
            assert reply.bundle_id == shelf.id(name)
        assert (reply.previous_bundle_id, reply.changed_streams) == (at_work[-1], len(STREAMS))
        at_work.append(reply.bundle_id)
        footprints.append(Footprint.of(engine.process.pid))
    return at_work, footprints


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_hundred_swaps_under_load(shelf: Shelf) -> None:
    done = threading.Event()
    with (
        deploying(shelf["first"]) as engine,
        EventSubscriber(engine.events) as subscriber,
        ThreadPoolExecutor(len(STREAMS) + 1) as threads,
    ):
        subscriber.wait_connected(PATIENCE_S)
        listening = threads.submit(hear_until_ended, subscriber, *STREAMS)
        feeding = {name: threads.submit(feed, engine, name, done) for name in STREAMS}
        try:
            wait_for(lambda: len(engine.status()["streams"]) == len(STREAMS))
            at_work, footprints = swap(engine, shelf)
        finally:
            done.set()
        ended = {name: each.result(PATIENCE_S) for name, each in feeding.items()}
        heard = listening.result(PATIENCE_S)
        counters = engine.status()["counters"]

    total = sum(count for count, _ in ended.values())
    assert counters["snippets_in"] == counters["snippets_processed"] == total
    assert (counters["deploys"], counters["ended_streams"]) == (SWAPS, len(STREAMS))
    for name, (count, said) in ended.items():
        assert said.next_index == count > SWAPS
        assert numbered(heard, name, said)

    # Each bundle in its time, and nothing out of it.
    made_by = [each.bundle_id for each in heard if not isinstance(each, StreamNotice)]
    order = iter(at_work)
    changes = [name for name, _ in itertools.groupby(made_by)]
    assert all(name in order for name in changes)
    assert len(changes) > SWAPS / 2

    first, second = map(settled, (footprints[: SWAPS // 2], footprints[SWAPS // 2 :]))
    assert second.resident_bytes - first.resident_bytes < MEMORY_BOUND_BYTES
    assert (second.files, second.threads) == (first.files, first.threads)


def settled(footprints: list[Footprint]) -> Footprint:
    """What the last ten have in the middle: a connection may come or go at any moment."""
    columns = zip(*(astuple(each) for each in footprints[-10:]), strict=True)
    return Footprint(*(statistics.median_low(column) for column in columns))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_more_than_two_bundles_stay(shelf: Shelf) -> None:
    # Each session of inference has a thread of its own beside the one that calls it.
    with deploying(shelf["first"], "--set", "threads=2") as engine:
        threads = [Footprint.of(engine.process.pid).threads]
        for name in ("renamed", "reweighted", "set", "renamed"):
            engine.deploy(shelf[name])
            threads.append(Footprint.of(engine.process.pid).threads)
        # Two sessions in a bundle: those of the current one and of the previous one.
        assert threads == [threads[0]] + [threads[0] + 2] * 4
