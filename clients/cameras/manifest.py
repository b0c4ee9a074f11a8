"""extractor.json: what an extractor's networks are given, and what they make of it.

EXTRACTOR/
  extractor.json    `ExtractorManifest`
  NAME.onnx         the networks, and other files that they need

ExtractorError    the folder is no usable extractor; the message names file, expectation, finding
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from hrpro.engine.settings import Settings
from hrpro.engine.timebase import SnippetClock
from hrpro.engine.wire import HrproError

MANIFEST = "extractor.json"
SCHEMA_VERSION = 1

Layout = Literal["NCHW", "NHWC", "NCTHW", "NTCHW", "NTHWC"]
FlowMethod = Literal["tvl1", "dis"]
Pooling = Literal["none", "mean", "mean_and_difference"]
# Plain names: nothing outside the folder is read.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class ExtractorError(HrproError, ValueError):
    """A folder that is no usable extractor, or a network that does not do what it says."""


class Flow(Settings):
    """Optical flow."""

    method: FlowMethod = Field(description="tvl1, as for the published I3D; or dis, far faster")
    limit_px: float = Field(gt=0, description="motion is cut off at plus and minus so many pixels")


class Network(Settings):
    """One ONNX file, which makes ``features`` numbers of an image or of all images of a snippet.

    An image is a frame, its colours in 0..255; or the optical flow between two frames that follow
    each other in ``frames``, in pixels, x and y. Its values x become (x * scale - mean) / std.
    """

    file: str = Field(description="the ONNX file")
    flow: Flow | None = Field(None, description="given optical flow (null: frames)")
    frames: tuple[int, ...] = Field(
        min_length=1,
        description="which frames of a snippet, counted from its first; -1 is the frame before it",
    )
    layout: Layout = Field(
        description="axes of the input: N batch, C channels, H, W, and T where a network takes all "
        "images of a snippet at once"
    )
    channels: Literal["rgb", "bgr"] = Field("rgb", description="order of a frame's channels")
    crop: tuple[int, int] | None = Field(
        None, description="height and width, cut from the middle of the images (null: all of them)"
    )
    scale: float = Field(1.0, gt=0, description="values are multiplied with this first")
    mean: tuple[float, ...] = Field(description="of each channel, subtracted then")
    std: tuple[float, ...] = Field(description="of each channel, divided by at last")
    output: str | None = Field(None, description="name of the output (null: the first)")
    features: int = Field(ge=1, description="numbers that the network makes of an image or clip")
    pooling: Pooling = Field(
        description="how those of all images become one: none where the layout has T; mean; "
        "or mean_and_difference, the mean and behind it the mean absolute difference of neighbours"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Network:
        if list(self.frames) != sorted(set(self.frames)):
            raise ValueError(f"frames: expected each once and in order, came {list(self.frames)}")
        if self.flow is not None and len(self.frames) < 2:
            raise ValueError("frames: expected at least 2, between which the flow is taken")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channel_count:
                raise ValueError(f"{name}: expected {self.channel_count} numbers, one a channel")
        if min(self.std) <= 0:
            raise ValueError("std: expected numbers above 0")
        if self.takes_clips != (self.pooling == "none"):
            raise ValueError(
                f"pooling: expected none with a layout that has T, and else another, came "
                f"{self.pooling} with {self.layout}"
            )
        if self.pooling == "mean_and_difference" and self.image_count < 2:
            raise ValueError("pooling: expected at least 2 images for differences")
        return self

    @property
    def takes_clips(self) -> bool:
        """Whether it is given all images of a snippet at once."""
        return "T" in self.layout

    @property
    def channel_count(self) -> int:
        """C."""
        return 3 if self.flow is None else 2

    @property
    def image_count(self) -> int:
        """T, images of one snippet."""
        return len(self.frames) - (self.flow is not None)

    @property
    def snippet_features(self) -> int:
        """Features of a snippet that come of it."""
        return self.features * (2 if self.pooling == "mean_and_difference" else 1)


class ExtractorManifest(Settings):
    """extractor.json."""

    schema_version: Literal[1] = Field(description="version of this file's layout")
    name: str = Field(min_length=1, description="for people, and for what is made with it")
    frames_per_s: float = Field(gt=0, description="frames per second of the snippet clock")
    snippet_frames: int = Field(ge=1, description="frames in a snippet")
    feature_dim: int = Field(ge=1, description="D, the features of all networks one after another")
    height: int = Field(ge=1, description="of a frame as it is kept")
    width: int = Field(ge=1, description="of a frame as it is kept")
    short_side: int | None = Field(
        description="a frame is scaled until its shorter side has this, then height and width are "
        "cut from its middle (null: it is stretched to height and width)"
    )
    interpolation: Literal["bilinear", "bicubic", "area"] = Field(
        "bilinear", description="of that scaling, which averages where a frame becomes smaller"
    )
    networks: tuple[Network, ...] = Field(min_length=1)
    files: dict[str, str] = Field(description="SHA-256 of each file")

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"expected names of files in the folder, came {name!r}")
        return files

    @model_validator(mode="after")
    def _fits_together(self) -> ExtractorManifest:
        if self.short_side is not None and self.short_side < max(self.height, self.width):
            raise ValueError("short_side: expected at least height and width")
        if self.frame_offsets[-1] < 0:
            raise ValueError("networks: expected one that looks at a frame of the snippet itself")
        for network in self.networks:
            if network.file not in self.files:
                raise ValueError(f"files: expected the SHA-256 of {network.file}, came none")
            if not -1 <= network.frames[0] <= network.frames[-1] < self.snippet_frames:
                raise ValueError(
                    f"{network.file}: frames: expected -1 to {self.snippet_frames - 1}, "
                    f"came {network.frames[0]} to {network.frames[-1]}"
                )
            if network.crop is not None and (
                min(network.crop) < 1
                or network.crop[0] > self.height
                or network.crop[1] > self.width
            ):
                raise ValueError(
                    f"{network.file}: crop: expected at most height and width, "
                    f"came {list(network.crop)}"
                )
        made = sum(network.snippet_features for network in self.networks)
        if made != self.feature_dim:
            raise ValueError(
                f"feature_dim: expected {made}, which the networks make, came {self.feature_dim}"
            )
        return self

    @property
    def clock(self) -> SnippetClock:
        """The clock of the streams that it makes."""
        return SnippetClock(frames_per_s=self.frames_per_s, snippet_frames=self.snippet_frames)

    @property
    def frame_offsets(self) -> tuple[int, ...]:
        """All frames of a snippet that any network looks at."""
        return tuple(sorted({offset for network in self.networks for offset in network.frames}))

    @property
    def identity(self) -> str:
        """A hash over all of it, the files' hashes among that: what gives the same features."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_manifest(folder: Path) -> ExtractorManifest:
    """extractor.json of a folder whose files are what it says. Raises ExtractorError."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ExtractorError(
            f"{path}: file is missing; expected the folder of an extractor"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ExtractorError(f"{path}: expected JSON: {error}") from None
    try:
        manifest = ExtractorManifest.model_validate(content)
    except ValidationError as error:
        raise ExtractorError(f"{path}: {_complaint(error)}") from None
    for name, expected in manifest.files.items():
        found = _sha256(folder / name)
        if found != expected:
            raise ExtractorError(f"{folder / name}: expected SHA-256 {expected}, got {found}")
    return manifest


def write_manifest(folder: Path, manifest: ExtractorManifest) -> None:
    """Write extractor.json with the SHA-256 of the files that it names, which are in ``folder``."""
    hashes = {name: _sha256(folder / name) for name in manifest.files}
    content = manifest.model_copy(update={"files": hashes}).model_dump_json(indent=2)
    (folder / MANIFEST).write_text(content + "\n")


@contextlib.contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target``, whole or not at all.

    Where ``target`` has come to be in the meantime, it stays, and the temporary one goes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary) / "whole"
        folder.mkdir()
        yield folder
        try:
            folder.rename(target)
        except OSError:  # it is there and not empty, or there is another reason
            if not target.exists():
                raise


def _complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error":
        return f"{where}{': ' if where else ''}{first['ctx']['error']}"
    if first["type"] == "extra_forbidden":
        return f"{where}: no such key"
    came = "" if first["type"] == "missing" else f", got {first['input']!r}"
    return f"{where}: {first['msg']}{came}"


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ExtractorError(f"{path}: cannot be read: {error.strerror}") from None
