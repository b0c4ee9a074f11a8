"""A preallocated ring of rows, addressed by the absolute snippet index."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Ring:
    """The newest ``capacity`` rows of an endless sequence that begins at ``first_index``.

    Rows have the shape ``row_shape``. ``oldest <= index < next_index`` can be read. What is
    older is overwritten in place; nothing is ever shifted or allocated.
    """

    def __init__(
        self,
        capacity: int,
        row_shape: tuple[int, ...],
        first_index: int = 0,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self._rows = np.zeros((capacity, *row_shape), dtype=dtype)
        self.capacity = capacity  # rows that are kept
        self.first_index = first_index
        self.next_index = first_index

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row."""
        return self._rows.shape[1:]

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return self._rows.nbytes

    @property
    def oldest(self) -> int:
        """Index of the oldest row that can be read."""
        first, oldest = self.first_index, self.next_index - self.capacity
        return first if first > oldest else oldest  # quicker than max

    def append(self, rows: NDArray[np.generic]) -> None:
        """Write ``rows`` (n, *row_shape) at ``next_index``; n is at most ``capacity``."""
        n = len(rows)
        assert n <= self.capacity
        at = self.next_index % self.capacity
        head = min(n, self.capacity - at)
        self._rows[at : at + head] = rows[:head]
        self._rows[: n - head] = rows[head:]
        self.next_index += n

    def push(self, row: NDArray[np.generic]) -> None:
        """Write one row (*row_shape) at ``next_index``."""
        self._rows[self.next_index % self.capacity] = row
        self.next_index += 1

    def read(self, start: int, stop: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows ``start <= index < stop`` as a copy, or written to ``out`` of that length."""
        assert self.oldest <= start <= stop <= self.next_index, (self.oldest, start, stop)
        n = stop - start
        if out is None:
            out = np.empty((n, *self.row_shape), dtype=self._rows.dtype)
        at = start % self.capacity
        head = min(n, self.capacity - at)
        out[:head] = self._rows[at : at + head]
        out[head:] = self._rows[: n - head]
        return out

    def resized(self, capacity: int) -> Ring:
        """A ring of another capacity with the newest rows of this one."""
        first = max(self.oldest, self.next_index - capacity)
        ring = Ring(capacity, self.row_shape, first, self._rows.dtype)
        ring.append(self.read(first, self.next_index))
        return ring

    @property
    def newest(self) -> NDArray[Any]:
        """The newest row, as a view; zeros where there is none yet."""
        row: NDArray[Any] = self._rows[(self.next_index - 1) % self.capacity]
        return row

    def row(self, index: int) -> NDArray[Any]:
        """One row, as a view."""
        assert self.oldest <= index < self.next_index, (self.oldest, index, self.next_index)
        return self._rows[index % self.capacity]
