"""Bundles: what is written is what was trained, and nothing else is ever read or left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from tiny_model import (
    CLASSES,
    CONTEXT,
    DIM,
    LOOKAHEAD,
    copy_graphs,
    tiny_config,
    tiny_description,
    tiny_model,
    tiny_recording,
)

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.config import EngineConfig, WindowConfig
from hrpro.engine.settings import SettingsError
from hrpro.export import export, verify
from hrpro.export.bundle import Bundle, BundleError, content_id, read_bundle
from hrpro.export.replaced import replaced_folder
from hrpro.export.tracing import ExportError
from hrpro.export.verify import (
    TOLERANCES,
    Exactness,
    torch_instances,
    verify_graphs,
)
from hrpro.training.config import ModelConfig
from hrpro.training.snippet_stage import snippet_scores
from hrpro.training.train import TrainedModel

EXACT = Exactness(exact=True, context=CONTEXT, lookahead=LOOKAHEAD)


@pytest.fixture
def model() -> TrainedModel:
    """The one that the bundle was made of."""
    return tiny_model(tiny_config())


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.folder, tmp_path / "copy"))


# --- contents ------------------------------------------------------------------------------------


def test_a_bundle_says_what_it_is(bundle: Bundle) -> None:
    manifest = bundle.manifest
    config = tiny_config()
    assert (manifest.data_set, manifest.classes, manifest.feature_dim) == ("tiny", CLASSES, DIM)
    assert (manifest.embedding_width, manifest.exact) == (DIM, True)
    assert (manifest.context_snippets, manifest.lookahead_snippets) == (13, 3)
    assert (manifest.clock.frames_per_s, manifest.clock.snippet_frames) == (25.0, 16)
    assert manifest.snippet_s == 0.64
    assert (manifest.window, manifest.localization) == (config.window, config.localization)
    assert manifest.training == config.model_dump(mode="json")
    assert manifest.verified.keys() == TOLERANCES.keys()
    assert all(manifest.verified[name] <= TOLERANCES[name] for name in TOLERANCES)
    assert {"torch", "onnx", "numpy", "python", "hrpro-stream"} <= manifest.versions.keys()
    assert sorted(path.name for path in bundle.folder.iterdir()) == [
        "bundle.json",
        "golden.npz",
        "instance.onnx",
        "snippet.onnx",
        "step.onnx",
    ]


def test_a_bundle_is_read_as_it_was_written(bundle: Bundle, copy: Path) -> None:
    again = read_bundle(copy)
    assert again.manifest == bundle.manifest
    assert len(again.manifest.bundle_id) == 16
    assert again.manifest.bundle_id == content_id(json.loads((copy / "bundle.json").read_text()))


def test_a_bundle_gives_stage_2_the_weight_that_it_is_trusted_with(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_graphs(monkeypatch, bundle.folder, "snippet", "step")
    config = tiny_config()
    model = tiny_model(config)
    model.instance.trust.fill_(0.5)
    bundle = export.export_bundle(tiny_description(config), model, {}, tmp_path / "bundle")
    assert bundle.manifest.localization.completeness_weight == 0.25
    backend = OnnxRuntimeBackend(bundle, EngineConfig(threads=1))
    embedding = np.abs(tiny_recording(33))
    table = np.array([[4.0, 9.0], [20.0, 30.0]], np.float32)
    halfway = backend.score_instances(embedding, table)[1]
    full = torch_instances(tiny_model(config), embedding, table)[1]
    np.testing.assert_allclose(halfway, (table + full) / 2, atol=1e-4)


def test_the_graphs_compute_what_the_model_does(bundle: Bundle, model: TrainedModel) -> None:
    backend = OnnxRuntimeBackend(bundle, EngineConfig(threads=1))
    features = tiny_recording(33)
    expected = snippet_scores(model.snippet, features)
    scores, embedding, _ = backend.score_snippets(features[None], np.ones((1, 33), np.bool_))
    np.testing.assert_allclose(scores[0], expected.scores, atol=1e-5)
    np.testing.assert_allclose(embedding[0], expected.embedding, atol=1e-5)
    for proposals in (np.zeros((0, 2)), [[-2.0, 3.5]], [[4.0, 9.0], [30.0, 40.0], [1.0, 1.5]]):
        table = np.asarray(proposals, np.float32)
        got = backend.score_instances(embedding[0], table)
        wanted = torch_instances(model, expected.embedding, table)
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_prototypes_are_a_named_initializer(bundle: Bundle, model: TrainedModel) -> None:
    graph = onnx.load(bundle.snippet_graph).graph
    arrays = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    np.testing.assert_array_equal(arrays["prototypes"], model.snippet.prototypes.numpy())
    assert [each.name for each in graph.input] == ["features", "valid"]
    assert [each.name for each in graph.output] == ["scores", "cas", "attention", "embedding"]


def test_other_prototypes_give_other_scores(
    bundle: Bundle, model: TrainedModel, tmp_path: Path
) -> None:
    proto = onnx.load(bundle.snippet_graph)
    (at,) = [i for i, each in enumerate(proto.graph.initializer) if each.name == "prototypes"]
    with torch.no_grad():
        model.snippet.prototypes.mul_(-1)
    array = numpy_helper.from_array(model.snippet.prototypes.numpy(), "prototypes")
    proto.graph.initializer[at].CopyFrom(array)
    onnx.save(proto, tmp_path / "changed.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "changed.onnx")
    features = tiny_recording(20)
    (scores,) = session.run(
        ["scores"], {"features": features[None], "valid": np.ones((1, 20), bool)}
    )
    expected = snippet_scores(model.snippet, features).scores
    np.testing.assert_allclose(scores[0], expected, atol=1e-5)
    original = tiny_model(tiny_config()).snippet
    assert np.abs(snippet_scores(original, features).scores - expected).max() > 0.01


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 2 blocks of 32 back and 0 ahead, and 1 for the convolution
        ({}, Exactness(True, 65, 1)),
        ({"blocks": 3, "attention_past": 4, "attention_future": 2}, Exactness(True, 13, 7)),
        ({"blocks": 0}, Exactness(True, 1, 1)),
        ({"attention_past": None}, Exactness(False, 64, 4)),
    ],
)
def test_exact_positions(settings: dict[str, Any], expected: Exactness) -> None:
    assert export.exact_positions(ModelConfig(**settings)) == expected


# --- verification --------------------------------------------------------------------------------


def test_untouched_graphs_pass(bundle: Bundle, model: TrainedModel) -> None:
    graphs = bundle.snippet_graph, bundle.instance_graph
    worst = verify_graphs(model, *graphs, EXACT, bundle.step_graph)
    assert worst.keys() == TOLERANCES.keys()
    assert worst["scores"] < 1e-5


Tamper = Callable[[TrainedModel], object]


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (
            lambda m: m.snippet.classify.bias.add_(0.01),
            "scores: ONNX Runtime differs from torch by",
        ),
        (lambda m: m.snippet.prototypes.mul_(1.1), "scores: "),
        (lambda m: m.snippet.feature_mean.add_(0.1), "scores: "),
        (lambda m: m.snippet.embed.bias.add_(float("nan")), "scores: .* nan"),
        (lambda m: m.instance.heads.score[-1].bias.add_(0.01), "completeness: "),
        (lambda m: m.instance.heads.regress[-1].bias.add_(0.1), "(borders|completeness): "),
    ],
)
def test_a_graph_that_is_not_the_model_is_refused(
    bundle: Bundle, model: TrainedModel, tamper: Tamper, message: str
) -> None:
    with torch.no_grad():
        tamper(model)
    with pytest.raises(ExportError, match=message):
        verify_graphs(model, bundle.snippet_graph, bundle.instance_graph, EXACT)


@pytest.mark.parametrize(
    "claimed", [Exactness(True, CONTEXT - 1, LOOKAHEAD), Exactness(True, CONTEXT, LOOKAHEAD - 1)]
)
def test_windows_that_are_not_exact_are_refused(
    bundle: Bundle, model: TrainedModel, claimed: Exactness
) -> None:
    with pytest.raises(ExportError, match=r"(scores|embedding): "):
        verify_graphs(model, bundle.snippet_graph, bundle.instance_graph, claimed)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["nan-first", "nan-last"])
def test_nan_is_not_forgotten(order: tuple[int, int]) -> None:
    ones = np.ones(3, np.float32)
    pairs = [(np.array([1, np.nan, 1], np.float32), ones), (ones, ones)]
    worst = dict.fromkeys(TOLERANCES, 0.0)
    for index in order:
        verify._note(worst, "scores", *pairs[index])
    with pytest.raises(ExportError, match=r"scores: .* nan"):
        verify._refuse_differences(worst)


# --- reading -------------------------------------------------------------------------------------


def changed(**changes: object) -> Callable[[Path], object]:
    """The manifest with other entries; None takes one away."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "bundle.json").read_text()) | changes
        content = {key: value for key, value in content.items() if value is not None}
        (folder / "bundle.json").write_text(json.dumps(content))

    return damage


def append_byte(folder: Path) -> None:
    with (folder / "snippet.onnx").open("ab") as file:
        file.write(b"\0")


def nested_training(levels: int) -> Callable[[Path], object]:
    training: dict[str, object] = {}
    for _ in range(levels):
        training = {"more": training}
    return changed(training=training)


def circular_link(folder: Path) -> None:
    (folder / "instance.onnx").unlink()
    (folder / "instance.onnx").symlink_to("other.onnx")
    (folder / "other.onnx").symlink_to("instance.onnx")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "bundle.json").unlink(), r"bundle\.json: file is missing"),
        (lambda f: (f / "bundle.json").write_text("{"), r"bundle\.json: expected JSON"),
        (lambda f: (f / "bundle.json").write_bytes(b"\xff{}"), r"bundle\.json: expected JSON"),
        (
            lambda f: (f / "bundle.json").write_text("[]"),
            "expected schema_version 4 .*, got None",
        ),
        (changed(schema_version=5), r"bundle\.json: expected schema_version 4 .*, got 5"),
        (changed(schema_version=None), "expected schema_version 4 .*, got None"),
        (changed(classes=None), r"bundle\.json: classes: "),
        (changed(classes=[]), r"bundle\.json: classes: "),
        (changed(feature_dim=0), r"bundle\.json: feature_dim: .*got 0"),
        (changed(surprise=1), r"bundle\.json: surprise: "),
        (changed(figures={"average_map": 1.0}), "bundle_id: .*the file was changed"),
        (changed(bundle_id="0" * 16), f"bundle_id: expected .* got {'0' * 16}"),
        (
            changed(files={}),
            r"files: expected .*instance\.onnx, golden\.npz, got none",
        ),
        (changed(files={"../x": "0"}), r"files: expected .*got \.\./x"),
        (lambda f: (f / "instance.onnx").unlink(), r"instance\.onnx: cannot be read"),
        (append_byte, r"snippet\.onnx: expected SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}"),
        (changed(schema_version=4.0), r"expected schema_version 4 .*, got 4\.0"),
        (changed(schema_version=True), "expected schema_version 4 .*, got True"),
        (
            changed(snippet_s=0.5),
            r"bundle\.json: snippet_s: expected 0\.64, 16 frames at 25 frames/s, got 0\.5$",
        ),
        (
            changed(classes=["run", "run", "run"]),
            r"bundle\.json: classes: expected distinct names$",
        ),
        (
            lambda f: (f / "bundle.json").write_text("[" * 100_000),
            r"bundle\.json: expected JSON: ",
        ),
        (
            lambda f: (f / "bundle.json").write_text('{"training": ' * 40 + "1" + "}" * 40),
            r"bundle\.json: expected JSON of at most 32 levels, got more",
        ),
        (
            nested_training(300),  # which can be read and hashed, but not printed
            r"bundle\.json: expected JSON of at most 32 levels, got more",
        ),
        (circular_link, r"instance\.onnx: cannot be read: "),
    ],
)
def test_what_is_no_bundle_is_refused(
    copy: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(copy)
    with pytest.raises(BundleError, match=message) as caught:
        read_bundle(copy)
    assert str(copy) in str(caught.value)


# --- writing -------------------------------------------------------------------------------------


def test_a_failed_export_leaves_nothing(
    bundle: Bundle, model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_graphs(monkeypatch, bundle.folder, "snippet", "step", "instance")  # of another model
    with torch.no_grad():
        model.snippet.classify.bias.add_(0.1)
    with pytest.raises(ExportError, match="scores"):
        export.export_bundle(tiny_description(tiny_config()), model, {}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_window_that_is_too_short_is_refused_before_the_graphs_are_made(
    model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "export_snippet_graph", pytest.fail)
    window = WindowConfig(window_snippets=16)
    config = tiny_config().model_copy(update={"window": window})
    with pytest.raises(SettingsError, match=r"expected at least 17 \(context 13 .*, got 16"):
        export.export_bundle(tiny_description(config), model, {}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(copy: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(RuntimeError, match="killed"), replaced_folder(copy) as folder:
        (folder / "bundle.json").write_text("half")
        raise RuntimeError("killed")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    with replaced_folder(copy) as folder:
        (folder / "bundle.json").write_text("whole")
        assert {path.name for path in copy.iterdir()} == before.keys()  # until all went well
    assert {path.name: path.read_text() for path in copy.iterdir()} == {"bundle.json": "whole"}
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_link_stays_and_its_target_is_replaced(copy: Path, tmp_path: Path) -> None:
    current, absent = tmp_path / "current", tmp_path / "absent"
    current.symlink_to("copy")
    absent.symlink_to("new")
    for link in (current, absent):
        with replaced_folder(link) as folder:
            (folder / "bundle.json").write_text("whole")
    assert (current.readlink(), absent.readlink()) == (Path("copy"), Path("new"))
    for target in (copy, tmp_path / "new"):
        assert not target.is_symlink()
        assert {path.name: path.read_text() for path in target.iterdir()} == {
            "bundle.json": "whole"
        }
    assert len(list(tmp_path.iterdir())) == 4


def test_links_in_a_circle_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    refusal = pytest.raises(FileExistsError, match="expected a folder, got links in a circle")
    with refusal, replaced_folder(tmp_path / "one"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("done", [1, 2], ids=["old-aside", "new-in-place"])
def test_a_signal_between_the_renames_leaves_a_whole_bundle(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """It comes when the first rename is done, or the second: before they have returned."""
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    rename = Path.rename
    renamed = []

    def stopped(path: Path, target: Path) -> Path:
        found = rename(path, target)
        renamed.append(target)
        if len(renamed) == done:
            raise SystemExit(143)
        return found

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(SystemExit), replaced_folder(copy) as folder:
        (folder / "bundle.json").write_bytes(b"whole")
    after = {path.name: path.read_bytes() for path in copy.iterdir()}
    assert after == (before if done == 1 else {"bundle.json": b"whole"})
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_old_bundle_that_cannot_come_back_is_kept_aside(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    rename = Path.rename

    def once(path: Path, target: Path) -> Path:
        if path != copy:
            raise OSError("no more")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(OSError, match="no more"), replaced_folder(copy) as folder:
        (folder / "bundle.json").write_bytes(b"whole")
    (aside,) = tmp_path.iterdir()
    assert aside.name.endswith(".old")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before


def test_a_bundle_that_others_keep_files_in_is_not_overwritten(copy: Path) -> None:
    (copy / "bundle.sig").write_text("a signature is one of its files")
    (copy / "notes.txt").write_text("text")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    refusal = pytest.raises(FileExistsError, match=r"nothing but a bundle.*found 'notes\.txt'")
    with refusal, replaced_folder(copy):
        pass
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    (copy / "notes.txt").unlink()
    with replaced_folder(copy):
        pass
    assert list(copy.iterdir()) == []


@pytest.mark.parametrize("content", ["{}", "[4]", "{", "[" * 100_000])
def test_another_file_of_that_name_makes_no_bundle(tmp_path: Path, content: str) -> None:
    (tmp_path / "bundle.json").write_text(content)
    refusal = pytest.raises(FileExistsError, match="exists and is not a bundle; not overwritten")
    with refusal, replaced_folder(tmp_path):
        pass
    assert (tmp_path / "bundle.json").read_text() == content


def test_folders_above_are_made_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    for target in (tmp_path / "new" / "folder", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with replaced_folder(target) as folder:
            (folder / "file").write_text("text")
        assert [path.name for path in target.iterdir()] == ["file"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


def test_what_is_no_bundle_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("text")
    (tmp_path / "file").write_text("text")
    for target in (tmp_path / "other", tmp_path / "file"):
        refusal = pytest.raises(FileExistsError, match="is not a bundle; not overwritten")
        with refusal, replaced_folder(target):
            pass
    assert (tmp_path / "other" / "precious").read_text() == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


# --- imports -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("hrpro.engine.pipeline", ["torch", "onnx"]),
        ("hrpro.export.bundle", ["torch", "onnx", "onnxruntime"]),
        ("hrpro.clients", ["torch", "onnx", "onnxruntime", "pydantic"]),
    ],
)
def test_what_runs_live_imports_no_torch(module: str, unwanted: list[str]) -> None:
    code = f"import sys, {module}\nprint(*sorted(set({unwanted!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
