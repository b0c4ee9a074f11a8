"""Windows a second through a Triton server: by shared memory or gRPC, and batches in flight.

    python benchmarks/triton_transport.py [--dim 2048] [--classes 20] [--snippets 128] [--batch 16]

The server is that of `make triton-server`, with one instance on one thread. One model only copies,
so that the way there and back is all there is; the other one is real. "async" is the client's own
asynchronous call in place of a thread a batch. All in turn in one run: the ratios count, absolute
figures of a shared machine mean little.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tritonclient import grpc

from hrpro.engine.backends.triton import TritonBackend
from hrpro.engine.config import EngineConfig, TritonConfig, WindowConfig
from hrpro.engine.inference import Inference
from hrpro.export.bundle import Bundle, Manifest
from hrpro.export.export import export_bundle
from hrpro.export.triton import write_repository
from hrpro.training.config import ModelConfig, TrainingConfig
from hrpro.training.instance_stage import new_instance_model
from hrpro.training.run import RunDescription
from hrpro.training.snippet_stage import new_snippet_model
from hrpro.training.train import TrainedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from triton_server import triton_server

MODEL = "hrpro-snippet"
DEPTHS = (1, 2, 4)
Windows = tuple[NDArray[np.float32], NDArray[np.bool_]]


@dataclass
class _Stream:
    asked: int = 0
    processed: int = 0


@dataclass
class _Job:
    """What an `Inference` needs of one."""

    stream: _Stream
    until: int = 0


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--snippets", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", choices=("full", "lean"), default="lean")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    B, T, D = arguments.batch, arguments.snippets, arguments.dim
    windows = (
        np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32),
        np.ones((B, T), dtype=np.bool_),
    )
    print("| model | way | " + " | ".join(f"{each} in flight" for each in DEPTHS) + " |")
    print("| --- | --- |" + " --- |" * len(DEPTHS))
    with tempfile.TemporaryDirectory() as scratch:
        bundle = _bundle(arguments, Path(scratch))
        for model, batches in (("copies", 24), (arguments.size, 6)):
            with _served(bundle, Path(scratch, model), model == "copies") as address:
                rates = _rates(bundle, address, windows, batches, arguments.rounds)
            for way in ("shared memory", "gRPC", "gRPC, async"):
                each = (f"{rates[way, depth]:.0f}" for depth in DEPTHS)
                print(f"| {model} | {way} | {' | '.join(each)} |", flush=True)


def _rates(
    bundle: Bundle, address: str, windows: Windows, batches: int, rounds: int
) -> dict[tuple[str, int], float]:
    """Windows a second: the median of rounds, in each of which all ways have their turn."""
    B, T, _ = windows[0].shape
    ways: dict[str, Callable[[int], None]] = {}
    for way, mode in (("shared memory", "always"), ("gRPC", "never")):
        triton = TritonConfig(address=address, batches_in_flight=max(DEPTHS), shared_memory=mode)
        config = EngineConfig(
            backend="triton", triton=triton, max_batch=B, window=WindowConfig(window_snippets=T)
        )
        backend = TritonBackend(bundle, config)
        ways[way] = lambda depth, backend=backend: _by_threads(backend, windows, batches, depth)
    with contextlib.closing(grpc.InferenceServerClient(address)) as client:
        ways["gRPC, async"] = lambda depth: _by_callbacks(client, windows, batches, depth)
        spent_s: dict[tuple[str, int], list[float]] = {}
        for turn in range(rounds + 1):
            for way, run in ways.items():
                for depth in DEPTHS:
                    began_s = time.perf_counter()
                    run(depth)
                    if turn:  # the first one warms up
                        spent_s.setdefault((way, depth), []).append(time.perf_counter() - began_s)
    return {key: batches * B / statistics.median(each) for key, each in spent_s.items()}


def _by_threads(backend: TritonBackend, windows: Windows, batches: int, depth: int) -> None:
    """As an engine does, with streams that always have windows."""
    inference, woken = Inference(depth, depth), threading.Event()
    jobs = [_Job(_Stream())] * len(windows[0])
    asked = answered = 0
    while answered < batches:
        woken.clear()
        if asked < batches and inference.has_room:
            inference.ask(jobs, lambda: [backend.score_snippets(*windows)], woken.set)
            asked += 1
        elif inference.has_answer:
            answered += bool(inference.take())
            assert inference.waits_for is None, inference.waits_for
        else:
            woken.wait()


def _by_callbacks(
    client: grpc.InferenceServerClient, windows: Windows, batches: int, depth: int
) -> None:
    room, failed = threading.Semaphore(depth), []

    def answered(result: grpc.InferResult | None, error: Exception | None) -> None:
        if error is not None:
            failed.append(error)
        else:
            for name in ("scores", "embedding"):
                result.as_numpy(name)
        room.release()

    for _ in range(batches):
        room.acquire()
        inputs = []
        for name, kind, array in zip(("features", "valid"), ("FP32", "BOOL"), windows, strict=True):
            inputs.append(grpc.InferInput(name, list(array.shape), kind))
            inputs[-1].set_data_from_numpy(array)
        outputs = [grpc.InferRequestedOutput(name) for name in ("scores", "embedding")]
        client.async_infer(MODEL, inputs, answered, outputs=outputs, client_timeout=60.0)
    for _ in range(depth):
        room.acquire()
    assert not failed, failed


# --- the models ----------------------------------------------------------------------------------


def _bundle(arguments: argparse.Namespace, scratch: Path) -> Bundle:
    """Of an untrained model."""
    config = TrainingConfig(model=ModelConfig(size=arguments.size))
    classes = tuple(f"class {number}" for number in range(arguments.classes))
    description = RunDescription(
        config=config, data_set="none", classes=classes, feature_dim=arguments.dim,
        recordings=1, points=1, data_digest="",
    )  # fmt: skip
    torch.manual_seed(0)
    snippet = new_snippet_model(config, arguments.dim, arguments.classes)
    model = TrainedModel(snippet.eval(), new_instance_model(config, snippet).eval())
    return export_bundle(description, model, {}, scratch / "bundle")


@contextlib.contextmanager
def _served(bundle: Bundle, folder: Path, copies: bool) -> Iterator[str]:
    repository, scratch = folder / "repository", folder / "scratch"
    repository.mkdir(parents=True)
    scratch.mkdir()
    write_repository(bundle, repository, "hrpro", "python", 1, "cpu", 1)
    if copies:
        onnx.save(_copying(bundle.manifest), repository / MODEL / "1" / "model.onnx")
    with triton_server(repository, scratch, [MODEL]) as server:
        yield server.url


def _copying(manifest: Manifest) -> onnx.ModelProto:
    """Outputs that are the first columns of the features."""
    D, C, W = manifest.feature_dim, len(manifest.classes), manifest.embedding_width
    sizes = {"scores": C, "cas": C, "embedding": W}
    constants = {"zero": 0, "one": 1, "axis": 2, **{f"{name}_size": n for name, n in sizes.items()}}
    nodes = [
        helper.make_node("Slice", ["features", "zero", f"{name}_size", "axis"], [name])
        for name in sizes
    ]
    nodes.append(helper.make_node("Cast", ["valid"], ["attention"], to=TensorProto.FLOAT))

    def tensor(name: str, *size: int, kind: Any = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, ["B", "T", *size])

    graph = helper.make_graph(
        nodes,
        "copying",
        [tensor("features", D), tensor("valid", kind=TensorProto.BOOL)],
        [*(tensor(name, n) for name, n in sizes.items()), tensor("attention")],
        [numpy_helper.from_array(np.array([n]), name) for name, n in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


if __name__ == "__main__":
    main()
