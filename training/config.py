"""Configuration of training: the model and its two stages.

Where a default differs from the paper's value, the description says so; docs/TRAINING.md has the
measurements behind it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from hrpro.engine.config import LocalizationConfig, WindowConfig
from hrpro.engine.settings import Settings
from hrpro.training.data_config import DataConfig, with_tuples
from hrpro.training.presets import PRESETS, read_preset
from hrpro.training.ranking import ReliableRule


class ModelConfig(Settings):
    """The snippet model of stage 1 and the instance heads of stage 2."""

    size: Literal["full", "lean"] = Field(
        "full", description="full: blocks as wide as D, as in the paper; lean: a quarter of that"
    )
    width: int | None = Field(
        None, ge=1, description="width of the attention blocks (default: as size says)"
    )
    blocks: int = Field(2, ge=0, description="reliability-aware attention blocks")
    attention_heads: int = Field(
        4,
        ge=1,
        description="attention heads of a block, or as many as divide the width (paper: 1)",
    )
    attention_past: int | None = Field(
        32, ge=0, description="snippets before that a snippet attends to (null: all, both ways)"
    )
    attention_future: int = Field(0, ge=0, description="snippets after that a snippet attends to")
    ffn_width: int | None = Field(
        None, ge=1, description="width of the feed-forward layer (default: twice the width)"
    )
    activation: Literal["gelu", "relu"] = Field("gelu", description="in the feed-forward layer")
    dropout: float = Field(0.3, ge=0, lt=1, description="in the blocks and before the heads")
    instance_width: int = Field(128, ge=1, description="hidden width of the instance heads")


class SnippetStageConfig(Settings):
    """Stage 1: snippet-level action discrimination learning."""

    steps: int = Field(500, ge=1, description="optimiser steps")
    batch_size: int = Field(32, ge=1, description="crops in a step (paper: 16)")
    crop_snippets: int = Field(160, ge=8, description="longest crop of a recording, in snippets")
    learning_rate: float = Field(
        1e-3, gt=0, description="peak of the one-cycle schedule (paper: 1e-4, constant)"
    )
    weight_decay: float = Field(1e-3, ge=0, description="of AdamW")
    mining: Literal["attention", "class", "points"] = Field(
        "attention",
        description="what must stay above action_threshold on the walk from a point: the "
        "attention A (paper), the score P of the point's class, or nothing (points alone)",
    )
    action_threshold: float = Field(0.95, ge=0, le=1, description="theta_1 of Algorithm 1")
    background_threshold: float = Field(0.1, ge=0, le=1, description="theta_2 of Algorithm 1")
    lowest_weight: float = Field(
        1.0, ge=0, description="weight of background that is only the lowest A between two points"
    )
    focal_gamma: float = Field(2.0, ge=0, description="focusing parameter of the focal loss")
    action_weight: float = Field(1.0, ge=0, description="weight of the action term of eq. 1")
    background_weight: float = Field(1.0, ge=0, description="weight of the background term, eq. 1")
    background_class_weight: float = Field(
        1.0,
        ge=0,
        description="weight of a focal term of P on background (not in the paper)",
    )
    contrastive_weight: float = Field(0.1, ge=0, description="lambda_1 of eq. 8 (the paper: 1)")
    temperature: float = Field(0.1, gt=0, description="tau of the contrastive loss")
    prototype_momentum: float = Field(
        0.999, ge=0, lt=1, description="mu of eq. 3 for the prototypes that snippets attend to"
    )
    embedding_momentum: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="mu of eq. 3 for the contrastive loss, on the embedding",
    )
    average_decay: float = Field(0.99, ge=0, lt=1, description="decay of the averaged weights")


class InstanceStageConfig(Settings):
    """Stage 2: instance-level action completeness learning."""

    steps: int = Field(1000, ge=1, description="optimiser steps")
    batch_size: int = Field(256, ge=2, description="proposals in a step")
    learning_rate: float = Field(
        1e-3, gt=0, description="peak of the one-cycle schedule (paper: 1e-4, constant)"
    )
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW (paper: 1e-3)")
    dropout: float = Field(0.3, ge=0, lt=1, description="in the instance heads")
    score_loss: Literal["cross_entropy", "smooth_l1"] = Field(
        "cross_entropy", description="loss of the completeness score (paper: smooth_l1, eq. 10)"
    )
    score_weight: float = Field(1.0, ge=0, description="weight of L_score in eq. 14")
    regression_weight: float = Field(1.0, ge=0, description="lambda_2 of eq. 14")
    reliable: ReliableRule = Field(
        "contrast",
        description="reliable proposal of a point: the one with the highest p_OIC (paper), "
        "the same but within the neighbouring points if there is one, or every one that "
        "holds the point for itself",
    )
    regression_floor: float = Field(
        0.3,
        gt=0,
        le=1,
        description="a proposal regresses from this IoU with its reliable proposal on",
    )
    trust_points: float = Field(
        10.0,
        ge=0,
        description="with n points in the median class, stage 2 moves borders and weighs in scores "
        "by the share 1 - trust_points / n of what it learnt, at least 0 (0: always in full, as in "
        "the paper)",
    )
    negative_share: float = Field(0.25, ge=0, lt=1, description="negative proposals in a batch")
    negative_thresholds: tuple[float, ...] = Field(
        (0.02, 0.05, 0.1),
        description="theta_A: runs of A below are negative proposals (paper: 0 to 0.1)",
    )
    average_decay: float = Field(0.99, ge=0, lt=1, description="decay of the averaged weights")


class TrainingConfig(Settings):
    """Everything that a training run depends on, beside the data itself."""

    seed: int = Field(0, ge=0, description="of all random draws")
    threads: int = Field(0, ge=0, description="torch threads (0: as torch chooses)")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where to train (auto: a GPU if there is one)"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the model in training (auto: bfloat16 where the hardware has it)"
    )
    compile: bool = Field(False, description="compile the models with torch.compile")
    checkpoint_s: float = Field(
        300.0, ge=0, description="seconds between saved states, to go on from with --resume"
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    snippet_stage: SnippetStageConfig = SnippetStageConfig()
    instance_stage: InstanceStageConfig = InstanceStageConfig()
    localization: LocalizationConfig = LocalizationConfig()
    window: WindowConfig = WindowConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = with_tuples(values)
        data = values.get("data")
        if isinstance(data, dict) and data.get("preset") in PRESETS:
            for group, settings in read_preset(data["preset"]).training.items():
                given = values.get(group, {})
                if isinstance(given, dict):
                    values[group] = {**settings, **given}
        return values

    @model_validator(mode="after")
    def _full_attention_has_no_band(self) -> TrainingConfig:
        if self.model.attention_past is None and self.model.attention_future:
            raise ValueError(
                "model.attention_future: full attention (attention_past null) has no band"
            )
        return self
