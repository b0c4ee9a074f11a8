"""The state of streams in memory of the device that computes, updated there in place.

    host: features, flags, slots -> device: gather -> step -> write
        -> host: scores, embedding, attention

Written from ONNX Runtime's documentation and run on the CPU alone, whose memory can be bound as
that of a GPU can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from hrpro.engine.config import EngineConfig
from hrpro.engine.incremental import Floats, Pool, cache_dtype
from hrpro.engine.inference import Outputs
from hrpro.export.bundle import Bundle, StepLayout

_OUTPUTS = ("scores", "embedding", "attention")
_ROWS_BOUND = 8192  # snippets, of all batches whose memory is kept


class PooledSession:
    """The step graph of a bundle on a device, with the pools as inputs and outputs."""

    def __init__(
        self,
        bundle: Bundle,
        config: EngineConfig,
        options: onnxruntime.SessionOptions,
        providers: list[Any],
        device: str,
    ) -> None:
        from hrpro.export.pooled import pooled_graph  # imports onnx, which no CPU host needs

        layout, graph = bundle.manifest.step, bundle.step_graph
        assert layout is not None, "the bundle has no step graph"
        assert graph is not None
        self._layout, self._device, self._dtype = layout, device, cache_dtype(config)
        self._delay = bundle.manifest.lookahead_snippets
        half = self._dtype == np.float16
        self.session = onnxruntime.InferenceSession(
            pooled_graph(graph, layout, half), options, providers
        )

    def new_pool(self, slots: int) -> DevicePool:
        """An empty one."""
        return DevicePool(self.session, self._layout, slots, self._dtype, self._device)

    def whole(self, features: Floats, valid: NDArray[np.bool_]) -> Outputs:
        """Windows (B, T, D) and validity (B, T) -> P (B, T, C), embedding (B, T, W) and attention
        (B, T): each as a stream that begins with it, in several steps, so that golden windows see
        the state, too. In one, where it is kept as float16: that is not what the export
        computed."""
        B, T, _ = features.shape
        pool, slots = self.new_pool(B), np.arange(B)
        features = np.pad(features, ((0, 0), (0, self._delay), (0, 0)))
        valid = np.pad(valid, ((0, 0), (self._layout.history, self._delay)))
        whole = T + self._delay
        portion = whole if self._dtype == np.float16 else max(1, self._layout.capacity // 2)
        steps = []
        for first in range(0, whole, portion):
            new = features[:, first : first + portion]
            flags = valid[:, first : first + self._layout.history + portion]
            steps.append(pool.step(new, flags, slots, np.full(B, first)))
        scores, embedding, attention = (
            np.concatenate(each, axis=1)[:, self._delay :] for each in zip(*steps, strict=True)
        )
        return scores, embedding, attention


@dataclass(frozen=True, slots=True)
class _Bound:
    """Memory of the device for batches of one shape; the pools are bound beside it."""

    binding: onnxruntime.IOBinding
    inputs: dict[str, onnxruntime.OrtValue]
    outputs: list[onnxruntime.OrtValue]


class DevicePool(Pool):
    """A pool in memory of ``device``, made once: a step reads and writes the slots of its streams,
    and copies nothing else."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        layout: StepLayout,
        slots: int,
        dtype: type[np.floating],
        device: str,
    ) -> None:
        super().__init__(layout, slots)
        self._session, self._device = session, device
        self._inputs = {each.name for each in session.get_inputs()}
        self._widths = {each.name: each.shape[2:] for each in session.get_outputs()}
        self._fresh = np.zeros(slots, dtype=np.bool_)
        # Zeros: what is masked is multiplied by 0, and must be a number.
        self._parts = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros((slots, *shape), dtype if name in layout.rings else np.float32), device, 0
            )
            for name, shape in layout.state.items()
        }
        self._bound: dict[tuple[int, int], _Bound] = {}  # by (B, n), the last used at the end

    def reset(self, slot: int) -> None:
        """See `Pool`."""
        super().reset(slot)
        self._fresh[slot] = True

    def step(
        self,
        features: Floats,
        flags: NDArray[np.bool_],
        slots: NDArray[np.int64],
        arrival: NDArray[np.int64],
    ) -> Outputs:
        """See `Pool`."""
        n = features.shape[1]
        given: dict[str, NDArray[Any]] = {
            "features": features,
            "valid": flags,
            "arrival": arrival,
            "slots": slots,
            "fresh": self._fresh[slots],
            "places": self._places(arrival, n),
        }
        bound = self._bound_for({k: v for k, v in given.items() if k in self._inputs})
        for name, value in bound.inputs.items():
            value.update_inplace(np.ascontiguousarray(given[name]))
        bound.binding.synchronize_inputs()
        self._session.run_with_iobinding(bound.binding)
        bound.binding.synchronize_outputs()
        self._fresh[slots] = False
        self._flags[slots] = flags[:, n:]
        # Copies: on the CPU this would be memory that the next step writes to.
        scores, embedding, attention = (np.array(each.numpy()) for each in bound.outputs)
        return scores, embedding, attention

    def _bound_for(self, given: dict[str, NDArray[Any]]) -> _Bound:
        B, n, _ = given["features"].shape
        bound = self._bound.pop((B, n), None)
        self._bound[B, n] = bound or self._bind(given)
        # Streams that begin or go on after a gap have shapes that do not come again.
        while len(self._bound) > 1 and sum(B * n for B, n in self._bound) > _ROWS_BOUND:
            del self._bound[next(iter(self._bound))]
        return self._bound[B, n]

    def _bind(self, given: dict[str, NDArray[Any]]) -> _Bound:
        binding = self._session.io_binding()
        inputs = {name: self._empty(each.shape, each.dtype) for name, each in given.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        B, n, _ = given["features"].shape
        outputs = {name: self._empty((B, n, *self._widths[name]), np.float32) for name in _OUTPUTS}
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        for name, pool in self._parts.items():
            binding.bind_ortvalue_input(f"pool/{name}", pool)
            binding.bind_ortvalue_output(f"pool/new_{name}", pool)
        return _Bound(binding, inputs, list(outputs.values()))

    def _empty(self, shape: tuple[int, ...], dtype: Any) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self._device, 0)
