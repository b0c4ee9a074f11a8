"""Snippet index <-> seconds: the only clock of training, export, engine and clients.

A snippet is a run of `snippet_frames` consecutive video frames; it has one feature vector.
The only thing that is counted is the integer `snippet_index`, from 0. Seconds are computed
from it here, by one multiplication and one division, and are never added up.

At 25 frames/s and 16 frames per snippet:

    frame           0               16              32              48
                    |---------------|---------------|---------------|--
    snippet_index   |       0       |       1       |       2       |
    position        0.0     0.5     1.0             2.0             3.0
    seconds         0.00    0.32    0.64            1.28            1.92

A position is a border, not a snippet: position 1.0 is the left border of snippet 1 and also
the right border of snippet 0. An action that covers snippets 1 and 2 therefore lasts from
`seconds(1)` = 0.64 s to `seconds(3)` = 1.92 s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SnippetClock:
    """The frame rate and the snippet length of a stream; two clocks are equal by value.

    Raises ValueError unless `frames_per_s` is finite and positive and `snippet_frames` is an
    integer of at least 1.
    """

    frames_per_s: float = 25.0
    snippet_frames: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.frames_per_s, bool) or not (
            isinstance(self.frames_per_s, (int, float))
            and math.isfinite(self.frames_per_s)
            and self.frames_per_s > 0
        ):
            raise ValueError(
                f"frames_per_s: expected a finite number above 0, came {self.frames_per_s!r}"
            )
        if type(self.snippet_frames) is not int or self.snippet_frames < 1:
            raise ValueError(
                f"snippet_frames: expected an integer of at least 1, came {self.snippet_frames!r}"
            )
        # 25 and 25.0 must not differ in any text or byte that is made from this clock.
        object.__setattr__(self, "frames_per_s", float(self.frames_per_s))

    @property
    def snippet_s(self) -> float:
        """How long one snippet lasts, in seconds."""
        return self.snippet_frames / self.frames_per_s

    def seconds(self, position: float) -> float:
        """The time of `position` (in snippets, fractions allowed) from the stream's frame 0."""
        return position * self.snippet_frames / self.frames_per_s

    def position(self, seconds: float) -> float:
        """The position (in snippets, with its fraction) of a time; undoes `seconds`."""
        return seconds * self.frames_per_s / self.snippet_frames

    def index_of_frame(self, frame: int) -> int:
        """The snippet_index of the snippet that holds video frame `frame` (from 0).

        Raises ValueError when `frame` is negative.
        """
        if frame < 0:
            raise ValueError(f"frame: expected an integer of at least 0, came {frame!r}")
        return frame // self.snippet_frames
