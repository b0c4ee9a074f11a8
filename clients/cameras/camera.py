"""Cameras and videos into the engine: all of them through one extractor.

    SourceReader, a thread each          frames -> snippets -> Outlet
    run_cameras, one thread              Outlets -> a batch of snippets -> Extractor -> features
    StreamSender, a thread each          features -> FeatureFeeder -> engine

Nothing is queued without bound. Where the extractor does not keep up with live sources, the newest
ROOM_SNIPPETS of each are kept; the older ones are skipped, counted, and told to the engine as a
gap. Recordings wait for the extractor and the engine. While the engine is away, the feeders of live
streams keep their newest snippets (`FeatureFeeder`, drop_oldest), and recordings wait.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from hrpro.clients.cameras.extractor import Extractor
from hrpro.clients.cameras.frames import Snippet, SnippetAssembler
from hrpro.clients.cameras.reader import Outlet, SourceReader
from hrpro.clients.cameras.sender import StreamSender
from hrpro.clients.cameras.sources import RtspTransport, Source
from hrpro.clients.cameras.thumbnails import ThumbnailRing
from hrpro.clients.connection import FILES_OF_A_CLIENT, Key
from hrpro.clients.feeder import FeatureFeeder
from hrpro.engine.protocol import HrproError, NoReplyError, Policy, StreamError

# Of each source, waiting for the extractor; of a recording as many as make a batch.
ROOM_SNIPPETS = 2
_RECORDING_ROOM_SNIPPETS = 8
# Of its feeder, and of its source: RTSP may have two for each of video and sound, and one more.
FILES_OF_A_CAMERA = FILES_OF_A_CLIENT + 6
# In one call of the extractor, of all cameras together; fewer where it would take longer than a
# second, in which what waits becomes old.
_BATCH_SNIPPETS = 16
_BATCH_S = 1.0
_ASK_S = 1.0
_LOOK_S = 0.2
_LEAVE_S = 5.0


@dataclass(frozen=True)
class CameraStatus:
    """How a camera is; all that is counted is counted since it was started."""

    stream: str
    source: str
    state: str
    """opening, reading, away, stuck, ended, failed or refused."""
    reason: str
    """Why it is away, stuck, failed or refused."""
    frames: int
    frames_per_s: float
    """Since the last report."""
    late_frames: int
    next_index: int
    sent: int
    skipped: int
    """Snippets that the extractor had no time for."""
    missing: int
    """Snippets that the source did not give."""
    dropped: int
    """Snippets that were sent, and that the feeder had no room for while the engine was away."""
    lag: int
    """Snippets that were sent and that the engine has not accepted."""
    behind_s: float
    """How long ago the newest sent snippet ended, when it was sent; 0 for a recording."""
    reconnects: int


class Camera:
    """A source on its way into the engine, behind a feeder that is connected.

    Of a source that cannot be read again, a stream that the engine has already goes on behind what
    it has; a file is not sent again as far as the engine has it. A live stream begins anew where
    the engine has ended it, with a feeder that `new_feeder` makes for its next index.
    """

    def __init__(
        self,
        source: Source,
        feeder: FeatureFeeder,
        new_feeder: Callable[[int], FeatureFeeder],
        extractor: Extractor,
        changed: threading.Condition,
        speed: float | None,
        stall_s: float,
        rtsp_transport: RtspTransport,
        thumbnails: ThumbnailRing | None,
    ) -> None:
        assert feeder.welcome is not None
        self.stream, self.source = feeder.stream, source
        self._clock = extractor.clock
        self._base = 0 if source.kind == "file" else feeder.welcome.next_index
        feeder.skip(self._base - feeder.next_index)
        assembler = SnippetAssembler(
            extractor.clock, extractor.frame_offsets, extractor.prepare, self._base
        )
        room = ROOM_SNIPPETS if source.is_live else _RECORDING_ROOM_SNIPPETS
        self.outlet = Outlet(room, not source.is_live, changed)
        self.reader = SourceReader(
            source,
            assembler,
            self.outlet,
            feeder.stream,
            speed,
            stall_s,
            rtsp_transport,
            thumbnails.offer if thumbnails is not None else None,
        )
        self.sender = StreamSender(feeder, changed, new_feeder if source.is_live else None)
        self._extracted = 0  # snippets that were taken and are not sent yet
        self._is_told_the_end = False
        self._behind_s = 0.0
        self._reported = (time.monotonic(), 0)  # when, and how many frames there were

    @property
    def has_failed(self) -> bool:
        """Whether the source or the engine has given up on it."""
        return self.reader.state == "failed" or self.sender.refused is not None

    @property
    def is_ready(self) -> bool:
        """Whether a snippet waits that can be sent once it is extracted."""
        return len(self.outlet) > 0 and self.sender.room > self._extracted

    def take(self) -> Snippet:
        """The oldest snippet that waits, to be extracted and sent."""
        self._extracted += 1
        return self.outlet.take()

    def send(self, snippet: Snippet, features: NDArray[np.float32]) -> None:
        """Send what was extracted of a snippet."""
        if self.source.is_live and self.reader.began_s is not None:
            end_s = self._clock.seconds(snippet.index + 1 - self._base)
            self._behind_s = time.monotonic() - self.reader.began_s - end_s
        self._extracted -= 1
        self.sender.put(snippet.index, features)

    def look_after(self) -> None:
        """End what has ended, give up what was refused; to be called now and then."""
        if self.sender.is_done:
            self.reader.stop()
        elif self.outlet.ended and not self.outlet and not self._is_told_the_end:
            self._is_told_the_end = True
            self.sender.end()
        else:
            self.reader.watch()

    def status(self) -> CameraStatus:
        """How it is; the rate is that since the last call."""
        now_s, frames = time.monotonic(), self.reader.frames
        before_s, frames_before = self._reported
        self._reported = (now_s, frames)
        refused = self.sender.refused
        next_index, sent, skipped = self.sender.next_index, self.sender.sent, self.outlet.skipped
        return CameraStatus(
            stream=self.stream,
            source=self.source.shown,
            state="refused" if refused else self.reader.state,
            reason=str(refused) if refused else self.reader.reason,
            frames=frames,
            frames_per_s=(frames - frames_before) / max(1e-9, now_s - before_s),
            late_frames=self.reader.late,
            next_index=next_index,
            sent=sent,
            skipped=skipped,
            missing=max(0, next_index - self._base - sent - skipped),
            dropped=self.sender.dropped,
            lag=self.sender.lag,
            behind_s=self._behind_s,
            reconnects=self.reader.reconnects,
        )


def feeder_of(
    address: str, stream: str, extractor: Extractor, is_live: bool, key: Key
) -> Callable[[int], FeatureFeeder]:
    """What makes feeders for what the extractor makes, from an index on."""
    policy: Policy = "drop_oldest" if is_live else "wait"
    dim, clock = extractor.feature_dim, extractor.clock
    return partial(FeatureFeeder, address, stream, dim, clock, policy=policy, key=key)


def connected(
    feeder: FeatureFeeder,
    extractor: Extractor,
    stop: threading.Event,
    say_waiting: Callable[[], None],
) -> bool:
    """Whether the engine has let the feeder in; waits for an engine, or until stopped.

    `say_waiting` is told each second that none answers. Raises HrproError where the engine refuses
    the stream, or its bundle takes other features.
    """
    while not stop.is_set():
        try:
            feeder.connect(timeout_s=_ASK_S)
        except NoReplyError:
            say_waiting()
        except StreamError as error:
            if error.code not in ("wrong_dimension", "wrong_clock"):
                raise
            raise HrproError(
                f"extractor {extractor.name!r} does not fit the engine's bundle: {error}"
            ) from None
        else:
            return True
    return False


def run_cameras(
    cameras: Sequence[Camera],
    extractor: Extractor,
    changed: threading.Condition,
    stop: threading.Event,
    report: Callable[[list[CameraStatus]], None],
    interval_s: float = 1.0,
) -> list[CameraStatus]:
    """Read, extract and send until all streams are done or `stop` is set; how they are then.

    Streams are ended where their sources are, recordings and live ones alike, as far as the engine
    answers within 5 s. `report` is told how they are each ``interval_s``. Raises ExtractorError.
    """
    report_at_s, most = time.monotonic(), _BATCH_SNIPPETS
    try:
        for camera in cameras:
            camera.reader.start()
        for turn in itertools.count():
            if stop.is_set() or all(camera.sender.is_done for camera in cameras):
                break
            batch = _next_batch(cameras, changed, turn, most)
            if batch:
                began_s = time.monotonic()
                features = extractor.extract(np.stack([each.frames for _, each in batch]))
                for (camera, snippet), row in zip(batch, features, strict=True):
                    camera.send(snippet, row)
                most = fitting_batch(len(batch), time.monotonic() - began_s)
            for camera in cameras:
                camera.look_after()
            if time.monotonic() >= report_at_s:
                report_at_s = time.monotonic() + interval_s
                report([camera.status() for camera in cameras])
    finally:
        _end(cameras)
    return [camera.status() for camera in cameras]


def fitting_batch(snippets: int, took_s: float) -> int:
    """How many snippets to extract at a time, when so many took so long."""
    return max(1, min(_BATCH_SNIPPETS, int(_BATCH_S * snippets / max(took_s, 1e-9))))


def _next_batch(
    cameras: Sequence[Camera], changed: threading.Condition, turn: int, most: int
) -> list[tuple[Camera, Snippet]]:
    """Snippets that wait, one of each camera, then another of each; in another order each turn."""
    first = turn % len(cameras)
    in_turn = [*cameras[first:], *cameras[:first]]
    batch: list[tuple[Camera, Snippet]] = []
    with changed:
        changed.wait_for(lambda: any(camera.is_ready for camera in cameras), _LOOK_S)
        while len(batch) < most:
            ready = [camera for camera in in_turn if camera.is_ready]
            if not ready:
                break
            room = most - len(batch)
            batch += [(camera, camera.take()) for camera in ready[:room]]
    return batch


def _end(cameras: Sequence[Camera]) -> None:
    for camera in cameras:
        camera.reader.stop()
        camera.sender.leave(_LEAVE_S)
    for camera in cameras:
        camera.sender.end()
    for camera in cameras:
        camera.sender.join()
        camera.reader.join(_LOOK_S)
