"""Keys, who may do what with them, and how often: rules and files, without sockets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hrpro.engine.access import (
    MAX_SUBSCRIPTIONS,
    Access,
    Buckets,
    Misuse,
    Peer,
    Subscriptions,
    permitted_topics,
    user_id,
)
from hrpro.engine.client_key import KeyFileError, Role, read_client_key
from hrpro.engine.config import LimitsConfig
from hrpro.engine.keys import (
    CLIENT_SUFFIX,
    ENGINE_SECRET,
    LOOK_INTERVAL_S,
    ClientRecord,
    Keyring,
    new_client,
    read_clients,
    revoke,
)
from hrpro.engine.serve import Doors
from hrpro.engine.sockets import is_local

PUBLIC = "0" * 40


def record(*streams: str, role: Role = "subscriber") -> ClientRecord:
    return ClientRecord(name="a", role=role, streams=streams, public=PUBLIC)


# ---- topics ------------------------------------------------------------------------------------

ALL = record("*")
CAM1 = record("cam1")
CAMS = record("cam*", "door")


@pytest.mark.parametrize(
    ("key", "topic", "permitted"),
    [
        # Everything, narrowed to each kind and pattern.
        (CAM1, b"", [b"event/cam1/", b"final/cam1/", b"stream/cam1/", b"scores/cam1/", b"mark/"]),
        (CAMS, b"final/", [b"final/cam", b"final/door/"]),
        (CAMS, b"e", [b"event/cam", b"event/door/"]),
        # Prefixes of ids: never more than the id, and nothing of another one.
        (CAM1, b"event/cam", [b"event/cam1/"]),
        (CAM1, b"event/cam1", [b"event/cam1/"]),
        (CAM1, b"event/cam1/", [b"event/cam1/"]),
        (CAM1, b"event/cam1/Run/", [b"event/cam1/Run/"]),
        (CAM1, b"event/cam10", []),
        (CAM1, b"event/cam10/", []),
        (CAM1, b"event/cam2/", []),
        (CAM1, b"event//cam1/", []),
        (CAM1, b"event/../cam1/", []),
        (CAM1, b"event/*/", []),
        (CAMS, b"event/ca", [b"event/cam"]),
        (CAMS, b"event/cam7/", [b"event/cam7/"]),
        (CAMS, b"event/door2/", []),
        (record("cam*", "cam1"), b"event/cam1/", [b"event/cam1/", b"event/cam1/"]),
        # Topics that are one subscriber's own; a prefix of them would be others', too.
        (CAM1, b"welcome/abc/", [b"welcome/abc/"]),
        (CAM1, b"welcome/", []),
        (CAM1, b"welcome/abc", []),
        (CAM1, b"mark/", [b"mark/"]),
        (CAM1, b"mark/7/", [b"mark/7/"]),
        (CAM1, b"mar", [b"mark/"]),
        (CAM1, b"open/abc/cam1/", [b"open/abc/cam1/"]),
        (CAM1, b"open/abc/cam2/", []),
        (CAM1, b"open/abc/*/", [b"open/abc/*/"]),  # the answer is narrowed instead
        (CAM1, b"open/abc/cam", []),
        (CAM1, b"open/", []),
        (CAM1, b"replay/abc/17/cam1/", [b"replay/abc/17/cam1/"]),
        (CAM1, b"replay/abc/17/cam2/", []),
        (CAM1, b"replay/abc/17/*/", [b"replay/abc/17/*/"]),
        (CAM1, b"replay/abc/", []),
        (CAMS, b"replay/abc/17/cam9/", [b"replay/abc/17/cam9/"]),
        (ALL, b"", [b""]),
        (ALL, b"event/cam", [b"event/cam"]),
        (ALL, b"open/abc/*/", [b"open/abc/*/"]),
        (ALL, b"replay/abc/17/*/", [b"replay/abc/17/*/"]),
        (record("*", "cam1"), b"", [b""]),
        (record("*", role="operator"), b"event/", [b"event/"]),
        # A producer sees nothing, not even its own streams.
        (record("cam1", role="producer"), b"event/cam1/", []),
        (record("*", role="producer"), b"", []),
        (record("*", role="producer"), b"welcome/abc/", []),
    ],
)
def test_permitted_topics(key: ClientRecord, topic: bytes, permitted: list[bytes]) -> None:
    assert list(permitted_topics(key, topic)) == permitted


def test_what_two_subscriptions_share_stays_until_both_end() -> None:
    subscriptions = Subscriptions()
    assert subscriptions.add("1", b"", (b"event/a/", b"final/a/"))
    assert subscriptions.add("1", b"event/", (b"event/a/",))
    assert subscriptions.add("2", b"", (b"event/a/", b"final/a/"))
    assert subscriptions.remove("1", b"") == [b"final/a/"]
    assert subscriptions.remove("1", b"") == []
    assert subscriptions.remove("1", b"event/") == [b"event/a/"]
    assert subscriptions.remove("3", b"") == []
    assert subscriptions.remove("2", b"") == [b"event/a/", b"final/a/"]


def test_subscriptions_of_a_connection_and_of_all_are_bounded() -> None:
    subscriptions = Subscriptions()
    for number in range(MAX_SUBSCRIPTIONS):
        assert subscriptions.add("1", b"%d" % number, (b"%d" % number,))
    assert not subscriptions.add("1", b"more", (b"more",))
    assert subscriptions.add("1", b"7", (b"7",))  # again
    assert subscriptions.remove("1", b"7") == [b"7"]
    assert subscriptions.add("1", b"more", (b"more",))
    for connection in range(2, 30):
        for number in range(MAX_SUBSCRIPTIONS):
            subscriptions.add(str(connection), b"%d" % number, (b"%d" % number,))
    assert subscriptions.remove("1", b"8") == []  # forgotten, as the oldest one
    assert subscriptions.remove("29", b"8") == [b"8"]


# ---- rates -------------------------------------------------------------------------------------


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_bucket_fills_again_and_is_of_one_account() -> None:
    clock = Clock()
    buckets = Buckets(2.0, 3, clock)
    assert [buckets.take("a") for _ in range(5)] == [True] * 3 + [False] * 2
    assert buckets.take("b")
    clock.now_s += 0.4
    assert not buckets.take("a")
    clock.now_s += 0.2
    assert [buckets.take("a") for _ in range(2)] == [True, False]
    clock.now_s += 1000
    assert [buckets.take("a") for _ in range(4)] == [True] * 3 + [False]


def test_full_buckets_are_forgotten() -> None:
    clock = Clock()
    buckets = Buckets(1.0, 2, clock)
    for number in range(1024):
        buckets.take(str(number))
    clock.now_s += 10
    buckets.take("x")
    assert list(buckets._left) == ["x"]


# ---- files -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def make(folder: Path, name: str, role: Role, *streams: str) -> Path:
    out = folder.parent / f"{name}.key"
    new_client(folder, name, role, streams, out)
    return out


def test_files_and_their_permissions(folder: Path) -> None:
    before = os.umask(0)
    try:
        out = make(folder, "cams", "producer", "cam*")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir(), out)}
    expected = {"keys": 0o700, ENGINE_SECRET: 0o600, "cams.client": 0o644, "cams.key": 0o600}
    assert modes == expected
    key, ring = read_client_key(out), Keyring(folder)
    assert key.engine == ring.public
    assert ring.clients[key.public.decode()] == read_clients(folder)[0]
    # The secret is in the client's file alone.
    assert all(key.secret not in path.read_bytes() for path in folder.iterdir())
    assert key.secret.decode() not in repr(key)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_secret_that_others_can_read_is_refused(folder: Path, mode: int) -> None:
    out = make(folder, "cams", "producer", "cam*")
    for file in (out, folder / ENGINE_SECRET):
        file.chmod(mode)
    with pytest.raises(KeyFileError, match=rf"its owner alone can read, got mode {mode:04o}"):
        read_client_key(out)
    with pytest.raises(KeyFileError, match=r"engine\.secret: expected a secret"):
        Keyring(folder)


@pytest.mark.parametrize("name", ["", "cams.client"])
def test_a_folder_that_others_can_write_to_is_refused(folder: Path, name: str) -> None:
    make(folder, "cams", "producer", "cam*")
    (folder / name).chmod(0o777)
    with pytest.raises(KeyFileError, match=r"owner alone can write to it, got mode 0777"):
        Keyring(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_root_may_use_a_folder_of_another_user(folder: Path) -> None:
    make(folder, "cams", "producer", "cam*")
    os.chown(folder, 65534, 65534)
    assert len(Keyring(folder).clients) == 1


def test_no_folder_says_how_to_make_one(folder: Path) -> None:
    with pytest.raises(KeyFileError, match=rf"hrpro keys new NAME .* --keys {folder}$"):
        Keyring(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": "king"}, "role: "),
        ({"streams": ["a/b"]}, "streams.0: expected a stream id"),
        ({"streams": ["a*b"]}, "streams.0: expected a stream id"),
        ({"streams": []}, "streams: "),
        ({"public": "short"}, "public: expected the 40 characters"),
        ({"name": "other"}, "expected the key of 'cams', got that of 'other'"),
        ({"more": 1}, "more: "),
        ({"version": 2}, "version: "),
        ({"role": "operator"}, "expected none for an operator"),
    ],
)
def test_a_record_that_is_wrong_keeps_the_engine_from_starting(
    folder: Path, change: dict[str, object], message: str
) -> None:
    make(folder, "cams", "producer", "cam*")
    file = folder / "cams.client"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(KeyFileError) as caught:
        Keyring(folder)
    assert str(file) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1}', "[" * 100_000])
def test_a_client_key_that_is_none(tmp_path: Path, content: str) -> None:
    file = tmp_path / "a.key"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(KeyFileError, match=r"a\.key: expected "):
        read_client_key(file)


def test_nothing_is_overwritten(folder: Path) -> None:
    out = make(folder, "cams", "producer", "cam*")
    kept = out.read_bytes()
    with pytest.raises(KeyFileError, match="revoke that key first"):
        make(folder, "cams", "operator")
    with pytest.raises(KeyFileError, match="exists; not overwritten"):
        new_client(folder, "more", "operator", (), out)
    assert out.read_bytes() == kept
    assert [each.name for each in read_clients(folder)] == ["cams"]


@pytest.mark.parametrize("name", ["../cams", "a/b", ".hidden", "", "a" * 65, "x\n"])
def test_a_name_cannot_leave_the_folder(folder: Path, name: str) -> None:
    make(folder, "cams", "producer", "cam*")
    with pytest.raises(KeyFileError):
        new_client(folder, name, "operator", (), folder.parent / "out.key")
    with pytest.raises(KeyFileError, match="there are: cams"):
        revoke(folder, name)
    assert len(read_clients(folder)) == 1
    assert not (folder.parent / "out.key").exists()


def test_the_folder_is_read_again_when_it_changes(folder: Path) -> None:
    clock = Clock()
    a, b = (read_client_key(make(folder, name, "operator")) for name in "ab")
    ring = Keyring(folder, clock)
    revoke(folder, "a")
    assert not ring.look() and len(ring.clients) == 2  # it is not time to
    clock.now_s += LOOK_INTERVAL_S
    assert ring.look()
    assert list(ring.clients) == [b.public.decode()]
    clock.now_s += LOOK_INTERVAL_S
    assert not ring.look()
    # A new key of the same name is another key; the old one does not come back with it.
    make(folder.parent / "keys", "c", "operator")
    clock.now_s += LOOK_INTERVAL_S
    assert not ring.look()  # nobody has less rights
    assert len(ring.clients) == 2 and a.public.decode() not in ring.clients
    # What cannot be read is no key any more, and neither is what others can change.
    (folder / "b.client").write_text("{")
    (folder / "c.client").chmod(0o666)
    clock.now_s += LOOK_INTERVAL_S
    assert ring.look() and ring.clients == {}


def test_a_folder_that_is_gone_has_no_keys(folder: Path) -> None:
    clock = Clock()
    make(folder, "a", "operator")
    ring = Keyring(folder, clock)
    folder.rename(folder.with_name("elsewhere"))
    clock.now_s += LOOK_INTERVAL_S
    assert ring.look() and ring.clients == {}


def test_a_banned_key_stays_banned(folder: Path) -> None:
    clock = Clock()
    key = read_client_key(make(folder, "a", "subscriber", "*"))
    ring = Keyring(folder, clock)
    ring.ban(key.public.decode())
    make(folder, "b", "subscriber", "*")
    clock.now_s += LOOK_INTERVAL_S
    ring.look()
    assert [each.name for each in ring.clients.values()] == ["b"]


# ---- peers -------------------------------------------------------------------------------------


class Frame:
    def __init__(self, content: bytes, **metadata: str) -> None:
        self.bytes = content
        self._metadata = {name.replace("_", "-"): value for name, value in metadata.items()}

    def get(self, option: str) -> str:
        return self._metadata[option]


def test_a_peer_is_its_routing_id_and_its_key() -> None:
    assert Peer(b"a", "", "10.0.0.1") == Peer(b"a", "", "10.0.0.2")  # an address may change
    assert Peer(b"a", "one") != Peer(b"a", "two")
    assert Peer(b"a", "one") != Peer(b"b", "one")


def test_what_no_subscriber_sends_is_misuse(folder: Path) -> None:
    public = read_client_key(make(folder, "a", "subscriber", "*")).public.decode()
    ring = Keyring(folder)
    access = Access(ring, LimitsConfig(), 8)
    good = access.subscription(Frame(b"\1event/", User_Id=user_id(1, public)))
    assert (good.add, good.refused) == ((b"event/",), False)
    for content in (b"\2event/", b""):
        with pytest.raises(Misuse, match="key 'a'"):
            Access(Keyring(folder), LimitsConfig(), 8).subscription(
                Frame(content, User_Id=user_id(1, public))
            )


# ---- addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("tcp://127.0.0.1:5555", True),
        ("tcp://127.9.9.9:*", True),
        ("tcp://localhost:0", True),
        ("tcp://[::1]:5555", True),
        ("ipc:///run/hrpro/feed", True),
        ("inproc://x", True),
        ("ipc://@hrpro", False),  # no file, so no permissions
        ("tcp://*:5555", False),
        ("tcp://0.0.0.0:5555", False),
        ("tcp://[::]:5555", False),
        ("tcp://eth0:5555", False),
        ("tcp://lo:5555", False),
        ("tcp://10.0.0.7:5555", False),
        ("tcp://1.127.0.0:5555", False),
        ("tcp://127.0.0.1.example.org:5555", False),
        ("tcp://localhost.example.org:5555", False),
        ("tcp://127.0.0.1;0.0.0.0:5555", False),
        ("tcp://127.0.0.1:5555;tcp://0.0.0.0:1", False),
        ("ws://127.0.0.1:5555", False),
        ("tcp://", False),
    ],
)
def test_which_addresses_are_local(address: str, local: bool) -> None:
    assert is_local(address) == local


def test_others_may_only_reach_it_with_keys_or_where_they_are_trusted() -> None:
    sides = {"feed": "tcp://0.0.0.0:1", "events": "tcp://127.0.0.1:2", "control": "tcp://*:3"}
    said = Doors().problem(sides)
    assert said is not None
    assert said.startswith("--feed tcp://0.0.0.0:1, --control tcp://*:3: others than this machine")
    assert "hrpro keys new" in said and "--trusted-network" in said
    assert Doors(trusted_network=True).problem(sides) is None
    assert Doors(keys=Path("keys")).problem(sides) is None
    assert Doors().problem(dict.fromkeys(sides, "tcp://127.0.0.1:*")) is None


def test_the_names_of_files_are_what_is_documented() -> None:
    assert (ENGINE_SECRET, CLIENT_SUFFIX) == ("engine.secret", ".client")
