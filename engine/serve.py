"""A bundle and a configuration -> a running engine."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.config import EngineConfig
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.server import Server
from hrpro.engine.settings import load_settings
from hrpro.export.bundle import Bundle, check_fixed_settings
from hrpro.export.golden import check_golden


@dataclass(frozen=True)
class Addresses:
    """The three sockets of an engine."""

    feed: str
    events: str
    control: str


def load_engine_config(
    bundle: Bundle, file: Path | None = None, assignments: Sequence[str] = ()
) -> EngineConfig:
    """The engine's settings: defaults, the bundle's own, a YAML file, and assignments over them."""
    base = bundle.manifest.model_dump(mode="json", include={"window", "localization"})
    config = load_settings(EngineConfig, file, assignments, base)
    check_fixed_settings(bundle.manifest, config.localization)
    return config


def new_pipeline(bundle: Bundle, config: EngineConfig) -> Pipeline:
    """The data path of a bundle on ONNX Runtime, after one batch to warm it up."""
    backend = OnnxRuntimeBackend(bundle, config)
    check_golden(bundle, backend)
    pipeline = Pipeline(bundle.manifest, backend, config)
    pipeline.warm_up()
    return pipeline


def serve(
    bundle: Bundle,
    config: EngineConfig,
    addresses: Addresses,
    ready: Callable[[Addresses, Pipeline], None],
) -> None:
    """Serve until a drain is asked for, by SIGTERM, SIGINT or the control socket, and complete.

    ``ready`` is called with the bound addresses once snippets can come.
    """
    pipeline = new_pipeline(bundle, config)
    with Server(pipeline, addresses.feed, addresses.events, addresses.control) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.drain())
        bound = Addresses(server.feed_address, server.events_address, server.control_address)
        ready(bound, pipeline)
        server.run()
