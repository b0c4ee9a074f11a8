"""Stage 2 asked by many at once: who comes to a question waits, and all wait for one call.

    Asking (a generator) --Question--> UnderWay --all of them--> InstanceScorer
                         <--Answer---           <---------------

Who asks nothing, or has been answered, goes on to its outcome meanwhile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Answer = tuple[Floats, Floats, Floats]
Answers = Mapping[int, Answer]  # by the number of who has asked
T = TypeVar("T")

_PROPOSALS_AT_ONCE = 256


class InstanceScorer(Protocol):
    """Stage 2: an ONNX session in the engine, the torch model in training."""

    def score_instances(
        self, embedding: Floats, proposals: Floats, stretch: NDArray[np.int64] | None = None
    ) -> Answer:
        """Embedding (T, W) and proposals (N, 2) in snippets from its first row ->
        completeness (N, C), refined borders (N, 2), their completeness (N, C).

        With ``stretch`` (N, 2) the embedding holds several stretches: a proposal counts from the
        first of these rows, and sees nothing behind the last.
        """
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """For stage 2: a stretch of embedding (T, W), and proposals (N, 2) from its first row on."""

    scorer: InstanceScorer
    embedding: Floats
    proposals: Floats


# What asks questions on its way to an outcome: those of many streams are answered in one call.
Asking = Generator[Question, Answer, T]


class UnderWay(Generic[T]):
    """Many on the way to their outcomes; questions that come at the same time are one call, which
    ``compute`` makes, at once or in another thread."""

    def __init__(
        self,
        all_asking: Sequence[Asking[T]],
        compute: Callable[[Callable[[], Answers]], Future[Answers]],
    ) -> None:
        self._asking = all_asking
        self._compute = compute
        self._answers: Future[Answers] | None = None  # while some wait for theirs
        self._outcomes = self._go_on(dict.fromkeys(range(len(all_asking))))

    @property
    def is_over(self) -> bool:
        """Whether all outcomes were taken."""
        return self._answers is None and not self._outcomes

    @property
    def waits(self) -> bool:
        """Whether `take` has nothing to give yet."""
        return not self._outcomes and self._answers is not None and not self._answers.done()

    def take(self) -> list[T]:
        """The outcomes that are there by now, each of them once."""
        outcomes, self._outcomes = self._outcomes, []
        while self._answers is not None and self._answers.done():
            outcomes += self._go_on(self._answers.result())
        return outcomes

    def finish(self) -> list[T]:
        """All that are left; waits for the answers."""
        outcomes = self.take()
        while self._answers is not None:
            self._answers.result()
            outcomes += self.take()
        return outcomes

    def _go_on(self, answers: Mapping[int, Answer | None]) -> list[T]:
        """Each with its answer, as far as it comes without another one."""
        outcomes, questions = [], {}
        for n, answer in answers.items():
            try:
                # The first time there is no answer yet.
                questions[n] = self._asking[n].send(answer)  # type: ignore[arg-type]
            except StopIteration as stop:
                outcomes.append(stop.value)
        self._answers = self._compute(lambda: _answered(questions)) if questions else None
        return outcomes


def at_once(compute: Callable[[], T]) -> Future[T]:
    """What is computed here and now."""
    done: Future[T] = Future()
    done.set_result(compute())
    return done


def alone(asking: Asking[T]) -> T:
    """The outcome, each question answered by itself."""
    (outcome,) = UnderWay([asking], at_once).take()
    return outcome


def _answered(questions: Mapping[int, Question]) -> Answers:
    """One call for each scorer that is asked."""
    answers: dict[int, Answer] = {}
    by_scorer: dict[int, list[int]] = {}
    for n, question in questions.items():
        by_scorer.setdefault(id(question.scorer), []).append(n)
    for numbers in by_scorer.values():
        of_scorer = [questions[n] for n in numbers]
        answers.update(zip(numbers, _of_one_scorer(of_scorer), strict=True))
    return answers


def _of_one_scorer(questions: Sequence[Question]) -> list[Answer]:
    """In blocks: the features of many regions at once would need much memory."""
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
