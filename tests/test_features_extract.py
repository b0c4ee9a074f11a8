"""`hrpro features extract`: videos become a data folder that training takes as it is."""

from __future__ import annotations

import fcntl
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from commands import (
    HRPRO,
    TRAINING,
    assignments,
    environment,
    hrpro,
    hrpro_json,
    one_line,
    refusal,
)
from numpy.typing import NDArray
from tiny_extractor import network, write_extractor

from hrpro.clients.cameras.extraction import extract_videos, video_features
from hrpro.clients.cameras.extractor import load_extractor
from hrpro.clients.cameras.frames import SnippetAssembler
from hrpro.clients.cameras.sources import parse_source, read_frames
from hrpro.training.data import read_training_split
from hrpro.training.data_config import DataConfig, DataError

CLOCK_SETTINGS = ("--set", "data.frames_per_s=10", "--set", "data.snippet_frames=4")


def write_video(path: Path, levels: list[int], rate: int = 10, at: list[int] | None = None) -> Path:
    """A video without losses, one grey picture for each level; ``at`` are frame times in 1/rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "bgr0"
        for number, level in enumerate(levels):
            image = np.full((16, 24, 3), level, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = at[number] if at else number
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Three equal features: the mean of the frames 0 and 2 of four, in 0..1."""
    return write_extractor(
        tmp_path / "tiny", network(frames=(0, 2)), frames_per_s=10.0, snippet_frames=4
    )


def extract(*arguments: object) -> dict[str, Any]:
    return hrpro_json("features", "extract", *arguments)


def grey(features: NDArray[np.float32]) -> list[float]:
    np.testing.assert_allclose(features, np.repeat(features[:, :1], 3, axis=1), atol=1e-6)
    return np.round(features[:, 0] * 255, 2).tolist()


# ---- what is written ---------------------------------------------------------------------------


def test_videos_become_a_data_folder(tmp_path: Path, tiny: Path) -> None:
    up = write_video(tmp_path / "up.mkv", list(range(0, 100, 10)))  # ten frames: two snippets
    flat = write_video(tmp_path / "flat.mkv", [50] * 40, rate=20)
    said = extract(up, flat, "--extractor", tiny, "--out", tmp_path / "data")
    assert said == {
        "feature_dim": 3, "made": {"up": 2, "flat": 5}, "there": {}, "failed": {}
    }  # fmt: skip
    data = tmp_path / "data"
    features = np.load(data / "features" / "train" / "up.npy")
    assert (features.dtype, features.shape) == (np.float32, (2, 3))
    assert grey(features) == [10, 50]
    assert grey(np.load(data / "features" / "train" / "flat.npy")) == [50] * 5
    assert (data / "split_train.txt").read_text() == "up\nflat\n"
    assert json.loads((data / "gt_full.json").read_text())["database"] == {
        "up": {"subset": "train", "annotations": [], "duration": 1.0, "fps": 10.0},
        "flat": {"subset": "train", "annotations": [], "duration": 2.0, "fps": 20.0},
    }
    source = json.loads((data / "features.json").read_text())
    assert len(source.pop("extractor_id")) == 16
    assert source == {
        "extractor": "tiny", "frames_per_s": 10.0, "snippet_frames": 4, "feature_dim": 3
    }  # fmt: skip


def test_features_are_those_of_the_live_path(tmp_path: Path, tiny: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, 90).tolist()
    video = write_video(tmp_path / "noise.mkv", levels)
    extractor = load_extractor(tiny)
    assembler = SnippetAssembler(extractor.clock, extractor.frame_offsets, extractor.prepare)
    live = [
        extractor.extract(snippet.frames[None])[0]
        for frame, time_s in read_frames(parse_source(str(video)))
        for snippet in assembler.push(frame, time_s)
    ]
    live += [extractor.extract(each.frames[None])[0] for each in assembler.end()]
    counted: list[int] = []
    made = video_features(video, extractor, counted.append)
    np.testing.assert_array_equal(made.features, live)
    assert (len(live), sum(counted), made.missing) == (22, 22, 0)
    assert grey(made.features)[3] == pytest.approx((levels[12] + levels[14]) / 2, abs=0.01)


def test_a_snippet_without_frames_repeats_the_one_before(
    tmp_path: Path, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The time stamps jump by three seconds behind eight frames: 3.7 s of video, nine snippets.
    at = [*range(8), *range(36, 48)]
    video = write_video(tmp_path / "torn.mkv", [10] * 8 + [200] * 12, at=at)
    extract_videos([video], load_extractor(tiny), tmp_path / "data", "train", lambda _: None)
    features = np.load(tmp_path / "data" / "features" / "train" / "torn.npy")
    assert grey(features) == [10, 10, 10, 10, 10, 10, 10, 10, 10, 200, 200, 200]
    assert caplog.messages == [
        "torn: 7 of 12 snippets have no frames of their own: they repeat the one before"
    ]


def test_what_a_user_wrote_stays(tmp_path: Path, tiny: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    entry = {"annotations": [{"label": "hop", "segment": [0.1, 0.5]}], "fps": 25}
    given = {"version": "mine", "database": {"a": entry, "other": {"annotations": []}}}
    (data / "gt_full.json").write_text(json.dumps(given))
    (data / "split_test.txt").write_text("other")
    video = write_video(tmp_path / "a.mkv", [9] * 8)
    extract(video, "--extractor", tiny, "--out", data, "--split", "test")
    given["database"]["a"] = entry | {"duration": 0.8}
    assert json.loads((data / "gt_full.json").read_text()) == given
    assert (data / "split_test.txt").read_text() == "other\na\n"
    assert (data / "features" / "test" / "a.npy").exists()


# ---- again, and what goes wrong ----------------------------------------------------------------


def test_what_is_there_is_not_made_again(tmp_path: Path, tiny: Path) -> None:
    videos = [write_video(tmp_path / f"{name}.mkv", [40] * 8) for name in "abc"]
    options = ("--extractor", tiny, "--out", tmp_path / "data")
    assert extract(*videos[:2], *options)["made"] == {"a": 2, "b": 2}
    features = tmp_path / "data" / "features" / "train"
    (features / "b.npy").rename(features / "b.npy.part")  # as if killed while it was written
    first = (features / "a.npy").stat().st_mtime_ns
    videos[0].write_bytes(b"not looked at")
    said = extract(*videos, *options)
    assert (said["there"], said["made"]) == ({"a": 2}, {"b": 2, "c": 2})
    assert (features / "a.npy").stat().st_mtime_ns == first
    assert sorted(each.name for each in features.iterdir()) == ["a.npy", "b.npy", "c.npy"]
    assert (tmp_path / "data" / "split_train.txt").read_text() == "a\nb\nc\n"


def test_a_broken_video_is_named_and_the_others_go_on(tmp_path: Path, tiny: Path) -> None:
    broken = tmp_path / "broken.mkv"
    broken.write_bytes(b"no video" * 100)
    short = write_video(tmp_path / "short.mkv", [1, 2, 3])
    good = write_video(tmp_path / "good.mkv", [1, 2, 3, 4])
    data = tmp_path / "data"
    said = hrpro(
        "features", "extract", broken, tmp_path / "none.mkv", short, good,
        "--extractor", tiny, "--out", data, status=1,
    )  # fmt: skip
    reasons = said.stderr.splitlines()
    assert len(reasons) == 3
    assert reasons[0].startswith(f"hrpro: {broken}: ")
    assert reasons[1].startswith(f"hrpro: {tmp_path / 'none.mkv'}: ")
    assert reasons[2] == (f"hrpro: {short}: expected at least one snippet of 0.4 s, got 3 frames")
    assert said.stdout.splitlines() == [
        "good: 1 snippets",
        f"{data}: D = 3; with points in {data / 'point_labels'}, go on with",
        f"    hrpro train {data} --out RUN {' '.join(CLOCK_SETTINGS)}",
    ]
    assert (data / "split_train.txt").read_text() == "good\n"
    assert [each.name for each in (data / "features" / "train").iterdir()] == ["good.npy"]


def test_what_does_not_belong_into_a_folder(tmp_path: Path, tiny: Path) -> None:
    video = write_video(tmp_path / "a.mkv", [1] * 4)
    data = tmp_path / "data"
    run = ("features", "extract", video, "--extractor", tiny, "--out", data)
    hrpro(*run)
    assert "recording 'a' is in the train split already" in refusal_of_one(*run, "--split", "test")

    other = write_extractor(
        tmp_path / "other", network(frames=(1,)), frames_per_s=10.0, snippet_frames=4, name="x"
    )
    said = refusal("features", "extract", video, "--extractor", other, "--out", data)
    assert "the features are of the extractor tiny (" in said

    (data / "features.json").unlink()
    assert "has features already, and no features.json that says of which" in refusal(*run)

    again = write_video(tmp_path / "sub" / "a.mkv", [1] * 4)
    said = refusal("features", "extract", video, again, "--extractor", tiny, "--out", data)
    assert "both are the recording a" in said
    blank = write_video(tmp_path / "a b.mkv", [1] * 4)
    said = refusal("features", "extract", blank, "--extractor", tiny, "--out", data)
    assert "expected a name without blanks" in said


def refusal_of_one(*arguments: object) -> str:
    said = hrpro(*arguments, status=1).stderr
    assert len(said.splitlines()) == 1
    return said


def test_a_folder_is_written_by_one_process(tmp_path: Path, tiny: Path) -> None:
    video = write_video(tmp_path / "a.mkv", [1] * 4)
    data = tmp_path / "data"
    data.mkdir()
    with (data / ".features.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = refusal("features", "extract", video, "--extractor", tiny, "--out", data)
    assert said == f"{data}: another process writes features there"


def test_what_cannot_be_written_whole_is_not_there(tmp_path: Path, tiny: Path) -> None:
    """As on a disk that is full, which a limit of the size of files is like."""
    video = write_video(tmp_path / "a.mkv", [1] * 400)  # 100 snippets: 1328 bytes
    data = tmp_path / "data"
    command = shlex.join(
        [*HRPRO, *map(str, ("features", "extract", video, "--extractor", tiny, "--out", data))]
    )
    said = subprocess.run(
        ["bash", "-c", f"ulimit -f 1; exec {command}"],
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert (said.returncode, said.stdout) == (1, "")
    assert "File too large" in one_line(said.stderr)
    assert not (data / "features" / "train" / "a.npy").exists()
    assert extract(video, "--extractor", tiny, "--out", data)["made"] == {"a": 100}


def test_features_that_are_damaged_are_named_and_the_others_go_on(
    tmp_path: Path, tiny: Path
) -> None:
    names = ("a", "b", "c", "d", "e")
    videos = [write_video(tmp_path / f"{name}.mkv", [1] * 8) for name in names]
    data = tmp_path / "data"
    extract(*videos[:4], "--extractor", tiny, "--out", data)
    files = [data / "features" / "train" / f"{name}.npy" for name in names[:4]]
    empty, short, archive, flat = files
    empty.write_bytes(b"")
    archive.write_bytes(b"PK\x03\x04" + bytes(60))
    short.write_bytes(short.read_bytes()[:-4])
    np.save(flat, np.zeros(3, np.float32))
    said = hrpro("features", "extract", *videos, "--extractor", tiny, "--out", data, status=1)
    reasons = said.stderr.splitlines()
    assert len(reasons) == 4
    for path, reason in zip(files[:3], reasons, strict=False):
        assert reason.startswith(f"hrpro: {path}: expected features, could not read them: ")
        assert reason.endswith("; remove the file, and they are made anew")
    assert reasons[3] == f"hrpro: {flat}: expected features (T, D), came an array (3,)"
    assert said.stdout.splitlines()[0] == "e: 2 snippets"
    empty.unlink()
    assert extract(videos[0], "--extractor", tiny, "--out", data)["made"] == {"a": 2}


def test_a_list_of_recordings_is_text_one_a_line(tmp_path: Path, tiny: Path) -> None:
    video = write_video(tmp_path / "a.mkv", [1] * 4)
    data = tmp_path / "data"
    data.mkdir()
    listed = data / "split_train.txt"
    listed.write_bytes("zwölf\n".encode("latin-1"))
    run = ("features", "extract", video, "--extractor", tiny, "--out", data)
    said = refusal(*run)
    assert said == f"{listed}: expected text in UTF-8, came other bytes"
    listed.write_text("\ufeffday one\n\nzwölf\n", encoding="utf-8")
    assert extract(*run[2:])["made"] == {"a": 1}
    assert listed.read_text(encoding="utf-8") == "day one\nzwölf\na\n"


def test_a_video_may_have_a_name_that_means_something_else(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "@at.mkv", [1] * 4)
    write_video(tmp_path / "plain.mkv", [1] * 8).rename(tmp_path / "-")
    made = extract("./@at.mkv", "./-", "--extractor", tiny, "--out", "data")["made"]
    assert made == {"@at": 1, "-": 2}


# ---- on to training ----------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path: Path, tiny: Path) -> Path:
    """Bright and dark flashes in six videos of 30 snippets, with a point for each."""
    data, rows, truth = tmp_path / "data", ["class,video_id,point"], {}
    for number in range(6):
        levels, shift = [100] * 120, 4 * (number % 3)
        levels[24 + shift : 48 + shift] = [250] * 24
        levels[72 + shift : 96 + shift] = [10] * 24
        video = write_video(tmp_path / f"video{number}.mkv", levels)
        split = "train" if number < 4 else "test"
        extract(video, "--extractor", tiny, "--out", data, "--split", split)
        truth[video.stem] = [
            {"label": label, "segment": [(begin + shift) / 10, (begin + 24 + shift) / 10]}
            for label, begin in (("bright", 24), ("dark", 72))
        ]
        if split == "train":
            rows += [f"bright,{video.stem},{36 + shift}", f"dark,{video.stem},{80 + shift}"]
    (data / "point_labels").mkdir()
    (data / "point_labels" / "points.csv").write_text("\n".join(rows) + "\n")
    content = json.loads((data / "gt_full.json").read_text())
    for name, entry in content["database"].items():
        entry["annotations"] = truth[name]
    (data / "gt_full.json").write_text(json.dumps(content))
    return data


def test_training_takes_the_folder_as_it_is(tmp_path: Path, labelled: Path) -> None:
    checked = hrpro_json("data", "check", labelled, *(
        each.replace("data.", "") for each in CLOCK_SETTINGS
    ))  # fmt: skip
    assert (checked["errors"], checked["warnings"]) == ([], [])
    run = tmp_path / "run"
    hrpro("train", labelled, "--out", run, *assignments(TRAINING), *CLOCK_SETTINGS)
    figures = hrpro_json("evaluate", run, "--data", labelled)
    assert figures["average_map"] > 0.8


def test_another_clock_is_refused(labelled: Path) -> None:
    with pytest.raises(DataError) as raised:
        read_training_split(labelled, DataConfig())
    assert str(raised.value) == (
        f"{labelled / 'features.json'}: the features have 4 frames a snippet at 10 frames/s, the "
        "settings 16 at 25; expected data.frames_per_s=10 data.snippet_frames=4"
    )
    assert "the features have 4 frames a snippet" in hrpro(
        "data", "check", labelled, status=1
    ).stdout  # fmt: skip
