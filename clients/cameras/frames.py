"""Decoded frames with presentation time stamps -> snippets on the snippet clock; no I/O.

The frames of a stream lie on a grid: position k is frame k of the snippet clock, and snippet i has
the positions from i * snippet_frames to before (i + 1) * snippet_frames. Which picture stands at a
position is decided by time stamps, never by counting:

    position                  0        1        2        3        4        5
    its time, k / frames_per_s|        |        |        |        |        |
    the grid looks                x        x        x        x        x        x
    frames shown, 30 frames/s A------B-------C------D-------E-----F-------G------
    taken                     A        B        C        D         F        G

Position k takes the frame that is on the screen at (k + 3/8) / frames_per_s, where the first frame
is shown from 0 on, each until the next one is. Three eighths into its time, since neither the
rounding of time stamps (as to milliseconds) nor their jitter then decides between two frames of a
source that has one to seven times the rate of the clock. All of it is exact: time stamps are
integers in the source's time base, and times are fractions.

What sources do, and what becomes of it:

- A frame that comes again, or comes late (its time stamp is not above the one before), is left out
  and counted. What was decided is never decided again.
- A frame is missing, or the source is slower than the clock: the frame shown is repeated, as on a
  screen, for up to LONGEST_HOLD_S from one frame to the next.
- A longer hole: the last frame before it stands for one position. The positions behind that, up to
  the next frame, are missing, and so is each snippet with such a position among those that the
  model looks at. Missing snippets are left out; the indices of what follows jump.
- Before the first frame of a snippet the model may look at others (optical flow needs one). Where
  they are missing, before the first frame of a stream and behind a hole, the first frame of the
  snippet stands for them.
- The time stamps begin anew where they go back by more than LONGEST_HOLD_S, and behind `end`.
  Of a live source the clock on the wall then says at which position, so that indices keep to real
  time through lost connections and restarts of a camera. It also does where time stamps and wall
  have come apart by more than APART_S, be it at once or by a clock that runs a little faster
  or slower. In a recording, what begins anew follows at the next position, and so does what is
  ahead by more than FURTHEST_S, a time that nobody has recorded nothing for.
- What is left of the last snippet at the end of a stream is no snippet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.timebase import SnippetClock

LONGEST_HOLD_S = 1
APART_S = 10
FURTHEST_S = 3600

_LOOK = Fraction(3, 8)

Image = NDArray[np.uint8]
Frame = TypeVar("Frame")


@dataclass(frozen=True, eq=False)
class Snippet:
    """Snippet ``index`` of a stream: ``frames`` (F, H, W, 3), those that the model looks at."""

    index: int
    frames: Image


class SnippetAssembler(Generic[Frame]):
    """Makes snippets of the frames of one stream; those that are not there are left out.

    ``frame_offsets`` are the positions that the model looks at, relative to the first frame of a
    snippet, ascending. ``prepare`` makes an image (H, W, 3) of a frame, and is called for frames
    that the model looks at alone, once for each. Position 0 is the first frame of snippet
    ``first_index``. Raises ValueError for offsets that no snippet has.
    """

    def __init__(
        self,
        clock: SnippetClock,
        frame_offsets: Sequence[int],
        prepare: Callable[[Frame], Image],
        first_index: int = 0,
    ) -> None:
        snippet_frames = clock.snippet_frames
        if not frame_offsets or max(frame_offsets) >= snippet_frames or max(frame_offsets) < 0:
            raise ValueError(
                f"frame_offsets: expected positions below {snippet_frames}, one of them in the "
                f"snippet, came {tuple(frame_offsets)}"
            )
        self._offsets = tuple(frame_offsets)
        self._looked_at = frozenset(offset % snippet_frames for offset in frame_offsets)
        self._snippet_frames = snippet_frames
        self._rate = Fraction(clock.frames_per_s)
        self._prepare = prepare
        self._base = first_index
        self._origin: tuple[Fraction, int] | None = None  # a time and its position
        self._shown: tuple[Frame, Fraction] | None = None  # and where on the grid it began
        self._shown_image: Image | None = None
        self._images: dict[int, Image] = {}  # by position, of the snippets that are to come
        self._undecided = 0  # the first position whose frame is not known
        self._next = 0  # the snippet that is to come, from 0 on
        self.late = 0
        """How many frames were left out: they came again, or late."""
        self.beginnings = 0
        """How often the time stamps began anew, the first time included."""

    @property
    def next_index(self) -> int:
        """The snippet that comes next; what did not come of those before is missing."""
        return self._base + self._next

    def push(self, frame: Frame, time_s: Fraction, wall_s: float | None = None) -> list[Snippet]:
        """Take the next frame, shown from ``time_s`` on; returns the snippets that are complete.

        ``time_s`` is its time stamp, from any beginning. ``wall_s`` is when it came, in seconds
        since position 0, of a live source; None in a recording.
        """
        at = self._place(time_s, wall_s)
        if at is None:
            self.late += 1
            return []
        if self._shown is not None:
            _, shown_at = self._shown
            if at - shown_at <= LONGEST_HOLD_S * self._rate:
                self._decide(math.ceil(at - _LOOK))
            else:
                self._decide_own()
        done = self._complete()
        self._undecided = max(self._undecided, math.ceil(at - _LOOK))
        done += self._complete()
        self._shown, self._shown_image = (frame, at), None
        return done

    def end(self) -> list[Snippet]:
        """The source has ended, or broken off; returns the last snippets that are complete.

        A frame that comes later begins anew.
        """
        if self._shown is not None:
            self._decide_own()
        self._origin = None
        return self._complete()

    def _place(self, time_s: Fraction, wall_s: float | None) -> Fraction | None:
        """Where on the grid a frame begins; None if it is late."""
        if self._origin is not None:
            origin_s, position = self._origin
            at = position + (time_s - origin_s) * self._rate
            assert self._shown is not None
            step = at - self._shown[1]
            if self._is_continued(at, step, wall_s):
                return at if step > 0 else None
            self._decide_own()
        position = self._undecided if wall_s is None else max(0, round(wall_s * self._rate))
        self._origin = (time_s, position)
        self.beginnings += 1
        return Fraction(position)

    def _is_continued(self, at: Fraction, step: Fraction, wall_s: float | None) -> bool:
        """Whether a frame at this position, a step behind the one before, is where it should be."""
        if step < -LONGEST_HOLD_S * self._rate:
            return False
        if wall_s is None:
            return step <= FURTHEST_S * self._rate
        return abs(float(at / self._rate) - wall_s) <= APART_S

    def _decide_own(self) -> None:
        """The frame shown stands for the one position that is its own."""
        assert self._shown is not None
        self._decide(math.ceil(self._shown[1] + 1 - _LOOK))

    def _decide(self, until: int) -> None:
        """The frame shown stands at the undecided positions below ``until``."""
        assert self._shown is not None
        for position in range(self._undecided, until):
            if position % self._snippet_frames in self._looked_at:
                if self._shown_image is None:
                    self._shown_image = self._prepare(self._shown[0])
                self._images[position] = self._shown_image
        self._undecided = max(self._undecided, until)

    def _complete(self) -> list[Snippet]:
        """The snippets all of whose positions are decided, but those that are missing."""
        done = []
        until = self._undecided // self._snippet_frames
        while self._next < until and self._images:
            frames = self._frames(self._next * self._snippet_frames)
            if frames is not None:
                done.append(Snippet(self.next_index, frames))
            self._next += 1
            self._forget(self._next * self._snippet_frames + self._offsets[0])
        self._next = max(self._next, until)
        return done

    def _frames(self, first: int) -> Image | None:
        """What the model looks at of the snippet from ``first`` on; None if it is missing."""
        own = [first + offset for offset in self._offsets if offset >= 0]
        if any(position not in self._images for position in own):
            return None
        stand_in = self._images[own[0]]
        return np.stack([self._images.get(first + each, stand_in) for each in self._offsets])

    def _forget(self, before: int) -> None:
        for position in [each for each in self._images if each < before]:
            del self._images[position]
