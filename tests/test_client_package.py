"""`hrpro.clients` as a user has it: typed, light, and quick to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from commands import PATIENCE_S, environment

# A line that a type checker must refuse is marked; strict mypy refuses a mark without an error.
USER_PROGRAM = """
from __future__ import annotations

import asyncio
from typing import assert_type

import numpy as np
from hrpro.clients import (
    ActionEvent,
    AsyncEventSubscriber,
    AsyncFeatureFeeder,
    Ended,
    EventSubscriber,
    FeatureFeeder,
    FinalProposal,
    ScoreSubscriber,
    SnippetScores,
    StreamNotice,
)
from hrpro.clients.testing import MemoryEngine, action_event

Given = ActionEvent | FinalProposal | StreamNotice
engine = MemoryEngine(feature_dim=2)
FEATURES = np.zeros((3, 2), np.float32)


def on_event(event: ActionEvent) -> None:
    assert_type(event.end_s, float | None)


async def on_final(final: FinalProposal) -> None:
    await asyncio.sleep(final.score)


def feed() -> Ended:
    with FeatureFeeder(engine.feed, "cam1", feature_dim=2, policy="drop_oldest") as feeder:
        feeder.send(FEATURES)
        feeder.send([1.0, 2.0])  # type: ignore[arg-type]
        assert_type(feeder.lag, int)
        assert_type(feeder.lag_s, float)
        return feeder.end()


def watch() -> None:
    with EventSubscriber(engine.events, min_score=0.5) as subscriber:
        assert_type(subscriber.receive(), Given | None)
        for message in subscriber:
            assert_type(message, Given)
        subscriber.run(on_event=on_event, on_notice=lambda notice: notice.kind)
        subscriber.run(on_final=on_event)  # type: ignore[arg-type]
    with ScoreSubscriber(engine.events) as looking:
        assert_type(looking.receive(), SnippetScores | None)
    FeatureFeeder(engine.feed, "cam1", feature_dim=2, policy="drop")  # type: ignore[arg-type]


async def both() -> None:
    async with AsyncFeatureFeeder(engine.feed, "cam1", feature_dim=2) as feeder:
        await feeder.send(FEATURES)
        assert_type(await feeder.end(), Ended)
    async with AsyncEventSubscriber(engine.events) as subscriber:
        async for message in subscriber:
            assert_type(message, Given)
        await subscriber.run(on_event=on_event, on_final=on_final)


engine.publish(action_event("cam1", "Jump", "start", start_s=1.0))
"""


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=environment(),
    )


def test_a_users_program_is_checked_strictly(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(USER_PROGRAM)
    said = python("-m", "mypy", "--strict", "--cache-dir", "cache", "program.py", cwd=tmp_path)
    assert said.stdout == "Success: no issues found in 1 source file\n", said.stdout + said.stderr


def test_the_import_is_light_and_quick(tmp_path: Path) -> None:
    """As quick as what it needs: 0.2 s in all, where nobody else is at work."""
    code = """
import sys, time
bare = set(sys.modules)  # of Debian's Python, a sitecustomize
began_s = time.process_time()
import msgpack, numpy, zmq
needs_s, began_s = time.process_time() - began_s, time.process_time()
import hrpro.clients
tops = {name.partition(".")[0] for name in set(sys.modules) - bare} - set(sys.stdlib_module_names)
is_quick = time.process_time() - began_s < needs_s
print(is_quick, "asyncio" in sys.modules, *sorted(top for top in tops if not top.startswith("_")))
"""
    results = [python("-c", code, cwd=tmp_path).stdout.split() for _ in range(3)]
    assert [tops for _, _, *tops in results] == [
        ["cython_runtime", "hrpro", "msgpack", "numpy", "zmq"]
    ] * 3
    assert {loop for _, loop, *_ in results} == {"False"}
    assert "True" in {is_quick for is_quick, *_ in results}
