"""Pictures of a run: what they show, and that they are there."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from commands import Trained, hrpro, hrpro_json, refusal
from matplotlib.colors import to_rgba
from tiny_data import CLASSES, write_tiny_data

from hrpro.engine.timebase import SnippetClock
from hrpro.engine.wire import HrproError
from hrpro.training import figures
from hrpro.training.annotations import read_truth
from hrpro.training.data import read_training_split
from hrpro.training.figures import (
    Looked,
    best_tiou,
    look_at,
    rank_correlation,
    read_curves,
    timeline,
)
from hrpro.training.metrics import Segments
from hrpro.training.plots import Timeline, class_colours, plot_timeline, shown_classes
from hrpro.training.run import read_run
from hrpro.training.snippet_stage import snippet_scores

pytest_plugins = ("cli_fixtures",)


def test_best_tiou_by_hand() -> None:
    truth = Segments.from_rows([(0, 10, 0, 1), (20, 30, 1, 1)])
    proposals = Segments.from_rows(
        [
            (0, 10, 0, 0.9),  # exactly the first
            (0, 5, 0, 0.8),  # its half
            (0, 10, 1, 0.7),  # of another class
            (25, 35, 1, 0.6),  # 5 of 15
        ]
    )
    assert best_tiou(proposals, truth).tolist() == pytest.approx([1, 0.5, 0, 1 / 3])
    assert best_tiou(proposals, Segments.from_rows([])).tolist() == [0, 0, 0, 0]


def test_rank_correlation() -> None:
    rising = np.array([1.0, 2, 3, 4])
    assert rank_correlation(rising, rising**3) == pytest.approx(1)
    assert rank_correlation(rising, -rising) == pytest.approx(-1)
    assert rank_correlation(rising, np.ones(4)) == rank_correlation(rising[:1], rising[:1]) == 0


def test_curves_are_read_from_what_was_recorded(tmp_path: Path) -> None:
    with pytest.raises(HrproError, match=r"metrics\.jsonl: cannot be read"):
        read_curves(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    with pytest.raises(HrproError, match="expected the losses of a run"):
        read_curves(tmp_path)
    rows = [{"stage": "snippet", "step": 10 * n, "loss": 1 / n} for n in (1, 2)]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"stage": "inst')
    curves = read_curves(tmp_path)
    odd = [{"stage": "snippet", "loss": 1.0}, {"stage": "instance", "step": 10, "loss": 1.0}]
    path.write_text("\n".join(map(json.dumps, [*rows, *odd, {"stage": "instance", "step": 20}])))
    with pytest.raises(HrproError, match=r"metrics\.jsonl: expected the same losses .*'loss'"):
        read_curves(tmp_path)
    assert list(curves) == ["snippet"]
    assert curves["snippet"]["step"].tolist() == [10, 20]
    assert curves["snippet"]["loss"].tolist() == [1, 0.5]


@pytest.mark.parametrize("count", [1, 10, 11, 16, 20, 34])
def test_colours_are_those_of_one_class_each(count: int) -> None:
    colours = class_colours(count)
    background = to_rgba("0.8")
    assert len(np.unique(colours, axis=0)) == count
    assert (np.abs(colours - background).max(axis=1) > 0.1).all()


def test_classes_in_the_legend() -> None:
    """What is there, and of the rest what is most sure, as far as there is room."""
    cas = np.zeros((2, 30), np.float32)
    cas[1] = np.linspace(0.99, 0.3, 30)  # 21 of them above 0.5
    nothing = Segments.from_rows([])
    there = Segments.from_rows([(0, 1, 29, 1), (1, 2, 3, 1), (2, 3, 29, 1)])
    shown = [
        shown_classes(Timeline("a", truth, cas, cas[:, 0], nothing)) for truth in (nothing, there)
    ]
    assert shown == [[*range(20)], [*range(19), 29]]
    everything = Segments.from_rows([(c, c + 1, c, 1) for c in range(30)])
    assert shown_classes(Timeline("a", everything, cas, cas[:, 0], nothing)) == [*range(30)]
    assert shown_classes(Timeline("a", there, 0 * cas, cas[:, 0], nothing)) == [3, 29]


def test_what_is_seen_of_a_recording(trained: Trained) -> None:
    description, model = read_run(trained.run)
    recording = read_training_split(trained.data, description.config.data).recordings[0]
    truth = read_truth(trained.data, [recording.name], description.classes)[recording.name]
    model.instance.trust.fill_(1.0)  # few points as there were
    output = snippet_scores(model.snippet, recording.features)
    looked = look_at(output, truth, np.arange(len(recording)), description, model)
    points = timeline(recording, truth, description, model).points
    assert points is not None and len(points) == len(recording.point_index)
    assert (points.start_s / 0.64).round().astype(int).tolist() == recording.point_index.tolist()
    # Each point lies in an action of its class.
    on_points = looked.label[recording.point_index]
    assert on_points.tolist() == recording.point_label.tolist()
    assert (looked.label == -1).any()
    np.testing.assert_array_equal(looked.embedding, output.embedding)
    before, after = looked.scored
    assert len(before) == len(after) > 0
    assert not np.allclose(before.start_s, after.start_s)
    assert ((after.score >= 0) & (after.score <= 1)).all()


NAMES = ("_hidden", "cost $x^2$", "$", "\\alpha")


def texts(picture: Path) -> list[str]:
    """The texts of an SVG in which they were left as such, in their order."""
    return [
        html.unescape(each) for each in re.findall(r"<text[^>]*>(.*?)</text>", picture.read_text())
    ]


def test_names_are_shown_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    cas = np.full((100, 4), 0.75, np.float32)
    truth = Segments.from_rows([(15 * c, 15 * c + 14, c, 1) for c in range(4)])
    shown = Timeline("cam_$1$", truth, cas, cas[:, 0], Segments.from_rows([]))
    plot_timeline(shown, NAMES, SnippetClock(25.0, 16), tmp_path / "timeline.svg")
    found = texts(tmp_path / "timeline.svg")
    assert "cam_$1$" in found
    assert [found.count(name) for name in NAMES] == [2] * 4  # on its bar, and in the legend
    assert found[-5:] == [*NAMES, "attention A"]

    embedding = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    nothing = Segments.from_rows([])
    looked = Looked(nothing, (nothing, nothing), embedding, np.arange(40) % 5 - 1)
    figures._plot_embedding([looked], NAMES, tmp_path / "embedding.svg")
    assert texts(tmp_path / "embedding.svg")[-5:] == ["background", *NAMES]


def test_losses_have_numbers_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    values = {"step": np.arange(3.0), "loss": np.array([100.0, 1.0, 0.001])}
    figures._plot_learning({"snippet": values}, tmp_path / "learning.svg")
    found = texts(tmp_path / "learning.svg")
    assert {"0", "0.01", "0.1", "1", "10", "100", "loss"} <= {*found}
    assert not any("$" in each for each in found)


def test_without_an_action_there_are_pictures(trained: Trained, tmp_path: Path) -> None:
    data = Path(shutil.copytree(trained.data, tmp_path / "data"))
    content = json.loads((data / "gt_full.json").read_text())
    for entry in content["database"].values():
        entry["annotations"] = []
    (data / "gt_full.json").write_text(json.dumps(content))
    pictures = figures.plot_run(trained.run, data, tmp_path / "out", 1, ["seq1"])
    assert [path.name for path in pictures] == [
        "timeline_seq1.png", "reliability.png", "embedding.png", "learning.png",
    ]  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in pictures)


def test_a_run_of_another_data_set(trained: Trained, tmp_path: Path) -> None:
    write_tiny_data(tmp_path / "tiny")
    (tmp_path / "tiny" / "classes.txt").write_text("\n".join(CLASSES))
    said = refusal("plot", trained.run, "--data", tmp_path / "tiny", "--out", tmp_path / "out")
    assert "was trained on" in said and "has 2; they differ in" in said
    assert not (tmp_path / "out").exists()


def test_the_command(trained: Trained, tmp_path: Path) -> None:
    arguments = ("plot", trained.run, "--data", trained.data, "--out", tmp_path / "pictures")
    pictures = [Path(path) for path in hrpro_json(*arguments)["pictures"]]
    assert [path.name for path in pictures] == [
        "timeline_seq5.png", "timeline_seq6.png", "reliability.png", "embedding.png",
        "learning.png",
    ]  # fmt: skip
    for path in pictures:
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) >= 400
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 30
    said = hrpro(*arguments, "--recording", "seq1").stdout.splitlines()
    assert Path(said[0]).name == "timeline_seq1.png" and len(said) == 4
    assert "'seq9' is in neither split" in refusal(*arguments, "--recording", "seq9")
