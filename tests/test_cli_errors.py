"""What a user can mend is told in one line on stderr, with an exit code that is not 0."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import (
    ANY_PORT,
    HRPRO,
    Engine,
    Trained,
    engine,
    environment,
    hrpro,
    one_line,
    refusal,
)

from hrpro.clients import cli
from hrpro.export.bundle import Bundle

pytest_plugins = ("cli_fixtures",)

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def served(trained: Trained) -> Iterator[Engine]:
    with engine(trained.bundle, quiet=False) as running_engine:
        yield running_engine


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """As `refusal`, but in this process, where torch is there already."""
    # What `main` sets for its process must not stay in this one.
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["hrpro", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 1
        said = capsys.readouterr()
        assert said.out == ""
        return one_line(said.err)

    return run


@pytest.fixture
def data(trained: Trained, tmp_path: Path) -> Path:
    """The example's data folder, to be spoilt."""
    return Path(shutil.copytree(trained.data, tmp_path / "data"))


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.run, tmp_path / "run"))


@pytest.fixture
def broken_bundle(trained: Trained, tmp_path: Path) -> Path:
    bundle = Path(shutil.copytree(trained.bundle, tmp_path / "bundle"))
    graph = bundle / "snippet.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    return bundle


# ---- data --------------------------------------------------------------------------------------


def test_training_without_data(tmp_path: Path) -> None:
    said = refusal("train", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert str(tmp_path / "nowhere") in said
    assert not (tmp_path / "run").exists()


def test_a_point_outside_its_recording(refused: Refused, data: Path, tmp_path: Path) -> None:
    points = data / "point_labels" / "point_gaussian.csv"
    header, first, *rest = points.read_text().splitlines()
    first = ",".join([*first.split(",")[:-1], "99999"])
    points.write_text("\n".join([header, first, *rest]) + "\n")
    said = refused("train", data, "--out", tmp_path / "run")
    assert said.startswith(f"{points}, line 2: recording 'seq1': the point at frame 99999 ")
    assert "outside" in said
    assert not (tmp_path / "run").exists()


def test_a_missing_feature_file(refused: Refused, data: Path, tmp_path: Path) -> None:
    for subset, name in (("train", "seq2"), ("test", "seq6")):
        (data / "features" / subset / f"{name}.npy").unlink()
    missing = data / "features"
    said = refused("train", data, "--out", tmp_path / "run")
    assert said.startswith(f"{missing / 'train'}: 1 of 4 feature files are missing: seq2.npy; ")
    assert not (tmp_path / "run").exists()
    said = refused("feed", "features", data, "--to", ANY_PORT)
    assert said.startswith(f"{missing / 'test' / 'seq6.npy'}: ")


def test_evaluating_on_data_that_is_not_there(
    refused: Refused, trained: Trained, tmp_path: Path
) -> None:
    said = refused("evaluate", trained.run, "--data", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in said
    said = refused("stream-eval", trained.bundle, "--data", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in said


def test_evaluating_on_features_of_another_kind(
    refused: Refused, trained: Trained, data: Path
) -> None:
    for file in (data / "features" / "test").iterdir():
        np.save(file, np.load(file)[:, :95])
    said = refused("evaluate", trained.run, "--data", data)
    assert "96" in said and "95" in said
    said = refused("stream-eval", trained.bundle, "--data", data)
    assert "96" in said and "95" in said


def test_a_test_split_without_an_action(
    refused: Refused, trained: Trained, data: Path, tmp_path: Path
) -> None:
    path = data / "gt_full.json"
    content = json.loads(path.read_text())
    for name in ("seq5", "seq6"):
        content["database"][name]["annotations"] = []
    path.write_text(json.dumps(content))
    expected = (
        f"{path}: expected at least one annotated action in the 2 recordings to evaluate on, "
        "found none: without, nothing can be measured"
    )
    predictions = tmp_path / "p.json"
    predictions.write_text('{"results": {}}')
    out = ("--out", tmp_path / "out")
    for command in (
        ("evaluate", trained.run),
        ("evaluate", "--predictions", predictions),
        ("stream-eval", trained.bundle),
        ("stream-eval", trained.bundle, "--curve"),
        ("export", trained.run, *out, "--precision", "int8"),
    ):
        assert refused(*command, "--data", data) == expected
    assert refused("ablate", data, *out, "--row", "a:") == expected
    assert not (tmp_path / "out" / "bundle.json").exists()


def test_recordings_that_are_trained_on(refused: Refused, trained: Trained, data: Path) -> None:
    with (data / "split_train.txt").open("a") as file:
        file.write("seq6\n")
    for command in (("evaluate", trained.run), ("stream-eval", trained.bundle)):
        said = refused(*command, "--data", data)
        assert said.startswith(f"{data}: expected to test on what is not trained on, but 1 ")
        assert said.endswith("in both splits: seq6")


# ---- runs and bundles --------------------------------------------------------------------------


def test_a_folder_that_is_no_run(refused: Refused, run: Path, trained: Trained) -> None:
    (run / "run.json").unlink()
    expected = f"{run / 'run.json'}: file is missing; expected a run finished by hrpro train"
    assert refused("evaluate", run, "--data", trained.data) == expected
    assert refused("export", run, "--out", run.parent / "bundle") == expected
    assert not (run.parent / "bundle").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"truncated", b"pickled list"])
def test_weights_that_cannot_be_read(
    refused: Refused, run: Path, trained: Trained, content: bytes
) -> None:
    import torch

    weights = run / "snippet.pt"
    if content == b"truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif content == b"pickled list":
        torch.save([1, 2, 3], weights)
    else:
        weights.write_bytes(content)
    said = refused("evaluate", run, "--data", trained.data)
    assert said.startswith(f"{weights}: expected the weights of this run: ")


def test_weights_of_another_model(refused: Refused, run: Path) -> None:
    description = json.loads((run / "run.json").read_text())
    description["config"]["model"]["width"] = 32
    (run / "run.json").write_text(json.dumps(description))
    said = refused("export", run, "--out", run.parent / "bundle")
    assert said.startswith(f"{run / 'snippet.pt'}: expected the weights of this run: ")


def test_a_bundle_whose_graph_was_changed(broken_bundle: Path, trained: Trained) -> None:
    sides = [part for side in ("feed", "events", "control") for part in (f"--{side}", ANY_PORT)]
    sides += ["--state", "none"]
    for command in (("serve", broken_bundle, *sides), ("stream-eval", broken_bundle)):
        data = ("--data", trained.data) if command[0] == "stream-eval" else ()
        said = refusal(*command, *data)
        assert said.startswith(f"{broken_bundle / 'snippet.onnx'}: expected SHA-256 ")


def test_a_bundle_does_not_replace_something_else(
    refused: Refused, trained: Trained, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("all of it")
    said = refused("export", trained.run, "--out", tmp_path / "notes")
    assert said.startswith(f"{tmp_path / 'notes'}: exists and is not a bundle")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "all of it"


# ---- feeding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "complaint"),
    [
        (np.zeros((4, 96), np.int64), "came int64 (4, 96)"),
        (np.zeros(96, np.float32), "came float32 (96,)"),
        (np.full((4, 96), np.nan, np.float32), "snippet 0: expected finite features"),
        (np.diag([1, 1, np.inf]), "snippet 2: expected finite features"),
        (np.full((4, 96), 1e300), "snippet 0: expected finite features"),
        (np.zeros((0, 96), np.float32), "(0, 96)"),
    ],
    ids=["integers", "one snippet", "NaN", "infinity", "too large", "no snippet"],
)
def test_features_that_are_none(
    refused: Refused, tmp_path: Path, features: np.ndarray, complaint: str
) -> None:
    np.save(tmp_path / "cam.npy", features)
    said = refused("feed", "features", tmp_path / "cam.npy", "--to", ANY_PORT)
    assert said.startswith(f"{tmp_path / 'cam.npy'}: ")
    assert complaint in said


def test_a_file_that_is_no_array(refused: Refused, tmp_path: Path) -> None:
    for content in (b"no array", b"PK\x03\x04 a damaged archive"):
        (tmp_path / "cam.npy").write_bytes(content)
        said = refused("feed", "features", tmp_path / "cam.npy", "--to", ANY_PORT)
        assert said.startswith(f"{tmp_path / 'cam.npy'}: expected a .npy array")


def test_a_list_of_recordings_that_is_none(refused: Refused, data: Path) -> None:
    split, feeding = (
        data / "split_test.txt",
        ("feed", "features", data, "--to", "tcp://127.0.0.1:1"),
    )
    split.write_bytes(b"\xff\n")
    assert refused(*feeding) == f"{split}: expected text in UTF-8, came other bytes"
    split.write_text("\n")
    said = refused(*feeding)
    assert said == f"{split}: expected at least one recording name, the file is empty"
    split.write_text("\ufeffday one\n", encoding="utf-8")
    assert f"{data / 'features' / 'test' / 'day one.npy'}: expected a .npy" in refused(*feeding)


def test_two_files_of_one_name(refused: Refused, trained: Trained) -> None:
    file = trained.data / "features" / "test" / "seq5.npy"
    said = refused("feed", "features", trained.data, file, "--to", ANY_PORT)
    assert "'seq5'" in said


def test_features_that_the_engine_refuses(served: Engine, tmp_path: Path) -> None:
    np.save(tmp_path / "cam.npy", np.zeros((4, 95), np.float32))
    said = refusal("feed", "features", tmp_path / "cam.npy", "--to", served.feed)
    assert said.startswith("stream 'cam'")
    assert "95" in said and "96" in said


def test_a_clock_that_the_engine_refuses(
    refused: Refused, served: Engine, trained: Trained
) -> None:
    said = refused("feed", "features", trained.data, "--to", served.feed, "--frames-per-s", 30)
    assert "30" in said and "25" in said


def test_an_engine_that_is_not_there(refused: Refused, trained: Trained, free_address: str) -> None:
    said = refused("feed", "features", trained.data, "--to", free_address, "--timeout", 0.2)
    assert said.startswith(f"stream 'seq5' at {free_address}: expected a Welcome within 0.2 s")


@pytest.mark.parametrize("speed", ["0", "-1", "nan", "inf", "fast"])
def test_a_speed_that_is_none(speed: str, trained: Trained) -> None:
    # One more than a line: the parser says how the command is used, and exits with 2.
    said = hrpro("feed", "features", trained.data, "--to", ANY_PORT, "--speed", speed, status=2)
    assert said.stdout == ""
    assert f"--speed: expected a number above 0 or max, got '{speed}'" in said.stderr


# ---- addresses ---------------------------------------------------------------------------------


@pytest.fixture
def free_address() -> Iterator[str]:
    """An address that nobody answers at, and that nobody else can take meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"tcp://127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize("side", ["feed", "events", "control"])
def test_an_address_in_use(trained: Trained, served: Engine, side: str) -> None:
    taken = getattr(served.addresses, side)
    at = {"feed": ANY_PORT, "events": ANY_PORT, "control": ANY_PORT, side: taken}
    options = [part for name, address in at.items() for part in (f"--{name}", address)]
    said = refusal("serve", trained.bundle, *options, "--state", "none")
    assert taken in said
    assert "in use" in said


def test_more_streams_than_a_process_may_have_files_for(bundle: Bundle, tmp_path: Path) -> None:
    files = [tmp_path / f"r{number}.npy" for number in range(70)]
    for file in files:
        np.save(file, np.ones((2, 8), np.float32))
    command = shlex.join([*HRPRO, "feed", "features", *map(str, files), "--speed", "max", "--json"])
    with engine(bundle.folder, "--set", "max_streams=70") as served:

        def fed(limit: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["sh", "-c", f"{limit}; exec {command} --to {served.feed}"],
                check=False,
                capture_output=True,
                text=True,
                env=environment(),
            )

        refused = fed("ulimit -n 128")
        assert refused.returncode == 1
        assert refused.stdout == ""
        assert one_line(refused.stderr) == (
            "70 streams: expected room for 204 open files, this process may have 128; raise the "
            "limit (ulimit -Hn), or feed fewer streams in one process"
        )
        raised = fed("ulimit -S -n 128")
        assert raised.returncode == 0, raised.stderr
        assert json.loads(raised.stdout)["snippets"] == 140
        # More than ever fitted while each feeder had a context: seven files and two threads.
        assert json.loads(fed("ulimit -n 256").stdout)["streams"]["r69"] == 2


def test_something_that_is_no_address(refused: Refused, trained: Trained) -> None:
    assert "nonsense" in refused("feed", "features", trained.data, "--to", "nonsense")
    assert "nonsense" in refusal("watch", "--from", "nonsense")
    assert "nonsense" in refusal(
        "serve",
        trained.bundle,
        "--feed",
        "nonsense",
        "--events",
        ANY_PORT,
        "--control",
        ANY_PORT,
        "--state",
        "none",
    )
