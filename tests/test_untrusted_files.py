"""Files are data: nothing is unpickled, and a bundle reads nothing that it does not vouch for."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import set_external_data

from hrpro.engine import serve
from hrpro.export.bundle import Bundle, BundleError, content_id, read_bundle, sha256
from hrpro.export.golden import check_golden
from hrpro.training.checkpoint import read_checkpoint, read_tensors

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "clients", "engine", "export", "training")
# Calls that run what a file says.
FORBIDDEN = {
    "eval", "exec", "compile", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load",
    "marshal.loads", "shelve.open", "joblib.load", "dill.load", "dill.loads", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "torch.hub.load",
}  # fmt: skip
# And those that do unless they are told not to.
NEEDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Each call in the project: where, of what, and how."""
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call):
                    where = f"{file.relative_to(ROOT)}:{node.lineno}"
                    yield where, ast.unparse(node.func), node


def test_nothing_is_unpickled_or_evaluated() -> None:
    found = set()
    for where, name, call in calls():
        assert name not in FORBIDDEN, f"{where}: {name}"
        if name in NEEDED:
            keyword, value = NEEDED[name]
            given = {each.arg: ast.unparse(each.value) for each in call.keywords}
            assert given.get(keyword) == str(value), f"{where}: {name} without {keyword}={value}"
            found.add(name)
    assert found == set(NEEDED)  # they are still called so


class Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"made_by": Runs(made)}, tmp_path / "checkpoint.pt")
    with pytest.raises(Exception, match="expected the state of a run that was stopped"):
        read_checkpoint(tmp_path)
    with pytest.raises(Exception, match="Weights only load failed"):
        read_tensors(tmp_path / "checkpoint.pt")
    assert not made.exists()
    # It would have.
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert made.exists()


@pytest.fixture
def copied(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))


def vouch(folder: Path) -> None:
    """Lets bundle.json have the hashes of what is there."""
    path = folder / "bundle.json"
    content = json.loads(path.read_text())
    content["files"] = {name: sha256(folder / name) for name in content["files"]}
    content["bundle_id"] = content_id(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["snippet.onnx", "step.onnx", "instance.onnx", "golden.npz"])
def test_a_changed_file_never_reaches_onnx_runtime(
    copied: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (copied / name).open("r+b") as file:
        file.seek(100)
        file.write(b"\0changed")
    opened = []
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *each, **_: opened.append(each))
    with pytest.raises(BundleError, match=rf"{name}: expected SHA-256"):
        serve.new_deployment(read_bundle(copied), serve.load_engine_config(read_bundle(copied)))
    assert opened == []


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/hostname", "sub/snippet.onnx", "x"])
def test_a_manifest_cannot_name_other_files(copied: Path, name: str) -> None:
    shutil.copy(copied / "snippet.onnx", copied.parent / "outside.onnx")
    path = copied / "bundle.json"
    content = json.loads(path.read_text())
    content["files"][name] = content["files"].pop("snippet.onnx")
    content["bundle_id"] = content_id(content)
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"files: expected snippet\.onnx"):
        read_bundle(copied)


def test_a_link_cannot_leave_the_folder(copied: Path) -> None:
    graph = copied / "snippet.onnx"
    inside = graph.rename(copied / "real.onnx")
    graph.symlink_to(inside.name)
    read_bundle(copied)
    graph.unlink()
    graph.symlink_to(inside.rename(copied.parent / "real.onnx"))
    with pytest.raises(BundleError, match=r"snippet\.onnx: .* a link that leaves its folder"):
        read_bundle(copied)
    # The folder itself may be a link.
    graph.unlink()
    (copied.parent / "real.onnx").rename(graph)
    (copied.parent / "current").symlink_to(copied)
    read_bundle(copied.parent / "current")


@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "/etc/hostname"])
def test_a_graph_cannot_have_tensors_in_other_files(copied: Path, location: str) -> None:
    path = copied / "snippet.onnx"
    model = onnx.load(path)
    tensor = next(each for each in model.graph.initializer if each.HasField("raw_data"))
    for folder in (copied, copied.parent):
        np.frombuffer(tensor.raw_data, np.uint8).tofile(folder / "weights.bin")
    set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    vouch(copied)
    with pytest.raises(BundleError, match=r"snippet\.onnx: expected a graph without tensors in"):
        read_bundle(copied)


def test_golden_windows_are_no_pickles(copied: Path, bundle: Bundle) -> None:
    config = serve.load_engine_config(bundle)
    backend = serve._new_backend(bundle, config)
    with np.load(copied / "golden.npz", allow_pickle=False) as golden:
        arrays = dict(golden)
    arrays["features"] = np.array([Runs(copied / "made")], dtype=object)
    np.savez(copied / "golden.npz", **arrays, allow_pickle=True)
    vouch(copied)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        check_golden(read_bundle(copied), backend)
    assert not (copied / "made").exists()
