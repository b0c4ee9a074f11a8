"""Inference by ONNX Runtime, on the CPU or on a GPU.

The GPU providers are written from ONNX Runtime's documentation and have not been run on one. What
has been: that an engine without one does not start, in place of a silent fall-back to the CPU.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state

from hrpro.engine.backends.device_pool import DevicePool, PooledSession
from hrpro.engine.backends.session import (
    CPU_PROVIDER,
    CUDA_OPTIONS,
    CUDA_PROVIDER,
    session_options,
)
from hrpro.engine.backends.step import StepSession
from hrpro.engine.config import EngineConfig, Provider
from hrpro.engine.incremental import Floats, Stepped, runs_by_steps
from hrpro.engine.inference import Outputs
from hrpro.engine.wire import HrproError
from hrpro.export.bundle import Bundle, BundleError, Manifest

_log = logging.getLogger(__name__)

_PROVIDERS: dict[Provider, str] = {
    "cpu": CPU_PROVIDER,
    "cuda": CUDA_PROVIDER,
    "tensorrt": "TensorrtExecutionProvider",
}
_SNIPPET_OUTPUTS = ["scores", "embedding", "attention"]
_INSTANCE_OUTPUTS = ["completeness", "refined", "refined_completeness"]
Providers = list[str | tuple[str, dict[str, Any]]]
# ONNX Runtime's exceptions have no ancestor of their own.
RUNTIME_ERRORS: tuple[type[Exception], ...] = tuple(
    each
    for each in vars(onnxruntime_pybind11_state).values()
    if isinstance(each, type) and issubclass(each, Exception)
)


@contextmanager
def loading(graph: Path | None) -> Iterator[None]:
    """Raise BundleError where ONNX Runtime cannot load a graph."""
    try:
        yield
    except RUNTIME_ERRORS as error:
        reason = " ".join(str(error).split())
        raise BundleError(
            f"{graph}: expected a graph that ONNX Runtime can load: {reason}"
        ) from None


class ProviderError(HrproError):
    """ONNX Runtime does not compute where it was told to."""


class InstanceStage:
    """Stage 2 as an ONNX Runtime session.

    It runs on this machine's CPU, wherever stage 1 does: its inputs have another size each time,
    and a few proposals are less work than the way to a GPU or to another machine.
    """

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        with loading(bundle.instance_graph):
            self._instance = onnxruntime.InferenceSession(
                bundle.instance_graph, session_options(config.session_threads), [CPU_PROVIDER]
            )
        # Bundles of schema versions 1 and 2 know of one stretch alone.
        self._has_stretches = len(self._instance.get_inputs()) > 2

    def score_instances(
        self, embedding: Floats, proposals: Floats, stretch: NDArray[np.int64] | None = None
    ) -> tuple[Floats, Floats, Floats]:
        """Stage 2, see `hrpro.engine.asking.InstanceScorer`."""
        inputs = {"features": embedding, "proposals": proposals}
        if self._has_stretches:
            if stretch is None:
                stretch = np.tile(np.array([0, len(embedding) - 1]), (len(proposals), 1))
            return self._run(inputs | {"stretch": stretch})
        if stretch is None or not len(stretch):
            return self._run(inputs)
        # One stretch at a time: proposals of one stand side by side.
        begins = np.flatnonzero(np.diff(stretch[:, 0], prepend=-1)).tolist()
        parts = []
        for begin, end in itertools.pairwise([*begins, len(proposals)]):
            own = embedding[stretch[begin, 0] : stretch[begin, 1] + 1]
            parts.append(self._run({"features": own, "proposals": proposals[begin:end]}))
        joined = [np.concatenate(each) for each in zip(*parts, strict=True)]
        return joined[0], joined[1], joined[2]

    def _run(self, inputs: dict[str, NDArray[Any]]) -> tuple[Floats, Floats, Floats]:
        completeness, refined, again = self._instance.run(_INSTANCE_OUTPUTS, inputs)
        return completeness, refined, again


class OnnxRuntimeBackend(InstanceStage):
    """Both stages of a bundle as ONNX Runtime sessions. Raises BundleError and ProviderError.

    Stage 1 is the step graph or the snippet graph, as `runs_by_steps` says; both can score windows.
    By steps, a device has the state of streams in its memory, and the CPU is given it.
    """

    def __init__(self, bundle: Bundle, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        super().__init__(bundle, config)
        self._step: StepSession | None = None
        self._pooled: PooledSession | None = None
        self.provider: Provider
        if runs_by_steps(bundle.manifest, config):
            with loading(bundle.step_graph):
                self.provider = self._load_steps(bundle, config)
            return
        with loading(bundle.snippet_graph):
            self._snippet = onnxruntime.InferenceSession(
                bundle.snippet_graph,
                session_options(config.session_threads),
                _providers(bundle.manifest, config),
            )
        self.provider = _provider_in_use(self._snippet, config)
        self._bound = None if self.provider == "cpu" else BoundSession(self._snippet, "cuda")

    def _load_steps(self, bundle: Bundle, config: EngineConfig) -> Provider:
        if config.provider != "cpu":
            providers = _providers(bundle.manifest, config)
            pooled = PooledSession(
                bundle, config, session_options(config.session_threads), providers, "cuda"
            )
            provider = _provider_in_use(pooled.session, config)
            if provider != "cpu":
                self._pooled = pooled
                return provider
        self._step = StepSession(bundle, session_options(config.session_threads), [CPU_PROVIDER])
        return "cpu"

    def device_pool(self, slots: int) -> DevicePool | None:
        """See `hrpro.engine.incremental.PoolKeeper`."""
        return None if self._pooled is None else self._pooled.new_pool(slots)

    def score_step(
        self,
        features: Floats,
        valid: NDArray[np.bool_],
        arrival: NDArray[np.int64],
        state: Sequence[Floats],
    ) -> Stepped:
        """See `hrpro.engine.incremental.StepScorer`."""
        assert self._step is not None, "windows are computed, or the state is on a device"
        return self._step.step(features, valid, arrival, state)

    def score_snippets(self, features: NDArray[np.float32], valid: NDArray[np.bool_]) -> Outputs:
        """Windows (B, T, D) and validity (B, T) -> P (B, T, C), embedding (B, T, W) and attention
        (B, T)."""
        by_steps = self._step or self._pooled
        if by_steps is not None:
            return by_steps.whole(features, valid)
        inputs = {"features": features, "valid": valid}
        if self._bound is not None:
            scores, embedding, attention = self._bound.run(inputs)
        else:
            scores, embedding, attention = self._snippet.run(_SNIPPET_OUTPUTS, inputs)
        return scores, embedding, attention


class BoundSession:
    """Stage 1 with its inputs and outputs in memory of the device, made once for each batch size.

    Otherwise each call would allocate there, and copy in two steps. The outputs are copied to the
    host, since what follows is computed there.
    """

    def __init__(self, session: onnxruntime.InferenceSession, device: str) -> None:
        self._session = session
        self._device = device
        self._bindings: dict[tuple[int, ...], tuple[Any, dict[str, Any]]] = {}

    def run(self, inputs: dict[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        """As the session's own `run`, for inputs of the shapes (B, T, D) and (B, T)."""
        shape = inputs["features"].shape
        if shape not in self._bindings:
            self._bindings[shape] = self._bind(inputs)
        binding, values = self._bindings[shape]
        for name, array in inputs.items():
            values[name].update_inplace(np.ascontiguousarray(array))
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        outputs: list[NDArray[np.float32]] = binding.copy_outputs_to_cpu()
        return outputs

    def _bind(self, inputs: dict[str, NDArray[Any]]) -> tuple[Any, dict[str, Any]]:
        binding = self._session.io_binding()
        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, 0)
            for name, array in inputs.items()
        }
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        widths = {each.name: each.shape[2:] for each in self._session.get_outputs()}
        for name in _SNIPPET_OUTPUTS:
            shape = (*inputs["valid"].shape, *widths[name])
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                shape, np.float32, self._device, 0
            )
            binding.bind_ortvalue_output(name, value)
        return binding, values


def _providers(manifest: Manifest, config: EngineConfig) -> Providers:
    """The provider that was asked for, and those that it hands to what it cannot compute."""
    cpu, cuda = _PROVIDERS["cpu"], _PROVIDERS["cuda"]
    if config.provider == "cpu":
        return [cpu]
    if config.provider == "cuda":
        return [(cuda, CUDA_OPTIONS), cpu]
    return [(_PROVIDERS["tensorrt"], _tensorrt_options(manifest, config)), cuda, cpu]


def _tensorrt_options(manifest: Manifest, config: EngineConfig) -> dict[str, Any]:
    """One profile for all batches and windows: without, each new shape would build an engine."""
    own = config.window.length(manifest.context_snippets, manifest.lookahead_snippets)
    longest = max(own, manifest.window_length)  # the latter is that of the golden windows
    shapes = {
        name: f"features:{batch}x{length}x{manifest.feature_dim},valid:{batch}x{length}"
        for name, batch, length in (
            ("min", 1, 1),
            ("opt", config.batch_limit, longest),
            ("max", max(2, config.batch_limit), longest),  # there are two golden windows
        )
    }
    options: dict[str, Any] = {
        f"trt_profile_{name}_shapes": shape for name, shape in shapes.items()
    }
    options["trt_fp16_enable"] = manifest.precision == "fp16"
    if config.engine_cache is not None:
        options |= {"trt_engine_cache_enable": True, "trt_engine_cache_path": config.engine_cache}
    return options


def _provider_in_use(session: onnxruntime.InferenceSession, config: EngineConfig) -> Provider:
    """The one that was asked for. ONNX Runtime falls back to the CPU without an error."""
    used, wanted = session.get_providers()[0], _PROVIDERS[config.provider]
    if used == wanted:
        return config.provider
    problem = (
        f"provider {config.provider}: expected ONNX Runtime to compute by {wanted}, it took {used}"
    )
    if not config.fall_back_to_cpu:
        raise ProviderError(
            f"{problem}; its own message above says why (a missing GPU, driver or library)"
        )
    _log.warning("%s, as fall_back_to_cpu allows", problem)
    return next(name for name, full in _PROVIDERS.items() if full == used)
