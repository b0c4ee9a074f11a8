"""Reading data sets: what is read, and that what does not hold together is told with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hrpro.clients.feeding import read_sources
from hrpro.engine.timebase import SnippetClock
from hrpro.training.annotations import read_measurable_truth, read_truth
from hrpro.training.data import read_test_split, read_training_split
from hrpro.training.data_config import DataConfig, DataError

POINTS = """class,extra,video_id,point
jump,x,one,40
run,x,two,16.0
jump,x,one,0
run,x,one,79.5
jump,x,elsewhere,99999
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two training recordings of 5 and 4 snippets, one for testing."""
    for split, names in (("train", {"one": 5, "two": 4}), ("test", {"three": 3})):
        (tmp_path / "features" / split).mkdir(parents=True)
        (tmp_path / f"split_{split}.txt").write_text("\n".join(names))
        for name, length in names.items():
            features = np.arange(length * 2, dtype=np.float64).reshape(length, 2)
            np.save(tmp_path / "features" / split / f"{name}.npy", features)
    (tmp_path / "point_labels").mkdir()
    (tmp_path / "point_labels" / "p.csv").write_text(POINTS)
    rows = [{"label": "run", "segment": ["0.5", 2.0]}, {"label": "jump", "segment": [1, 3]}]
    (tmp_path / "gt_full.json").write_text(
        json.dumps({"database": {"three": {"annotations": rows}, "four": {"annotations": []}}})
    )
    return tmp_path


def test_a_training_split(folder: Path) -> None:
    data = read_training_split(folder)
    assert (data.name, data.classes, data.feature_dim) == (folder.name, ("jump", "run"), 2)
    assert data.clock == SnippetClock(25.0, 16)
    one, two = data.recordings
    assert (one.name, len(one), two.name, len(two)) == ("one", 5, "two", 4)
    assert one.features.dtype == np.float32
    assert one.features.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    # Frames 0, 40 and 79.5 of 16 a snippet, by time; the point elsewhere is of no split.
    assert one.point_index.tolist() == [0, 2, 4] and one.point_label.tolist() == [0, 0, 1]
    assert two.point_index.tolist() == [1] and two.point_label.tolist() == [1]
    assert one.point_index.dtype == one.point_label.dtype == np.int64


def test_another_clock(folder: Path) -> None:
    data = read_training_split(folder, DataConfig(frames_per_s=50.0, snippet_frames=20))
    assert data.clock == SnippetClock(50.0, 20)
    assert data.recordings[0].point_index.tolist() == [0, 2, 3]


def test_classes_may_be_given_in_an_order(folder: Path) -> None:
    (folder / "classes.txt").write_text("run\n\njump \n")
    data = read_training_split(folder)
    assert data.classes == ("run", "jump")
    assert data.recordings[0].point_label.tolist() == [1, 1, 0]


def test_training_needs_no_annotations(folder: Path) -> None:
    (folder / "gt_full.json").unlink()
    (folder / "split_test.txt").unlink()
    (folder / "features" / "test" / "three.npy").unlink()
    assert len(read_training_split(folder).recordings) == 2


def test_a_test_split_needs_no_training_split_that_can_be_used(folder: Path) -> None:
    for damage in (write("split_train.txt", "\n"), remove("split_train.txt")):
        damage(folder)
        assert [each.name for each in read_test_split(folder, ["run"]).recordings] == ["three"]


def test_names_may_have_blanks(folder: Path) -> None:
    for split, name in (("train", "one"), ("test", "three")):
        features = folder / "features" / split
        (features / f"{name}.npy").rename(features / f"clip {name} of 3.npy")
        listed = folder / f"split_{split}.txt"
        listed.write_text(listed.read_text().replace(name, f"  clip {name} of 3\t"))
    marked = folder / "point_labels" / "p.csv"
    marked.write_text(marked.read_text().replace(",one,", ",clip one of 3,"))
    one, two = read_training_split(folder).recordings
    assert (one.name, one.point_index.tolist(), two.name) == ("clip one of 3", [0, 2, 4], "two")
    (three,) = read_test_split(folder, ["jump", "run"]).recordings
    assert (three.name, len(three)) == ("clip three of 3", 3)
    (source,) = read_sources([folder])
    assert (source.stream, source.features.shape) == ("clip three of 3", (3, 2))


def test_a_test_split_has_no_points(folder: Path) -> None:
    (folder / "point_labels" / "p.csv").unlink()
    (folder / "gt_full.json").unlink()
    data = read_test_split(folder, ["jump", "run"])
    (three,) = data.recordings
    assert data.classes == ("jump", "run")
    assert (three.name, len(three), len(three.point_index)) == ("three", 3, 0)


def test_without_an_action_nothing_is_measurable(folder: Path) -> None:
    classes = ["jump", "run"]
    truth = read_measurable_truth(folder, ["three", "four"], classes)
    assert [len(truth[name]) for name in ("three", "four")] == [2, 0]
    with pytest.raises(
        DataError,
        match=r"gt_full\.json: expected at least one annotated action in the 1 recordings .* none",
    ):
        read_measurable_truth(folder, ["four"], classes)
    assert len(read_truth(folder, ["four"], classes)["four"]) == 0


def test_truth(folder: Path) -> None:
    truth = read_truth(folder, ["three", "four"], ["jump", "run"])
    assert list(truth) == ["three", "four"]
    assert truth["three"].start_s.tolist() == [0.5, 1.0]
    assert truth["three"].end_s.tolist() == [2.0, 3.0]
    assert truth["three"].label_index.tolist() == [1, 0]
    assert len(truth["four"]) == 0


# --- what is wrong -------------------------------------------------------------------------------

Damage = Callable[[Path], object]


def write(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def write_bytes(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def features(array: object) -> Damage:
    return lambda folder: np.save(
        folder / "features/train/two.npy", np.asarray(array), allow_pickle=True
    )


def archive(folder: Path) -> None:
    with (folder / "features/train/two.npy").open("wb") as file:
        np.savez(file, features=np.ones((4, 2), np.float32))


def points(*rows: str) -> Damage:
    return write("point_labels/p.csv", "\n".join(["class,video_id,point", *rows, ""]))


WHOLE = ("jump,one,0", "run,two,0")

TRAINING: dict[str, tuple[Damage, str]] = {
    "no-split": (remove("split_train.txt"), r"split_train\.txt: file is missing"),
    "empty-split": (write("split_train.txt", " \n"), r"split_train\.txt: .*the file is empty"),
    "repeated-name": (
        write("split_train.txt", "one\ntwo\none\n"),
        r"split_train\.txt: recordings named more than once: one$",
    ),
    "no-features": (
        remove("features/train/two.npy"),
        r"1 of 2 .* are missing: two\.npy; expected one NAME",
    ),
    "no-array": (write("features/train/two.npy", "text"), r"two\.npy: not a readable \.npy array"),
    "empty-file": (write("features/train/two.npy", ""), r"two\.npy: not a readable \.npy array"),
    "pickled": (features(["a", None]), r"two\.npy: not a readable \.npy array"),
    "one-axis": (features([1.0, 2.0]), r"two\.npy: expected a float array .*got float64 \(2,\)"),
    "no-snippet": (features(np.zeros((0, 2))), r"two\.npy: expected .*got float64 \(0, 2\)"),
    "integers": (features([[1, 2]]), r"two\.npy: expected a float array .*got int64 \(1, 2\)"),
    "nan": (
        features([[0.0, 1.0], [2.0, np.nan], [np.inf, 0.0]]),
        r"two\.npy: snippet 1 is not finite",
    ),
    "beyond-float32": (features([[0.0, 1.0], [1e300, 1.0]]), r"two\.npy: snippet 1 is not finite"),
    "archive": (archive, r"two\.npy: not a readable \.npy array: .* got b'PK"),
    "damaged-archive": (
        write_bytes("features/train/two.npy", b"PK\x03\x04" + bytes(100)),
        r"two\.npy: not a readable \.npy array: .* got b'PK",
    ),
    "another-dimension": (
        features(np.ones((4, 3))),
        r"recording 'two' has D = 3, but 'one' has D = 2",
    ),
    "no-points": (remove("point_labels/p.csv"), r"point_labels: expected one \.csv .*found none"),
    "two-files": (
        write("point_labels/q.csv", ""),
        r"point_labels: expected one \.csv file, found p\.csv, q\.csv; .*data\.point_labels",
    ),
    "no-column": (
        write("point_labels/p.csv", "class,video_id\njump,one\n"),
        r"p\.csv: columns are missing: point",
    ),
    "empty-csv": (
        write("point_labels/p.csv", ""),
        r"p\.csv: columns are missing: class, point, video_id",
    ),
    "no-number": (
        points(*WHOLE, "jump,one,middle"),
        r"p\.csv, line 4: expected a frame number .*got 'middle'",
    ),
    "short-row": (points(*WHOLE, "jump,one"), r"p\.csv, line 4: expected a frame number"),
    "no-class-in-a-row": (
        write("point_labels/p.csv", "point,video_id,class\n0,one,jump\n\n0,two\n"),
        r"p\.csv, line 4: expected a class and a video_id, got None and 'two'",
    ),
    "no-recording-in-a-row": (
        points(*WHOLE, "run,,3"),
        r"p\.csv, line 4: expected a class and a video_id, got 'run' and ''",
    ),
    "endless-field": (
        points(*WHOLE, 'run,"' + 200_000 * "x"),
        r"p\.csv: expected columns with commas between: field larger than",
    ),
    "points-no-text": (
        write_bytes("point_labels/p.csv", b"class,video_id,point\n\xff,one,0\n"),
        r"p\.csv: expected text in UTF-8",
    ),
    "classes-no-text": (
        write_bytes("classes.txt", b"jump\nr\xfcn\n"),
        r"classes\.txt: expected text in UTF-8",
    ),
    "behind-the-end": (
        points(*WHOLE, "run,two,80"),
        r"p\.csv, line 4: recording 'two': the point at frame 80 \(snippet 5\) lies outside the "
        r"recording, which has the snippets 0 to 3",
    ),
    "before-the-start": (points(*WHOLE, "run,two,-1"), r"line 4: recording 'two': .*frame -1 "),
    "nan-frame": (points(*WHOLE, "run,two,nan"), r"p\.csv, line 4: .*nan"),
    "endless-frame": (points(*WHOLE, "run,two,inf"), r"p\.csv, line 4: .*inf"),
    "unknown-class": (
        write("classes.txt", "jump\n"),
        r"p\.csv, line 5: recording 'one': class 'run' is not one of jump",
    ),
    "repeated-class": (
        write("classes.txt", "jump\nrun\njump\n"),
        r"classes\.txt: expected distinct",
    ),
    "no-class": (write("classes.txt", "\n"), r"classes\.txt: expected distinct class names"),
    "class-without-points": (
        write("classes.txt", "jump\nrun\nswim\n"),
        r"no training point for swim; each class needs at least one",
    ),
    "no-point-at-all": (points(), r"no training point"),
    "class-that-is-no-topic": (
        write("classes.txt", "jump\nrun\na/b\n"),
        r"classes\.txt: class: expected a label .*'a/b'",
    ),
}


@pytest.mark.parametrize(("damage", "message"), TRAINING.values(), ids=TRAINING.keys())
def test_a_training_split_that_does_not_hold_together(
    folder: Path, damage: Damage, message: str
) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        read_training_split(folder)
    assert str(folder) in str(caught.value)


def test_a_byte_order_mark_is_none_of_the_text(folder: Path) -> None:
    before = read_training_split(folder)
    for name in ("split_train.txt", "point_labels/p.csv"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("\n", "\r\n"), encoding="utf-8-sig", newline="")
    (folder / "classes.txt").write_text("\n".join(before.classes), encoding="utf-8-sig")
    truth = read_truth(folder, ["three"], before.classes)["three"]
    content = (folder / "gt_full.json").read_text()
    (folder / "gt_full.json").write_text(content, encoding="utf-8-sig")
    after = read_training_split(folder)
    assert after.classes == before.classes
    assert [each.name for each in after.recordings] == [each.name for each in before.recordings]
    for one, other in zip(before.recordings, after.recordings, strict=True):
        assert one.point_index.tolist() == other.point_index.tolist()
        assert one.point_label.tolist() == other.point_label.tolist()
    again = read_truth(folder, ["three"], before.classes)["three"]
    assert len(truth) == 2 and again.start_s.tolist() == truth.start_s.tolist()


def test_one_of_several_point_files_can_be_named(folder: Path) -> None:
    (folder / "point_labels" / "q.csv").write_text("class,video_id,point\nfly,one,0\n")
    data = read_training_split(folder, DataConfig(point_labels="q.csv"))
    assert data.classes == ("fly",)
    with pytest.raises(DataError, match=r"point_labels/r\.csv: file is missing"):
        read_training_split(folder, DataConfig(point_labels="r.csv"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("split_test.txt"), r"split_test\.txt: file is missing"),
        (
            remove("features/test/three.npy"),
            r"1 of 1 feature files are missing: three\.npy",
        ),
        (
            write("split_test.txt", "one\nthree\ntwo\n"),
            r"expected to test on what is not trained on, but 2 recordings are in both splits: "
            r"one, two$",
        ),
    ],
)
def test_a_test_split_that_does_not_hold_together(
    folder: Path, damage: Damage, message: str
) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message):
        read_test_split(folder, ["jump", "run"])


def annotated(*rows: object) -> Damage:
    content = {"database": {"three": {"annotations": rows}}}
    return write("gt_full.json", json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(remove("gt_full.json"), "file is missing; it has the full", id="missing"),
        pytest.param(
            write("gt_full.json", "{"), 'expected JSON with the key "database"', id="json"
        ),
        pytest.param(write("gt_full.json", "{}"), 'the key "database"', id="no-database"),
        pytest.param(write("gt_full.json", "[]"), 'the key "database"', id="a-list"),
        pytest.param(
            write("gt_full.json", '{"database": {}}'),
            "'three' of the split has no entry",
            id="entry",
        ),
        pytest.param(
            annotated({"label": "swim", "segment": [0, 1]}),
            "'three' has the label 'swim', not one of the classes",
            id="label",
        ),
        pytest.param(annotated({"segment": [0, 1]}), "'three'", id="no-label"),
        pytest.param(annotated({"label": "run", "segment": [0]}), "'three'", id="no-end"),
        pytest.param(annotated({"label": "run", "segment": ["a", 1]}), "'three'", id="no-number"),
        pytest.param(
            write("gt_full.json", '{"database": {"three": {}}}'), "'three'", id="no-annotations"
        ),
    ],
)
def test_truth_that_does_not_hold_together(folder: Path, damage: Damage, message: str) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        read_truth(folder, ["three"], ["jump", "run"])
    assert str(folder / "gt_full.json") in str(caught.value)
