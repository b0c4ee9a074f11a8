"""The videos that are labelled, each made ready in a thread of its own when first asked for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np
from numpy.typing import NDArray

from hrpro.clients.label.media import frame_times, playable_copy, playable_type
from hrpro.engine.wire import HrproError

State = Literal["waiting", "converting", "reading", "ready", "failed"]


class _StoppedError(Exception):
    """The program leaves: what is under way is given up."""


@dataclass(frozen=True)
class Playable:
    """What a page needs to show a video: its file, the file's type, and (N,) frame times in s."""

    file: Path
    media_type: str
    times_s: NDArray[np.float64]


class Video:
    """One video; ``name`` is that of its recording in the data folder, the file's stem."""

    def __init__(self, path: Path, stopping: threading.Event) -> None:
        self.path = path
        self.name = path.stem
        self.state: State = "waiting"
        self.share_done = 0.0
        self.problem = ""
        self.playable: Playable | None = None
        self._stopping = stopping
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def prepare(self) -> None:
        """Begin, if nobody has; `state` tells when it is ready."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"video {self.name}")
                self._thread.start()

    def join(self) -> None:
        """Wait for what is under way; the event for stopping should have been set."""
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        try:
            self.playable = self._made_playable()
            self.state = "ready"
        except (HrproError, OSError, av.FFmpegError) as error:
            self.problem = str(error)
        except _StoppedError:
            pass
        finally:
            if self.playable is None:
                self.problem = self.problem or "the terminal says why not"
                self.state = "failed"

    def _made_playable(self) -> Playable:
        file, media_type = self.path, playable_type(self.path)
        if media_type is None:
            self.state = "converting"
            file, media_type = playable_copy(self.path, self._progress), "video/mp4"
        self.state, self.share_done = "reading", 0.0
        return Playable(file, media_type, frame_times(file, self._progress))

    def _progress(self, share: float) -> None:
        if self._stopping.is_set():
            raise _StoppedError
        self.share_done = share


def open_videos(paths: Sequence[Path], stopping: threading.Event) -> list[Video]:
    """The videos in the order given. Raises HrproError where a name cannot be a recording's."""
    videos: dict[str, Video] = {}
    for path in paths:
        if not path.is_file():
            raise HrproError(f"{path}: expected a video file, there is none")
        video = Video(path, stopping)
        if video.name.split() != [video.name]:
            raise HrproError(
                f"{path}: expected a name without blanks: it names the recording, and the files of "
                "splits list one name a line"
            )
        if (other := videos.setdefault(video.name, video)) is not video:
            raise HrproError(
                f"{path} and {other.path}: expected names that differ in more than folder and "
                f"ending; both are the recording {video.name}"
            )
    return list(videos.values())
