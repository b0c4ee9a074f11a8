"""features.json of a data folder: which extractor has made its features, on which clock.

Folders whose features come from elsewhere have none.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field, ValidationError

from hrpro.engine.settings import Settings
from hrpro.training.data_config import DataConfig, DataError
from hrpro.training.files import replaced_file

FILE = "features.json"


class FeatureSource(Settings):
    """features.json."""

    extractor: str = Field(description="name of the extractor")
    extractor_id: str = Field(description="hash over all that the extractor is")
    frames_per_s: float = Field(gt=0, description="frames per second of the features' clock")
    snippet_frames: int = Field(ge=1, description="frames in one snippet")
    feature_dim: int = Field(ge=1, description="D")


def read_feature_source(folder: Path) -> FeatureSource | None:
    """What features.json says; None where there is none. Raises DataError."""
    path = folder / FILE
    try:
        return FeatureSource.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {where}: {first['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON: {error}") from None


def write_feature_source(folder: Path, source: FeatureSource) -> None:
    """Write features.json."""
    with replaced_file(folder / FILE) as temporary:
        temporary.write_text(source.model_dump_json(indent=2) + "\n", encoding="utf-8")


def check_clock(folder: Path, config: DataConfig) -> None:
    """Raise DataError where features.json knows of another clock than the settings."""
    source = read_feature_source(folder)
    if source is None:
        return
    made = (source.frames_per_s, source.snippet_frames)
    if made != (config.frames_per_s, config.snippet_frames):
        raise DataError(
            f"{folder / FILE}: the features have {made[1]} frames a snippet at {made[0]:g} "
            f"frames/s, the settings {config.snippet_frames} at {config.frames_per_s:g}; "
            f"expected data.frames_per_s={made[0]:g} data.snippet_frames={made[1]}"
        )
