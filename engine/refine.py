"""Closed runs -> scored and refined proposals (paper, "Temporal Action Localization Inference")."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.config import LocalizationConfig
from hrpro.engine.proposals import Run, RunDetector
from hrpro.engine.ring import Ring

Floats = NDArray[np.float32]
Scored = tuple[Floats, Floats, Floats]
T = TypeVar("T")

_PROPOSALS_AT_ONCE = 256


class InstanceScorer(Protocol):
    """Stage 2: an ONNX session in the engine, the torch model in training."""

    def score_instances(
        self, embedding: Floats, proposals: Floats, stretch: NDArray[np.int64] | None = None
    ) -> Scored:
        """Embedding (T, W) and proposals (N, 2) in snippets from its first row ->
        completeness (N, C), refined borders (N, 2), their completeness (N, C).

        With ``stretch`` (N, 2) the embedding holds several stretches: a proposal counts from the
        first of these rows, and sees nothing behind the last.
        """
        ...


class Proposal(NamedTuple):
    """A scored proposal: borders are positions in snippets, ``score`` is in [0, 1].

    ``run_stop`` is the end of the run that it came from.
    """

    label_index: int
    start: float
    end: float
    score: float
    run_stop: int

    @property
    def due_from(self) -> int:
        """The look-ahead counts from here: the end of its run, or its own where that is earlier."""
        return min(self.run_stop, int(self.end))


@dataclass(frozen=True, slots=True)
class Question:
    """For stage 2: a stretch of embedding (T, W), and proposals (N, 2) from its first row on."""

    scorer: InstanceScorer
    embedding: Floats
    proposals: Floats


# What asks questions on its way to an outcome: those of many streams are answered in one call.
Asking = Generator[Question, Scored, T]


def alone(asking: Asking[T]) -> T:
    """The outcome, each question answered by itself."""
    (outcome,) = together([asking])
    return outcome


def together(all_asking: Sequence[Asking[T]]) -> list[T]:
    """The outcomes, in their order; questions that come at the same time are one call."""
    outcomes: dict[int, T] = {}
    questions: dict[int, Question] = {}
    answers: dict[int, Scored | None] = dict.fromkeys(range(len(all_asking)))
    while answers:
        for n, answer in answers.items():
            try:
                # The first time there is no answer yet.
                questions[n] = all_asking[n].send(answer)  # type: ignore[arg-type]
            except StopIteration as stop:
                outcomes[n] = stop.value
        answers = {}
        by_scorer: dict[int, list[int]] = {}
        for n, question in questions.items():
            by_scorer.setdefault(id(question.scorer), []).append(n)
        for numbers in by_scorer.values():
            of_scorer = [questions[n] for n in numbers]
            answers.update(zip(numbers, _answers(of_scorer), strict=True))
        questions.clear()
    return [outcomes[n] for n in range(len(all_asking))]


def _answers(questions: Sequence[Question]) -> list[Scored]:
    """Of questions to one scorer. In blocks: the features of many regions at once would need much
    memory."""
    scorer = questions[0].scorer
    lengths = [len(each.embedding) for each in questions]
    counts = [len(each.proposals) for each in questions]
    firsts = np.cumsum([0, *lengths[:-1]])
    spans = np.stack([firsts, firsts + lengths - 1], axis=1)  # (questions, 2)
    stretch = None if len(questions) == 1 else np.repeat(spans, counts, axis=0)
    embedding = _joined([each.embedding for each in questions])
    proposals = _joined([each.proposals for each in questions])
    outputs = []
    for n in range(0, len(proposals), _PROPOSALS_AT_ONCE):
        block = slice(n, n + _PROPOSALS_AT_ONCE)
        of_block = () if stretch is None else (stretch[block],)
        outputs.append(scorer.score_instances(embedding, proposals[block], *of_block))
    a, b, c = (_joined(each) for each in zip(*outputs, strict=True))
    ends = itertools.accumulate(counts)
    blocks = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    return [(a[block], b[block], c[block]) for block in blocks]


def _joined(arrays: Sequence[Floats]) -> Floats:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def refine_runs(
    runs: Sequence[Run],
    detector: RunDetector,
    history: Ring,
    scorer: InstanceScorer | None,
    config: LocalizationConfig,
) -> Asking[list[Proposal]]:
    """Score closed runs by contrast and completeness, and move their borders.

    ``history`` holds the embedding of the newest snippets. The score is the weighted mean of p_OIC
    and the completeness of the refined borders in the run's class (with equal weights half of the
    paper's sum, which ranks the same). With ``keep_unrefined`` the unrefined borders are given
    too, as in the paper. Without a scorer, stage 1 alone: the run's own borders, scored by p_OIC.
    """
    if not runs:
        return []
    contrast = np.array([max(0.0, detector.outer_inner_contrast(run)) for run in runs])
    weight = config.completeness_weight
    borders = np.array([(run.start_position, run.stop_position) for run in runs])  # (N, 2)
    if scorer is None:
        return _proposals(runs, borders, contrast)
    # A border moves by up to the width of an outer region, and has one of its own from there on.
    first = math.floor(borders[:, 0].min()) - 2 * config.border_limit - 1
    first = max(first, history.oldest)
    stretch = history.read(first, history.next_index)  # (T, W)
    relative = (borders - first).astype(np.float32)  # (N, 2)
    completeness, refined, refined_completeness = yield Question(scorer, stretch, relative)
    labels = [run.label_index for run in runs]
    rows = np.arange(len(runs))
    refined = np.maximum(refined.astype(np.float64) + first, detector.first_index)
    refined = np.minimum(refined, detector.next_index)
    score = fuse(contrast, refined_completeness[rows, labels], weight)
    proposals = _proposals(runs, refined, score)
    if config.keep_unrefined:
        score = fuse(contrast, completeness[rows, labels], weight)
        proposals += _proposals(runs, borders, score)
    return proposals


def fuse(
    contrast: NDArray[np.float64], completeness: NDArray[np.float32], weight: float
) -> NDArray[np.float64]:
    """The scores of proposals, (N,), from p_OIC and completeness with its ``weight`` in [0, 1]."""
    return (1 - weight) * contrast + weight * completeness.astype(np.float64)


def _proposals(
    runs: Sequence[Run], borders: NDArray[np.float64], scores: NDArray[np.float64]
) -> list[Proposal]:
    return [
        Proposal(run.label_index, start, end, score, run.stop)
        for run, (start, end), score in zip(runs, borders.tolist(), scores.tolist(), strict=True)
        if end > start
    ]
