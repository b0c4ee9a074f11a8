"""The filter of a minimum score, which gives each action whole or not at all."""

from __future__ import annotations

from collections import OrderedDict

from hrpro.engine.protocol import ActionEvent, FinalProposal, Publication, StreamNotice

# Streams whose open actions are remembered; the longest silent one is forgotten first.
STREAMS_REMEMBERED = 10_000


class ScoreFilter:
    """Lets through what has a score of `min_score` at least; of an action that it has let through
    once, all that follows, whatever its score, so that who has heard of it hears of its end, too.

    An action that only its `end` lifts to the score has that one message; a `retract` never begins
    one. Of an action that was there before the subscription went on (`is_resumed`) all is let
    through: nobody here knows what was said of it.
    """

    def __init__(self, min_score: float, is_resumed: bool) -> None:
        self._min_score = min_score
        self._is_resumed = is_resumed
        # Of each stream its open actions, by session and id, and whether they were let through.
        self._actions: OrderedDict[str, dict[tuple[int, int], bool]] = OrderedDict()

    def passes(self, publication: Publication) -> bool:
        """Whether to let it through; to be asked of all events and notices, in their order."""
        match publication:
            case FinalProposal():
                return publication.score >= self._min_score
            case ActionEvent():
                return self._passes_event(publication)
            case StreamNotice(kind="opened" | "ended"):
                self._actions.pop(publication.stream, None)
        return True

    def forget(self) -> None:
        """Another engine publishes from now on."""
        self._actions.clear()
        self._is_resumed = False

    def _passes_event(self, event: ActionEvent) -> bool:
        actions = self._actions.setdefault(event.stream, {})
        self._actions.move_to_end(event.stream)
        if len(self._actions) > STREAMS_REMEMBERED:
            self._actions.popitem(last=False)
        key = event.session, event.id
        was_let_through = actions.pop(key, self._is_resumed and event.revision > 0)
        if event.is_last:
            return was_let_through or (event.kind == "end" and event.score >= self._min_score)
        actions[key] = was_let_through or event.score >= self._min_score
        return actions[key]
