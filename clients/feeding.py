"""Recordings on disk as live streams, at the pace of the snippet clock or as fast as they go."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.connection import Key, make_room
from hrpro.clients.feeder import AsyncFeatureFeeder, FeatureFeeder
from hrpro.engine.protocol import Ended, HrproError, NoReplyError, Policy
from hrpro.engine.timebase import SnippetClock

LEAVE_TIMEOUT_S = 2.0

_logger = logging.getLogger(__name__)


class FeatureFileError(HrproError, ValueError):
    """A file that is not an array of snippet features; the message names it."""


@dataclass(frozen=True)
class Source:
    """A recording to be fed: ``features`` float32 (T, D) as the stream ``stream``."""

    stream: str
    features: NDArray[np.float32]


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """``.npy`` files, or the test recordings of data folders; streams are named after the files.

    Raises FeatureFileError, and DataError for a list of recordings that is none.
    """
    files = [file for path in paths for file in _files_of(path)]
    sources = [Source(file.stem, _read(file)) for file in files]
    names = [source.stream for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise FeatureFileError(f"two files would be the stream {name!r}; feed one at a time")
    return sources


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if not (path / "split_test.txt").is_file():
        raise FeatureFileError(f"{path}: expected a data folder with split_test.txt, or .npy files")
    from hrpro.training.data import feature_path, read_names
    from hrpro.training.data_config import DataConfig

    names = read_names(path, "test", DataConfig())
    return [feature_path(path, "test", name) for name in names]


def _read(file: Path) -> NDArray[np.float32]:
    try:
        # Opened here, since numpy leaves the files of damaged archives open.
        with file.open("rb") as opened:
            features = np.load(opened, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise FeatureFileError(
            f"{file}: expected a .npy array, could not read it: {error}"
        ) from None
    if (
        not isinstance(features, np.ndarray)
        or features.ndim != 2
        or 0 in features.shape
        or features.dtype.kind != "f"
    ):
        came = f"{getattr(features, 'dtype', 'archive')} {getattr(features, 'shape', '')}"
        raise FeatureFileError(
            f"{file}: expected floats of shape (T, D), T and D at least 1, came {came}"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite
        features = features.astype(np.float32, copy=False)
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise FeatureFileError(
            f"{file}: snippet {int(finite.argmin())}: expected finite features, got NaN or infinity"
        )
    return features


def feed_sources(
    sources: Sequence[Source],
    address: str,
    clock: SnippetClock,
    speed: float | None = 1.0,
    chunk_snippets: int = 1,
    timeout_s: float = 60.0,
    policy: Policy = "wait",
    progress: Callable[[int], None] | None = None,
    key: Key = None,
) -> dict[str, Ended]:
    """Feed recordings side by side, each as a stream of its own, and end them.

    Snippet t is sent when its last frame would have been seen: (t + 1) snippets after the start,
    divided by ``speed``; None feeds without waiting. ``progress`` is told of each chunk's length.
    Returns what the engine said of each stream at its end.

    When something goes wrong, the streams are ended where they are. A stream that the engine has
    already, from a feeder that was killed, is continued behind what the engine has of it. Raises
    HrproError where the process may not open so many files, and as a feeder does.
    """
    make_room(len(sources))
    ended: dict[str, Ended] = {}
    with contextlib.ExitStack() as stack:
        feeders: dict[str, FeatureFeeder] = {}
        try:
            for source in sources:
                feeder = FeatureFeeder(
                    address,
                    source.stream,
                    source.features.shape[1],
                    clock,
                    policy=policy,
                    timeout_s=timeout_s,
                    key=key,
                )
                feeders[source.stream] = stack.enter_context(feeder)
                if feeder.welcome is not None and feeder.welcome.next_index > 0:
                    warn_of_resumption(feeder, "continuing behind them")
            started_s = time.monotonic()
            for source, first in _in_turn(sources, chunk_snippets):
                chunk = source.features[first : first + chunk_snippets]
                if speed is not None:
                    due_s = clock.seconds(first + len(chunk)) / speed
                    time.sleep(max(0.0, started_s + due_s - time.monotonic()))
                feeders[source.stream].send(chunk)
                if progress is not None:
                    progress(len(chunk))
                if first + len(chunk) == len(source.features):
                    ended[source.stream] = feeders[source.stream].end()
                    warn_of_drops(feeders[source.stream])
        except BaseException:
            end_all(feeder for name, feeder in feeders.items() if name not in ended)
            raise
    return ended


def _in_turn(sources: Sequence[Source], chunk_snippets: int) -> Iterator[tuple[Source, int]]:
    """The chunks of all recordings in the order of time: source and first snippet."""
    longest = max((len(source.features) for source in sources), default=0)
    for first in range(0, longest, chunk_snippets):
        for source in sources:
            if first < len(source.features):
                yield source, first


def warn_of_resumption(feeder: FeatureFeeder | AsyncFeatureFeeder, what: str) -> None:
    """The engine has the stream already, of a feeder that was killed; say what becomes of it."""
    assert feeder.welcome is not None
    _logger.warning(
        "stream %r: the engine has %d snippets of it already; %s",
        feeder.stream,
        feeder.welcome.next_index,
        what,
    )


def warn_of_drops(feeder: FeatureFeeder | AsyncFeatureFeeder) -> None:
    """Say how many snippets there was no room for, if there were any."""
    if feeder.dropped:
        _logger.warning("stream %r: %d snippets dropped", feeder.stream, feeder.dropped)


def end_all(feeders: Iterable[FeatureFeeder]) -> None:
    """End streams as far as the engine still answers."""
    for feeder in feeders:
        try:
            feeder.end(timeout_s=LEAVE_TIMEOUT_S)
        except NoReplyError:
            return
        except HrproError:
            continue
