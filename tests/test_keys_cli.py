"""Keys on the command line: made, used by each command, listed and revoked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import ANYWHERE, PATIENCE_S, engine, environment, hrpro, hrpro_json, refusal, running
from tiny_model import tiny_recording

from hrpro.clients import KeyFileError, read_client_key
from hrpro.engine import serve
from hrpro.engine.serve import Addresses, Doors
from hrpro.engine.settings import SettingsError
from hrpro.export.bundle import Bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def new(folder: Path, name: str, *options: str) -> Path:
    out = folder.parent / f"{name}.key"
    made = hrpro_json("keys", "new", name, *options, "--keys", folder, "--out", out)
    assert made["file"] == str(out)
    assert read_client_key(out).public.decode() == made["public"]
    return out


def test_each_command_with_its_key(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    producer = new(folder, "cams", "--role", "producer", "--streams", "cam*", "--streams", "door")
    viewer = new(folder, "viewer", "--role", "subscriber", "--streams", "cam1")
    operator = new(folder, "operator", "--role", "operator")
    listed = hrpro_json("keys", "list", "--keys", folder)["keys"]
    assert [(each["name"], each["role"], each["streams"]) for each in listed] == [
        ("cams", "producer", ["cam*", "door"]),
        ("operator", "operator", ["*"]),
        ("viewer", "subscriber", ["cam1"]),
    ]
    lines = hrpro("keys", "list", "--keys", folder).stdout.splitlines()
    assert lines[0].startswith("cams  producer  cam* door  ")
    for name in ("cam1", "cam2"):
        np.save(tmp_path / f"{name}.npy", tiny_recording(40))
    seen = tmp_path / "seen.jsonl"
    with (
        engine(bundle.folder, "--keys", folder, quiet=False) as served,
        running(
            "watch", "--from", served.events, "--jsonl", seen, env=environment() | {
                "HRPRO_KEY": str(viewer)
            },
        ) as watch,
    ):  # fmt: skip
        assert watch.stderr is not None
        assert "watching" in watch.stderr.readline()
        for name in ("cam2", "cam1"):
            file = tmp_path / f"{name}.npy"
            hrpro(
                "feed", "features", file, "--to", served.feed, "--speed", "max", "--key", producer
            )
        said = refusal("feed", "features", file, "--to", served.feed, "--key", operator)
        assert "expected the key of a producer of this stream, came key 'operator'" in said
        said = refusal("drain", served.control, "--key", producer)
        assert "expected the key of an operator, came key 'cams', of a producer" in said
        status = hrpro_json("status", served.control, "--key", operator)
        assert status["counters"]["ended_streams"] == 2
        hrpro("keys", "revoke", "operator", "--keys", folder)
        asking = ("status", served.control, "--once", "--timeout", "1", "--key", operator)
        while hrpro_or_none(*asking) is not None:
            pass  # until it is noticed
        assert "none came; does it know this key?" in refusal(*asking)
        second = new(folder, "second", "--role", "operator")
        while True:  # until the engine has read it
            drained = hrpro_or_none("drain", served.control, "--timeout", "5", "--key", second)
            if drained is not None:
                break
        assert served.process.wait(PATIENCE_S) == 0
        watch.terminate()
        watch.wait(PATIENCE_S)
    streams = {json.loads(line)["stream"] for line in seen.read_text().splitlines()}
    assert streams == {"cam1"}
    assert any("1 added, revoked or changed: none" in line for line in served.said)


def hrpro_or_none(*arguments: object) -> str | None:
    with running(*arguments) as process:
        stdout, _ = process.communicate(timeout=PATIENCE_S)
        return stdout if process.returncode == 0 else None


def test_an_engine_that_others_could_reach_does_not_start(bundle: Bundle, folder: Path) -> None:
    sides = ("--feed", "tcp://0.0.0.0:0", "--events", "tcp://*:0", "--control", "tcp://127.0.0.1:0")
    said = refusal("serve", bundle.folder, "--state", "none", *sides)
    assert said.startswith("--feed tcp://0.0.0.0:0, --events tcp://*:0: others than this machine")
    assert "hrpro keys new NAME" in said and "--trusted-network" in said
    checked = json.loads(
        hrpro("serve", bundle.folder, *sides, "--check", "--json", status=1).stdout
    )
    assert checked["problems"] == [said]
    assert hrpro_json("serve", bundle.folder, *sides, "--check", "--trusted-network")["ok"]
    new(folder, "cams", "--role", "producer", "--streams", "cam*")
    assert hrpro_json("serve", bundle.folder, *sides, "--check", "--keys", folder)["ok"]


def test_nothing_is_bound_before_the_doors_are_looked_at(bundle: Bundle, tmp_path: Path) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it has been read or bound")

    sides = Addresses("tcp://0.0.0.0:0", *(f"ipc://{tmp_path}/{name}" for name in "ec"))
    with pytest.raises(SettingsError, match="--trusted-network"):
        serve.serve(bundle.folder, never, sides, never)  # type: ignore[arg-type]
    with pytest.raises(KeyFileError, match="make them with: hrpro keys new"):
        serve.serve(
            bundle.folder, never, ANYWHERE, never, doors=Doors(tmp_path / "none")  # type: ignore[arg-type]
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_keys_that_cannot_be_used_keep_an_engine_from_starting(
    bundle: Bundle, folder: Path
) -> None:
    new(folder, "cams", "--role", "producer", "--streams", "cam*")
    (folder / "engine.secret").chmod(0o644)
    sides = [part for side, at in vars(ANYWHERE).items() for part in (f"--{side}", at)]
    said = refusal("serve", bundle.folder, "--state", "none", *sides, "--keys", folder)
    assert said.endswith(f"got mode 0644; chmod 600 {folder}/engine.secret")
    said = refusal("status", "tcp://127.0.0.1:1", "--once", "--key", folder / "engine.secret")
    assert "its owner alone can read" in said


def test_what_is_wrong_with_a_new_key_is_said(folder: Path) -> None:
    options = ("--keys", folder, "--out", folder.parent / "x.key")
    for given, message in (
        (("x", "--role", "producer"), "expected one at least, such as 'cam*'"),
        (("x", "--role", "operator", "--streams", "a"), "expected none for an operator"),
        (("x", "--role", "producer", "--streams", "a*b"), "expected a stream id, or the beginning"),
        (("a/x", "--role", "operator"), "name: expected 1 to 64"),
    ):
        assert message in refusal("keys", "new", *given, *options)
    assert not folder.exists()
    assert "no key 'x'; there are: none" in refusal("keys", "revoke", "x", "--keys", folder)
