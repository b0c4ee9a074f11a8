"""Where ONNX Runtime computes: a GPU that is not there is refused, and what one would be told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from commands import PATIENCE_S, hrpro
from tiny_model import DIM

from hrpro.engine.backends.onnxruntime import (
    BoundSession,
    OnnxRuntimeBackend,
    ProviderError,
    _providers,
)
from hrpro.engine.config import EngineConfig
from hrpro.export.bundle import Bundle

ANY_PORT = "tcp://127.0.0.1:*"


def has_gpu(bundle: Bundle) -> bool:
    try:
        OnnxRuntimeBackend(bundle, EngineConfig(provider="cuda"))
    except ProviderError:
        return False
    return True


def test_onnx_runtime_reports_nothing(bundle: Bundle, tmp_path: Path) -> None:
    """By default its packages keep an id of the machine, and a queue of what is to be sent."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    }
    command = [Path(sys.executable).with_name("hrpro"), "bundle", "verify", bundle.folder]
    subprocess.run(
        command,
        check=True,
        capture_output=True,
        timeout=PATIENCE_S,
        env={**environment, "HOME": str(tmp_path)},
    )
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    ("provider", "inference"), [("cuda", "auto"), ("cuda", "window"), ("tensorrt", "auto")]
)
def test_an_engine_does_not_fall_back_to_the_cpu(
    bundle: Bundle, provider: str, inference: str
) -> None:
    if has_gpu(bundle):
        pytest.skip("there is a GPU here: nothing to refuse")
    said = hrpro(
        "serve", bundle.folder, "--feed", ANY_PORT, "--events", ANY_PORT, "--control", ANY_PORT,
        "--state", "none", "--set", f"provider={provider}",
        "--set", f"inference={inference}", status=1,
    ).stderr  # fmt: skip
    assert f"hrpro: provider {provider}: expected ONNX Runtime to compute by " in said
    assert "it took CPUExecutionProvider" in said


@pytest.mark.parametrize("inference", ["incremental", "window"])
def test_an_engine_falls_back_where_that_is_allowed(
    bundle: Bundle,
    backend: OnnxRuntimeBackend,
    inference: Literal["incremental", "window"],
    caplog: pytest.LogCaptureFixture,
) -> None:
    if has_gpu(bundle):
        pytest.skip("there is a GPU here: nothing to fall back from")
    config = EngineConfig(provider="cuda", fall_back_to_cpu=True, inference=inference)
    fallen = OnnxRuntimeBackend(bundle, config)
    assert fallen.provider == "cpu"
    assert fallen.device_pool(2) is None
    window = np.ones((1, 9, DIM), np.float32), np.ones((1, 9), np.bool_)
    np.testing.assert_allclose(
        fallen.score_snippets(*window)[0], backend.score_snippets(*window)[0], atol=1e-5
    )
    (line,) = caplog.messages
    assert line == (
        "provider cuda: expected ONNX Runtime to compute by CUDAExecutionProvider, it took "
        "CPUExecutionProvider, as fall_back_to_cpu allows"
    )


def test_tensorrt_gets_one_profile_for_all_windows(bundle: Bundle) -> None:
    config = EngineConfig(provider="tensorrt", max_batch=4, engine_cache="cache")
    (name, options), *others = _providers(bundle.manifest, config)
    assert (name, others) == (
        "TensorrtExecutionProvider", ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )  # fmt: skip
    # 13 snippets before and 3 behind the one that counts, D = 8.
    assert options == {
        "trt_profile_min_shapes": "features:1x1x8,valid:1x1",
        "trt_profile_opt_shapes": "features:4x17x8,valid:4x17",
        "trt_profile_max_shapes": "features:4x17x8,valid:4x17",
        "trt_fp16_enable": False,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": "cache",
    }


def test_cuda_is_told_to_keep_to_float32(bundle: Bundle) -> None:
    assert _providers(bundle.manifest, EngineConfig(provider="cuda")) == [
        ("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}),
        "CPUExecutionProvider",
    ]


def test_bound_memory_gives_what_a_plain_call_gives(bundle: Bundle) -> None:
    """On the CPU, whose memory can be bound as a GPU's can."""
    backend = OnnxRuntimeBackend(bundle, EngineConfig(threads=1, inference="window"))
    bound = BoundSession(backend._snippet, "cpu")
    draw = np.random.default_rng(1)
    kept = []
    for batch in (2, 1, 2, 4, 2):  # each shape is bound once, and used with other values
        features = draw.normal(size=(batch, 17, DIM)).astype(np.float32)
        valid = draw.random((batch, 17)) < 0.8
        outputs = bound.run({"features": features, "valid": valid})
        expected = backend.score_snippets(features, valid)
        for got, wanted in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(got, wanted)
        kept.append((outputs, [each.copy() for each in outputs]))
    for outputs, copies in kept:  # a later call has not written over them
        for got, wanted in zip(outputs, copies, strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert len(bound._bindings) == 3
