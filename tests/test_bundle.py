"""`hrpro bundle`, precisions and signatures, on a bundle of a run that was trained."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import ANY_PORT, Trained, command_lines, hrpro, hrpro_json, refusal, running
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from onnx import numpy_helper
from tiny_model import (
    CLASSES,
    CONTEXT,
    LOOKAHEAD,
    copy_graphs,
    tiny_config,
    tiny_model,
    tiny_recording,
    tiny_run,
)
from typer.testing import CliRunner

from hrpro.clients import request_status
from hrpro.clients.cli import app
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.config import EngineConfig
from hrpro.export.bundle import Bundle, BundleError, content_id, read_bundle, sha256
from hrpro.export.export import Comparison, export_bundle
from hrpro.export.golden import check_golden
from hrpro.export.precision import GOLDEN_TOLERANCES
from hrpro.export.tracing import ExportError
from hrpro.export.verify import compare_graphs

pytest_plugins = ("cli_fixtures",)

Damage = Callable[[Path], None]


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.folder, tmp_path / "copy"))


def rewrite(folder: Path, **changes: object) -> None:
    """Change the manifest so that it is consistent."""
    content = json.loads((folder / "bundle.json").read_text()) | changes
    content["bundle_id"] = content_id(content)
    (folder / "bundle.json").write_text(json.dumps(content))


# --- identity and versions -----------------------------------------------------------------------


def test_a_bundle_of_version_1_is_read(copy: Path) -> None:
    content = json.loads((copy / "bundle.json").read_text())
    for name in (
        "created",
        "precision",
        "display_names",
        "tolerances",
        "compared",
        "window_flops",
        "step",
    ):
        del content[name]
    del content["localization"]["completeness_weight"]
    for name in ("golden.npz", "step.onnx"):
        del content["files"][name]
        (copy / name).unlink()
    (copy / "bundle.json").write_text(json.dumps(content))
    rewrite(copy, schema_version=1)
    said = json.loads((copy / "bundle.json").read_text())["bundle_id"]
    old = read_bundle(copy)
    assert (old.manifest.schema_version, old.manifest.bundle_id) == (4, said)
    assert (old.manifest.precision, old.golden) == ("fp32", None)
    assert old.manifest.localization.completeness_weight == 0.5
    assert check_golden(old, OnnxRuntimeBackend(old)) == {}
    assert "no golden windows" in hrpro("bundle", "verify", copy).stdout


def test_what_the_export_measured_is_no_part_of_the_identity(bundle: Bundle, copy: Path) -> None:
    measured: dict[str, object] = {"verified": {"scores": 0.5}, "compared": {"speedup": 2.5}}
    rewrite(copy, **measured)
    again = read_bundle(copy).manifest
    assert (again.bundle_id, again.compared) == (bundle.manifest.bundle_id, {"speedup": 2.5})
    # Of a bundle of version 3 it is one, as its id was made then.
    rewrite(copy, schema_version=3)
    before = read_bundle(copy).manifest
    assert (before.schema_version, before.compared) == (4, {"speedup": 2.5})
    assert before.bundle_id != bundle.manifest.bundle_id
    content = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(content | {"compared": {"speedup": 3.5}}))
    with pytest.raises(BundleError, match="the file was changed"):
        read_bundle(copy)


# --- golden windows ------------------------------------------------------------------------------


def test_golden_windows_are_what_this_machine_computes(bundle: Bundle) -> None:
    worst = check_golden(bundle, OnnxRuntimeBackend(bundle, EngineConfig(threads=1)))
    assert worst.keys() == GOLDEN_TOLERANCES["fp32"].keys()
    assert max(worst.values()) < 1e-5
    assert bundle.golden is not None
    with np.load(bundle.golden) as golden:
        assert golden["features"].shape == (2, bundle.manifest.window_length, 8)
        assert not golden["valid"][0, 0] and golden["valid"][1].all()
        assert np.ptp(golden["scores"]) > 0.1


def test_an_engine_that_computes_otherwise_does_not_start(bundle: Bundle, copy: Path) -> None:
    with np.load(copy / "golden.npz") as golden:
        arrays = dict(golden)
    arrays["scores"][1, 5, 2] += 0.01
    np.savez(copy / "golden.npz", **arrays)
    content = json.loads((copy / "bundle.json").read_text())
    rewrite(copy, files=content["files"] | {"golden.npz": sha256(copy / "golden.npz")})
    somewhere = ("--feed", "tcp://127.0.0.1:*", "--events", "tcp://127.0.0.1:*")
    somewhere += ("--state", "none")
    for command in (("bundle", "verify", copy), ("serve", copy, *somewhere)):
        more = ("--control", "tcp://127.0.0.1:*") if command[0] == "serve" else ()
        said = refusal(*command, *more)
        assert "golden windows: scores differ by 0.01 from those of the export" in said
        assert "expected at most 0.0001: this machine computes otherwise" in said


def golden_with(folder: Path, **changes: object) -> None:
    """Other arrays among the golden windows, None for one that is not there, in a bundle that is
    consistent."""
    with np.load(folder / "golden.npz") as golden:
        arrays = dict(golden) | changes
    np.savez(folder / "golden.npz", **{k: v for k, v in arrays.items() if v is not None})
    vouch(folder)


def vouch(folder: Path) -> None:
    """Let the manifest have the hashes of what is there."""
    content = json.loads((folder / "bundle.json").read_text())
    rewrite(folder, files={name: sha256(folder / name) for name in content["files"]})


def of_bytes(content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "golden.npz").write_bytes(content)
        vouch(folder)

    return damage


def an_array_alone(folder: Path) -> None:
    with (folder / "golden.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    vouch(folder)


def half_of_it(folder: Path) -> None:
    content = (folder / "golden.npz").read_bytes()
    of_bytes(content[: len(content) // 2])(folder)


T = CONTEXT + 1 + LOOKAHEAD


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (of_bytes(b"no archive"), r"golden\.npz: expected an archive of arrays \(\.npz\): "),
        (of_bytes(b""), r"golden\.npz: expected an archive of arrays"),
        (an_array_alone, r"golden\.npz: expected an archive of arrays"),
        (half_of_it, r"golden\.npz: expected an archive of arrays"),
        (
            lambda f: golden_with(f, stretch=None),
            r"golden\.npz: expected features, valid, .*: stretch is not a file in the archive",
        ),
        (
            lambda f: golden_with(f, features=zeros(2, T, 9)),
            rf"golden\.npz: features: expected float32 \(2, {T}, 8\) .*, got float32 \(2, {T}, 9\)",
        ),
        (
            lambda f: golden_with(f, features=zeros(1, T, 8)),
            rf"features: expected float32 \(2, {T}, 8\) .*, got float32 \(1, {T}, 8\)",
        ),
        (
            lambda f: golden_with(f, features=np.zeros((2, T, 8))),
            rf"features: expected float32 \(2, {T}, 8\) .*, got float64",
        ),
        (
            lambda f: golden_with(f, valid=np.ones((2, T))),
            rf"valid: expected bool \(2, {T}\) .*, got float64 \(2, {T}\)",
        ),
        (
            lambda f: golden_with(f, valid=np.zeros((2, T), np.bool_)),
            "valid: expected snippets that are there, got none",
        ),
        (
            lambda f: golden_with(f, scores=zeros(2, T, 1)),  # not to be broadcast
            rf"scores: expected float32 \(2, {T}, 3\) .*, got float32 \(2, {T}, 1\)",
        ),
        (
            lambda f: golden_with(f, embedding=zeros(2, T, 7)),
            rf"embedding: expected float32 \(2, {T}, 8\) .*, got float32 \(2, {T}, 7\)",
        ),
        (
            lambda f: golden_with(f, proposals=zeros(0, 2)),
            r"proposals: expected float32 \(1, 2\) .*, got float32 \(0, 2\)",
        ),
        (
            lambda f: golden_with(f, proposals=np.float32(1)),
            r"proposals: expected float32 \(1, 2\) .*, got float32 \(\)",
        ),
        (
            lambda f: golden_with(f, refined=zeros(4, 2)),
            r"refined: expected float32 \(5, 2\) .*, got float32 \(4, 2\)",
        ),
        (
            lambda f: rewrite(f, tolerances={"scores": 1e-4, "completeness": 1e-4}),
            r"bundle\.json: tolerances: expected those of golden windows, embedding, borders is",
        ),
        (lambda f: rewrite(f, tolerances={}), r"bundle\.json: tolerances: expected those of"),
    ],
)  # fmt: skip
def test_golden_windows_that_do_not_belong_to_the_bundle(
    backend: OnnxRuntimeBackend, copy: Path, damage: Damage, message: str
) -> None:
    damage(copy)
    with pytest.raises(BundleError, match=message) as caught:
        check_golden(read_bundle(copy), backend)
    assert str(caught.value).startswith(f"{copy}/")


def test_graphs_that_give_other_shapes(
    bundle: Bundle, backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        backend, "score_snippets", lambda *_: (zeros(2, T, 1), zeros(2, T, 8), zeros(2, T))
    )
    with pytest.raises(BundleError) as caught:
        check_golden(bundle, backend)
    assert str(caught.value) == (
        f"{bundle.golden}: scores: expected (2, {T}, 1), which the graphs give, got (2, {T}, 3)"
    )


def test_verify_and_check_say_what_is_wrong_with_golden_windows(copy: Path) -> None:
    golden_with(copy, scores=zeros(2, T, 1))
    expected = f"{copy / 'golden.npz'}: scores: expected float32 (2, {T}, 3) "
    assert refusal("bundle", "verify", copy).startswith(expected)
    assert refusal("serve", copy, "--check").startswith(expected)


@pytest.mark.parametrize(
    ("name", "inference"),
    [("snippet.onnx", "window"), ("step.onnx", "incremental"), ("instance.onnx", "window")],
)
def test_a_graph_that_is_none(copy: Path, name: str, inference: str) -> None:
    (copy / name).write_bytes(b"no graph")
    vouch(copy)
    config = EngineConfig.model_validate({"threads": 1, "inference": inference})
    with pytest.raises(BundleError) as caught:
        OnnxRuntimeBackend(read_bundle(copy), config)
    expected = f"{copy / name}: expected a graph that ONNX Runtime can load: "
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)
    for command in (("bundle", "verify", copy), ("serve", copy, "--check")):
        if (command[0], name) != ("bundle", "snippet.onnx"):  # it computes by steps
            more = ("--set", f"inference={inference}") if command[0] == "serve" else ()
            assert refusal(*command, *more).startswith(expected)
    if name == "instance.onnx":
        said = refusal("bundle", "triton", copy, "--out", copy.parent / "models")
        assert said.startswith(expected) and not (copy.parent / "models").exists()


def copying(width: int) -> onnx.ModelProto:
    """A graph that is fine, but of another model."""
    helper = onnx.helper
    value = helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, ["t", width])
    out = helper.make_tensor_value_info("completeness", onnx.TensorProto.FLOAT, ["t", width])
    node = helper.make_node("Identity", ["features"], ["completeness"])
    graph = helper.make_graph([node], "other", [value], [out])
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9)


def test_a_graph_of_something_else(copy: Path) -> None:
    onnx.save(copying(8), copy / "instance.onnx")
    vouch(copy)
    other = read_bundle(copy)
    with pytest.raises(BundleError) as caught:
        check_golden(other, OnnxRuntimeBackend(other, EngineConfig(threads=1)))
    expected = f"{copy}: expected graphs that compute the golden windows: "
    assert str(caught.value).startswith(expected)
    assert "proposals" in str(caught.value)
    assert refusal("bundle", "verify", copy).startswith(expected)


# --- show, verify, diff, set ---------------------------------------------------------------------


def test_show_and_verify(trained: Trained) -> None:
    said = hrpro("bundle", "show", trained.bundle).stdout
    manifest = read_bundle(trained.bundle).manifest
    for text in (manifest.bundle_id, manifest.created, "fp32", "ArmCircle", "golden.npz"):
        assert text in said
    assert hrpro_json("bundle", "show", trained.bundle)["bundle_id"] == manifest.bundle_id
    assert "all files are what it says" in hrpro("bundle", "verify", trained.bundle).stdout
    found = hrpro_json("bundle", "verify", trained.bundle)["golden"]
    assert set(found) == {"scores", "embedding", "completeness", "borders"}


def test_settings_are_overridden_in_place(bundle: Bundle, copy: Path) -> None:
    said = hrpro(
        "bundle", "set", copy, "localization.score_floor=0.25", "window.hop_snippets=4",
        "--name", "run=Running fast",
    ).stdout  # fmt: skip
    changed = read_bundle(copy).manifest
    assert changed.bundle_id in said and changed.bundle_id != bundle.manifest.bundle_id
    assert changed.localization.score_floor == 0.25
    assert changed.localization.thresholds == bundle.manifest.localization.thresholds
    assert changed.window.hop_snippets == 4
    assert changed.display_names == {"run": "Running fast"}
    assert "Running fast" in hrpro("bundle", "show", copy).stdout
    lines = hrpro("bundle", "diff", bundle.folder, copy, status=1).stdout.splitlines()
    assert 'display_names.run: null -> "Running fast"' in lines
    assert "localization.score_floor: 0.001 -> 0.25" in lines
    assert "window.hop_snippets: 1 -> 4" in lines
    assert hrpro("bundle", "diff", copy, copy).stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["localization.score_flor=1"], "no such setting"),
        (["localization.border_limit=2"], "expected 3, which the bundle was trained with"),
        (["--name", "swim=Swimming"], "display_names: expected names of classes, got 'swim'"),
        (["training.seed=1"], "no such setting"),
        (
            ["window.window_snippets=5"],
            "window.window_snippets: expected at least 17 (context 13 + hop 1 + look-ahead 3), got",
        ),
        (
            ["window.window_snippets=20", "window.hop_snippets=5"],
            "window.window_snippets: expected at least 21 (context 13 + hop 5 + look-ahead 3), got",
        ),
    ],
)
def test_what_cannot_be_set_changes_nothing(copy: Path, arguments: list[str], message: str) -> None:
    before = (copy / "bundle.json").read_bytes()
    assert message in refusal("bundle", "set", copy, *arguments)
    assert (copy / "bundle.json").read_bytes() == before


def test_the_window_is_the_one_that_is_set(copy: Path) -> None:
    assert f"{T} snippets, exact" in hrpro("bundle", "show", copy).stdout
    hrpro("bundle", "set", copy, "window.window_snippets=40")
    changed = read_bundle(copy).manifest
    assert (changed.window_snippets, changed.window_length) == (40, T)
    assert "40 snippets, exact from 13 to -3" in hrpro("bundle", "show", copy).stdout
    hrpro("bundle", "set", copy, "window.window_snippets=null", "window.hop_snippets=4")
    assert read_bundle(copy).manifest.window_snippets == T + 3
    assert check_golden(read_bundle(copy), OnnxRuntimeBackend(read_bundle(copy)))


# --- signatures ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """private.pem and public.pem, and those of somebody else."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("", "other_"):
        key = Ed25519PrivateKey.generate()
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}private.pem").write_bytes(private)
        (folder / f"{name}public.pem").write_bytes(public)
    curve = ec.generate_private_key(ec.SECP256R1())
    (folder / "curve.pem").write_bytes(
        curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return folder


def test_signed_bundles(copy: Path, keys: Path) -> None:
    trusted = ("--trusted-key", keys / "public.pem")
    assert "bundle.sig: No such file" in refusal("bundle", "verify", copy, *trusted)
    hrpro("bundle", "sign", copy, "--key", keys / "private.pem")
    assert "signed by" in hrpro("bundle", "verify", copy, *trusted).stdout
    said = refusal("bundle", "verify", copy, "--trusted-key", keys / "other_public.pem")
    assert "bundle.sig: expected a signature by" in said
    # Any change takes the signature away, also one that is consistent.
    signature = (copy / "bundle.sig").read_bytes()
    hrpro("bundle", "set", copy, "localization.score_floor=0.5")
    assert not (copy / "bundle.sig").exists()
    (copy / "bundle.sig").write_bytes(signature)
    said = refusal("bundle", "verify", copy, *trusted)
    assert "bundle.sig: expected a signature by" in said
    assert "bundle.sig" in refusal(
        "serve", copy, *trusted, "--feed", "tcp://127.0.0.1:*", "--events", "tcp://127.0.0.1:*",
        "--control", "tcp://127.0.0.1:*", "--state", "none",
    )  # fmt: skip


def test_keys_that_are_none(copy: Path, keys: Path) -> None:
    said = refusal("bundle", "sign", copy, "--key", keys / "curve.pem")
    assert "expected an Ed25519 key, got " in said
    assert "expected a private key in PEM" in refusal(
        "bundle", "sign", copy, "--key", keys / "public.pem"
    )
    assert "expected a public key in PEM" in refusal(
        "bundle", "verify", copy, "--trusted-key", keys / "absent.pem"
    )


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.01), ("int8", 0.1)])
def test_another_precision_keeps_the_accuracy(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    tolerance: float,
) -> None:
    copy_graphs(monkeypatch, trained.bundle, "snippet", "step", "instance")  # so in this process
    out = tmp_path / "bundle"
    words = ["export", trained.run, "--out", out, "--precision", precision, "--data", trained.data]
    result = CliRunner().invoke(app, [*map(str, words), "--gate", "0.05", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    compared = said["compared"]
    assert compared["average_map"] == pytest.approx(compared["average_map_fp32"], abs=0.05)
    assert compared["speedup"] > 0
    lower = read_bundle(out)
    assert (lower.manifest.precision, lower.manifest.bundle_id) == (precision, said["bundle_id"])
    check_golden(lower, OnnxRuntimeBackend(lower))
    full = read_bundle(trained.bundle)
    features = trained.recording("test", "seq5")[None]
    valid = np.ones(features.shape[:2], np.bool_)
    scores = [OnnxRuntimeBackend(each).score_snippets(features, valid)[0] for each in (full, lower)]
    assert 0 < np.abs(scores[0] - scores[1]).max() < tolerance
    types = {each.data_type for each in onnx.load(lower.snippet_graph).graph.initializer}
    wanted = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.INT8
    assert wanted in types


def test_what_costs_more_than_the_gate_is_refused(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hrpro.export import export
    from hrpro.training.run import read_run
    from hrpro.training.session import read_evaluation_data

    copy_graphs(monkeypatch, trained.bundle, "snippet", "step", "instance")
    description, model = read_run(trained.run)
    data, truth = read_evaluation_data(trained.data, description)
    found = iter([0.9, 0.85, 0.9, 0.85])
    monkeypatch.setattr(export, "_average_map", lambda *_: next(found))
    out = tmp_path / "bundle"
    with pytest.raises(ExportError, match=r"int8: average mAP 0.8500 on .*, 0.9000 in fp32"):
        export_bundle(description, model, {}, out, "int8", Comparison(data, truth, 0.04))
    assert not out.exists() and not list(tmp_path.iterdir())
    forced = Comparison(data, truth, 0.04, force=True)
    bundle = export_bundle(description, model, {}, out, "int8", forced)
    assert bundle.manifest.compared["average_map"] == 0.85


def test_a_precision_needs_data_or_force(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    said = hrpro("export", trained.run, "--out", out, "--precision", "int8", status=2).stderr
    assert "expected --data" in said
    said = hrpro("export", trained.run, "--out", out, "--precision", "int4", status=2).stderr
    assert "expected fp32, fp16, int8, got 'int4'" in said


# --- memory --------------------------------------------------------------------------------------


def test_the_memory_is_refreshed_without_a_new_graph(
    bundle: Bundle, copy: Path, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", seed=1)
    said = hrpro_json("bundle", "prototypes", copy, "--from", run)
    refreshed = read_bundle(copy)
    assert said["bundle_id"] == refreshed.manifest.bundle_id != bundle.manifest.bundle_id
    graphs = [onnx.load(each.snippet_graph).graph for each in (bundle, refreshed)]
    old, new = (
        {each.name: numpy_helper.to_array(each) for each in graph.initializer} for graph in graphs
    )
    other = tiny_model(tiny_config(), 1).snippet.prototypes.numpy()
    np.testing.assert_array_equal(new.pop("prototypes"), other)
    moved = np.abs(other - old.pop("prototypes")).max()
    assert said["largest_change"] == pytest.approx(float(moved))
    assert all(np.array_equal(new[name], old[name]) for name in old)
    assert [node.op_type for node in graphs[0].node] == [node.op_type for node in graphs[1].node]
    backend = OnnxRuntimeBackend(refreshed, EngineConfig(threads=1))
    check_golden(refreshed, backend)
    assert compare_graphs(refreshed, [tiny_recording(40)])["scores"] < 1e-5
    features, valid = tiny_recording(20)[None], np.ones((1, 20), np.bool_)
    before = OnnxRuntimeBackend(bundle, EngineConfig(threads=1)).score_snippets(features, valid)[0]
    assert np.abs(before - backend.score_snippets(features, valid)[0]).max() > 1e-3


def test_the_memory_of_other_classes_is_refused(copy: Path, tmp_path: Path) -> None:
    config = tiny_config()
    run = tmp_path / "run"
    tiny_run(run, 0, (*CLASSES[:2], "swim"))
    before = read_bundle(copy).manifest.bundle_id
    said = refusal("bundle", "prototypes", copy, "--from", run)
    assert "expected a run with the 3 classes and D = 8 of the bundle" in said
    assert read_bundle(copy).manifest.bundle_id == before
    assert config.model.blocks  # the run is one that can be read


def test_a_trusted_bundle_is_one_that_is_read_as_it_was_signed(copy: Path, keys: Path) -> None:
    from hrpro.export.signing import read_trusted_bundle, sign_bundle

    sign_bundle(copy, keys / "private.pem")
    (copy / "instance.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"instance\.onnx: expected SHA-256"):
        read_trusted_bundle(copy, keys / "public.pem")


# --- the guide -----------------------------------------------------------------------------------

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "deploying.md"


def test_the_guide_can_be_followed(
    trained: Trained, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy_graphs(monkeypatch, trained.bundle, "snippet", "step", "instance")
    shutil.copy(keys / "private.pem", tmp_path)
    meant = {"RUN": trained.run, "OTHER_RUN": trained.run, "DATA": trained.data}
    meant["0.01"] = 0.1  # of the gate: the run had a few steps
    followed = []
    with contextlib.ExitStack() as stack:
        for line in command_lines(GUIDE):
            words = [str(meant.get(word, word)) for word in shlex.split(line)[1:]]
            if "..." in words:  # a part of one; other tests run it as a whole
                continue
            if words[0] == "serve":
                anywhere = [
                    ANY_PORT if word.startswith("tcp://127.0.0.1:") else word for word in words
                ]
                process = stack.enter_context(running(*anywhere, "--json", "--set", "threads=1"))
                assert process.stdout is not None
                meant["tcp://127.0.0.1:7773"] = json.loads(process.stdout.readline())["control"]
            elif words[0] == "export":  # here, where it takes the graphs that there are
                result = CliRunner().invoke(app, words)
                assert result.exit_code == 0, result.output
            else:
                hrpro(*words, status=int(words[:2] == ["bundle", "diff"]))
            followed.append(words[1] if words[0] == "bundle" else words[0])
        status = request_status(meant["tcp://127.0.0.1:7773"])
    assert set(followed) == {
        "export", "show", "verify", "diff", "set", "prototypes", "sign", "serve", "deploy",
        "triton",
    }  # fmt: skip
    # A canary, for all, and back again.
    assert status["bundle_id"] == read_bundle(tmp_path / "bundle").manifest.bundle_id
    assert status["previous_bundle_id"] == read_bundle(tmp_path / "bundle-int8").manifest.bundle_id
    assert (status["canary_bundle_id"], status["counters"]["deploys"]) == (None, 3)
    assert hrpro("bundle", "verify", "bundle", "--trusted-key", keys / "public.pem")
    assert read_bundle(tmp_path / "bundle").manifest.display_names == {"Jog": "Jogging"}
