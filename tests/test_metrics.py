"""Average precision: golden cases by hand; test_predictions.py has it against a plain one."""

from __future__ import annotations

import pytest

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
