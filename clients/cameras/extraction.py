"""Videos -> features in a data folder for training, by the code that makes them live.

    VIDEO -> read_frames -> SnippetAssembler -> Extractor -> features/SPLIT/NAME.npy

A video's features are written when all else that the folder says of it is there; a video whose
features are there is done. What is in the folder besides, such as points and annotations, stays.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from hrpro.clients.cameras.extractor import Extractor
from hrpro.clients.cameras.frames import Snippet, SnippetAssembler
from hrpro.clients.cameras.sources import SourceError, file_source, read_frames
from hrpro.engine.wire import HrproError
from hrpro.training.data import feature_path
from hrpro.training.data_config import SPLITS, DataError, Split, read_lines
from hrpro.training.feature_source import (
    FILE,
    FeatureSource,
    read_feature_source,
    write_feature_source,
)
from hrpro.training.files import replaced_file, write_array

_BATCH_SNIPPETS = 8
_ANNOTATIONS = "gt_full.json"

_log = logging.getLogger(__name__)


@dataclass
class Report:
    """Names of videos: ``made`` and ``there`` before with their snippets, ``failed`` with why."""

    made: dict[str, int] = field(default_factory=dict)
    there: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class VideoFeatures:
    """Features (T, D) of a video, of which ``missing`` snippets had no frames of their own."""

    features: NDArray[np.float32]
    missing: int
    duration_s: float
    frames_per_s: float


def extract_videos(
    videos: Sequence[Path],
    extractor: Extractor,
    out: Path,
    split: Split,
    advance: Callable[[int], None],
) -> Report:
    """Write the features of videos to the data folder ``out``, as recordings of a split.

    ``advance`` is told how many snippets are done. A video that cannot be read is reported, and the
    others go on. Raises DataError where the folder has features of another extractor, and where two
    videos would be one recording.
    """
    named = _named(videos)
    out.mkdir(parents=True, exist_ok=True)
    report = Report()
    with _alone(out):
        _check_source(out, extractor)
        for name, video in named.items():
            path = feature_path(out, split, name)
            try:
                _check_split(out, split, name)
                if path.exists():
                    report.there[name] = _snippets_in(path)
                    advance(report.there[name])
                    continue
                made = video_features(video, extractor, advance)
                _write(out, split, name, made)
                report.made[name] = len(made.features)
            except (SourceError, DataError) as error:
                report.failed[name] = str(error)
    return report


def video_features(
    video: Path, extractor: Extractor, advance: Callable[[int], None]
) -> VideoFeatures:
    """Features of one video. Raises SourceError where it cannot be read or is too short."""
    assembler = SnippetAssembler(extractor.clock, extractor.frame_offsets, extractor.prepare)
    rows: dict[int, NDArray[np.float32]] = {}
    waiting: list[Snippet] = []

    def work_off() -> None:
        features = extractor.extract(np.stack([each.frames for each in waiting]))
        rows.update(zip((each.index for each in waiting), features, strict=True))
        advance(len(waiting))
        waiting.clear()

    frames, first_s, last_s = 0, None, None
    for frame, time_s in read_frames(file_source(video)):
        frames += 1
        first_s, last_s = time_s if first_s is None else first_s, time_s
        waiting += assembler.push(frame, time_s)
        if len(waiting) >= _BATCH_SNIPPETS:
            work_off()
    waiting += assembler.end()
    if waiting:
        work_off()
    if not rows or first_s is None or last_s is None:
        raise SourceError(
            f"{video}: expected at least one snippet of {extractor.clock.snippet_s:g} s, "
            f"got {frames} frames"
        )
    shown_s = float(last_s - first_s)
    rate = (frames - 1) / shown_s if shown_s > 0 else extractor.clock.frames_per_s
    T = assembler.next_index
    return VideoFeatures(_filled(rows, T), T - len(rows), shown_s + 1 / rate, rate)


def snippets_in(videos: Sequence[Path], extractor: Extractor) -> int | None:
    """About how many snippets the videos have; None where one of them does not say."""
    total = 0.0
    for video in videos:
        try:
            with av.open(f"file:{video}") as container:
                duration = container.duration
        except (av.FFmpegError, OSError, ValueError):
            continue  # it is reported when its turn comes
        if duration is None:
            return None
        total += extractor.clock.position(duration / av.time_base)
    return int(total)


def _snippets_in(path: Path) -> int:
    """T of features that are there. Raises DataError where they are none."""
    try:
        features = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: expected features, could not read them: {error}; remove the file, and they "
            "are made anew"
        ) from None
    if features.ndim != 2:
        raise DataError(f"{path}: expected features (T, D), came an array {features.shape}")
    return len(features)


def _filled(rows: dict[int, NDArray[np.float32]], length: int) -> NDArray[np.float32]:
    """(T, D): a snippet that is missing repeats the one before, the first ones the first there."""
    last = rows[min(rows)]
    filled = np.empty((length, len(last)), np.float32)
    for index in range(length):
        filled[index] = last = rows.get(index, last)
    return filled


def _named(videos: Sequence[Path]) -> dict[str, Path]:
    """The videos by the names of their recordings."""
    named: dict[str, Path] = {}
    for video in videos:
        name = video.stem
        if name.split() != [name]:
            raise DataError(
                f"{video}: expected a name without blanks: it names the recording, and the files "
                "of splits list one name a line"
            )
        if named.setdefault(name, video) is not video:
            raise DataError(
                f"{video} and {named[name]}: expected names that differ in more than folder and "
                f"ending; both are the recording {name}"
            )
    return named


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder's features for one process alone."""
    import fcntl  # not on every platform, as with the engine's event log

    with (folder / ".features.lock").open("w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HrproError(f"{folder}: another process writes features there") from None
        yield


def _check_source(folder: Path, extractor: Extractor) -> None:
    """Features of one data folder are of one extractor; the first one is noted."""
    manifest = extractor.manifest
    own = FeatureSource(
        extractor=manifest.name,
        extractor_id=manifest.identity,
        frames_per_s=manifest.frames_per_s,
        snippet_frames=manifest.snippet_frames,
        feature_dim=manifest.feature_dim,
    )
    there = read_feature_source(folder)
    if there is None:
        if any((folder / "features").rglob("*.npy")):
            raise DataError(
                f"{folder}: has features already, and no {FILE} that says of which extractor; "
                "expected another folder"
            )
        write_feature_source(folder, own)
    elif there != own:
        raise DataError(
            f"{folder / FILE}: the features are of the extractor {there.extractor} "
            f"({there.extractor_id}), got {own.extractor} ({own.extractor_id}); expected another "
            "folder for it"
        )


def _check_split(folder: Path, split: Split, name: str) -> None:
    for other in SPLITS:
        if other != split and (
            feature_path(folder, other, name).exists() or name in _listed(folder, other)
        ):
            raise DataError(f"{folder}: recording {name!r} is in the {other} split already")


def _listed(folder: Path, split: Split) -> list[str]:
    path = folder / f"split_{split}.txt"
    return read_lines(path, "one recording name a line") if path.exists() else []


def _write(folder: Path, split: Split, name: str, made: VideoFeatures) -> None:
    if made.missing:
        _log.warning(
            "%s: %d of %d snippets have no frames of their own: they repeat the one before",
            name,
            made.missing,
            len(made.features),
        )
    _note_duration(folder, split, name, made)
    listed = _listed(folder, split)
    if name not in listed:
        with replaced_file(folder / f"split_{split}.txt") as temporary:
            temporary.write_text("".join(f"{each}\n" for each in [*listed, name]), encoding="utf-8")
    path = feature_path(folder, split, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as temporary:
        write_array(temporary, made.features)


def _note_duration(folder: Path, split: Split, name: str, made: VideoFeatures) -> None:
    """Duration and frame rate in gt_full.json, where the annotations are to be."""
    path = folder / _ANNOTATIONS
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        entries = content.setdefault("database", {})
        entry = entries.setdefault(name, {"subset": split, "annotations": []})
        entry.setdefault("duration", round(made.duration_s, 3))
        entry.setdefault("fps", round(made.frames_per_s, 6))
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f'{path}: expected JSON with entries in "database": {error}') from None
    with replaced_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
