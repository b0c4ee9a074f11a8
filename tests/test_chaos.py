"""Kills, stops and cut lines, in short; and a checker that can fail."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_model import tiny_recording

from hrpro.clients.chaos import ChaosPlan, ledger, run_chaos
from hrpro.clients.chaos_link import Link
from hrpro.engine.serve import load_engine_config
from hrpro.export.bundle import Bundle

NOTHING = {"lost": 0, "duplicated": 0, "unexpected": 0, "changed": 0}


def line(sequence: int, **fields: object) -> dict[str, object]:
    values = {"score": 0.5, "start_s": 1.0, "label": "jump", "number": 7 + sequence}
    return {"stream": "a", "session": 1, "sequence": sequence, **values, **fields}


def test_the_ledger_counts_each_fault() -> None:
    expected = [line(n) for n in range(5)]
    assert ledger(expected, expected) == NOTHING
    rounded = [line(n, score=0.50009, number=n) for n in range(5)]
    assert ledger(expected, rounded) == NOTHING
    assert ledger(expected, expected[:3]) == {**NOTHING, "lost": 2}
    assert ledger(expected, [*expected, expected[0]]) == {**NOTHING, "duplicated": 1}
    assert ledger(expected[1:], expected) == {**NOTHING, "unexpected": 1}
    for other in (line(4, score=0.5002), line(4, label="run"), line(4, start_s=None)):
        assert ledger(expected, [*expected[:4], other]) == {**NOTHING, "changed": 1}
    # The same number in another session, or of another stream, is another publication.
    assert ledger(expected, [*expected[:4], line(4, session=2)])["lost"] == 1


def test_a_cut_is_of_a_line_that_is_just_made(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.create_connection

    def cut_meanwhile(address: tuple[str, int]) -> socket.socket:
        far = connect(address)
        cutting.start()
        cutting.join(0.2)
        return far

    with (
        socket.create_server(("127.0.0.1", 0)) as engine,
        Link(f"tcp://127.0.0.1:{engine.getsockname()[1]}") as road,
    ):
        cutting = threading.Thread(target=road.cut)
        monkeypatch.setattr(socket, "create_connection", cut_meanwhile)
        port = int(road.address.rsplit(":", 1)[1])
        with connect(("127.0.0.1", port), timeout=10) as near:
            assert near.recv(1) == b""
        cutting.join()


@pytest.mark.parametrize("forgets", [False, True])
def test_kills_lose_nothing(bundle: Bundle, tmp_path: Path, forgets: bool) -> None:
    """But where feeders forget what is not acknowledged, as a control."""
    settings = ["threads=1", "gap_wait_s=60", "lookahead_s=strict"]
    config = load_engine_config(bundle, None, settings)
    recording = tmp_path / "recording.npy"
    np.save(recording, tiny_recording(400, seed=3))
    plan = ChaosPlan(minutes=0.2, seed=2, streams=3, forgets=forgets)
    figures = run_chaos(bundle, config, recording, plan, tmp_path)
    assert figures["sent"] == figures["acknowledged"] == 3 * 120
    assert figures["killed"]["engine"] >= 2 and figures["kills"] >= 5, figures
    found = {name: figures[name] for name in NOTHING}
    if forgets:
        assert found["lost"] > 0
    else:
        assert found == NOTHING
        assert figures["received"] == figures["published"] > 100
