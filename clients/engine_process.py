"""An engine as a process of its own, for commands that bring their own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hrpro.clients.control import request_drain
from hrpro.engine.config import EngineConfig
from hrpro.engine.protocol import HrproError
from hrpro.engine.serve import Addresses

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 20.0
_TAIL_CHARACTERS = 2000


class EngineFailedError(HrproError):
    """The engine's process did not start, left before it should, or did not finish its work."""


@dataclass(frozen=True)
class RunningEngine:
    """An engine in a process of its own, as long as the block lasts."""

    addresses: Addresses
    pid: int


@contextlib.contextmanager
def running_engine(bundle: Path, config: EngineConfig) -> Iterator[Addresses]:
    """`hrpro serve` on loopback, drained at the end; it never outlives the block.

    Raises as `running_module`.
    """
    command = ["hrpro.clients.cli", "serve", str(bundle), "--json", "--state", "none"]
    for side in ("feed", "events", "control"):
        command += [f"--{side}", "tcp://127.0.0.1:*"]
    for name, value in config.model_dump(mode="json").items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    with running_module(command) as engine:
        yield engine.addresses


@contextlib.contextmanager
def running_module(command: Sequence[str]) -> Iterator[RunningEngine]:
    """A module that serves, with its arguments, and says where as `hrpro serve --json` does.

    Raises EngineFailedError with what the engine said, also when it was the engine's death that
    made the block fail.
    """
    # A file, because a pipe that nobody reads would block an engine that has much to say.
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(  # noqa: S603 - this very interpreter
            [sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            addresses = _ready_addresses(process, errors)
            yield RunningEngine(addresses, process.pid)
            request_drain(addresses.control)
            _wait_for_end(process, errors)
        except Exception as error:
            if isinstance(error, EngineFailedError) or process.poll() is None:
                raise
            raise _failure(process, errors, "left while it was needed") from error
        finally:
            _end(process)


def _wait_for_end(process: subprocess.Popen[str], errors: IO[str]) -> None:
    try:
        status = process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise _failure(process, errors, f"did not leave within {_STOP_TIMEOUT_S:g} s") from None
    if status:
        raise _failure(process, errors, "did not leave in order")


def _ready_addresses(process: subprocess.Popen[str], errors: IO[str]) -> Addresses:
    """What the engine says when it can take snippets; it has so long for that."""
    assert process.stdout is not None
    limit = threading.Timer(_START_TIMEOUT_S, process.kill)
    limit.start()
    try:
        line = process.stdout.readline()
    finally:
        limit.cancel()
    try:
        said = json.loads(line)
        return Addresses(said["feed"], said["events"], said["control"])
    except (ValueError, KeyError, TypeError):
        process.kill()
        process.wait()
        raise _failure(process, errors, "did not start") from None


def _failure(process: subprocess.Popen[str], errors: IO[str], what: str) -> EngineFailedError:
    errors.seek(0)
    said = errors.read().strip().removeprefix("hrpro: ")[-_TAIL_CHARACTERS:]
    return EngineFailedError(f"the engine {what} (exit code {process.returncode}): {said}")


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()
