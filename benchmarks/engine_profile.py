"""Where the engine's time goes at full load: python benchmarks/engine_profile.py [--size lean] ...

Messages of many streams go through the engine's own code in this process, one snippet of each
stream a turn, from bytes to bytes: everything but the sockets. Each stage is timed without the
stages that it calls. The model has random weights, and features in which actions come and go.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hrpro.clients.bench_bundle import BenchModel, material, random_bundle
from hrpro.engine import protocol
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.batcher import Batcher
from hrpro.engine.deployment import Deployment
from hrpro.engine.feeds import Counters, Feeds
from hrpro.engine.incremental import StatePool
from hrpro.engine.localizer import StreamLocalizer
from hrpro.engine.metrics import Metrics
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.proposals import RunDetector
from hrpro.engine.protocol import Chunk, Hello
from hrpro.engine.publish import Publisher
from hrpro.engine.serve import load_engine_config
from hrpro.engine.stream import Stream
from hrpro.engine.tracker import ActionTracker
from hrpro.export.bundle import Bundle, read_bundle

STAGES: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("decode of messages", protocol, ("decode_feed",)),
    ("ring: snippets in", Stream, ("check", "append")),
    ("batches", Batcher, ("offer", "take", "due_in_s")),
    ("ring: snippets out", Stream, ("read_snippets",)),
    ("gather of states", StatePool, ("gather", "flags")),
    ("scatter of states", StatePool, ("scatter",)),
    ("inference: stage 1", OnnxRuntimeBackend, ("score_step", "score_snippets")),
    ("inference: stage 2", OnnxRuntimeBackend, ("score_instances",)),
    ("proposals: runs", RunDetector, ("push", "outer_inner_contrast")),
    ("proposals: soft-NMS and what is due", StreamLocalizer, ("_publish", "_ready")),
    ("actions", ActionTracker, ("push", "conclude")),
    ("publishing", Publisher, ("publish", "notice")),
    ("encoding of messages", protocol, ("encode",)),
    ("metrics", Metrics, ("published",)),
)


class Stopwatch:
    """Seconds by stage, each without those of the stages that it calls."""

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = defaultdict(float)
        self._inner_s = [0.0]

    def wrap(self, stage: str, owner: Any, name: str) -> None:
        """Time a function wherever it is called from."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            self._inner_s.append(0.0)
            began_s = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                whole_s = time.perf_counter() - began_s
                self.spent_s[stage] += whole_s - self._inner_s.pop()
                self._inner_s[-1] += whole_s

        setattr(owner, name, timed)


def main() -> None:
    """Print a line for each stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="in place of one with random weights")
    parser.add_argument("--size", default="full", choices=("full", "lean"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "int8"))
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--turns", type=int, default=32, help="snippets of each stream")
    parser.add_argument("--quiet", type=float, default=0.8, help="share without an action")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if arguments.bundle is None:
            model = BenchModel(size=arguments.size, precision=arguments.precision)
            bundle = random_bundle(model, Path(made) / "bundle")
        else:
            bundle = read_bundle(arguments.bundle)
        figures = profile(bundle, arguments.streams, arguments.turns, arguments.quiet)
    if arguments.json:
        print(json.dumps(figures))
        return
    print(f"{figures['snippets']} snippets, {figures['us_a_snippet']:.0f} us each, one thread")
    for stage, us in figures["stages"].items():
        print(f"{stage:<38}{us:8.1f} us {us / figures['us_a_snippet']:7.1%}")
    print(f"{'inference of both stages':<49} {figures['inference_share']:7.1%}")


def profile(bundle: Bundle, streams: int, turns: int, quiet_share: float) -> dict[str, Any]:
    """Microseconds a snippet by stage, and the share of both stages of the model."""
    settings = [f"max_streams={streams}", "threads=1", "idle_s=1e6"]
    config = load_engine_config(bundle, None, settings)
    backend = OnnxRuntimeBackend(bundle, config)
    recording = material(bundle, backend, quiet_share)
    encode = protocol.encode  # what feeders do is not the engine's
    watch = Stopwatch()
    for stage, owner, names in STAGES:
        for name in names:
            watch.wrap(stage, owner, name)
    metrics = Metrics()
    pipeline = Pipeline(Deployment(bundle.manifest, backend, config))

    def send(_: bytes, message: protocol.Message) -> bool:
        protocol.encode(message)
        return True

    feeds = Feeds(pipeline, Counters(), send, arrivals=metrics.arrivals)
    clock = bundle.manifest.clock
    for n in range(streams):
        D = bundle.manifest.feature_dim
        hello = Hello(f"cam{n}", D, clock.frames_per_s, clock.snippet_frames, 0)
        feeds.handle(b"", protocol.decode_feed(encode(hello)))

    def turn(t: int) -> float:
        rows = [(389 * n + t) % len(recording) for n in range(streams)]
        chunks = [Chunk(f"cam{n}", t, recording[row : row + 1]) for n, row in enumerate(rows)]
        frames = [encode(each) for each in chunks]
        began_s = time.perf_counter()
        for each in frames:
            feeds.handle(b"", protocol.decode_feed(each))
        while pipeline.pending():
            for publication in pipeline.step():
                protocol.encode(publication)
                metrics.published(publication)
        feeds.acknowledge()
        return time.perf_counter() - began_s

    for t in range(8):
        turn(t)
    watch.spent_s.clear()
    feeding_s = sum(turn(t) for t in range(8, 8 + turns))
    snippets = streams * turns
    stages = {stage: 1e6 * watch.spent_s[stage] / snippets for stage, _, _ in STAGES}
    us = 1e6 * feeding_s / snippets
    stages["the rest of the loop"] = us - sum(stages.values())
    inference = stages["inference: stage 1"] + stages["inference: stage 2"]
    return {
        "snippets": snippets,
        "us_a_snippet": us,
        "stages": stages,
        "inference_share": inference / us,
    }


if __name__ == "__main__":
    main()
