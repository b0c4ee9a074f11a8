"""Presets of the published data sets: clocks, classes, splits, and how they are evaluated.

The facts are in presets.yaml; `DataConfig` takes its defaults from the preset that it names.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources
from typing import Literal, get_args

import yaml
from pydantic import Field

from hrpro.engine.settings import Settings

PresetName = Literal["thumos14", "gtea", "beoid", "activitynet13", "sbhar", "mocap6"]
PRESETS: tuple[PresetName, ...] = get_args(PresetName)


class SplitSizes(Settings):
    """Recordings in each split."""

    train: int
    test: int


class Preset(Settings):
    """One data set; see presets.yaml."""

    title: str
    frames_per_s: float
    snippet_frames: int
    point_frames_per_s: float | Literal["annotations"] | None
    point_labels: str
    recordings: SplitSizes
    blocked: tuple[str, ...]
    ambiguous: str | None
    tiou_thresholds: tuple[float, ...]
    feature_dim: int
    features: str
    classes: tuple[str, ...]
    training: dict[str, dict[str, int | float]] = Field(default_factory=dict)


@functools.cache
def read_preset(name: PresetName) -> Preset:
    """The preset of this name."""
    text = resources.files("hrpro.training").joinpath("presets.yaml").read_text(encoding="utf-8")
    return Preset.model_validate(yaml.safe_load(text)[name])


def preset_of(classes: Sequence[str]) -> PresetName | None:
    """The data set that has just these classes, if it is one of the presets."""
    return next((n for n in PRESETS if set(read_preset(n).classes) == set(classes)), None)
