"""Configuration of the live half; a bundle carries the window and localization settings."""

from __future__ import annotations

import json
import math
import os
from typing import Literal

from pydantic import AliasChoices, Field, field_validator, model_validator

from hrpro.engine.settings import Settings, SettingsError

Provider = Literal["cpu", "cuda", "tensorrt"]
BackendName = Literal["onnxruntime", "triton"]
SharedMemory = Literal["auto", "always", "never"]
Fsync = Literal["checkpoint", "commit"]


class LocalizationConfig(Settings):
    """How snippet scores become proposals and events. Lengths are in snippets."""

    thresholds: tuple[float, ...] = Field(
        tuple(round(0.05 + 0.07 * step, 2) for step in range(11)),
        min_length=1,
        description="thresholds on P whose runs become proposals (theta_P)",
    )
    peak_gate: float = Field(
        0.1, ge=0, le=1, description="a run must exceed this score somewhere to become a proposal"
    )
    border_ratio: float = Field(
        0.25, gt=0, le=1, description="outer regions as a share of the proposal's length (epsilon)"
    )
    border_limit: int = Field(
        3,
        ge=1,
        description="outer regions are never wider than this, so that they can be waited for",
    )
    soft_nms_sigma: float = Field(0.3, gt=0, description="width of the Gaussian of soft-NMS")
    completeness_weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of completeness in the score of a proposal, the rest is its contrast; "
        "a bundle has less where the model was trained on few points",
    )
    keep_unrefined: bool = Field(
        False, description="publish proposals with their unrefined borders too (the paper does)"
    )
    score_floor: float = Field(
        0.001, ge=0, description="proposals that soft-NMS leaves at or below this are dropped"
    )
    event_start: float = Field(0.5, gt=0, lt=1, description="an action starts when P exceeds this")
    event_end: float = Field(
        0.25, gt=0, lt=1, description="an action is over when P falls below this"
    )
    event_update_snippets: int = Field(
        4,
        ge=1,
        # The second is its name in bundles and runs of before.
        validation_alias=AliasChoices("event_update_snippets", "event_update"),
        description="an action is updated when it has grown by so many snippets",
    )
    event_update_score: float = Field(
        0.1, gt=0, le=1, description="an action is updated when its score has changed by so much"
    )
    event_confirm: float = Field(
        0.3,
        ge=0,
        le=1,
        description="an action is retracted if none of its final proposals has a score of so much",
    )
    history_snippets: int = Field(
        512, ge=32, description="snippets of embedding kept for the refinement of proposals"
    )

    @model_validator(mode="after")
    def _ordered(self) -> LocalizationConfig:
        if list(self.thresholds) != sorted(set(self.thresholds)):
            raise ValueError("thresholds: expected distinct values from small to large")
        if not 0 < self.thresholds[0] <= self.thresholds[-1] < 1:
            raise ValueError("thresholds: expected values above 0 and below 1")
        if self.event_end > self.event_start:
            raise ValueError("event_end: expected at most event_start")
        return self


class WindowConfig(Settings):
    """How a stream is cut into windows. Lengths are in snippets."""

    hop_snippets: int = Field(1, ge=1, description="new snippets from one window to the next")
    window_snippets: int | None = Field(
        None, ge=1, description="length of a window (default: the shortest that is exact)"
    )

    def length(self, context: int, lookahead: int) -> int:
        """Snippets in a window: as configured, or else the shortest one whose hop is exact.

        Raises SettingsError if the configured one is shorter than that.
        """
        shortest = context + self.hop_snippets + lookahead
        window = self.window_snippets or shortest
        if window < shortest:
            raise SettingsError(
                f"window.window_snippets: expected at least {shortest} (context {context} + hop "
                f"{self.hop_snippets} + look-ahead {lookahead}), got {window}"
            )
        return window


class TritonConfig(Settings):
    """A Triton Inference Server that computes the windows."""

    address: str = Field("127.0.0.1:8001", min_length=1, description="host and port of its gRPC")
    name: str = Field(
        "hrpro", min_length=1, description="name of the models, before -snippet and -instance"
    )
    deadline_s: float = Field(
        10.0, gt=0, description="a request without an answer for so long is made again"
    )
    batches_in_flight: int = Field(
        2, ge=1, le=64, description="batches that are asked for before the first is answered"
    )
    shared_memory: SharedMemory = Field(
        "auto",
        description="windows and scores lie in memory shared with the server, where it is on this "
        "machine (auto: if the address is loopback and the server takes it)",
    )


class LogConfig(Settings):
    """The event log, where the engine has one (`hrpro serve --state`)."""

    days: float = Field(
        7.0, gt=0, description="events are kept for so long; days on which the engine runs count"
    )
    mb: int = Field(
        1024, ge=1, description="the oldest events go when the log is larger than so many MiB"
    )
    fsync: Fsync = Field(
        "checkpoint",
        description="when the log is forced to the disk. After a crash of the engine it is whole "
        "either way; after a power cut, checkpoint may have lost the newest events, commit none",
    )


class LimitsConfig(Settings):
    """What one key may do, or, where there are no keys, one address."""

    streams_per_key: int | None = Field(
        None,
        ge=1,
        description="streams open at the same time, idle ones not counted (default: half of "
        "max_streams, or no limit where there are no keys)",
    )
    hellos_per_s: float = Field(
        200.0,
        gt=0,
        description="Hellos of feeders; as many as in 10 s, or twice max_streams, may come at once",
    )
    control_requests_per_s: float = Field(
        20.0, gt=0, description="requests on control; as many as in 10 s may come at once"
    )


class EngineConfig(Settings):
    """The engine as a process."""

    window: WindowConfig = WindowConfig()
    localization: LocalizationConfig = LocalizationConfig()
    lookahead_s: float | Literal["strict"] = Field(
        4.0,
        description="a proposal is final this long after its end, and not while its action goes "
        "on or a better one that overlaps it waits; strict: as soon as model and hop can tell that "
        "it is over",
    )
    mode: Literal["latency", "throughput"] = Field(
        "latency", description="compute windows as they come, or wait for large batches"
    )
    max_batch: int | None = Field(
        None,
        ge=1,
        description="hops in one inference call (default: 64, for throughput 128; of windows 16 "
        "and 64)",
    )
    max_wait_ms: float | None = Field(
        None,
        ge=0,
        le=60_000,
        description="longest wait of a window for others in its batch (default: 0, for "
        "throughput 50)",
    )
    gap_wait_s: float = Field(
        5.0, ge=0, description="a snippet that is missing for so long is given up: a gap"
    )
    idle_s: float = Field(
        60.0,
        gt=0,
        description="a stream that nothing came of for so long is idle: its actions end, and it "
        "gives way to another one where there are too many",
    )
    backlog_snippets: int = Field(
        64, ge=1, description="snippets a feeder may be ahead of inference"
    )
    max_chunk_snippets: int = Field(64, ge=1, description="snippets in one message")
    max_streams: int = Field(256, ge=1, description="streams open at the same time")
    limits: LimitsConfig = LimitsConfig()
    drain_s: float = Field(
        30.0,
        gt=0,
        description="a drain that takes longer is given up: what is not processed then is lost, "
        "the log says how much, and the exit code is 1",
    )
    threads: int = Field(
        0,
        ge=0,
        description="threads of inference (0: one a usable core); for throughput, on a CPU, each "
        "computes a batch of its own",
    )
    backend: BackendName = Field("onnxruntime", description="what computes the windows")
    inference: Literal["auto", "incremental", "window"] = Field(
        "auto",
        description="compute each snippet once, from what is kept of the past, or a whole window "
        "for each hop (auto: the former where the bundle has a step graph, with provider cpu, or "
        "cuda if the package onnx is there)",
    )
    cache_precision: Literal["fp32", "fp16"] = Field(
        "fp32", description="of the keys and values that are kept of the past of a stream"
    )
    triton: TritonConfig = TritonConfig()
    log: LogConfig = LogConfig()
    provider: Provider = Field("cpu", description="where ONNX Runtime computes the windows")
    fall_back_to_cpu: bool = Field(
        False, description="compute on the CPU where the provider cannot, with a warning"
    )
    engine_cache: str | None = Field(
        None, description="folder where TensorRT keeps what it has built (default: nowhere)"
    )

    @field_validator("lookahead_s", mode="plain")
    @classmethod
    def _lookahead(cls, value: object) -> float | str:
        if value == "strict":
            return "strict"
        if (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and 0 <= value < math.inf
        ):
            return float(value)
        raise ValueError(f"expected strict or seconds of at least 0, came {json.dumps(value)}")

    @property
    def batch_limit(self) -> int:
        """Most windows in one inference call."""
        return self.max_batch or (16 if self.mode == "latency" else 64)

    @property
    def step_batch_limit(self) -> int:
        """Most hops in one step; one is less work than a window by the length of that."""
        return self.max_batch or (64 if self.mode == "latency" else 128)

    @property
    def batch_wait_s(self) -> float:
        """Longest wait of a window for others in its batch."""
        by_mode_ms = 0.0 if self.mode == "latency" else 50.0
        return (by_mode_ms if self.max_wait_ms is None else self.max_wait_ms) / 1000

    @property
    def batches_in_flight(self) -> int:
        """How many may be asked for before the first is answered; 0: computed in the loop itself.

        For throughput they are computed beside it, and one more waits.
        """
        if self.backend == "triton":
            return self.triton.batches_in_flight
        return 0 if self.mode == "latency" else self.inference_workers + 1

    @property
    def inference_workers(self) -> int:
        """Threads that compute a batch each, or wait for the answer."""
        if self.backend == "triton":
            return self.triton.batches_in_flight
        return self.threads or usable_cores() if self._computes_side_by_side else 1

    @property
    def session_threads(self) -> int:
        """Threads of one call of the model; 0: one a usable core.

        Two that compute a batch each take less time of a core for it than two that share one.
        """
        return 1 if self._computes_side_by_side else self.threads

    @property
    def _computes_side_by_side(self) -> bool:
        """Whether each thread computes a batch of its own: on a CPU, for throughput."""
        on_cpu = self.backend == "onnxruntime" and self.provider == "cpu"
        return on_cpu and self.mode == "throughput"


def usable_cores() -> int:
    """Cores of this machine that the process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
