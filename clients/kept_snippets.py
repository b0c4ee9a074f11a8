"""The snippets that a feeder holds: those to be sent, and those that may have to be sent again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.protocol import Policy


class KeptSnippets:
    """The features of a stream's snippets, each (D,) float32, by their index.

          kept for a restarted engine      sent, not        given, not
                                           acknowledged     sent yet
        |--------------------------------|----------------|-----------|
        oldest                           acked            sent        next_index

    What is not here below `next_index` does not exist: it was skipped, or dropped. With the policy
    `wait` nothing is dropped; of the others, `buffer_snippets` may wait to be sent.
    `history_snippets` of the accepted ones are kept, or None: as many as `keep_at_least` says.
    """

    def __init__(
        self,
        first_index: int,
        policy: Policy,
        buffer_snippets: int,
        history_snippets: int | None,
    ) -> None:
        if buffer_snippets < 1:
            raise ValueError(f"buffer_snippets: expected at least 1, came {buffer_snippets}")
        self.next_index = first_index
        self.gone_until = first_index
        """No snippet below can be sent any more; above, what is not here does not exist."""
        self.dropped = 0
        self._policy = policy
        self._buffer_snippets = buffer_snippets
        self._history_given = history_snippets is not None
        self._history_snippets = history_snippets or 0
        self._rows: dict[int, NDArray[np.float32]] = {}  # ascending
        self._dropped: list[tuple[int, int]] = []  # [start, stop), ascending, not yet accepted

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, index: int) -> bool:
        return index in self._rows

    @property
    def oldest(self) -> int:
        """The oldest snippet that can still be sent."""
        return next(iter(self._rows), self.next_index)

    # ---- what comes ------------------------------------------------------------------------------

    def add(self, row: NDArray[np.float32], sent: int) -> None:
        """Take a snippet, or drop one, where too many wait that may be dropped; those below `sent`
        do not wait."""
        index, self.next_index = self.next_index, self.next_index + 1
        if self._policy != "wait" and index - sent >= self._buffer_snippets:
            waiting = [each for each in self._rows if each >= sent]
            if len(waiting) >= self._buffer_snippets:
                self.dropped += 1
                dropped = index if self._policy == "drop_newest" else waiting[0]
                self._note_dropped(dropped)
                if dropped == index:
                    return
                del self._rows[dropped]
        # Copied: the caller may change its array, and a view would keep all of it alive.
        self._rows[index] = row.copy()

    def skip(self, snippets: int) -> None:
        """The next ones do not exist. Raises ValueError for less than 0."""
        if snippets < 0:
            raise ValueError(f"snippets: expected at least 0, came {snippets}")
        self.next_index += snippets

    def _note_dropped(self, index: int) -> None:
        """What was skipped between two that were dropped counts as dropped: one span, not many, of
        a source that leaves out every second snippet while the engine is away for hours."""
        before = self.before(index)
        start, stop = self._dropped[-1] if self._dropped else (index, index)
        if stop == index or before is None or before < stop:
            self._dropped[-1:] = [(start, index + 1)]
        else:
            self._dropped.append((index, index + 1))

    # ---- what is to be sent ----------------------------------------------------------------------

    def run(self, first: int, until: int) -> list[NDArray[np.float32]]:
        """The consecutive snippets from `first` on, up to before `until`."""
        rows: list[NDArray[np.float32]] = []
        while first + len(rows) < until and (row := self._rows.get(first + len(rows))) is not None:
            rows.append(row)
        return rows

    def gap(self, first: int) -> tuple[int, bool]:
        """Where the gap that begins with `first` ends, and whether it was dropped."""
        stop = next((index for index in self._rows if index > first), self.next_index)
        for start, end in self._dropped:
            if start <= first < end:
                return min(end, stop), True
            if first < start < stop:
                stop = start
        return stop, False

    def before(self, index: int) -> int | None:
        """The newest snippet below an index."""
        return next((each for each in reversed(self._rows) if each < index), None)

    # ---- what goes -------------------------------------------------------------------------------

    def keep_at_least(self, snippets: int) -> None:
        """So many accepted ones, unless it was said how many."""
        if not self._history_given:
            self._history_snippets = max(self._history_snippets, snippets)

    def forget(self, acked: int, needed_from: int | None) -> None:
        """Lets go of accepted snippets that will not be needed again, as the engine says or, where
        it says nothing of that, behind the history."""
        keep_from = acked - self._history_snippets
        if needed_from is not None:
            keep_from = min(keep_from, needed_from) if self._history_given else needed_from
        keep_from = min(keep_from, acked, self.next_index)
        while (oldest := self.oldest) < keep_from:
            del self._rows[oldest]
            self.gone_until = oldest + 1
        oldest = min(self.oldest, acked)
        self._dropped = [span for span in self._dropped if span[1] > oldest]
