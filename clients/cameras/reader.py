"""One thread a source: its frames become snippets, and a source that is lost is opened again.

    read_frames -> pace -> SnippetAssembler -> Outlet -> (the loop, camera.py)

The thread keeps one decoded frame and the images of the snippets that it is at; of what it has
made, an outlet keeps no more than it has room for.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Literal

import av

from hrpro.clients.cameras.frames import APART_S, LONGEST_HOLD_S, Snippet, SnippetAssembler
from hrpro.clients.cameras.sources import (
    STALL_S,
    RtspTransport,
    Source,
    SourceError,
    TimedFrame,
    read_frames,
)

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
# Opening, finding out what it is and the first frame may take `stall_s` each; so long after FFmpeg
# should have given up, the thread is taken to be stuck in the system.
_STUCK_S = 5.0
_MOST_LEFT_BEHIND = 2
# How the first frames are told from those that come as they are seen, see `_from_now_on`.
_STEADY_FRAMES = 4
_LESS_LATE_S = 0.01

State = Literal["opening", "reading", "away", "stuck", "ended", "failed"]

_log = logging.getLogger(__name__)


class Outlet:
    """Snippets that wait to be taken, of one source; `changed` is notified of each.

    With ``keep_all`` who puts them in waits for room; otherwise the oldest give way to new ones,
    and `skipped` counts them.
    """

    def __init__(self, room: int, keep_all: bool, changed: threading.Condition) -> None:
        self._room = room
        self._keep_all = keep_all
        self._changed = changed
        self._waiting: deque[Snippet] = deque()
        self._closed = False
        self.skipped = 0
        self.ended = False
        """Nothing comes behind what waits."""

    def put(self, snippet: Snippet) -> None:
        """Put a snippet in; returns at once when the outlet is closed."""
        with self._changed:
            if self._keep_all:
                self._changed.wait_for(lambda: len(self._waiting) < self._room or self._closed)
            if self._closed:
                return
            if len(self._waiting) == self._room:
                self._waiting.popleft()
                self.skipped += 1
            self._waiting.append(snippet)
            self._changed.notify_all()

    def end(self) -> None:
        """The source has ended."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """What waits and what comes is left out."""
        with self._changed:
            self._closed = self.ended = True
            self._waiting.clear()
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> Snippet:
        """The oldest that waits; with `changed` held."""
        self._changed.notify_all()
        return self._waiting.popleft()


class SourceReader:
    """Reads one source in a thread of its own until it ends or `stop` is called.

    A live source that is lost is opened again after 1 s, then 2 s and so on up to 30 s; one that
    has stayed for longer than the pause before it begins with 1 s once more. A recording plays at
    ``speed`` times its pace, None as fast as there is room for its snippets.

    ``seen`` is told of each frame, with the index of the snippet that it comes to, in the thread.
    """

    def __init__(
        self,
        source: Source,
        assembler: SnippetAssembler[av.VideoFrame],
        outlet: Outlet,
        stream: str | None = None,
        speed: float | None = 1.0,
        stall_s: float = STALL_S,
        rtsp_transport: RtspTransport = "tcp",
        seen: Callable[[int, av.VideoFrame], None] | None = None,
    ) -> None:
        self.source = source
        self.state: State = "opening"
        self.reason = ""
        """Why it is away, stuck or failed."""
        self.frames = 0
        """How many frames were decoded."""
        self.reconnects = 0
        self.began_s: float | None = None
        """The monotonic time of position 0: when the first frame came."""
        self._assembler = assembler
        self._outlet = outlet
        self._stream = source.stream if stream is None else stream
        self._speed = speed
        self._stall_s = stall_s
        self._rtsp_transport = rtsp_transport
        self._seen = seen
        self._stopped = threading.Event()
        self._turn = threading.Lock()  # held by the thread that hands a frame over
        self._thread: threading.Thread | None = None
        self._left_behind: list[threading.Thread] = []
        self._alive_s = 0.0  # when it was known to be well
        self._stayed_s = 0.0  # how long this connection gave frames
        self._is_lost = False

    @property
    def late(self) -> int:
        """How many frames were left out because they came late, or again."""
        return self._assembler.late

    def start(self) -> None:
        """Begin to read."""
        self._alive_s = time.monotonic()
        # A daemon: the system may not let go of it.
        self._thread = threading.Thread(
            target=self._run, name=f"source {self.source.stream}", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Read no more."""
        self._stopped.set()
        self._outlet.close()

    def join(self, timeout_s: float) -> None:
        """Wait until the source is closed, if it can be."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def watch(self) -> None:
        """Go on in another thread where a driver or a name server does not let go of this one.

        Two at most are left behind; then it waits for one of them. To be called now and then.
        """
        silent_s = time.monotonic() - self._alive_s
        if not self.source.is_live or silent_s < 3 * self._stall_s + _STUCK_S:
            return
        self._lost("stuck", f"{self.source.shown}: the system does not answer")
        self._left_behind = [each for each in self._left_behind if each.is_alive()]
        if self._thread is not None and len(self._left_behind) < _MOST_LEFT_BEHIND:
            with self._turn:
                self._left_behind.append(self._thread)
                self._hand_over(self._assembler.end())
                self.reconnects += 1
                self.start()

    # ---- in the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._read_on()
        finally:
            if self._is_mine() and not self._outlet.ended:  # by an error that nobody has foreseen
                self._end("it cannot be read any more")

    def _read_on(self) -> None:
        pause_s = FIRST_PAUSE_S
        while self._is_mine():
            self._stayed_s, failed, reason = 0.0, False, f"{self.source.shown}: it has ended"
            try:
                self._read()
            except SourceError as error:
                failed, reason = True, str(error)
            with self._turn:
                if not self._is_mine():
                    return
                self._hand_over(self._assembler.end())
            if not self.source.is_live:
                self._end(reason if failed else None)
                return
            self._lost("away", reason)
            pause_s = FIRST_PAUSE_S if self._stayed_s > pause_s else pause_s
            self._wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if self._is_mine():
                self.reconnects += 1

    def _read(self) -> None:
        """Until the source ends or is lost."""
        frames = read_frames(self.source, self._stall_s, self._rtsp_transport)
        if self.source.kind in ("rtsp", "device"):
            frames, pace = _from_now_on(frames), None
        else:
            pace = _Pace(1.0 if self.source.is_live else self._speed)
        first_s = None
        for frame, time_s in frames:
            if pace is not None:
                self._wait(pace.due_in_s(time_s))
            with self._turn:
                if not self._is_mine():
                    return
                now_s = self._alive_s = time.monotonic()
                first_s = now_s if first_s is None else first_s
                self._stayed_s = now_s - first_s
                self._take(frame, time_s, now_s)

    def _take(self, frame: av.VideoFrame, time_s: Fraction, now_s: float) -> None:
        if self.state != "reading":
            if self._is_lost:
                _log.warning("stream %r: %s: there again", self._stream, self.source.shown)
            self.state, self.reason, self._is_lost = "reading", "", False
        self.began_s = now_s if self.began_s is None else self.began_s
        self.frames += 1
        wall_s = now_s - self.began_s if self.source.is_live else None
        self._hand_over(self._assembler.push(frame, time_s, wall_s))
        if self._seen is not None:
            self._seen(self._assembler.next_index, frame)

    def _hand_over(self, snippets: Iterable[Snippet]) -> None:
        for snippet in snippets:
            self._outlet.put(snippet)

    def _wait(self, wait_s: float) -> None:
        """Wait, and be known to be well."""
        self._alive_s = time.monotonic() + wait_s
        self._stopped.wait(wait_s)

    def _is_mine(self) -> bool:
        """Whether this thread is neither stopped nor left behind."""
        return threading.current_thread() is self._thread and not self._stopped.is_set()

    def _lost(self, state: State, reason: str) -> None:
        if not self._is_lost:
            _log.warning("stream %r: %s; trying again", self._stream, reason)
        self.state, self.reason, self._is_lost = state, reason, True

    def _end(self, failure: str | None) -> None:
        if failure is not None:
            _log.error("stream %r: %s", self._stream, failure)
        self.state, self.reason = ("failed", failure) if failure else ("ended", "")
        self._outlet.end()


def _from_now_on(frames: Iterable[TimedFrame]) -> Iterator[TimedFrame]:
    """Without the frames that come faster than they are shown, as the first ones of a connection:
    FFmpeg has kept them while it found out what the source is, and when they came is not known any
    more. They are over when some frames in turn have not been less late than any before."""
    began_s, least_late_s, steady = time.monotonic(), math.inf, 0
    for frame, time_s in frames:
        if steady >= _STEADY_FRAMES:
            yield frame, time_s
            continue
        now_s = time.monotonic()
        late_s = now_s - float(time_s)  # than any fixed time
        steady = 0 if late_s < least_late_s - _LESS_LATE_S else steady + 1
        least_late_s = min(least_late_s, late_s)
        if now_s - began_s > APART_S:  # it goes on like that
            steady = _STEADY_FRAMES


class _Pace:
    """When frames are due that are played at a speed, from the first one on."""

    def __init__(self, speed: float | None) -> None:
        self._speed = speed
        self._begin: tuple[Fraction, float] | None = None  # a time stamp and when it was due
        self._last_s = Fraction(0)

    def due_in_s(self, time_s: Fraction) -> float:
        """Seconds to wait for the frame of this time stamp, 0 if it is late."""
        if self._speed is None:
            return 0.0
        step_s, self._last_s = time_s - self._last_s, time_s
        if self._begin is None or not -LONGEST_HOLD_S <= step_s <= APART_S:
            self._begin = (time_s, time.monotonic())  # the first, or time stamps that begin anew
        begin_s, begin_due_s = self._begin
        due_s = begin_due_s + float(time_s - begin_s) / self._speed
        return max(0.0, due_s - time.monotonic())
