"""The newest snippets of a stream in a preallocated ring, in whatever order they come.

A snippet is here, still missing, or given up: it will never come, and the windows that hold its
place have it masked.

    index      | here, or given up              | missing | here, early |   room   |
               oldest                           known_until             top_index  limit

Below ``known_until`` nothing is missing. What was given up may reach beyond the room there is:
``next_index``, the snippet that has to come next, is then ahead of ``known_until``, which follows
as room comes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]


class SnippetBuffer:
    """Features (D,) of the newest ``capacity`` snippets, from ``first_index`` on."""

    def __init__(self, capacity: int, feature_dim: int, first_index: int) -> None:
        self._features = np.zeros((capacity, feature_dim), dtype=np.float32)
        self._here = np.zeros(capacity, dtype=np.bool_)
        self._given_up_until = first_index
        self.first_index = first_index
        self.known_until = first_index
        self.top_index = first_index
        self.came_until = first_index  # behind the newest snippet that came

    @property
    def feature_dim(self) -> int:
        """D."""
        return self._features.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the ring."""
        return self._features.nbytes + self._here.nbytes

    @property
    def next_index(self) -> int:
        """The first snippet that neither came nor was given up."""
        known, given_up = self.known_until, self._given_up_until
        return known if known >= given_up else given_up  # quicker than max

    @property
    def oldest(self) -> int:
        """The first of the known snippets that are kept."""
        return max(self.first_index, self.known_until - len(self._here))

    @property
    def missing_until(self) -> int | None:
        """The end of what is missing from ``next_index`` on, where a later snippet is here."""
        first = self.next_index
        if first >= self.top_index:
            return None
        return first + int(np.argmax(self.here(first, self.top_index)))

    def write(self, first_index: int, features: Floats, limit: int) -> int:
        """Take those of the snippets (n, D) that are new; returns how many are not.

        All are below ``limit``, up to where there is room.
        """
        stop = first_index + len(features)
        assert stop <= limit, (stop, limit)
        start = max(first_index, self.next_index)
        if start >= stop:
            return len(features)
        self.came_until = max(self.came_until, stop)
        rows = features[start - first_index :]
        if start == self.known_until == self.top_index:  # in order
            if len(rows) == 1:  # as live sources send them
                row = start % len(self._here)
                self._features[row] = rows[0]
                self._here[row] = True
                self.known_until = self.top_index = stop
                return len(features) - 1
            for ring, span in self._spans(start, stop):
                self._features[ring] = rows[span]
                self._here[ring] = True
            self.known_until = self.top_index = stop
            return len(features) - len(rows)
        self._make_place(stop)
        new = ~self.here(start, stop)
        at = np.arange(start, stop)[new] % len(self._here)
        self._features[at] = rows[new]
        self._here[at] = True
        self.settle(limit)
        return len(features) - len(at)

    def give_up(self, until: int, limit: int) -> None:
        """What is not here of the snippets below ``until`` will never come."""
        self._given_up_until = max(self._given_up_until, until)
        self.settle(limit)

    def settle(self, limit: int) -> None:
        """Follow what came and was given up as far as there is room, below ``limit``."""
        given_up_until = min(limit, self._given_up_until)
        self._make_place(given_up_until)
        known = max(self.known_until, given_up_until)
        here = self.here(known, self.top_index)
        self.known_until = known + (len(here) if here.all() else int(np.argmin(here)))

    def take_out(self, start: int, stop: int) -> None:
        """Of the known snippets ``start <= index < stop``, none is here."""
        self._clear(max(start, self.oldest), min(stop, self.known_until))

    def here(self, start: int, stop: int) -> Flags:
        """Which of the snippets ``start <= index < stop`` are here."""
        return self._here[np.arange(start, stop) % len(self._here)]

    def read(self, start: int, stop: int, features: Floats, here: Flags) -> None:
        """Write known snippets ``start <= index < stop`` to ``features`` (n, D), ``here`` (n,).

        Features of those that are not here are 0.
        """
        oldest = self.oldest
        assert oldest <= start <= stop <= self.known_until, (oldest, start, stop, self.known_until)
        if stop - start == 1:
            at = start % len(self._here)
            features[0], here[0] = self._features[at], self._here[at]
            if not here[0]:
                features[0] = 0
            return
        for ring, span in self._spans(start, stop):
            features[span] = self._features[ring]
            here[span] = self._here[ring]
        if not here.all():
            features[~here] = 0

    def _make_place(self, until: int) -> None:
        """Where new snippets will be there were much older ones."""
        if until > self.top_index:
            self._clear(self.top_index, until)
            self.top_index = until

    def _clear(self, start: int, stop: int) -> None:
        for ring, _ in self._spans(start, stop):
            self._here[ring] = False

    def _spans(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """Where the snippets stand: slices of the ring, and of arrays that begin at ``start``."""
        capacity, n = len(self._here), stop - start
        at = start % capacity
        head = min(n, capacity - at)
        yield slice(at, at + head), slice(0, head)
        if head < n:
            yield slice(0, n - head), slice(head, n)
