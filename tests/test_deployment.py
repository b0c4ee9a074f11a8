"""A running pipeline goes on with another bundle: what stays, what changes, what is refused."""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driving import PATIENCE_S, Drive, Turn, assert_same, engine_config, finals, of_stream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lives import FIRST_INDEX, LENGTH, Life, durable_config
from lives import NAMES as STREAMS
from other_bundles import changed_bundle, renamed_bundle, reweighted_bundle, widened_bundle
from tiny_model import tiny_recording

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.config import EngineConfig, LocalizationConfig, WindowConfig
from hrpro.engine.deployer import FollowedFolder
from hrpro.engine.deployment import DeployError, Deployment, check_agreement, relied_on
from hrpro.engine.localizer import Decision, Final, StreamLocalizer
from hrpro.engine.messages import ActionEvent, Publication, StreamNotice
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.proposals import Run, RunDetector
from hrpro.engine.refine import Proposal
from hrpro.engine.ring import Ring
from hrpro.export.bundle import Bundle, Manifest

Floats = np.ndarray

few = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# One threshold: runs of a class do not overlap. Suppression without any effect, so that a score is
# that of the run alone.
APART = (
    "localization.thresholds=[0.5]",
    "localization.peak_gate=0",
    "localization.score_floor=0",
    "localization.soft_nms_sigma=1e9",
)


@dataclass
class Loaded:
    """A bundle and its backend, from which deployments are made."""

    bundle: Bundle
    backend: OnnxRuntimeBackend

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    def deployment(self, **options: Any) -> Deployment:
        return Deployment(self.manifest, self.backend, engine_config(self.manifest, **options))

    def drive(self, recordings: dict[str, Floats], first_index: int = 0, **options: Any) -> Drive:
        config = engine_config(self.manifest, **options)
        return Drive(self.manifest, self.backend, config, recordings, first_index)

    def whole(self, features: Floats) -> tuple[Floats, Floats]:
        """Scores and embedding of a recording in one piece."""
        valid = np.ones((1, len(features)), np.bool_)
        scores, embedding, _ = self.backend.score_snippets(features[None], valid)
        return scores[0], embedding[0]


@pytest.fixture(scope="module")
def others(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """The shared bundle as "a", and what differs from it."""
    folder = tmp_path_factory.mktemp("others")
    apart = changed_bundle(bundle.folder, folder / "apart", *APART)
    made = {
        "a": bundle,
        "renamed": renamed_bundle(bundle.folder, folder / "renamed"),
        "reweighted": reweighted_bundle(bundle.folder, folder / "reweighted", seed=1),
        "wide": widened_bundle(bundle.folder, folder / "wide"),
        "apart": apart,
        "apart and wide": widened_bundle(apart.folder, folder / "apart_and_wide"),
    }
    config = EngineConfig(threads=1)
    return {name: Loaded(each, OnnxRuntimeBackend(each, config)) for name, each in made.items()}


def anonymous(published: Iterable[Publication]) -> list[Publication]:
    """Without the bundle that made them."""
    return [replace(p, bundle_id="any") if hasattr(p, "bundle_id") else p for p in published]


def bundle_ids(published: Iterable[Publication]) -> set[str]:
    return {each.bundle_id for each in published if hasattr(each, "bundle_id")}


def assert_continuous(published: Sequence[Publication], streams: Iterable[str]) -> None:
    """Nothing is missing and nothing there twice, in the numbers of each stream."""
    for name in streams:
        told = of_stream(published, name)
        assert {each.session for each in told} == {1}
        assert [each.sequence for each in told] == list(range(len(told)))
        proposals = finals(told)
        assert [each.id for each in proposals] == list(range(len(proposals)))
        events = [each for each in told if isinstance(each, ActionEvent)]
        started = [each.id for each in events if each.kind == "start"]
        assert started == list(range(len(started)))
        assert sorted(each.id for each in events if each.is_last) == started
        for action in started:
            revisions = [each.revision for each in events if each.id == action]
            assert revisions == list(range(len(revisions)))


# --- another id, nothing else --------------------------------------------------------------------

NAMES = ("a", "b", "c")
turns = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(NAMES), st.integers(0, 9), st.integers(0, 2)),
        st.sampled_from(["deploy", "roll back"]),
    ),
    max_size=40,
)


@few
@given(turns=turns, hop=st.sampled_from([1, 4]), max_batch=st.sampled_from([1, 2, 5]))
def test_swaps_to_the_same_model_change_the_id_alone(
    others: dict[str, Loaded], turns: list[Turn | str], hop: int, max_batch: int
) -> None:
    recordings = {name: tiny_recording(25 + 5 * n, n) for n, name in enumerate(NAMES)}
    options = {"hop": hop, "max_batch": max_batch}
    first, second = others["a"], others["renamed"]
    drive = first.drive(recordings, **options)
    at_work, before = first.manifest.bundle_id, None
    for turn in turns:
        count = len(drive.published)
        if turn == "deploy":
            other = second if at_work == first.manifest.bundle_id else first
            assert drive.pipeline.deploy(other.deployment(**options)) == len(NAMES)
            at_work, before = other.manifest.bundle_id, at_work
        elif turn == "roll back":
            if before is None:
                with pytest.raises(DeployError, match="there was none"):
                    drive.pipeline.roll_back()
            else:
                assert drive.pipeline.roll_back() == len(NAMES)
                at_work, before = before, at_work
        else:
            drive.take_turns([turn])  # type: ignore[list-item]
        assert drive.pipeline.bundle_id == at_work
        assert bundle_ids(drive.published[count:]) <= {at_work}
    count = len(drive.published)
    published = drive.finish(chunk=7)
    assert bundle_ids(published[count:]) == {at_work}
    assert_continuous(published, NAMES)
    for name, features in recordings.items():
        expected = first.drive({name: features}, **options).finish()
        assert_same(anonymous(of_stream(published, name)), anonymous(expected))


def test_deploying_the_bundle_that_works_keeps_the_one_before(others: dict[str, Loaded]) -> None:
    first, second = others["a"], others["renamed"]
    pipeline = Pipeline(first.deployment())
    pipeline.deploy(second.deployment())
    pipeline.deploy(second.deployment())  # read again: its folder may be a repaired copy
    pipeline.roll_back()
    assert pipeline.bundle_id == first.manifest.bundle_id
    pipeline.roll_back()
    assert pipeline.bundle_id == second.manifest.bundle_id


# --- other weights -------------------------------------------------------------------------------


@few
@given(
    pieces=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=8),
    hop=st.sampled_from([1, 4]),
    first_index=st.integers(0, 5),
    second=st.sampled_from(["reweighted", "wide"]),
)
def test_each_snippet_has_the_scores_of_the_bundle_at_work(
    others: dict[str, Loaded],
    pieces: list[tuple[int, int]],
    hop: int,
    first_index: int,
    second: str,
) -> None:
    recordings = {"x": tiny_recording(70), "y": tiny_recording(50, 1)}
    models = [others["a"], others[second]]
    drive = models[0].drive(recordings, first_index, hop=hop)
    # For each stream, from which snippet on which model has to have scored it.
    changes = {name: [(0, 0)] for name in recordings}
    for number, (count, steps) in enumerate(pieces, start=1):
        drive.take_turns([("x", count, 0), ("y", count, steps)])
        for name, stream in drive.pipeline.streams.items():
            changes[name].append((stream.processed - first_index, number % 2))
        assert drive.pipeline.deploy(models[number % 2].deployment(hop=hop)) == 2
    published = drive.finish(chunk=5)
    for name, features in recordings.items():
        whole = [each.whole(features)[0] for each in models]
        expected = whole[0].copy()
        for start, model in changes[name]:
            expected[start:] = whole[model][start:]
        got = drive.scores(name)
        assert len(got) == len(features)
        np.testing.assert_allclose(got, expected, atol=1e-4)
    assert drive.pipeline.snippets_scored == 120
    assert_continuous(published, recordings)


def test_the_models_of_these_tests_differ(others: dict[str, Loaded]) -> None:
    features = tiny_recording(70)
    scores = {name: each.whole(features)[0] for name, each in others.items()}
    assert np.abs(scores["a"] - scores["reweighted"]).mean() > 0.1
    np.testing.assert_allclose(scores["wide"], scores["a"], atol=1e-6)
    assert others["wide"].manifest.embedding_width == 2 * others["a"].manifest.embedding_width


def test_a_stream_keeps_its_snippets_and_its_place(others: dict[str, Loaded]) -> None:
    drive = others["a"].drive({"x": tiny_recording(40)}, first_index=3, backlog=16)
    drive.take_turns([("x", 20, 3), ("x", 4, 0)])
    stream = drive.pipeline.streams["x"]

    def state() -> tuple[int, ...]:
        told = (stream.next_index, stream.processed, stream.send_until, stream.sequence)
        return (*told, stream.proposals, stream.events, stream.open_actions, stream.session)

    before = state()
    assert stream.processed < stream.ready_until()  # there is work left
    drive.pipeline.deploy(others["reweighted"].deployment(backlog=16))
    assert state() == before
    assert drive.pipeline.streams["x"] is stream
    assert stream.bundle_id == others["reweighted"].manifest.bundle_id
    assert drive.published[-1].sequence == before[3] - 1


# --- runs that reach back ------------------------------------------------------------------------


def recorded(drive: Drive, name: str = "x") -> dict[tuple[int, int], Proposal]:
    """The final proposals of a stream by class and end of their run."""
    decisions = [each for each in drive.recorders[name].decisions if isinstance(each, Final)]
    by_run = {(e.proposal.label_index, e.proposal.run_stop): e.proposal for e in decisions}
    assert len(by_run) == len(decisions)
    return by_run


@pytest.mark.parametrize("nth", [1, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_runs_from_before_other_weights_are_scored_by_contrast_alone(
    others: dict[str, Loaded], nth: int, seed: int
) -> None:
    features = tiny_recording(100, seed)
    first, second = others["apart"], others["apart and wide"]
    limit = first.manifest.localization.border_limit
    undisturbed = first.drive({"x": features})
    undisturbed.finish()
    detector = RunDetector(3, first.manifest.localization)
    runs = [r for row in undisturbed.scores("x") for r in detector.push(row)] + detector.flush()
    swap_at = [run for run in runs if run.stop - run.start > 4][nth].start + 2
    drive = first.drive({"x": features})
    while (swapped := drive.pipeline.streams["x"].processed) < swap_at:
        drive.take_turns([("x", 1, 1)])
    drive.pipeline.deploy(second.deployment())
    drive.finish()

    expected, got = recorded(undisturbed), recorded(drive)
    # The same scores: what is over before the swap, and known to be, is the same.
    kinds = Counter[str]()
    for run in runs:
        key = (run.label_index, run.stop)
        if run.start < swapped <= run.stop:
            kinds["reaching over"] += 1
            # Its own borders, and p_OIC with its right outer region, if it is above 0.
            contrast = detector_contrast(run, drive.scores("x"))
            if contrast <= 0:
                assert key not in got
                continue
            assert got[key] == Proposal(
                run.label_index,
                pytest.approx(run.start_position, abs=1e-4),
                pytest.approx(run.stop_position, abs=1e-4),
                pytest.approx(contrast, abs=1e-4),
                run.stop,
            )
        elif run.evidence_stop <= swapped or run.start > swapped + 2 * limit:
            kinds["apart"] += 1
            assert close(got.get(key), expected.get(key))
        elif run.start >= swapped:
            kinds["just after"] += 1
            # Stage 2 sees what is there from the swap on, as at the beginning of a stream.
            assert key not in got or not at_borders_of(run, got[key])
    assert kinds["reaching over"] >= 1 and kinds["apart"] >= 5
    assert set(got) <= {(run.label_index, run.stop) for run in runs}


def detector_contrast(run: Run, scores: Floats) -> float:
    """p_OIC as the paper has it, of the run's class."""
    track = scores[:, run.label_index].astype(np.float64)
    left = track[max(0, run.start - run.border) : run.start]
    right = track[run.stop : run.stop + run.border]
    outer = np.concatenate([left, right])
    inner = track[run.start : run.stop].mean()
    return float(inner - (outer.mean() if len(outer) else 0.0))


def close(one: Proposal | None, other: Proposal | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.allclose(
        [one.start, one.end, one.score], [other.start, other.end, other.score], atol=1e-4
    )


def at_borders_of(run: Run, proposal: Proposal) -> bool:
    own = (run.start_position, run.stop_position)
    return np.allclose((proposal.start, proposal.end), own, atol=1e-3)


def test_what_is_over_at_a_swap_is_scored_with_what_is_known(others: dict[str, Loaded]) -> None:
    first, second = others["apart"], others["apart and wide"]
    scores, embedding = first.whole(tiny_recording(100))
    config, wait = first.manifest.localization, 9
    over = 0
    for swap_at in range(20, 60):
        ours, flushed = (
            StreamLocalizer(3, 8, config, first.backend, wait) for _ in range(2)
        )  # fmt: skip
        before = ours.advance(scores[:swap_at], embedding[:swap_at])
        assert flushed.advance(scores[:swap_at], embedding[:swap_at]) == before
        closed = {(run.label_index, run.stop) for run in ours._closed}
        ours.use(config, second.backend, embedding_width=16)
        later = ours.advance(scores[swap_at:], np.tile(embedding[swap_at:], 2))
        at_the_end = {key(each): each for each in proposals(flushed.flush())}
        for proposal in proposals(later):
            if key(proposal) in closed:
                assert proposal == at_the_end[key(proposal)]
                over += 1
    assert over > 10


def proposals(decisions: Iterable[Decision]) -> list[Proposal]:
    return [each.proposal for each in decisions if isinstance(each, Final)]


def key(proposal: Proposal) -> tuple[int, int]:
    return proposal.label_index, proposal.run_stop


# --- other settings ------------------------------------------------------------------------------

levels = st.sampled_from([0.0, 0.1, 0.1875, 0.25, 0.3, 0.375, 0.5, 0.625, 0.875, 1.0])
stretches = st.tuples(st.tuples(levels, levels), st.integers(1, 9))
tracks = st.lists(stretches, min_size=1, max_size=12).map(
    lambda parts: np.repeat(
        np.array([values for values, _ in parts], np.float32), [n for _, n in parts], axis=0
    )[:60]
)
configs = st.builds(
    LocalizationConfig,
    thresholds=st.lists(
        st.sampled_from([0.1, 0.15, 0.3, 0.45, 0.6, 0.8]), min_size=1, max_size=4, unique=True
    ).map(lambda values: tuple(sorted(values))),
    peak_gate=st.sampled_from([0.0, 0.2, 0.55]),
    border_limit=st.integers(1, 4),
    history_snippets=st.sampled_from([64, 100]),
    score_floor=st.sampled_from([0.0, 0.1]),
)


def test_an_open_run_keeps_what_lies_left_of_it() -> None:
    old = LocalizationConfig(thresholds=(0.5,), peak_gate=0.0)
    localizer = StreamLocalizer(1, 1, old, None, 3)
    track = np.array([[0.25]] * 6 + [[0.75]] * 12 + [[0.0]], np.float32)
    localizer.advance(track[:10], track[:10])
    localizer.use(old.model_copy(update={"thresholds": (0.375,)}), None, None)
    runs = [run for row in track[10:] for run in localizer._detector.push(row)]
    # From a quarter of the way from 0.25 to 0.75, to half of the way from 0.75 to 0.
    assert runs == [Run(0, 6, 18, 5.75, 18.0, 3, 0.75, left_sum=3 * 0.25, left_count=3)]


@settings(max_examples=300)
@given(track=tracks, old=configs, new=configs, at=st.integers(0, 60), first_index=st.integers(0, 3))
def test_open_runs_are_found_as_if_the_settings_had_been_there_from_the_beginning(
    track: Floats, old: LocalizationConfig, new: LocalizationConfig, at: int, first_index: int
) -> None:
    at = min(at, len(track))
    reference = RunDetector(2, new, first_index)
    localizer = StreamLocalizer(2, 2, old, None, 3, first_index)
    for row in track[:at]:
        reference.push(row)
    localizer.advance(track[:at], track[:at])
    localizer.use(new, None, None)
    detector = localizer._detector
    for label in (0, 1):
        expected = reference.earliest_open_start(label)
        assert detector.earliest_open_start(label) == expected
    for row in track[at:]:
        same_runs(detector, detector.push(row), reference, reference.push(row))
    same_runs(detector, detector.flush(), reference, reference.flush())


def same_runs(
    detector: RunDetector, got: list[Run], reference: RunDetector, expected: list[Run]
) -> None:
    """Equal in all values, and in what is known of their contrast, but for rounding."""
    assert [run._replace(left_sum=0.0, inner_mean=0.0) for run in got] == [
        run._replace(left_sum=0.0, inner_mean=0.0) for run in expected
    ]
    for one, other in zip(got, expected, strict=True):
        assert one.left_sum == pytest.approx(other.left_sum, abs=1e-9)
        assert one.inner_mean == pytest.approx(other.inner_mean, abs=1e-9)
        contrast = reference.outer_inner_contrast(other)
        assert detector.outer_inner_contrast(one) == pytest.approx(contrast, abs=1e-9)


def test_a_score_that_is_nearly_a_threshold_is_on_the_same_side_of_it() -> None:
    # As float32, 0.3 is a little above 0.3.
    old = LocalizationConfig(thresholds=(0.3,), peak_gate=0.0)
    localizer = StreamLocalizer(1, 1, old, None, 3)
    track = np.array([[0.0], *[[0.3]] * 20], np.float32)
    localizer.advance(track, track)
    assert localizer._detector.earliest_open_start(0) == 1
    localizer.use(old.model_copy(update={"score_floor": 0.01}), None, None)
    assert localizer._detector.earliest_open_start(0) == 1


@given(track=tracks, old=configs, new=configs, at=st.integers(0, 60))
def test_no_run_is_published_twice(
    track: Floats, old: LocalizationConfig, new: LocalizationConfig, at: int
) -> None:
    at = min(at, len(track))
    before, after = RunDetector(2, old), RunDetector(2, new)
    allowed = [run for row in track[:at] for run in before.push(row)]
    for row in track[:at]:
        after.push(row)
    allowed += [run for row in track[at:] for run in after.push(row)] + after.flush()

    localizer = StreamLocalizer(2, 2, old, None, 3)
    decisions = localizer.advance(track[:at], track[:at])
    localizer.use(new, None, None)
    decisions += localizer.advance(track[at:], track[at:]) + localizer.flush()
    published = Counter(
        (each.label_index, each.start, each.end, each.run_stop) for each in proposals(decisions)
    )
    runs = Counter(
        (run.label_index, run.start_position, run.stop_position, run.stop) for run in allowed
    )
    assert published <= runs
    assert localizer.open_actions == 0


def test_a_run_that_is_longer_than_what_is_remembered_begins_there() -> None:
    old = LocalizationConfig(thresholds=(0.5,), peak_gate=0.0, history_snippets=32)
    localizer = StreamLocalizer(1, 1, old, None, 2)
    track = np.array([[0.0]] * 3 + [[0.75]] * 50, np.float32)
    localizer.advance(track, track)
    localizer.use(old.model_copy(update={"thresholds": (0.625,)}), None, None)
    over = np.zeros((6, 1), np.float32)
    (final,) = proposals(localizer.advance(over, over))
    # 53 snippets came, the last 32 of them are remembered. From 0.75 at 52.5 down to 0 at 53.5.
    assert (final.start, final.end) == (21.0, pytest.approx(52.5 + 0.125 / 0.75))
    assert final.score == pytest.approx(0.75)  # nothing left of it, 0 right of it


@pytest.mark.parametrize("count", [3, 8, 11])
def test_a_resized_ring_has_the_newest_rows(count: int) -> None:
    ring = Ring(8, (1,), first_index=5)
    for row in range(5, 5 + count):
        ring.append(np.array([[row]], np.float32))
    for capacity in (4, 8, 16):
        resized = ring.resized(capacity)
        assert (resized.capacity, resized.next_index) == (capacity, 5 + count)
        newest = range(max(ring.oldest, 5 + count - capacity), 5 + count)
        assert resized.oldest == newest[0]
        assert resized.read(newest[0], 5 + count)[:, 0].tolist() == list(newest)
        resized.append(np.array([[-1]], np.float32))
        assert resized.row(5 + count - 1).tolist() == [5 + count - 1]


def test_thresholds_of_events_change_at_the_swap() -> None:
    old = LocalizationConfig(
        thresholds=(0.5,), event_start=0.5, event_end=0.25, event_update_score=0.5
    )
    localizer = StreamLocalizer(1, 1, old, None, 1)

    def kinds(value: float) -> list[str]:
        row = np.array([[value]], np.float32)
        changes = [d for d in localizer.advance(row, row) if not isinstance(d, Final)]
        return [f"{each.kind} {each.id}" for each in changes]

    assert [kinds(value) for value in (0.0, 0.75, 0.375)] == [[], ["start 0"], []]
    localizer.use(old.model_copy(update={"event_start": 0.9, "event_end": 0.4}), None, None)
    # 0.375 is below the new end, 0.75 not above the new start.
    assert [kinds(value) for value in (0.375, 0.75, 0.95)] == [["end 0"], [], ["start 1"]]


def test_a_floor_counts_from_the_swap_on() -> None:
    old = LocalizationConfig(thresholds=(0.25,), peak_gate=0.0, score_floor=0.0)
    localizer = StreamLocalizer(1, 1, old, None, 1)
    weak = np.array([[0], [0.5], [0], [0]], np.float32)
    assert len(proposals(localizer.advance(weak, weak))) == 1
    localizer.use(old.model_copy(update={"score_floor": 0.6}), None, None)
    assert proposals(localizer.advance(weak, weak)) == []
    strong = np.array([[0], [1], [0], [0]], np.float32)
    assert [each.score for each in proposals(localizer.advance(strong, strong))] == [1.0]


def test_a_bundle_with_other_settings_takes_over(
    others: dict[str, Loaded], bundle: Bundle, tmp_path: Path
) -> None:
    changed = changed_bundle(
        bundle.folder, tmp_path / "changed",
        "localization.thresholds=[0.2,0.6]", "localization.history_snippets=40",
        "localization.score_floor=0.05", "localization.keep_unrefined=true",
    )  # fmt: skip
    second = Loaded(changed, OnnxRuntimeBackend(changed, EngineConfig(threads=1)))
    features = tiny_recording(120)
    drive = others["a"].drive({"x": features})
    for number in range(12):
        drive.take_turns([("x", 10, 10)])
        drive.pipeline.deploy((second, others["a"])[number % 2].deployment())
    published = drive.finish()
    assert_continuous(published, ["x"])
    np.testing.assert_allclose(drive.scores("x"), others["a"].whole(features)[0], atol=1e-4)
    assert bundle_ids(published) == {bundle.manifest.bundle_id, changed.manifest.bundle_id}
    of_second = [e for e in finals(published) if e.bundle_id == changed.manifest.bundle_id]
    assert of_second and all(each.score > 0.05 for each in of_second)


# --- canaries ------------------------------------------------------------------------------------


def test_a_canary_has_its_streams_and_no_other(others: dict[str, Loaded]) -> None:
    recordings = {name: tiny_recording(40, n) for n, name in enumerate(NAMES)}
    first, second = others["a"], others["reweighted"]
    first_id, second_id = first.manifest.bundle_id, second.manifest.bundle_id
    drive = first.drive(recordings)
    drive.take_turns([("a", 10, 0), ("b", 10, 0), ("c", 10, 2)])
    pipeline = drive.pipeline
    canary_from = {name: pipeline.streams[name].processed for name in NAMES}
    tried = second.deployment()
    assert pipeline.deploy(tried, ["b", "later"]) == 1
    assert (pipeline.bundle_id, pipeline.deployments.previous) == (first_id, None)
    assert {n: s.bundle_id for n, s in pipeline.streams.items()} == {
        "a": first_id, "b": second_id, "c": first_id,
    }  # fmt: skip
    assert pipeline.open("later", 0).bundle_id == second_id
    assert pipeline.open("other", 0).bundle_id == first_id
    for name in ("later", "other"):
        pipeline.end(name, 0)
    count = len(drive.published)
    published = drive.finish()
    for name in ("a", "c"):
        alone = first.drive({name: recordings[name]}).finish()
        assert_same(of_stream(published, name), alone)
    assert bundle_ids(of_stream(published[count:], "b")) == {second_id}
    start = canary_from["b"]
    expected = second.whole(recordings["b"])[0][start:]
    np.testing.assert_allclose(drive.scores("b")[start:], expected, atol=1e-4)
    assert_continuous(published, NAMES)


def test_a_canary_ends_by_a_roll_back_or_works_for_all(others: dict[str, Loaded]) -> None:
    first, second = others["a"], others["renamed"]
    first_id, second_id = first.manifest.bundle_id, second.manifest.bundle_id
    pipeline = Pipeline(first.deployment())
    for name in NAMES:
        pipeline.open(name, 0)

    def at_work() -> list[str]:
        return [each.bundle_id for each in pipeline.streams.values()]

    assert pipeline.deploy(second.deployment(), ["a", "b"]) == 2
    assert pipeline.deploy(second.deployment(), ["b"]) == 2  # "a" back, "b" to the one read again
    assert at_work() == [first_id, second_id, first_id]
    assert pipeline.roll_back() == 1
    assert at_work() == [first_id] * 3
    with pytest.raises(
        DeployError, match=f"^roll back: expected a bundle before {first_id}, there was none$"
    ):
        pipeline.roll_back()
    pipeline.deploy(second.deployment(), ["c"])
    assert pipeline.deploy(second.deployment()) == 3
    assert at_work() == [second_id] * 3
    assert pipeline.deployments.canary is None
    assert pipeline.open("d", 0).bundle_id == second_id
    assert pipeline.roll_back() == 4
    assert at_work() == [first_id] * 4


@pytest.mark.parametrize("busy", ["a", "b"])
def test_two_bundles_take_turns(others: dict[str, Loaded], busy: str) -> None:
    (quiet,) = {"a", "b"} - {busy}
    recordings = {busy: tiny_recording(400), quiet: tiny_recording(30)}
    drive = others["a"].drive(recordings, max_batch=1, backlog=100)
    drive.pipeline.deploy(others["reweighted"].deployment(max_batch=1, backlog=100), ["b"])
    drive.step()  # announcements
    streams = drive.pipeline.streams
    for _ in range(20):
        drive.send(busy, 100)
        drive.send(quiet, 1)
        ready = max(0, streams[quiet].ready_until())
        drive.step()
        drive.step()
        assert streams[busy].processed < streams[busy].ready_until()  # there is always more
        assert streams[quiet].processed == ready


def test_drops_go_on_from_the_scores_of_the_bundle_before(others: dict[str, Loaded]) -> None:
    features = tiny_recording(80)
    drive = others["a"].drive({"x": features}, backlog=16)
    stream = drive.pipeline.streams["x"]
    stream.policy = "drop_oldest"
    drive.send("x", 10)
    drive.settle()
    first = stream.processed
    drive.pipeline.deploy(others["wide"].deployment(backlog=16))
    while not stream.dropped:  # nothing is computed meanwhile
        at = stream.next_index
        drive.pipeline.append("x", at, features[at : at + 6])
    dropped = stream.dropped
    drive.settle()
    drive.finish(chunk=4)
    scores = drive.scores("x")
    last = np.repeat(scores[first - 1 : first], dropped, axis=0)
    np.testing.assert_array_equal(scores[first : first + dropped], last)
    whole = others["a"].whole(features)[0]
    np.testing.assert_allclose(scores[first + dropped :], whole[first + dropped :], atol=1e-4)


@pytest.mark.parametrize("name", ["wide", "reweighted", "renamed"])
def test_drops_have_no_embedding_of_another_model(others: dict[str, Loaded], name: str) -> None:
    drive = others["a"].drive({"x": tiny_recording(40)}, backlog=16)
    stream = drive.pipeline.streams["x"]
    drive.send("x", 10)
    drive.settle()
    last = drive.scores("x")[-1]
    drive.pipeline.deploy(others[name].deployment(backlog=16))
    drive.send("x", 14)
    stream.drop_oldest(stream.send_until + 3)
    rows = stream.pass_over()
    assert rows is not None
    np.testing.assert_array_equal(rows[0], [last] * 3)
    assert rows[1].shape == (3, others[name].manifest.embedding_width)
    assert rows[1].any() == (name == "renamed")


class Gated:
    """A backend whose steps wait."""

    def __init__(self, inner: OnnxRuntimeBackend) -> None:
        self._inner = inner
        self.open = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def score_step(self, *arguments: Any) -> Any:
        assert self.open.wait(PATIENCE_S)
        return self._inner.score_step(*arguments)


def test_what_was_given_up_at_a_swap_counts_as_never_fed(others: dict[str, Loaded]) -> None:
    # A canary of "y" gives up what is asked for "x", which then drops what it would have begun
    # with: its state in the pool has not seen those snippets.
    features = tiny_recording(60, seed=4)
    gated = Gated(others["a"].backend)
    config = engine_config(others["a"].manifest, backlog=12).model_copy(
        update={"mode": "throughput", "max_wait_ms": 0.0}
    )
    drive = Drive(others["a"].manifest, gated, config, {"x": features, "y": features})
    pipeline, x = drive.pipeline, drive.pipeline.streams["x"]
    x.policy = "drop_oldest"
    drive.step()  # announcements
    for name, count in (("y", 8), ("x", 10)):
        pipeline.append(name, 0, features[:count])
        drive.step()  # asked for: the one of "y" waits in the thread, that of "x" behind it
    assert x.asked > 0
    canary = Deployment(others["reweighted"].manifest, others["reweighted"].backend, config)
    pipeline.deploy(canary, ["y"])
    assert x.asked == 0
    for first in (10, 16):
        pipeline.append("x", first, features[first : first + 6])
    assert x.dropped == 6
    gated.open.set()
    drive.settle()
    scores = drive.scores("x")
    whole = others["a"].whole(features)[0]
    assert len(scores) == x.processed == 19
    np.testing.assert_allclose(scores[6:], whole[6:19], atol=1e-4)


# --- after a restart ------------------------------------------------------------------------------


def restarted(
    others: dict[str, Loaded],
    name: str,
    killed_at: int,
    is_before: bool,
    lookahead_s: float | str,
) -> Life:
    """An engine that was killed, whose successor gets another bundle before, or after, the feeders
    have sent again what its streams have to remember."""
    made_of = others["a"].bundle, others["a"].backend
    config = durable_config(made_of[0], hop=1, history=128, lookahead_s=lookahead_s)
    life = Life(*made_of, config)
    for stream in STREAMS:
        life.send_to(stream, killed_at)
    life.settle()
    life.pipeline = life.started_again()
    other = others[name]
    localization = other.manifest.localization.model_copy(update={"history_snippets": 128})
    deployment = Deployment(
        other.manifest,
        other.backend,
        config.model_copy(update={"localization": localization}),
    )
    if is_before:
        life.pipeline.deploy(deployment)
    for stream in STREAMS:
        restored = life.pipeline.streams[stream]
        life.sent[stream] = restored.next_index
        life.send_to(stream, restored.decided_until + made_of[0].manifest.lookahead_snippets)
    life.settle()
    if not is_before:
        life.pipeline.deploy(deployment)
    life.finish()
    return life


@pytest.mark.parametrize("killed_at", [21, 45, 63])
def test_other_settings_hold_from_where_a_restored_stream_goes_on(
    others: dict[str, Loaded], killed_at: int
) -> None:
    before, after = (
        restarted(others, "apart", killed_at, is_before, 5.12) for is_before in (True, False)
    )
    for stream in STREAMS:
        assert_same(of_stream(before.log, stream), of_stream(after.log, stream))


@pytest.mark.parametrize("lookahead_s", ["strict", 5.12])
@pytest.mark.parametrize("name", ["reweighted", "wide", "apart and wide"])
def test_another_model_takes_over_a_restored_stream_at_once(
    others: dict[str, Loaded], name: str, lookahead_s: float | str
) -> None:
    for killed_at in range(20, 70, 10):
        life = restarted(others, name, killed_at, is_before=True, lookahead_s=lookahead_s)
        assert_continuous(life.log, STREAMS)
        end_s = (FIRST_INDEX + LENGTH) * others["a"].manifest.clock.snippet_s
        for each in finals(life.log):
            assert each.start_s < each.end_s <= end_s
        for stream in STREAMS:
            last = of_stream(life.log, stream)[-1]
            assert isinstance(last, StreamNotice)
            assert (last.kind, last.next_index) == ("ended", FIRST_INDEX + LENGTH)


# --- refusals ------------------------------------------------------------------------------------

# What differs in the manifest or the settings -> how it is said. The window is as long as context,
# hop and look-ahead ask for: 13 + 1 + 3.
DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "D": ({"feature_dim": 9}, {}, "feature_dim: expected 8, got 9"),
    "frame rate": ({"frames_per_s": 30.0}, {}, "frames_per_s: expected 25.0, got 30.0"),
    "snippet": ({"snippet_frames": 8}, {}, "snippet_frames: expected 16, got 8"),
    "classes": (
        {"classes": ("jump", "run")},
        {},
        "classes: expected jump, run, throw, got jump, run",
    ),
    "their order": (
        {"classes": ("run", "jump", "throw")},
        {},
        "classes: expected jump, run, throw, got run, jump, throw",
    ),
    "window": (
        {},
        {"window_snippets": 20},
        "window: expected 17, got 20; context: expected 13, got 16",
    ),
    "hop": ({}, {"hop_snippets": 2}, "window: expected 17, got 18; hop: expected 1, got 2"),
    "hop in the same window": (
        {"context_snippets": 12},
        {"hop_snippets": 2},
        "hop: expected 1, got 2; context: expected 13, got 12",
    ),
    "context": (
        {"context_snippets": 14},
        {},
        "window: expected 17, got 18; context: expected 13, got 14",
    ),
    "look-ahead": (
        {"lookahead_snippets": 2, "context_snippets": 14},
        {},
        "context: expected 13, got 14; look-ahead: expected 3, got 2",
    ),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_a_bundle_that_differs_is_refused_with_the_difference(
    others: dict[str, Loaded], case: str
) -> None:
    in_manifest, in_window, said = DIFFERENCES[case]
    first = others["a"].manifest
    expected = relied_on(first, engine_config(first))
    manifest = first.model_copy(update={"bundle_id": "0" * 16, **in_manifest})
    config = engine_config(first).model_copy(update={"window": WindowConfig(**in_window)})
    with pytest.raises(DeployError) as refused:
        check_agreement(expected, manifest, config)
    assert str(refused.value) == (
        f"bundle {'0' * 16} cannot take over the streams of this engine: {said}; "
        "an engine of its own can serve it"
    )


def test_what_streams_do_not_rely_on_may_differ(others: dict[str, Loaded]) -> None:
    first = others["a"].manifest
    for name in ("renamed", "reweighted", "wide", "apart"):
        other = others[name]
        expected = relied_on(first, engine_config(first))
        check_agreement(expected, other.manifest, engine_config(other.manifest))


# --- a folder that is followed -------------------------------------------------------------------


@dataclass
class Shelf:
    """A folder with bundles; each look is as far in time as it needs to be."""

    folder: Path
    ticks: list[int] = field(default_factory=list)

    def put(self, name: str, *files: str, content: str = "1") -> Path:
        """Write files of a bundle, each newer than all before."""
        target = self.folder / name
        target.mkdir(exist_ok=True)
        for file in files or ("bundle.json", "snippet.onnx"):
            (target / file).write_text(content)
            self.ticks.append(1)
            os.utime(target / file, (1e9 + len(self.ticks), 1e9 + len(self.ticks)))
        return target


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    (tmp_path / "shelf").mkdir()
    return Shelf(tmp_path / "shelf")


def names(folders: list[Path]) -> list[str]:
    return [each.name for each in folders]


def test_what_is_there_at_the_beginning_is_not_new(shelf: Shelf) -> None:
    shelf.put("old")
    followed = FollowedFolder(shelf.folder)
    assert [followed.appeared() for _ in range(3)] == [[], [], []]


def test_a_folder_to_follow_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for missing in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(DeployError, match=f"^{missing}: expected a folder to follow$"):
            FollowedFolder(missing)


def test_a_copy_counts_when_nothing_changes_any_more(shelf: Shelf) -> None:
    followed = FollowedFolder(shelf.folder)
    shelf.put("new", "snippet.onnx")
    assert [followed.appeared() for _ in range(2)] == [[], []]  # without a manifest it is none
    shelf.put("new", "bundle.json", content="")
    assert followed.appeared() == []
    shelf.put("new", "bundle.json", content="{}")
    assert followed.appeared() == []
    shelf.put("new", "golden.npz")
    assert followed.appeared() == []
    assert names(followed.appeared()) == ["new"]
    assert [followed.appeared() for _ in range(2)] == [[], []]


def test_one_that_takes_the_place_of_another_is_new(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put("served")
    followed = FollowedFolder(shelf.folder)
    # As an export does it: written aside, the old one moved away, renamed.
    shelf.put(".served.part")
    assert [followed.appeared() for _ in range(2)] == [[], []]
    (shelf.folder / "served").rename(tmp_path / "gone")
    (shelf.folder / ".served.part").rename(shelf.folder / "served")
    assert followed.appeared() == []
    assert names(followed.appeared()) == ["served"]
    # The same size, time and names, but other files.
    shutil.copytree(shelf.folder / "served", tmp_path / "copy")
    shutil.rmtree(tmp_path / "gone")
    (shelf.folder / "served").rename(tmp_path / "gone")
    (tmp_path / "copy").rename(shelf.folder / "served")
    assert followed.appeared() == []
    assert names(followed.appeared()) == ["served"]


def test_a_hidden_one_and_what_is_none_never_count(shelf: Shelf) -> None:
    followed = FollowedFolder(shelf.folder)
    shelf.put(".hidden")
    shelf.put("none", "snippet.onnx")
    (shelf.folder / "file").write_text("")
    assert [followed.appeared() for _ in range(4)] == [[], [], [], []]


def test_a_bad_one_comes_again_when_it_changes(shelf: Shelf) -> None:
    followed = FollowedFolder(shelf.folder)
    shelf.put("bad")
    assert names([*followed.appeared(), *followed.appeared()]) == ["bad"]
    assert [followed.appeared() for _ in range(3)] == [[], [], []]
    shelf.put("bad", "snippet.onnx")
    assert names([*followed.appeared(), *followed.appeared()]) == ["bad"]


def test_several_come_in_the_order_of_their_time(shelf: Shelf) -> None:
    followed = FollowedFolder(shelf.folder)
    for name in ("z", "m", "a"):
        shelf.put(name)
    shelf.put("m", "golden.npz")
    followed.appeared()
    assert names(followed.appeared()) == ["z", "a", "m"]


def test_one_that_was_taken_away_and_comes_back_is_new(shelf: Shelf, tmp_path: Path) -> None:
    shelf.put("old")
    followed = FollowedFolder(shelf.folder)
    (shelf.folder / "old").rename(tmp_path / "away")
    assert followed.appeared() == []
    (tmp_path / "away").rename(shelf.folder / "old")
    assert followed.appeared() == []
    assert names(followed.appeared()) == ["old"]


@pytest.mark.parametrize("looks", [1, 3])
def test_a_folder_that_cannot_be_read_for_a_while_brings_nothing_new(
    shelf: Shelf, tmp_path: Path, looks: int
) -> None:
    shelf.put("old")
    followed = FollowedFolder(shelf.folder)
    shelf.folder.rename(tmp_path / "away")
    assert [followed.appeared() for _ in range(looks)] == [[]] * looks
    (tmp_path / "away").rename(shelf.folder)
    shelf.put("new")
    assert followed.appeared() == []
    assert names(followed.appeared()) == ["new"]
