"""The scores of snippets, as they become final, for whoever looks at them: a page with curves.

They are made and sent only for streams that somebody has subscribed to, are not logged, and are
gone when they are sent.
"""

from __future__ import annotations

from collections import Counter

from hrpro.engine.messages import SnippetScores
from hrpro.engine.protocol import topic_prefix

_ALL = topic_prefix(SnippetScores.TYPE)
# Streams of which it is known whether they are wanted.
_REMEMBERED = 65_536


class Curves:
    """Which streams' scores are wanted, and those that wait to be sent."""

    def __init__(self) -> None:
        self._topics: Counter[bytes] = Counter()  # of all subscriptions that scores fall under
        self._wanted: dict[str, bool] = {}
        self._waiting: list[SnippetScores] = []

    def subscribed(self, topic: bytes, more: int = 1) -> None:
        """There are so many more subscriptions, or fewer, to what begins with this topic."""
        if not more or not (topic.startswith(_ALL) or _ALL.startswith(topic)):
            return
        self._topics[topic] += more
        if self._topics[topic] <= 0:
            del self._topics[topic]
        self._wanted.clear()

    def forget(self) -> None:
        """All subscriptions have ended."""
        self._topics.clear()
        self._wanted.clear()

    def wanted(self, stream: str) -> bool:
        """Whether anybody has subscribed to the scores of a stream."""
        if not self._topics:
            return False
        if stream not in self._wanted:
            if len(self._wanted) >= _REMEMBERED:
                self._wanted.clear()
            own = topic_prefix(SnippetScores.TYPE, stream)
            self._wanted[stream] = any(own.startswith(topic) for topic in self._topics)
        return self._wanted[stream]

    def add(self, scores: SnippetScores) -> None:
        """Scores that are final, to be sent."""
        self._waiting.append(scores)

    def take(self) -> list[SnippetScores]:
        """What is to be sent now."""
        taken, self._waiting = self._waiting, []
        return taken
