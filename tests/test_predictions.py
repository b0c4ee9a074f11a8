"""Evaluation against a plain reference, ambiguous stretches, and files of predictions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import plain_metrics
import pytest
from commands import Trained, hrpro, hrpro_json, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_metrics import Row
from tiny_data import CLASSES, write_tiny_data

from hrpro.training import session
from hrpro.training.annotations import point_rates, read_truth
from hrpro.training.data_config import DataConfig, DataError
from hrpro.training.metrics import Segments, mean_average_precision
from hrpro.training.predictions import PredictionsError, read_predictions, write_predictions
from hrpro.training.presets import read_preset
from hrpro.training.session import evaluate_predictions, evaluate_run

pytest_plugins = ("cli_fixtures",)

# Whole seconds, so that ties, touching and nested segments come up often.
times = st.integers(0, 8)
scores = st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9])


@st.composite
def rows(draw: st.DrawFn, most: int) -> list[Row]:
    found = []
    for _ in range(draw(st.integers(0, most))):
        start, length = draw(times), draw(st.integers(1, 5))
        found.append((float(start), float(start + length), draw(st.integers(0, 1)), draw(scores)))
    return found


NAMES = ("a", "b")
stretches = st.lists(st.tuples(times, st.integers(0, 3)), max_size=2).map(
    lambda pairs: [(float(start), float(start + length)) for start, length in pairs]
)


@given(
    st.fixed_dictionaries({name: rows(4) for name in NAMES}),
    st.fixed_dictionaries({name: rows(8) for name in NAMES}),
    st.fixed_dictionaries(dict.fromkeys(NAMES, stretches)),
)
@settings(max_examples=400)
def test_it_is_what_the_plain_one_gives(
    truth: dict[str, list[Row]],
    predictions: dict[str, list[Row]],
    ambiguous: dict[str, list[tuple[float, float]]],
) -> None:
    thresholds = [0.1, 0.25, 0.5, 0.7, 1.0]
    expected = plain_metrics.mean_average_precision(truth, predictions, thresholds, ambiguous)
    got = mean_average_precision(
        {name: Segments.from_rows(each) for name, each in truth.items()},
        {name: Segments.from_rows(each) for name, each in predictions.items()},
        2,
        thresholds,
        {name: np.array(each).reshape(-1, 2) for name, each in ambiguous.items()},
    )
    assert got.by_tiou == pytest.approx(expected)
    assert got.average == pytest.approx(sum(expected.values()) / 5)


@pytest.mark.parametrize(
    ("ambiguous", "expected"),
    [
        # Hit, miss at (20, 30), hit: precision 1, 1/2, 2/3, so 1/2 * 1 + 1/2 * 2/3.
        ([], 5 / 6),
        # The miss is left out: both hits come at precision 1.
        ([(29.0, 40.0)], 1.0),
        # Touching is not overlapping.
        ([(30.0, 40.0)], 5 / 6),
        # A hit stays one, and a second ambiguous stretch changes nothing.
        ([(0.0, 10.0), (25.0, 26.0)], 1.0),
        # An ambiguous stretch of no length has nothing to overlap.
        ([(25.0, 25.0)], 5 / 6),
    ],
)
def test_ambiguous_stretches_by_hand(ambiguous: list[tuple[float, float]], expected: float) -> None:
    truth = {"a": Segments.from_rows([(0, 10, 0, 1), (50, 60, 0, 1)])}
    found = {"a": Segments.from_rows([(0, 10, 0, 0.9), (20, 30, 0, 0.8), (50, 60, 0, 0.7)])}
    stretches = {"a": np.array(ambiguous).reshape(-1, 2)}
    got = mean_average_precision(truth, found, 1, [0.5], stretches)
    assert got.average == pytest.approx(expected)


# --- files ---------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    found = {
        "v_one": Segments.from_rows([(1.5, 2.0, 1, 0.25), (0.0, 3.0, 0, 0.75)]),
        "two": Segments.from_rows([]),
    }
    write_predictions(path, found, ("hop", "spin"))
    assert json.loads(path.read_text())["results"] == {
        "v_one": [
            {"label": "hop", "score": 0.75, "segment": [0.0, 3.0]},
            {"label": "spin", "score": 0.25, "segment": [1.5, 2.0]},
        ],
        "two": [],
    }
    again = read_predictions(path, ["two", "v_one", "three"], ("spin", "hop"))
    assert again["v_one"].label_index.tolist() == [1, 0]
    assert again["v_one"].start_s.tolist() == [0.0, 1.5]
    assert len(again["two"]) == len(again["three"]) == 0
    # As ActivityNet names them.
    path.write_text(path.read_text().replace("v_one", "one"))
    assert len(read_predictions(path, ["two", "v_one"], ("spin", "hop"))["v_one"]) == 2


GOOD = {"label": "hop", "score": 0.5, "segment": [1, 2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", 'expected JSON with the key "results"'),
        ([], 'expected JSON with the key "results"'),
        ({"results": []}, "expected recordings by name"),
        ({"results": {"five": []}}, "recording 'five' is not one of the test split"),
        ({"results": {"one": {}}}, "'one': expected a list"),
        ({"results": {"one": [GOOD, {}]}}, "'one', prediction 1: expected \"label\""),
        ({"results": {"one": [{**GOOD, "label": "jog"}]}}, "the label 'jog' is not one"),
        ({"results": {"one": [{**GOOD, "label": ["hop"]}]}}, "the label ['hop'] is not one"),
        ({"results": {"one": [{**GOOD, "score": 10**400}]}}, "OverflowError"),
        ({"results": {"one": [{**GOOD, "segment": [0, 10**400]}]}}, "OverflowError"),
        ({"results": {"one": [{**GOOD, "score": "NaN"}]}}, "expected a finite score, got nan"),
        ({"results": {"one": [{**GOOD, "segment": [2, 1]}]}}, "from start to end"),
        ({"results": {"one": [{**GOOD, "segment": [2]}]}}, "two numbers"),
    ],
)
def test_what_is_no_file_of_predictions_is_refused(
    content: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(PredictionsError) as caught:
        read_predictions(path, ["one"], ("hop",))
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_a_recording_is_there_once(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for names in (("one", "v_one"), ("v_one", "one")):
        path.write_text(json.dumps({"results": {name: [GOOD] for name in names}}))
        with pytest.raises(PredictionsError) as caught:
            read_predictions(path, ["v_one"], ("hop",))
        assert str(caught.value) == f"{path}: 'v_one' is there with and without 'v_'"
        both = read_predictions(path, ["one", "v_one"], ("hop",))  # two recordings
        assert [len(both[name]) for name in ("one", "v_one")] == [1, 1]


def test_predictions_of_blocked_recordings_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    results = {"two": [GOOD], "v_three": "whatever", "four": [], "one": [GOOD, GOOD]}
    path.write_text(json.dumps({"results": results}))
    found = read_predictions(path, ["one"], ("hop",), ["two", "v_three", "v_four"])
    assert {name: len(each) for name, each in found.items()} == {"one": 2}
    with pytest.raises(PredictionsError, match="recording 'two' is not one of the test split"):
        read_predictions(path, ["one"], ("hop",), ["v_three", "v_four"])


def test_a_preset_leaves_out_its_blocked_recordings_of_a_file(tmp_path: Path) -> None:
    blocked = "video_test_0000270"
    label = read_preset("thumos14").classes[0]
    good, other = {**GOOD, "label": label}, {**GOOD, "label": label, "segment": [50, 60]}
    (tmp_path / "split_test.txt").write_text(f"test0\n{blocked}\n")
    database = {"test0": {"annotations": [{"label": label, "segment": [1, 2]}]}, blocked: {}}
    database[blocked] = {"annotations": []}
    (tmp_path / "gt_full.json").write_text(json.dumps({"database": database}))
    (tmp_path / "Ambiguous_test.txt").write_text("")
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"results": {"test0": [good], blocked: [other]}}))
    config = DataConfig.model_validate({"preset": "thumos14"})
    figures = evaluate_predictions(path, tmp_path, config)
    assert (figures["recordings"], figures["instances"], figures["average_map"]) == (1, 1, 1.0)


def test_annotations_that_no_number_can_hold_are_refused(tmp_path: Path) -> None:
    segment = {"label": "hop", "segment": [0, 10**400]}
    path = tmp_path / "gt_full.json"
    path.write_text(json.dumps({"database": {"one": {"annotations": [segment], "fps": 10**400}}}))
    with pytest.raises(DataError, match=r"'one': expected annotations .* OverflowError"):
        read_truth(tmp_path, ["one"], ("hop",))
    config = DataConfig(point_frames_per_s="annotations")
    with pytest.raises(DataError, match=r"'one': expected its frame rate .* OverflowError"):
        point_rates(tmp_path, ["one"], config)
    # More digits than Python reads, and more levels
    for content in ("1" * 5000, "[" * 100_000):
        path.write_text(content)
        with pytest.raises(DataError, match='expected JSON with the key "database"'):
            read_truth(tmp_path, ["one"], ("hop",))


def test_a_run_is_evaluated_as_its_predictions_are(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    figures = hrpro_json(
        "evaluate", trained.run, "--data", trained.data, "--write-predictions", path
    )
    again = hrpro_json("evaluate", "--predictions", path, "--data", trained.data)
    assert again == {**figures, "stage1_average_map": None}
    said = hrpro("evaluate", "--predictions", path, "--data", trained.data, "--preset", "mocap6")
    assert f"{figures['average_map']:.3f}" in said.stdout


def test_predictions_that_cannot_be_written(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(trained.run, tmp_path / "run"))
    path = tmp_path / "absent" / "p.json"
    monkeypatch.setattr(session, "read_run", pytest.fail)  # it is said before the work
    with pytest.raises(PredictionsError, match=r"absent/p\.json: expected a folder to write it in"):
        evaluate_run(run, trained.data, path)
    monkeypatch.undo()
    # What was measured is noted, whatever comes of the file.
    (run / "figures.json").unlink(missing_ok=True)
    (tmp_path / "p.json").mkdir()
    with pytest.raises(OSError, match=r"p\.json"):
        evaluate_run(run, trained.data, tmp_path / "p.json")
    figures = json.loads((run / "figures.json").read_text())
    assert figures["recordings"] == 2 and 0.2 < figures["average_map"] < 1


def test_one_of_run_and_predictions(trained: Trained, tmp_path: Path) -> None:
    said = hrpro("evaluate", "--data", trained.data, status=2)
    assert "expected a run" in said.stderr
    said = hrpro(
        "evaluate", trained.run, "--data", trained.data, "--predictions", "p.json", status=2
    )
    assert "expected a run" in said.stderr


def test_a_run_of_another_data_set(trained: Trained, tmp_path: Path) -> None:
    write_tiny_data(tmp_path / "tiny")
    (tmp_path / "tiny" / "classes.txt").write_text("\n".join(CLASSES))
    said = refusal("evaluate", trained.run, "--data", tmp_path / "tiny")
    assert "was trained on" in said and "has 2; they differ in" in said
