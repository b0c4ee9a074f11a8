"""The engine of a benchmark: `hrpro serve` with its inference noted, as a process of its own.

    python -m hrpro.clients.bench_engine_process BUNDLE --calls FILE [--set KEY=VALUE ...]
        [--stand-in] [--leak-bytes N]

It is served by the same function as by the command. Begin and end of each call of the model go to a
file. Two things are for measuring memory alone: a stand-in that computes nothing, and a leak.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.engine_process import RunningEngine, running_module
from hrpro.engine import serve as engine
from hrpro.engine.metrics import Metrics
from hrpro.engine.noted import NotedBackend
from hrpro.export.bundle import read_bundle

if TYPE_CHECKING:
    from hrpro.engine.config import EngineConfig
    from hrpro.engine.incremental import Stepped
    from hrpro.engine.inference import Backend, Outputs
    from hrpro.engine.pipeline import Pipeline
    from hrpro.export.bundle import Bundle, Manifest

Floats = NDArray[np.float32]


@contextlib.contextmanager
def bench_engine(
    bundle: Path, config: EngineConfig, calls: Path, stand_in: bool = False, leak_bytes: int = 0
) -> Iterator[RunningEngine]:
    """An engine as a process, see above; it leaves a file for `read_calls`."""
    command = ["hrpro.clients.bench_engine_process", str(bundle), "--calls", str(calls)]
    for name, value in config.model_dump(mode="json").items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    command += ["--stand-in"] if stand_in else []
    command += ["--leak-bytes", str(leak_bytes)] if leak_bytes else []
    with running_module(command) as running:
        yield running


@dataclass(frozen=True)
class Calls:
    """Begin and end of each call of the model, in monotonic seconds: (n, 2), in order of time."""

    snippet_stage: NDArray[np.float64]
    instance_stage: NDArray[np.float64]


def read_calls(file: Path) -> Calls:
    """Of an engine that has left."""
    rows = np.fromfile(file, dtype=np.float64).reshape(-1, 3)
    return Calls(*(rows[rows[:, 0] == stage, 1:] for stage in (1, 2)))


# ---- in the process ------------------------------------------------------------------------------


class _NotingMetrics(Metrics):
    """An engine's metrics that also note each call."""

    def __init__(self, calls: BinaryIO, stand_in: Manifest | None, leak_bytes: int) -> None:
        super().__init__()
        self._calls = calls
        self._stand_in = stand_in
        self._leak_bytes = leak_bytes
        self._leaked: list[bytes] = []

    def timed(self, backend: Backend) -> Backend:
        """The backend, or what stands in for it, its calls noted."""
        if self._stand_in is not None:
            backend = _StandIn(self._stand_in, backend)
        return NotedBackend(super().timed(backend), self._note)

    def _note(self, stage: str, rows: int, began_s: float, ended_s: float) -> None:
        number = 1 if stage == "snippet" else 2
        array("d", (number, began_s, ended_s)).tofile(self._calls)
        if self._leak_bytes and stage == "snippet":
            # Not zeros, whose pages would not be there until they are written to.
            self._leaked.append(b"x" * (self._leak_bytes * rows))


class _StandIn:
    """Answers at once that nothing happens."""

    def __init__(self, manifest: Manifest, instance_stage: Backend) -> None:
        self._widths = (len(manifest.classes),), (manifest.embedding_width,), ()
        self._state = {} if manifest.step is None else manifest.step.state
        self.score_instances = instance_stage.score_instances

    def score_snippets(self, features: Floats, _: NDArray[np.bool_]) -> Outputs:
        B, T, _ = features.shape
        scores, embedding, attention = (
            np.zeros((B, T, *width), np.float32) for width in self._widths
        )
        return scores, embedding, attention

    def score_step(self, features: Floats, valid: NDArray[np.bool_], *_: object) -> Stepped:
        B, n, _ = features.shape
        new = [
            # Keys and values (H, capacity, W / H) have as many rows as there are new snippets.
            np.zeros((B, shape[0], n, shape[2]) if len(shape) == 3 else (B, *shape), np.float32)
            for shape in self._state.values()
        ]
        return self.score_snippets(features, valid), new


def main() -> None:
    """Serve until the drain."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--calls", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--leak-bytes", type=int, default=0)
    arguments = parser.parse_args()
    anywhere = engine.Addresses(*["tcp://127.0.0.1:*"] * 3)

    def read(folder: Path) -> tuple[Bundle, EngineConfig]:
        loaded = read_bundle(folder)
        return loaded, engine.load_engine_config(loaded, None, arguments.set)

    def ready(bound: engine.Addresses, _: Pipeline) -> None:
        print(json.dumps(asdict(bound)), flush=True)  # noqa: T201 - read by the other process

    manifest = read_bundle(arguments.bundle).manifest if arguments.stand_in else None
    with arguments.calls.open("wb") as calls:
        metrics = _NotingMetrics(calls, manifest, arguments.leak_bytes)
        engine.serve(arguments.bundle, read, anywhere, ready, metrics=metrics)


if __name__ == "__main__":
    main()
