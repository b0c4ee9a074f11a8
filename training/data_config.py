"""How a data set on disk is to be read, and the error of one that does not hold together.

DataError
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from hrpro.engine.settings import Settings
from hrpro.engine.timebase import SnippetClock
from hrpro.engine.wire import HrproError
from hrpro.training.metrics import THUMOS_TIOU_THRESHOLDS
from hrpro.training.presets import PRESETS, Preset, PresetName, read_preset

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class DataError(HrproError, ValueError):
    """A data set that does not hold together; the message names the file and what was expected."""


class DataConfig(Settings):
    """How a data set on disk is to be read."""

    preset: PresetName | None = Field(
        None, description="a published data set, which gives the other data settings their defaults"
    )
    frames_per_s: float = Field(25.0, gt=0, description="frames per second of the features' clock")
    snippet_frames: int = Field(16, ge=1, description="frames in one snippet")
    point_frames_per_s: Annotated[float, Field(gt=0)] | Literal["annotations"] | None = Field(
        None,
        description="frames per second of the point labels (default: frames_per_s; annotations: "
        "the fps of each recording in gt_full.json)",
    )
    point_labels: str | None = Field(
        None, description="file in point_labels/ to use (default: the only one there)"
    )
    tiou_thresholds: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        THUMOS_TIOU_THRESHOLDS, min_length=1, description="tIoU thresholds of the evaluation"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_preset(cls, values: Any) -> Any:
        values = with_tuples(values)
        if not isinstance(values, dict) or values.get("preset") not in PRESETS:
            return values
        preset = read_preset(values["preset"]).model_dump(include=set(cls.model_fields))
        return {**preset, **values}

    @property
    def published(self) -> Preset | None:
        """What is known of the published data set, if this is one."""
        return None if self.preset is None else read_preset(self.preset)

    @property
    def clock(self) -> SnippetClock:
        """The snippet clock of the data set."""
        return SnippetClock(frames_per_s=self.frames_per_s, snippet_frames=self.snippet_frames)


def with_tuples(values: Any) -> Any:
    """Settings with tuples for lists: what goes through a validator counts as Python's, where a
    list is no tuple."""
    if isinstance(values, dict):
        return {key: with_tuples(each) for key, each in values.items()}
    return tuple(map(with_tuples, values)) if isinstance(values, list) else values


def read_text(path: Path, what: str) -> str:
    """A text file of a data set, which lists ``what``; a byte order mark, as spreadsheets write it,
    is left out. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected text in UTF-8, came other bytes") from None
    except FileNotFoundError:
        raise DataError(f"{path}: file is missing; it lists {what}") from None


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of such a file, without blanks around them; empty ones are left out."""
    return [line.strip() for line in read_text(path, what).splitlines() if line.strip()]
