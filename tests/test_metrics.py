"""Average precision: golden cases by hand, and against a plain slow implementation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrpro.training.metrics import THUMOS_TIOU_THRESHOLDS, Segments, mean_average_precision

Row = tuple[float, float, int, float]
Rows = dict[str, list[Row]]


def average(
    truth: Rows, predictions: Rows, thresholds: tuple[float, ...] = (0.5,), classes: int = 1
) -> list[float]:
    found = mean_average_precision(
        {name: Segments.from_rows(rows) for name, rows in truth.items()},
        {name: Segments.from_rows(rows) for name, rows in predictions.items()},
        classes,
        thresholds,
    )
    assert found.average == pytest.approx(sum(found.by_tiou.values()) / len(thresholds))
    assert found.instances == sum(map(len, truth.values()))
    return [found.by_tiou[threshold] for threshold in thresholds]


TWO: Rows = {"x": [(0, 10, 0, 1), (20, 30, 0, 1)]}


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        pytest.param([(0, 10, 0, 0.9), (20, 30, 0, 0.1)], 1.0, id="perfect"),
        pytest.param([], 0.0, id="nothing"),
        pytest.param([(0, 10, 0, 0.9)], 0.5, id="half"),
        # Hit, miss, hit: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1
        pytest.param(
            [(0, 10, 0, 0.9), (50, 60, 0, 0.8), (20, 30, 0, 0.7)],
            0.5 + 0.5 * 2 / 3,
            id="one-false",
        ),
        # Miss, hit, hit: 0, 1/2, 2/3; from the right the best at recall 1/2 is 2/3, too
        pytest.param(
            [(50, 60, 0, 0.9), (0, 10, 0, 0.8), (20, 30, 0, 0.7)], 2 / 3, id="interpolated"
        ),
        # The second on the same instance is false: hit, miss, hit
        pytest.param(
            [(0, 10, 0, 0.9), (0, 10, 0, 0.8), (20, 30, 0, 0.7)],
            0.5 + 0.5 * 2 / 3,
            id="told-twice",
        ),
        # tIoU 5/10 is enough, 4.9/10 is not
        pytest.param([(0, 5, 0, 0.9), (20, 24.9, 0, 0.8)], 0.5, id="threshold"),
        # Touching is no overlap
        pytest.param([(10, 20, 0, 0.9)], 0.0, id="touching"),
        # The order in which they are given does not matter
        pytest.param(
            [(20, 30, 0, 0.7), (50, 60, 0, 0.8), (0, 10, 0, 0.9)],
            0.5 + 0.5 * 2 / 3,
            id="order",
        ),
    ],
)
def test_one_class_in_one_recording(predictions: list[Row], expected: float) -> None:
    assert average(TWO, {"x": predictions}) == [pytest.approx(expected)]


def test_a_prediction_takes_the_best_instance_that_is_free() -> None:
    truth: Rows = {"x": [(0, 10, 0, 1), (4, 14, 0, 1)]}
    # 1..11 has 9/11 with the first, 7/13 with the second; the other has 1 and 6/14. At 0.5 the
    # better one takes the first; what is left for the second is the second.
    both: Rows = {"x": [(0, 10, 0, 0.9), (1, 11, 0, 0.8)]}
    assert average(truth, both) == [1.0]
    # At 0.6 that does not reach: precision 1 and 1/2 at recall 1/2
    assert average(truth, both, (0.6,)) == [pytest.approx(0.5)]


def test_predictions_are_ranked_over_all_recordings() -> None:
    truth: Rows = {"x": [(0, 10, 0, 1)], "y": [(0, 10, 0, 1)]}
    predictions: Rows = {
        "x": [(0, 10, 0, 0.9), (50, 60, 0, 0.7)],
        "y": [(50, 60, 0, 0.8), (0, 10, 0, 0.6)],
    }
    # Hit, miss, miss, hit: precision 1 at recall 1/2, 2/4 at 1
    assert average(truth, predictions) == [pytest.approx(0.75)]


def test_an_instance_of_another_recording_is_another_one() -> None:
    assert average({"x": [(0, 10, 0, 1)], "y": []}, {"y": [(0, 10, 0, 0.9)]}) == [0.0]


def test_the_mean_is_over_classes_with_instances() -> None:
    truth: Rows = {"x": [(0, 10, 0, 1), (0, 10, 1, 1)]}
    predictions: Rows = {"x": [(0, 10, 0, 0.9), (0, 10, 2, 0.9), (0, 10, 3, 0.9)]}
    # Class 0 is found, 1 is not; 2 and 3 have no instance.
    assert average(truth, predictions, classes=4) == [0.5]
    assert average({"x": []}, {}, classes=4) == [0.0]


def test_thresholds_have_their_own_values() -> None:
    # tIoU 6/10
    assert average(TWO, {"x": [(0, 6, 0, 0.9)]}, (0.5, 0.6, 0.7)) == [0.5, 0.5, 0.0]
    assert average(TWO, {"x": [(0, 6, 0, 0.9)]}, (0.7, 0.5)) == [0.0, 0.5]
    assert THUMOS_TIOU_THRESHOLDS == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def test_predictions_of_an_unknown_recording_are_refused() -> None:
    with pytest.raises(ValueError, match="without ground truth: y, z"):
        average(TWO, {"z": [], "x": [], "y": []})


def test_segments_of_a_class() -> None:
    segments = Segments.from_rows([(0, 1, 1, 0.5), (2, 3, 0, 0.25), (4, 5, 1, 0.75)])
    assert len(segments) == 3 and len(Segments.from_rows([])) == 0
    chosen = segments.of_class(1)
    assert chosen.start_s.tolist() == [0, 4] and chosen.end_s.tolist() == [1, 5]
    assert chosen.score.tolist() == [0.5, 0.75] and chosen.label_index.tolist() == [1, 1]


def plain_tiou(a: Row, b: Row) -> float:
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return shared / (a[1] - a[0] + b[1] - b[0] - shared)


def plain_average_precision(truth: Rows, predictions: Rows, label: int, tiou: float) -> float:
    """Visit predictions by falling score; then add up the steps of recall."""
    total = sum(row[2] == label for rows in truth.values() for row in rows)
    ranked = [(name, row) for name in truth for row in predictions.get(name, []) if row[2] == label]
    ranked.sort(key=lambda each: -each[1][3])
    taken: set[tuple[str, int]] = set()
    hits = 0
    curve = []
    for position, (name, row) in enumerate(ranked, start=1):
        overlaps = [
            (plain_tiou(row, instance), -number)
            for number, instance in enumerate(truth[name])
            if instance[2] == label and (name, number) not in taken
        ]
        best, number = max(overlaps, default=(0.0, 0))
        if best >= tiou:
            taken.add((name, -number))
            hits += 1
        curve.append((hits / total, hits / position))
    area, reached = 0.0, 0.0
    for position, (recall, _) in enumerate(curve):
        area += (recall - reached) * max(precision for _, precision in curve[position:])
        reached = recall
    return area


segment = st.tuples(st.integers(0, 12), st.integers(1, 8), st.integers(0, 1))
instances = st.lists(
    segment.map(lambda s: (float(s[0]), float(s[0] + s[1]), s[2], 1.0)), max_size=4
)
scored = st.lists(
    st.tuples(segment, st.integers(1, 6)).map(
        lambda s: (float(s[0][0]), float(s[0][0] + s[0][1]), s[0][2], s[1] / 8)
    ),
    max_size=7,
)


@given(instances, instances, scored, scored)
def test_mean_average_precision_is_the_plain_one(
    first: list[Row], second: list[Row], found: list[Row], also: list[Row]
) -> None:
    truth, predictions = {"x": first, "y": second}, {"x": found, "y": also}
    labels = sorted({row[2] for row in first + second})
    thresholds = (0.3, 0.5, 0.7)
    expected = [
        sum(plain_average_precision(truth, predictions, label, tiou) for label in labels)
        / max(len(labels), 1)
        for tiou in thresholds
    ]
    assert average(truth, predictions, thresholds, classes=2) == pytest.approx(expected, abs=1e-9)
