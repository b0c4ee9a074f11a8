"""All state of one live stream: its newest snippets, how far they are processed, its localizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.ring import Ring
from hrpro.engine.wire import StreamError

if TYPE_CHECKING:
    from hrpro.engine.deployment import Deployment


class Stream:
    """One live stream; ``session`` counts how often its id was opened, ``deployment`` works for it.

    Snippets below ``next_index`` have come, scores below ``asked`` are asked for and below
    ``processed`` final.
    """

    def __init__(
        self,
        stream: str,
        session: int,
        first_index: int,
        deployment: Deployment,
    ) -> None:
        self.stream = stream
        self.session = session
        self.first_index = first_index
        self.asked = first_index
        self.processed = first_index
        self.deployment = deployment
        self.localizer = deployment.new_localizer(first_index)
        self.ended = False
        self.sequence = 0
        self.proposals = 0
        self.events = 0
        self.duplicates = 0
        self._plan = plan = deployment.plan
        self._backlog = backlog = deployment.config.backlog_snippets
        row_shape = (deployment.manifest.feature_dim,)
        self._ring = Ring(plan.window + backlog, row_shape, first_index)

    @property
    def bundle_id(self) -> str:
        """Of the bundle that works for it."""
        return self.deployment.bundle_id

    @property
    def next_index(self) -> int:
        """The first snippet that has not come yet."""
        return self._ring.next_index

    @property
    def send_until(self) -> int:
        """There is room for the snippets below this index."""
        return self._plan.stop(self.processed) + self._backlog

    @property
    def open_actions(self) -> int:
        """Actions whose end is not published yet."""
        return self.localizer.open_actions

    @property
    def buffer_bytes(self) -> int:
        """Of memory that the stream has for itself as long as it lives."""
        return self._ring.nbytes + self.localizer.buffer_bytes

    @property
    def finished(self) -> bool:
        """Whether the stream is over and all its scores are final."""
        return self.ended and self.processed == self.next_index

    @property
    def lag(self) -> int:
        """Snippets whose scores could be computed now and are not."""
        return max(0, self.ready_until() - self.processed)

    def append(self, first_index: int, features: NDArray[np.float32]) -> None:
        """Take the chunk (n, D) of consecutive snippets; what is there already is dropped.

        Raises StreamError and takes nothing if the chunk leaves a gap, does not fit the room,
        has another D, or holds a value that is not finite.
        """
        n, D = features.shape
        if self.ended:
            raise self._error("out_of_order", first_index, "no more snippets after the end")
        if self._ring.row_shape[0] != D:
            raise self._error(
                "wrong_dimension", first_index, f"expected D = {self._ring.row_shape[0]}, got {D}"
            )
        if first_index > self.next_index:
            raise self._error(
                "out_of_order", first_index, f"expected snippet {self.next_index} next"
            )
        if first_index + n > self.send_until:
            raise self._error(
                "no_credit", first_index, f"room up to snippet {self.send_until}, got {n} snippets"
            )
        finite = np.isfinite(features).all(axis=1)
        if not finite.all():
            at = first_index + int(finite.argmin())
            raise self._error("not_finite", at, "expected finite features, got NaN or infinity")
        repeated = min(n, self.next_index - first_index)
        self.duplicates += repeated
        self._ring.append(features[repeated:])

    def end(self, next_index: int) -> None:
        """No more snippets will come. Raises StreamError if some are missing."""
        if next_index != self.next_index:
            raise self._error(
                "out_of_order",
                next_index,
                f"expected the end at snippet {self.next_index}, which is the next one",
            )
        self.ended = True

    def ready_until(self) -> int:
        """Scores can be computed for the snippets below this index."""
        if self.ended:
            return self.next_index
        hop, lookahead = self._plan.hop, self._plan.lookahead
        return (self.next_index - lookahead) // hop * hop

    def read_window(
        self, stop: int, features: NDArray[np.float32], valid: NDArray[np.bool_]
    ) -> None:
        """Fill a window's ``features`` (T, D) and ``valid`` (T,) that ends before ``stop``."""
        start = stop - self._plan.window
        first, last = max(start, self.first_index), min(stop, self.next_index)
        features[: first - start] = 0
        self._ring.read(first, last, out=features[first - start : last - start])
        features[last - start :] = 0
        valid[:] = False
        valid[first - start : last - start] = True

    def _error(self, code: str, index: int, text: str) -> StreamError:
        where = f"stream {self.stream!r}, snippet {index}"
        return StreamError(code, f"{where}: {text}", self.next_index)
