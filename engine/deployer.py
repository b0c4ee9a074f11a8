"""Bundles for a running engine: those that are asked for, and those that appear in a folder.

To load one takes seconds, and minutes where TensorRT builds an engine. So it is done in a thread,
one after the other, and the server's loop takes what is ready.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hrpro.engine.deployment import DeployError, Deployment
from hrpro.engine.wire import HrproError
from hrpro.export.bundle import MANIFEST

# The folder is looked at so often; files that have not changed for so long are complete.
FOLLOW_INTERVAL_S = 1.0
_MOST_ORDERS = 16
_CLOSE_TIMEOUT_S = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """A bundle to load. ``envelope`` is that of the client who waits, None if nobody does."""

    folder: Path
    canary_streams: tuple[str, ...] = ()
    envelope: tuple[bytes, ...] | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of an order: a bundle ready to work, or why not."""

    order: Order
    loaded: Deployment | HrproError


class Deployer:
    """Loads bundles by ``load`` in a thread; ``follow`` is a folder where they may appear.

    ``load`` raises HrproError for a bundle that cannot work. All methods are for the server's
    thread.
    """

    def __init__(self, load: Callable[[Path], Deployment], follow: Path | None = None) -> None:
        self._load = load
        self._followed = None if follow is None else FollowedFolder(follow)
        self._orders: queue.Queue[Order | None] = queue.Queue(_MOST_ORDERS)
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.asked: list[Order] = []  # and not among the outcomes yet
        self._closing = False
        self._wake: Callable[[], None] = lambda: None
        # Not waited for at the end of the process: what it does may take minutes.
        self._thread = threading.Thread(target=self._run, name="deployer", daemon=True)

    def start(self, wake: Callable[[], None]) -> None:
        """Begin; ``wake`` is called, in the thread, when there is an outcome."""
        self._wake = wake
        self._thread.start()

    def close(self) -> None:
        """Load nothing more."""
        self._closing = True
        with contextlib.suppress(queue.Full):  # then the thread finds out by itself
            self._orders.put_nowait(None)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def ask(self, order: Order) -> None:
        """Load a bundle. Raises DeployError when too many wait."""
        try:
            self._orders.put_nowait(order)
        except queue.Full:
            raise DeployError(
                f"expected at most {_MOST_ORDERS} bundles to wait to be loaded, they do already"
            ) from None
        self.asked.append(order)

    def outcomes(self) -> Iterator[Outcome]:
        """What is ready."""
        with contextlib.suppress(queue.Empty):
            while True:
                outcome = self._outcomes.get_nowait()
                self.asked = [order for order in self.asked if order is not outcome.order]
                yield outcome

    def _run(self) -> None:
        timeout_s = None if self._followed is None else FOLLOW_INTERVAL_S
        looked_s = time.monotonic()
        while not self._closing:
            with contextlib.suppress(queue.Empty):
                order = self._orders.get(timeout=timeout_s)
                if order is not None:
                    self._carry_out(order)
            if self._followed is not None and time.monotonic() - looked_s >= FOLLOW_INTERVAL_S:
                looked_s = time.monotonic()
                for folder in self._followed.appeared():
                    self._carry_out(Order(folder))

    def _carry_out(self, order: Order) -> None:
        loaded: Deployment | HrproError
        try:
            loaded = self._load(order.folder)
        except HrproError as error:
            loaded = error.with_traceback(None)  # which would hold what was loaded, in a cycle
        except Exception as error:  # noqa: BLE001 - whatever a graph does, the engine goes on
            _log.exception("bundle %s", order.folder)
            loaded = DeployError(f"{order.folder}: {type(error).__name__}: {error}")
        self._outcomes.put(Outcome(order, loaded))
        self._wake()


class FollowedFolder:
    """Bundles that appear in a folder, or take the place of one there.

    Those that are there at the beginning are not new. A copy may come file by file: a bundle counts
    when its files are the same in two looks. One that turned out bad comes again when it changes.
    A folder that cannot be read for a while, as one on a network, is what it was.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DeployError(f"{folder}: expected a folder to follow")
        self._folder = folder
        self._known = self._seen = self._states() or {}

    def appeared(self) -> list[Path]:
        """What is new and complete since the last look, in the order of time."""
        states = self._states()
        if states is None:
            return []
        new = [
            folder
            for folder, state in states.items()
            if state == self._seen.get(folder) and state != self._known.get(folder)
        ]
        gone = self._known.keys() - states.keys()
        self._known = {n: s for n, s in self._known.items() if n not in gone}
        self._known |= {folder: states[folder] for folder in new}
        self._seen = states
        return sorted(new, key=lambda folder: max(modified for *_, modified in states[folder]))

    def _states(self) -> dict[Path, tuple[tuple[str, int, int, int], ...]] | None:
        """Name, inode, size and time of each file, by bundle; hidden folders are half-written.

        None if the folder cannot be read.
        """
        try:
            folders = list(self._folder.iterdir())
        except OSError:
            return None
        states = {}
        for folder in folders:
            # What vanishes between two calls is none.
            with contextlib.suppress(OSError):
                if not folder.name.startswith(".") and (folder / MANIFEST).is_file():
                    states[folder] = _state(folder)
        return states


def _state(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    found = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found)
