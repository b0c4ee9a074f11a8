"""Configuration of the live half; a bundle carries the window and localization settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hrpro.engine.settings import Settings

Provider = Literal["cpu", "cuda", "tensorrt"]
BackendName = Literal["onnxruntime", "triton"]
SharedMemory = Literal["auto", "always", "never"]


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
    event_update: int = Field(
        4, ge=1, description="an open action is updated when it has grown by so many snippets"
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


class EngineConfig(Settings):
    """The engine as a process."""

    window: WindowConfig = WindowConfig()
    localization: LocalizationConfig = LocalizationConfig()
    lookahead_s: float = Field(
        4.0,
        ge=0,
        description="a proposal is final this long after its end, and not while its action goes on",
    )
    max_batch: int = Field(16, ge=1, description="windows in one inference call")
    backlog_snippets: int = Field(
        64, ge=1, description="snippets a feeder may be ahead of inference"
    )
    max_chunk_snippets: int = Field(64, ge=1, description="snippets in one message")
    max_streams: int = Field(256, ge=1, description="streams open at the same time")
    threads: int = Field(0, ge=0, description="threads of inference (0: one a usable core)")
    backend: BackendName = Field("onnxruntime", description="what computes the windows")
    triton: TritonConfig = TritonConfig()
    provider: Provider = Field("cpu", description="where ONNX Runtime computes the windows")
    engine_cache: str | None = Field(
        None, description="folder where TensorRT keeps what it has built (default: nowhere)"
    )

    @property
    def batches_in_flight(self) -> int:
        """How many may be computed elsewhere at a time; 0 where the engine computes them itself."""
        return self.triton.batches_in_flight if self.backend == "triton" else 0
