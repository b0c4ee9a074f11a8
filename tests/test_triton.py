"""`hrpro bundle triton`: what it writes, and that a real Triton server computes what we compute.

The server that can be had as a wheel has the Python backend alone: for the onnxruntime backend the
configuration is read as the server reads it, but not run.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import typer
from commands import wait_for
from google.protobuf import text_format
from numpy.typing import NDArray
from other_bundles import changed_bundle
from tiny_model import tiny_recording, tiny_run
from triton_server import TritonServer, triton_server
from tritonclient import grpc
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException
from typer.testing import CliRunner

from hrpro.clients.cli_bundle_triton import triton
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.config import EngineConfig
from hrpro.export import triton as triton_models
from hrpro.export.bundle import Bundle, BundleError, read_bundle, write_manifest
from hrpro.export.memory import replace_prototypes
from hrpro.export.triton import MAX_BATCH_SIZE, write_repository

Arrays = dict[str, NDArray[Any]]

# Batches of another size are summed in another order.
TOLERANCE = 1e-4
KINDS = {np.dtype(np.float32): "FP32", np.dtype(np.bool_): "BOOL", np.dtype(np.int64): "INT64"}


@pytest.fixture(scope="module")
def other_bundle(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same model with another memory."""
    folder = tmp_path_factory.mktemp("other")
    out = Path(shutil.copytree(bundle.folder, folder / "bundle"))
    replace_prototypes(out, tiny_run(folder / "run", seed=1))
    return read_bundle(out)


def read_config(model: Path) -> ModelConfig:
    """As the server does: unknown names and wrong types are refused."""
    return text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- the repository ------------------------------------------------------------------------------


def test_the_snippet_model_for_the_onnxruntime_backend(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path, "mocap", "onnxruntime", 1, "cpu", 3)
    config = read_config(tmp_path / "mocap-snippet")
    assert (config.name, config.backend) == ("mocap-snippet", "onnxruntime")
    assert config.max_batch_size == MAX_BATCH_SIZE == 16
    tensors = [(each.name, each.data_type, list(each.dims)) for each in config.input]
    assert tensors == [("features", 11, [-1, 8]), ("valid", 1, [-1])]  # TYPE_FP32, TYPE_BOOL
    tensors = [(each.name, each.data_type, list(each.dims)) for each in config.output]
    assert tensors == [
        ("scores", 11, [-1, 3]),
        ("cas", 11, [-1, 3]),
        ("attention", 11, [-1]),
        ("embedding", 11, [-1, 8]),
    ]
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert config.version_policy.WhichOneof("policy_choice") == "all"
    assert [(group.count, group.kind) for group in config.instance_group] == [(3, 2)]  # KIND_CPU
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 16]
    length = bundle.manifest.window_length
    for warmup in config.model_warmup:
        dims = {name: list(each.dims) for name, each in warmup.inputs.items()}
        assert dims == {"features": [length, 8], "valid": [length]}
    parameters = {key: each.string_value for key, each in config.parameters.items()}
    bundle_id = bundle.manifest.bundle_id
    assert parameters == {"intra_op_thread_count": "1", "bundle_id.1": bundle_id}
    assert not config.optimization.HasField("execution_accelerators")


def test_the_instance_model_for_the_onnxruntime_backend(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path, "hrpro", "onnxruntime", 1, "gpu", 1)
    config = read_config(tmp_path / "hrpro-instance")
    assert (config.name, config.backend) == ("hrpro-instance", "onnxruntime")
    assert config.max_batch_size == 0
    assert config.WhichOneof("scheduling_choice") is None
    assert [(each.name, list(each.dims)) for each in config.input] == [
        ("features", [-1, 8]),
        ("proposals", [-1, 2]),
        ("stretch", [-1, 2]),
    ]
    assert [(each.name, list(each.dims)) for each in config.output] == [
        ("completeness", [-1, 3]),
        ("refined", [-1, 2]),
        ("refined_completeness", [-1, 3]),
    ]
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, 1)]  # KIND_GPU
    assert list(config.model_warmup) == []


@pytest.mark.parametrize("stage", ["snippet", "instance"])
def test_the_configuration_says_what_the_graph_has(
    bundle: Bundle, tmp_path: Path, stage: str
) -> None:
    write_repository(bundle, tmp_path, "hrpro", "onnxruntime", 1, "cpu", 1)
    model = tmp_path / f"hrpro-{stage}"
    config = read_config(model)
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
    kinds = {"tensor(float)": 11, "tensor(bool)": 1, "tensor(int64)": 9}
    batch = [-1] if config.max_batch_size else []
    for tensors, graph in (
        (config.input, session.get_inputs()),
        (config.output, session.get_outputs()),
    ):
        found = [
            (each.name, kinds[each.type], [-1 if isinstance(n, str) else n for n in each.shape])
            for each in graph
        ]
        assert [(each.name, each.data_type, batch + list(each.dims)) for each in tensors] == found


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_a_second_version_stands_beside_the_first(
    bundle: Bundle, other_bundle: Bundle, tmp_path: Path, backend: Any
) -> None:
    written = write_repository(bundle, tmp_path, "hrpro", backend, 1, "cpu", 1)
    assert written == [tmp_path / "hrpro-snippet" / "1", tmp_path / "hrpro-instance" / "1"]
    before = tree(tmp_path)
    write_repository(other_bundle, tmp_path, "hrpro", backend, 2, "cpu", 1)
    after = tree(tmp_path)
    files = {"model.onnx", "bundle.json"} | ({"model.py"} if backend == "python" else set())
    assert set(after) == {
        f"hrpro-{stage}/{path}"
        for stage in ("snippet", "instance")
        for path in {"config.pbtxt", *(f"{version}/{file}" for version in "12" for file in files)}
    }
    assert all(after[path] == before[path] for path in before if not path.endswith("config.pbtxt"))
    for stage in ("snippet", "instance"):
        for version, source in (("1", bundle), ("2", other_bundle)):
            folder = f"hrpro-{stage}/{version}"
            graph = (source.folder / f"{stage}.onnx").read_bytes()
            assert after[f"{folder}/model.onnx"] == graph
            manifest = (source.folder / "bundle.json").read_bytes()
            assert after[f"{folder}/bundle.json"] == manifest
        parameters = read_config(tmp_path / f"hrpro-{stage}").parameters
        assert parameters["bundle_id.1"].string_value == bundle.manifest.bundle_id
        assert parameters["bundle_id.2"].string_value == other_bundle.manifest.bundle_id


# --- streams -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream_model(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("stateful")
    written = write_repository(bundle, repository, "hrpro", "onnxruntime", 1, "cpu", 2, True)
    assert [each.parent.name for each in written] == [
        "hrpro-snippet", "hrpro-instance", "hrpro-stream",
    ]  # fmt: skip
    return repository / "hrpro-stream"


def test_the_state_of_a_stream_is_described_as_the_graph_has_it(
    bundle: Bundle, stream_model: Path
) -> None:
    config = read_config(stream_model)
    assert config.max_batch_size == MAX_BATCH_SIZE
    batching = config.sequence_batching
    assert config.WhichOneof("scheduling_choice") == "sequence_batching"
    assert batching.max_sequence_idle_microseconds == 60_000_000
    assert batching.oldest.max_candidate_sequences == 256
    kinds = {"tensor(float)": 11, "tensor(bool)": 1, "tensor(int64)": 9}
    session = onnxruntime.InferenceSession(stream_model / "1" / "model.onnx")
    names = [each.name for each in config.input], [each.name for each in config.output]
    assert names == (["features", "valid"], ["scores", "cas", "attention", "embedding"])
    taken, given = (
        {each.name: (kinds[each.type], each.shape[1:]) for each in side}
        for side in (session.get_inputs(), session.get_outputs())
    )
    assert list(taken) == [*names[0], *(each.input_name for each in batching.state)]
    assert list(given) == [*names[1], *(each.output_name for each in batching.state)]
    for each in batching.state:
        (zeros,) = each.initial_state
        assert zeros.zero_data
        described = (each.data_type, list(each.dims))
        assert described == (zeros.data_type, list(zeros.dims)) == taken[each.input_name]
        assert described == given[each.output_name]
    layout = bundle.manifest.step
    assert layout is not None
    assert taken["history"] == (1, [layout.history])
    parameters = {key: each.string_value for key, each in config.parameters.items()}
    assert parameters["bundle_id.1"] == bundle.manifest.bundle_id
    assert list(config.model_warmup) == []


def test_a_server_that_hands_the_state_on_gives_what_windows_give(
    bundle: Bundle, stream_model: Path
) -> None:
    """Two sequences, one of which begins later, as the sequence batcher would run them."""
    config = read_config(stream_model)
    session = onnxruntime.InferenceSession(stream_model / "1" / "model.onnx")
    outputs = [each.name for each in config.output]
    new = [each.output_name for each in config.sequence_batching.state]
    delay, length = bundle.manifest.lookahead_snippets, 50
    features = np.stack([tiny_recording(length, seed) for seed in (1, 2)])
    valid = np.random.default_rng(0).random((2, length)) > 0.2
    sent = np.pad(features, ((0, 0), (0, delay), (0, 0))), np.pad(valid, ((0, 0), (0, delay)))
    kinds = {11: np.float32, 1: np.bool_}
    states = [
        {
            each.input_name: np.zeros((1, *each.dims), kinds[each.data_type])
            for each in config.sequence_batching.state
        }
        for _ in range(2)
    ]
    at = [0, 0]
    got: list[list[list[NDArray[np.float32]]]] = [[], []]
    sizes = np.random.default_rng(1).choice([1, 2, 9], 200).tolist()
    while min(at) < length + delay:
        n = min(sizes.pop(), length + delay - min(at))
        # The second one begins when the first is at 10, and the first ends alone or not.
        chosen = [each for each in (0, 1) if at[each] + n <= length + delay]
        chosen = [each for each in chosen if each == 0 or at[0] >= 10]
        feed = {name: np.concatenate([states[each][name] for each in chosen]) for name in states[0]}
        for name, array in zip(("features", "valid"), sent, strict=True):
            feed[name] = np.stack([array[each, at[each] : at[each] + n] for each in chosen])
        found = session.run([*outputs, *new], feed)
        for row, each in enumerate(chosen):
            got[each].append([part[row] for part in found[: len(outputs)]])
            for name, part in zip(states[0], found[len(outputs) :], strict=True):
                states[each][name] = part[row : row + 1]
            at[each] += n
    whole = onnxruntime.InferenceSession(bundle.snippet_graph).run(
        outputs, {"features": features, "valid": valid}
    )
    for each in (0, 1):
        for parts, expected in zip(zip(*got[each], strict=True), whole, strict=True):
            joined = np.concatenate(parts)[delay:]
            np.testing.assert_allclose(joined, expected[each], rtol=0, atol=TOLERANCE)


def test_streams_that_cannot_be_had_are_refused(
    bundle: Bundle, stream_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="stateful: expected the onnxruntime backend"):
        write_repository(bundle, tmp_path, "hrpro", "python", 1, "cpu", 1, True)
    without = Path(shutil.copytree(bundle.folder, tmp_path / "without"))
    (without / "step.onnx").unlink()
    write_manifest(without, json.loads((without / "bundle.json").read_text()) | {"step": None})
    with pytest.raises(BundleError, match=r"expected a bundle with step\.onnx, got one without"):
        write_repository(read_bundle(without), tmp_path, "m", "onnxruntime", 1, "cpu", 1, True)
    assert [each.name for each in tmp_path.iterdir()] == ["without"]
    repository = Path(shutil.copytree(stream_model.parent, tmp_path / "other"))
    manifest = repository / "hrpro-stream" / "1" / "bundle.json"
    content = json.loads(manifest.read_text())
    content["step"]["history"] += 1
    manifest.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"hrpro-stream/1: state: expected \{.*'history': 9"):
        write_repository(bundle, repository, "hrpro", "onnxruntime", 2, "cpu", 1, True)


def change_manifest(repository: Path, **changes: object) -> None:
    path = repository / "hrpro-instance" / "1" / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


Spoil = Callable[[Path], object]


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (None, {"version": 1}, r"hrpro-snippet/1: exists, of bundle \w{16}; .* new number"),
        (None, {"backend": "python"}, "expected a version for the python backend, got one for onn"),
        (None, {"name": "../hrpro"}, r"name: expected a name of letters, .* got '../hrpro'"),
        (None, {"name": ""}, "name: expected a name of letters"),
        (None, {"version": 0}, "version: expected 1 or more, got 0"),
        (None, {"instances": 0}, "instances: expected 1 or more, got 0"),
        (
            lambda out: change_manifest(out, feature_dim=9),
            {},
            r"hrpro-instance/1: features \(D\): expected 8 as in bundle \w{16}, got 9",
        ),
        (
            lambda out: change_manifest(out, classes=["jump", "run"]),
            {},
            r"classes \(C\): expected 3 as in bundle \w{16}, got 2",
        ),
        (
            lambda out: change_manifest(out, embedding_width=4),
            {},
            r"embedding width \(W\): expected 8 as in bundle \w{16}, got 4",
        ),
        (
            lambda out: (out / "hrpro-instance" / "1" / "bundle.json").unlink(),
            {},
            "bundle.json: expected a version that hrpro bundle triton wrote: .*No such file",
        ),
        (
            lambda out: (out / "hrpro-instance" / "1" / "bundle.json").write_text("[]"),
            {},
            "bundle.json: expected a version that hrpro bundle triton wrote",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    bundle: Bundle, tmp_path: Path, spoil: Spoil | None, changes: dict[str, Any], message: str
) -> None:
    options: dict[str, Any] = {
        "name": "hrpro", "backend": "onnxruntime", "version": 2, "device": "cpu", "instances": 1,
    }  # fmt: skip
    write_repository(bundle, tmp_path, **options | {"version": 1})
    if spoil is not None:
        spoil(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(BundleError, match=message):
        write_repository(bundle, tmp_path, **options | changes)
    assert tree(tmp_path) == before


def test_a_disk_that_is_full_leaves_no_version(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left"):
        patched.setattr(shutil, "copyfile", full)
        write_repository(bundle, tmp_path, "hrpro", "python", 1, "cpu", 1)
    assert set(tree(tmp_path)) == {"hrpro-snippet/config.pbtxt"}
    write_repository(bundle, tmp_path, "hrpro", "python", 1, "cpu", 1)
    assert len(tree(tmp_path)) == 8


def test_a_disk_that_is_full_between_two_models(
    bundle: Bundle, other_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command goes on, once there is room."""
    copyfile = shutil.copyfile

    def full(source: Path, target: Path) -> None:
        if source == bundle.instance_graph:
            raise OSError("no space left on device")
        copyfile(source, target)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left"):
        patched.setattr(shutil, "copyfile", full)
        write_repository(bundle, tmp_path, "hrpro", "python", 1, "cpu", 1)
    begun = tree(tmp_path)
    written = (tmp_path / "hrpro-snippet" / "1" / "model.onnx").stat()
    assert "hrpro-snippet/1/model.onnx" in begun and "hrpro-instance/1/model.onnx" not in begun
    with pytest.raises(BundleError, match="hrpro-snippet/1: exists, of bundle"):
        write_repository(other_bundle, tmp_path, "hrpro", "python", 1, "cpu", 1)
    assert tree(tmp_path) == begun
    folders = write_repository(bundle, tmp_path, "hrpro", "python", 1, "cpu", 1)
    assert folders == [tmp_path / "hrpro-snippet" / "1", tmp_path / "hrpro-instance" / "1"]
    write_repository(bundle, tmp_path / "whole", "hrpro", "python", 1, "cpu", 1)
    whole = tree(tmp_path / "whole")
    assert {name: tree(tmp_path)[name] for name in whole} == whole
    again = (tmp_path / "hrpro-snippet" / "1" / "model.onnx").stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    with pytest.raises(BundleError, match="hrpro-snippet/1: exists, of bundle"):
        write_repository(bundle, tmp_path, "hrpro", "python", 1, "cpu", 1)


def test_a_server_is_warmed_with_the_window_that_is_set(bundle: Bundle, tmp_path: Path) -> None:
    changed = changed_bundle(bundle.folder, tmp_path / "bundle", "window.window_snippets=40")
    write_repository(changed, tmp_path / "out", "hrpro", "onnxruntime", 1, "cpu", 1)
    warm = read_config(tmp_path / "out" / "hrpro-snippet").model_warmup
    shapes = [{name: list(each.dims) for name, each in one.inputs.items()} for one in warm]
    assert shapes == [{"features": [40, 8], "valid": [40]}] * 2


@pytest.mark.parametrize("depth", [100_000, 500])
def test_a_version_that_is_nested_is_refused(bundle: Bundle, tmp_path: Path, depth: int) -> None:
    write_repository(bundle, tmp_path, "hrpro", "onnxruntime", 1, "cpu", 1)
    (tmp_path / "hrpro-instance" / "1" / "bundle.json").write_text("[" * depth + "]" * depth)
    with pytest.raises(BundleError, match=r"bundle\.json: expected a version that hrpro bundle tr"):
        write_repository(bundle, tmp_path, "hrpro", "onnxruntime", 2, "cpu", 1)


def run(*arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(triton)
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    return result.exit_code, result.output


def test_the_command(bundle: Bundle, tmp_path: Path) -> None:
    bundle_id = bundle.manifest.bundle_id
    code, said = run(bundle.folder, "--out", tmp_path, "--backend", "python", "--name", "m")
    assert code == 0
    assert said.splitlines() == [
        f"{tmp_path}/m-snippet/1: bundle {bundle_id}, for the python backend",
        f"{tmp_path}/m-instance/1: bundle {bundle_id}, for the python backend",
    ]
    code, said = run(bundle.folder, "--out", tmp_path, "--version", 7, "--device", "gpu", "--json")
    assert code == 0
    folders = [f"{tmp_path}/hrpro-snippet/7", f"{tmp_path}/hrpro-instance/7"]
    assert json.loads(said) == {"bundle_id": bundle_id, "versions": folders}
    assert read_config(tmp_path / "hrpro-snippet").instance_group[0].kind == 1
    code, said = run(bundle.folder, "--out", tmp_path, "--version", 8, "--stateful")
    assert code == 0
    assert f"{tmp_path}/hrpro-stream/8: bundle {bundle_id}" in said
    for option, message in (
        (("--backend", "torch"), "expected onnxruntime, python, got 'torch'"),
        (("--device", "tpu"), "expected cpu, gpu, got 'tpu'"),
    ):
        code, said = run(bundle.folder, "--out", tmp_path, *option)
        assert code == 2
        assert message in " ".join(said.replace("│", " ").split())


# --- the server ----------------------------------------------------------------------------------


class Served:
    """A server, a repository whose version 1 is of ``bundle``, and a client."""

    def __init__(self, server: TritonServer, repository: Path) -> None:
        self.server = server
        self.repository = repository
        self.client = grpc.InferenceServerClient(server.url)

    def states(self, model: str) -> dict[str, str]:
        index = self.client.get_model_repository_index().models
        return {each.version: each.state for each in index if each.name == model}

    def statistics(self, model: str) -> tuple[int, int, dict[int, int]]:
        """Requests, executions, and executions by the number of windows, of version 1."""
        (found,) = self.client.get_inference_statistics(model, "1").model_stats
        batches = {each.batch_size: each.compute_infer.count for each in found.batch_stats}
        return found.inference_stats.success.count, found.execution_count, batches


@pytest.fixture(scope="module")
def served(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    repository = tmp_path_factory.mktemp("repository")
    write_repository(bundle, repository, "hrpro", "python", 1, "cpu", 1)
    with triton_server(repository, tmp_path_factory.mktemp("triton")) as server:
        served = Served(server, repository)
        with contextlib.closing(served.client):
            for model in ("hrpro-snippet", "hrpro-instance"):
                served.client.load_model(model)
            yield served
        sys.stderr.write("".join(server.log))  # pytest shows it beside a failure


def inputs(arrays: Arrays) -> list[grpc.InferInput]:
    tensors = []
    for name, array in arrays.items():
        tensor = grpc.InferInput(name, list(array.shape), KINDS[array.dtype])
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def infer(
    client: grpc.InferenceServerClient, model: str, arrays: Arrays, version: str = ""
) -> Arrays:
    return outputs(client.infer(model, inputs(arrays), version))


def outputs(result: grpc.InferResult) -> Arrays:
    return {each.name: result.as_numpy(each.name) for each in result.get_response().outputs}


def windows(count: int, length: int, seed: int) -> Arrays:
    """Windows (count, length, D), each of which begins with a part that is not there."""
    features = np.stack([tiny_recording(length, 100 * seed + each) for each in range(count)])
    begin = np.random.default_rng(seed).integers(0, length // 2, count)
    return {"features": features, "valid": np.arange(length) >= begin[:, None]}


def assert_same_scores(got: Arrays, sent: Arrays, backend: OnnxRuntimeBackend) -> None:
    scores, embedding, _ = backend.score_snippets(sent["features"], sent["valid"])
    valid = sent["valid"]  # what is not there has outputs, but nobody reads them
    for name, expected in (("scores", scores), ("embedding", embedding)):
        np.testing.assert_allclose(got[name][valid], expected[valid], rtol=0, atol=TOLERANCE)


def test_each_output_is_that_of_the_graph(served: Served, bundle: Bundle) -> None:
    sent = windows(3, 20, seed=1)
    got = infer(served.client, "hrpro-snippet", sent)
    session = onnxruntime.InferenceSession(bundle.snippet_graph)
    names = ["scores", "cas", "attention", "embedding"]
    assert list(got) == names
    for name, expected in zip(names, session.run(names, sent), strict=True):
        assert got[name].shape == expected.shape
        valid = sent["valid"]
        np.testing.assert_allclose(got[name][valid], expected[valid], rtol=0, atol=TOLERANCE)
        assert np.ptp(got[name]) > 0.1


def test_concurrent_clients_share_batches(served: Served, backend: OnnxRuntimeBackend) -> None:
    clients, requests = 8, 20
    before = served.statistics("hrpro-snippet")

    def talk(seed: int) -> list[tuple[Arrays, Arrays]]:
        random = np.random.default_rng(seed)
        lengths, counts = random.choice([17, 40], requests), random.integers(1, 5, requests)
        said = [
            windows(count, length, seed * requests + each)
            for each, (count, length) in enumerate(zip(counts, lengths, strict=True))
        ]
        with contextlib.closing(grpc.InferenceServerClient(served.server.url)) as client:
            return [(sent, infer(client, "hrpro-snippet", sent)) for sent in said]

    with ThreadPoolExecutor(clients) as pool:
        talks = list(pool.map(talk, range(clients)))
    for sent, got in (each for one in talks for each in one):
        assert_same_scores(got, sent, backend)
    after = served.statistics("hrpro-snippet")
    assert after[0] - before[0] == clients * requests
    assert 0 < after[1] - before[1] < clients * requests
    assert max(after[2]) <= MAX_BATCH_SIZE


def test_a_window_has_the_same_scores_in_any_company(served: Served) -> None:
    """With more and with less that is not there; another length ends a batch."""
    said = [windows(1, 31 if 20 <= each < 30 else 20, seed=50 + each) for each in range(48)]
    alone = [infer(served.client, "hrpro-snippet", sent) for sent in said]
    for _ in range(20):  # a busy machine may take them one by one
        if _together(served, said, alone) < len(said):
            return
    pytest.fail("no two windows shared a batch")


def _together(served: Served, said: list[Arrays], alone: list[Arrays]) -> int:
    """Ask for all at once, and compare; returns how many executions the server took."""
    before = served.statistics("hrpro-snippet")
    answers: queue.SimpleQueue[tuple[int, grpc.InferResult, Exception | None]] = queue.SimpleQueue()
    for each, sent in enumerate(said):
        served.client.async_infer(
            "hrpro-snippet",
            inputs(sent),
            lambda result, error, each=each: answers.put((each, result, error)),
        )
    for _ in said:
        each, result, error = answers.get(timeout=60)
        assert error is None
        got, valid = outputs(result), said[each]["valid"]
        for name, expected in alone[each].items():
            np.testing.assert_allclose(got[name][valid], expected[valid], rtol=0, atol=TOLERANCE)
    return served.statistics("hrpro-snippet")[1] - before[1]


def test_a_server_begins_a_sequence_with_the_state_that_is_described(
    bundle: Bundle, stream_model: Path, tmp_path: Path
) -> None:
    """By the Python backend, which is given a state but cannot hand one on: a single request."""
    repository = Path(shutil.copytree(stream_model.parent, tmp_path / "models"))
    model = repository / "hrpro-stream"
    config = (model / "config.pbtxt").read_text()
    (model / "config.pbtxt").write_text(config.replace('"onnxruntime"', '"python"'))
    code = (Path(triton_models.__file__).with_name("triton_model.py")).read_text()
    named = '[each["name"] for each in config["input"]]'
    states = '[each["input_name"] for each in config["sequence_batching"]["state"]]'
    assert code.count(named) == 1
    (model / "1" / "model.py").write_text(code.replace(named, f"{named} + {states}"))
    sent = windows(1, 20, seed=2)
    delay = bundle.manifest.lookahead_snippets
    behind = {
        "features": np.pad(sent["features"], ((0, 0), (0, delay), (0, 0))),
        "valid": np.pad(sent["valid"], ((0, 0), (0, delay))),
    }
    with (
        triton_server(repository, tmp_path / "scratch", ["hrpro-stream"]) as server,
        contextlib.closing(grpc.InferenceServerClient(server.url)) as client,
    ):
        found = [
            client.infer(
                "hrpro-stream",
                inputs(behind),
                sequence_id=number,
                sequence_start=True,
                sequence_end=True,
            )
            for number in (1, 2)
        ]
    names = ["scores", "cas", "attention", "embedding"]
    expected = onnxruntime.InferenceSession(bundle.snippet_graph).run(names, sent)
    for each in map(outputs, found):
        for name, wanted in zip(names, expected, strict=True):
            np.testing.assert_allclose(each[name][:, delay:], wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_proposals(served: Served, backend: OnnxRuntimeBackend, count: int) -> None:
    embedding = tiny_recording(30, seed=3)
    start = np.random.default_rng(count).uniform(0, 20, (count, 1))
    proposals = np.hstack([start, start + 5.5]).astype(np.float32)
    stretch = np.tile([0, len(embedding) - 1], (count, 1))
    sent = {"features": embedding, "proposals": proposals, "stretch": stretch}
    got = infer(served.client, "hrpro-instance", sent)
    expected = backend.score_instances(embedding, proposals)
    assert [each.shape for each in got.values()] == [(count, 3), (count, 2), (count, 3)]
    for each, wanted in zip(got.values(), expected, strict=True):
        np.testing.assert_allclose(each, wanted, rtol=0, atol=TOLERANCE)


def test_a_request_that_does_not_fit_harms_no_other(
    served: Served, backend: OnnxRuntimeBackend
) -> None:
    good = windows(2, 20, seed=9)
    wrong = {"features": good["features"], "valid": good["valid"][:, :-3]}
    with pytest.raises(InferenceServerException, match="hrpro-snippet"):
        infer(served.client, "hrpro-snippet", wrong)
    wrong = {"features": good["features"][..., :5].copy(), "valid": good["valid"]}
    with pytest.raises(InferenceServerException, match=r"Expected \[-1,-1,8\], got \[2,20,5\]"):
        infer(served.client, "hrpro-snippet", wrong)
    with pytest.raises(InferenceServerException, match="batch-size must be <= 16"):
        infer(served.client, "hrpro-snippet", windows(17, 20, seed=9))
    assert_same_scores(infer(served.client, "hrpro-snippet", good), good, backend)


def test_versions_side_by_side(served: Served, bundle: Bundle, other_bundle: Bundle) -> None:
    """The second comes while the first is served, and both go again."""
    client, model, name = served.client, "pair-snippet", "pair"
    write_repository(bundle, served.repository, name, "python", 1, "cpu", 1)
    client.load_model(model)
    assert served.states(model) == {"1": "READY"}
    # It was warmed up in both sizes: 1 request and 16, and nobody has asked it yet.
    assert served.statistics(model) == (17, 2, {1: 1, 16: 1})
    write_repository(other_bundle, served.repository, name, "python", 2, "cpu", 1)
    client.load_model(model)
    assert served.states(model) == {"1": "READY", "2": "READY"}
    parameters = client.get_model_config(model).config.parameters
    ids = [parameters[f"bundle_id.{version}"].string_value for version in (1, 2)]
    assert ids == [bundle.manifest.bundle_id, other_bundle.manifest.bundle_id]
    sent = windows(2, 20, seed=4)
    one, other = (infer(client, model, sent, version) for version in ("1", "2"))
    assert_same_scores(one, sent, OnnxRuntimeBackend(bundle, EngineConfig(threads=1)))
    assert_same_scores(other, sent, OnnxRuntimeBackend(other_bundle, EngineConfig(threads=1)))
    assert np.abs(one["scores"] - other["scores"])[sent["valid"]].max() > 0.1
    newest = infer(client, model, sent)
    np.testing.assert_array_equal(newest["scores"], other["scores"])
    client.unload_model(model)
    wait_for(lambda: set(served.states(model).values()) == {"UNAVAILABLE"})
    with pytest.raises(InferenceServerException, match="no available versions"):
        infer(client, model, sent)
    assert client.is_model_ready("hrpro-snippet", "1")
