"""Decisions in snippets -> messages in seconds, numbered for their stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.localizer import Decision, Final
from hrpro.engine.messages import (
    ActionEvent,
    FinalProposal,
    NoticeKind,
    Publication,
    SnippetScores,
    StreamNotice,
)
from hrpro.engine.stream import Stream
from hrpro.engine.timebase import SnippetClock
from hrpro.engine.tracker import ActionChange


class Publisher:
    """Makes publications; the counters that number them belong to the streams."""

    def __init__(self, clock: SnippetClock, classes: Sequence[str], bundle_id: str) -> None:
        self._clock = clock
        self._classes = tuple(classes)
        self._bundle_id = bundle_id

    def publish(
        self, stream: Stream, decisions: Sequence[Decision], newest_index: int
    ) -> list[Publication]:
        """Messages for decisions that were taken knowing the snippets up to ``newest_index``."""
        return [
            self._final(stream, decision, newest_index)
            if isinstance(decision, Final)
            else self._event(stream, decision, newest_index)
            for decision in decisions
        ]

    def notice(
        self, stream: Stream, kind: NoticeKind, span: tuple[int, int] | None = None
    ) -> StreamNotice:
        """What has happened to a stream; ``span`` is where, if not in its session as a whole."""
        first_index, next_index = span or (stream.first_index, stream.next_index)
        return StreamNotice(
            stream=stream.stream,
            session=stream.session,
            sequence=_next_sequence(stream),
            kind=kind,
            first_index=first_index,
            next_index=next_index,
            proposals=stream.proposals,
            events=stream.events,
        )

    def scores(
        self,
        stream: Stream,
        first_index: int,
        scores: NDArray[np.float32],
        attention: NDArray[np.float32],
    ) -> SnippetScores:
        """P (n, C) and attention (n,) of the snippets from ``first_index`` on."""
        return SnippetScores.known(
            stream.stream,
            stream.session,
            first_index,
            self._clock.frames_per_s,
            self._clock.snippet_frames,
            self._classes,
            self._bundle_id,
            np.column_stack([attention, scores]),
        )

    def _event(self, stream: Stream, change: ActionChange, newest_index: int) -> ActionEvent:
        stream.events += 1
        return ActionEvent.known(
            stream.stream,
            stream.session,
            _next_sequence(stream),
            change.id,
            change.kind,
            change.revision,
            self._classes[change.label_index],
            self._clock.seconds(change.start),
            None if change.end is None else self._clock.seconds(change.end),
            change.score,
            newest_index,
            self._clock.seconds(newest_index + 1),
            self._bundle_id,
            None,  # number and previous are those of a log
            None,
        )

    def _final(self, stream: Stream, final: Final, newest_index: int) -> FinalProposal:
        proposal_id = stream.proposals
        stream.proposals += 1
        return FinalProposal.known(
            stream.stream,
            stream.session,
            _next_sequence(stream),
            proposal_id,
            self._classes[final.proposal.label_index],
            self._clock.seconds(final.proposal.start),
            self._clock.seconds(final.proposal.end),
            final.proposal.score,
            newest_index,
            self._clock.seconds(newest_index + 1),
            final.action_id,
            self._bundle_id,
            None,  # number and previous are those of a log
            None,
        )


def _next_sequence(stream: Stream) -> int:
    sequence = stream.sequence
    stream.sequence += 1
    return sequence
