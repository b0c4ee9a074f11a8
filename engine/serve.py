"""A bundle and a configuration -> a running engine."""

from __future__ import annotations

import contextlib
import gc
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.config import EngineConfig
from hrpro.engine.deployer import Deployer
from hrpro.engine.deployment import Deployment, check_agreement, relied_on
from hrpro.engine.event_log import EventLog
from hrpro.engine.incremental import runs_by_steps
from hrpro.engine.keys import Keyring
from hrpro.engine.metrics import Metrics
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.server import Server
from hrpro.engine.settings import SettingsError, load_settings
from hrpro.engine.sockets import is_local
from hrpro.engine.windows import plan_windows
from hrpro.export.bundle import Bundle, Manifest, check_fixed_settings
from hrpro.export.golden import check_golden

# Groups of settings whose defaults are the bundle's own.
BROUGHT_BY_BUNDLE = ("window", "localization")

# So many objects are made before Python looks which of the new ones are garbage in cycles. At its
# usual 700 it looks at all that a batch is made of, several times, and finds nothing.
_NEW_OBJECTS = 10_000

if TYPE_CHECKING:
    from hrpro.engine.backends.triton import TritonBackend


@dataclass(frozen=True)
class Addresses:
    """The three sockets of an engine."""

    feed: str
    events: str
    control: str


@dataclass(frozen=True)
class Doors:
    """Who is let in: owners of a key in the folder ``keys``, or everybody where there is none.

    Without keys, an address that others than this machine can reach is served only if their
    network is trusted.
    """

    keys: Path | None = None
    trusted_network: bool = False

    def problem(self, addresses: Mapping[str, str]) -> str | None:
        """What is wrong with addresses, by side, that must not be bound like this, if any."""
        reached = [
            f"--{side} {address}" for side, address in addresses.items() if not is_local(address)
        ]
        if not reached or self.keys is not None or self.trusted_network:
            return None
        return (
            f"{', '.join(reached)}: others than this machine can reach it, and there are no keys; "
            "make some with hrpro keys new NAME --role producer --streams 'cam*' --keys KEYS, and "
            "serve with --keys KEYS; or say with --trusted-network that whoever can reach it may "
            "feed, watch, deploy and drain"
        )

    def keyring(self) -> Keyring | None:
        """The keys, if any. Raises KeyFileError."""
        return None if self.keys is None else Keyring(self.keys)


def load_engine_config(
    bundle: Bundle, file: Path | None = None, assignments: Sequence[str] = ()
) -> EngineConfig:
    """The engine's settings: defaults, the bundle's own, a YAML file, and assignments over them.

    Raises SettingsError, also for what does not fit the bundle; it lists all that is wrong.
    """
    base = bundle.manifest.model_dump(mode="json", include=set(BROUGHT_BY_BUNDLE))
    config = load_settings(EngineConfig, file, assignments, base)
    problems = []
    for fits in (
        lambda: check_fixed_settings(bundle.manifest, config.localization),
        lambda: plan_windows(bundle.manifest, config),
        lambda: runs_by_steps(bundle.manifest, config),
    ):
        try:
            fits()
        except SettingsError as error:
            problems.append(str(error))
    if problems:
        raise SettingsError("\n  ".join(problems))
    return config


def new_deployment(
    bundle: Bundle, config: EngineConfig, metrics: Metrics | None = None
) -> Deployment:
    """A bundle on its backend, checked there and warm; from then on it is measured."""
    backend = _new_backend(bundle, config)
    check_golden(bundle, backend)
    measured = backend if metrics is None else metrics.timed(backend)
    deployment = Deployment(bundle.manifest, measured, config, backend.provider)
    deployment.warm_up(backend)
    return deployment


def streams_and_events(manifest: Manifest) -> dict[str, object]:
    """What has to be the same for streams of an earlier run of the engine to go on."""
    names = {"feature_dim", "frames_per_s", "snippet_frames", "classes"}
    return manifest.model_dump(mode="json", include=names)


def _freeze(phase: str, collection: dict[str, int]) -> None:
    """After a full collection of garbage, let the next ones leave alone what it has looked at.

    Otherwise each of them looks at all that belongs to a stream, in vain: none of it is in cycles,
    it goes with its last reference. With thousands of streams that holds up the loop for a quarter
    of a second, every few seconds.
    """
    if phase == "stop" and collection["generation"] == 2:
        gc.freeze()


def _new_backend(bundle: Bundle, config: EngineConfig) -> OnnxRuntimeBackend | TritonBackend:
    if config.backend == "onnxruntime":
        return OnnxRuntimeBackend(bundle, config)
    try:
        from hrpro.engine.backends.triton import TritonBackend
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"backend triton: expected the package {error.name}: pip install hrpro-stream[triton]"
        ) from None
    return TritonBackend(bundle, config)


def serve(
    folder: Path,
    read: Callable[[Path], tuple[Bundle, EngineConfig]],
    addresses: Addresses,
    ready: Callable[[Addresses, Pipeline], None],
    follow: Path | None = None,
    metrics: Metrics | None = None,
    state: Path | None = None,
    doors: Doors = Doors(),
) -> None:
    """Serve until SIGTERM or SIGINT, or until a drain that is asked for is complete.

    With a log, a signal ends the engine alone: its streams go on in the next one. Without one it
    asks for a drain, since what is not published would be lost.

    ``read`` gives the bundle in a folder and the settings for it; bundles that are deployed later
    are read by it, too, and those that appear in ``follow`` are deployed. ``ready`` is called with
    the bound addresses once snippets can come. ``metrics`` measures from here on. ``state`` is the
    folder of the event log; without one, what is published is not kept. Raises SettingsError for
    addresses that ``doors`` leave open, before anything is bound, KeyFileError, DrainError for a
    drain that is not complete in time, and LogError where the log cannot be opened.
    """
    metrics = metrics or Metrics()
    problem = doors.problem(vars(addresses))
    if problem is not None:
        raise SettingsError(problem)
    keyring = doors.keyring()
    bundle, config = read(folder)
    if _freeze not in gc.callbacks:
        gc.callbacks.append(_freeze)
        gc.set_threshold(_NEW_OBJECTS)

    def load(other: Path) -> Deployment:
        new, own = read(other)
        # Of the settings only those that a bundle brings may change while the engine runs.
        brought = {name: getattr(own, name) for name in BROUGHT_BY_BUNDLE}
        changed = config.model_copy(update=brought)
        check_agreement(relied_on(bundle.manifest, config), new.manifest, changed)
        return new_deployment(new, changed, metrics)

    deployer = Deployer(load, follow)  # what appears from here on is new
    with contextlib.ExitStack() as stack:
        log = None if state is None else stack.enter_context(EventLog(state, config.log))
        if log is not None:
            log.belong(streams_and_events(bundle.manifest))
        pipeline = Pipeline(new_deployment(bundle, config, metrics))
        server = stack.enter_context(
            Server(
                pipeline,
                addresses.feed,
                addresses.events,
                addresses.control,
                deployer,
                metrics,
                config.drain_s,
                log,
                keyring,
                config.limits,
            )
        )
        leave = server.drain if log is None else server.stop
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: leave())
        bound = Addresses(server.feed_address, server.events_address, server.control_address)
        ready(bound, pipeline)
        server.run()
