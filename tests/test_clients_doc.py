"""Each block of Python in docs/clients.md runs as it stands, against a real engine or the one in
memory, and does what the text says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import TinyPipeline, rows, serving

from hrpro.clients import request_status
from hrpro.engine.event_log import EventLog
from hrpro.engine.keys import Keyring, new_client
from hrpro.engine.server import Server

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "clients.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```\n", TEXT, re.DOTALL))
RECORDING = rows(0, 12) / 12  # scores of 1/12 to 1

Said = dict[str, list[str]]
Run = Callable[..., str]


pytestmark = pytest.mark.usefixtures("nothing_left_open")


def test_every_block_is_run() -> None:
    assert TEXT.count("```python") == len(BLOCKS)
    tested = set(re.findall(r'run\("(\w+)"', Path(__file__).read_text(encoding="utf-8")))
    assert tested == set(BLOCKS)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a block in a namespace that goes on from block to block; what it prints."""
    monkeypatch.chdir(tmp_path)
    np.save("recording.npy", RECORDING)
    names: dict[str, Any] = {"recording": RECORDING, "features_of_now": RECORDING[:1]}

    def run(block: str, server: Server | None = None) -> str:
        program = BLOCKS[block].replace('"Jump"', '"high"')
        if server is not None:
            program = program.replace("tcp://127.0.0.1:5555", server.feed_address)
            program = program.replace("tcp://127.0.0.1:5556", server.events_address)
        exec(compile(program, f"clients.md, {block}", "exec"), names)
        run.names = names  # type: ignore[attr-defined]
        return capsys.readouterr().out

    return run


def test_feeding_and_subscribing(run: Run, tmp_path: Path) -> None:
    pipeline = TinyPipeline()
    with EventLog(tmp_path / "state") as log, serving(pipeline, log=log) as server:
        assert run("feed", server) == "('high', 'low')\n12 12 12\n"
        ends = run("subscribe", server).splitlines()
        assert ends[:2] == ["high: 0.00 to 0.64 s", "high: 0.08"] and len(ends) == 24
        assert len(run("filters", server).splitlines()) == 2 + 2 * 7  # 6/12 to 12/12
        assert run("callbacks", server) == "cam1 end high\n" * 12
        numbers = run("resume", server).split()
        assert numbers == [str(number) for number in range(1, 27)]
        assert run("again", server) == ""
        assert run("resume", server).split() == [str(number) for number in range(27, 53)]
        assert run("continue", server) + run("continue", server) == ""
        behind = r"the engine is \d+\.\d s behind, 0 dropped"
        assert all(re.fullmatch(behind, line) for line in run("camera", server).splitlines())
        assert pipeline.received["cam2"] == pipeline.received["cam3"]
        assert [index for index, _ in pipeline.received["door"]] == [0, 1]
        (door,) = request_status(server.control_address)["streams"]
        assert (door["stream"], door["next_index"]) == ("door", 2)


def test_an_event_loop(run: Run) -> None:
    pipeline = TinyPipeline(max_streams=64)
    with serving(pipeline) as server:
        assert run("async", server) == f"{[12] * 20}\n"
        run("cancel", server)
    assert [index for index, _ in pipeline.received["gate"]] == list(range(12))


def test_curves(run: Run) -> None:
    with serving() as server:
        run("feed", server)
        first, *shapes = re.findall(r"\d+", run("scores", server))
        assert first == "0" and shapes[0] == shapes[1] and shapes[2] == "2"


def test_keys(run: Run, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    new_client(keys, "cams", "producer", ("*",), tmp_path / "cams.key")
    pipeline = TinyPipeline()
    with serving(pipeline, keyring=Keyring(keys)) as server:
        run("keys", server)
    assert len(pipeline.received["cam1"]) == 12


def test_tests_of_ones_own_code(run: Run) -> None:
    run("testing")
    tests = [value for name, value in run.names.items() if name.startswith("test_")]  # type: ignore[attr-defined]
    assert len(tests) == 2
    for test in tests:
        test()
