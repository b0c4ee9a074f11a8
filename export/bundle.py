"""The deployment bundle: a folder with ONNX graphs and a manifest that describes them.

    BUNDLE/
      bundle.json      `Manifest`
      snippet.onnx     stage 1, see hrpro.export.graphs
      step.onnx        stage 1 a step at a time, where its attention has a band
      instance.onnx    stage 2
      golden.npz       windows with their outputs, see hrpro.export.golden
      bundle.sig       if it is signed, see hrpro.export.signing

A bundle is read only if every file has the SHA-256 that the manifest says. It is written as
`hrpro.export.replaced` does, so a killed export leaves no half bundle.

Schema versions: 3 has the step graph; 2 has golden windows, precision, display names and the time
of the export. Bundles of earlier versions are read as they are; what they lack is empty.

    BundleError    the folder is not a usable bundle; the message names file, expectation, finding
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from hrpro.engine.config import LocalizationConfig, WindowConfig
from hrpro.engine.settings import Settings, SettingsError, load_settings
from hrpro.engine.timebase import SnippetClock
from hrpro.engine.wire import HrproError, checked
from hrpro.engine.wire import label as wire_label

SCHEMA_VERSION = 4
MANIFEST = "bundle.json"
UNFINISHED = f".{MANIFEST}.part"
SNIPPET_GRAPH = "snippet.onnx"
STEP_GRAPH = "step.onnx"
INSTANCE_GRAPH = "instance.onnx"
GOLDEN = "golden.npz"
SIGNATURE = "bundle.sig"
FILES = (SNIPPET_GRAPH, STEP_GRAPH, INSTANCE_GRAPH, GOLDEN)
# What is nested far deeper than any manifest can be read, but not checked, printed or hashed.
_MOST_LEVELS = 32
# Settings that the instance graph has inside, too.
_FIXED_BY_GRAPH = ("border_ratio", "border_limit")

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# The same run exported twice is the same bundle; what the export measures differs each time.
_NOT_OF_IDENTITY = ("bundle_id", "created")
_MEASURED = ("verified", "compared")


class BundleError(HrproError, ValueError):
    """A folder that is not a usable bundle."""


class StepLayout(Settings):
    """What step.onnx keeps of a stream's past, see `hrpro.export.step.StepModel`."""

    history: int = Field(ge=1, description="flags of past snippets that a step is given")
    capacity: int = Field(ge=1, description="keys and values of past snippets that a block keeps")
    state: dict[str, tuple[int, ...]] = Field(
        description="shape of each part of a stream's state, float32; keys and values are rings"
    )
    snippet_flops: int = Field(
        0,
        ge=0,
        description="floating-point operations of a snippet's matrix products; 0: not known",
    )

    @property
    def rings(self) -> tuple[str, ...]:
        """Parts of the state that are rings, (H, capacity, W / H)."""
        return tuple(name for name in self.state if name.startswith(("keys_", "values_")))


class Manifest(Settings):
    """bundle.json."""

    schema_version: int = Field(description="version of this file's layout")
    bundle_id: str = Field(description="hash over the files' hashes and the settings below")
    created: str = Field(description="when it was exported, UTC, ISO 8601")
    precision: Precision = Field(description="of the snippet graph's matrix products")
    data_set: str = Field(description="name of the data set trained on")
    classes: tuple[str, ...] = Field(min_length=1)
    display_names: dict[str, str] = Field(description="of classes, for people, where they differ")
    feature_dim: int = Field(ge=1, description="D, features in a snippet")
    embedding_width: int = Field(ge=1, description="W, width of the embedding")
    frames_per_s: float = Field(gt=0)
    snippet_frames: int = Field(ge=1)
    snippet_s: float = Field(gt=0, description="seconds in a snippet")
    exact: bool = Field(description="whether a window gives the scores of the whole recording")
    context_snippets: int = Field(
        ge=0, description="a position of a window is exact from this many snippets after its start"
    )
    lookahead_snippets: int = Field(
        ge=0, description="a position of a window is exact up to this many snippets before its end"
    )
    window: WindowConfig
    window_length: int = Field(
        ge=1, description="snippets in the window of the export, and in the golden windows"
    )
    window_flops: int = Field(
        ge=0, description="floating-point operations of a window's matrix products; 0: not known"
    )
    step: StepLayout | None = Field(
        description="of step.onnx; null: there is none, since attention has no band"
    )
    localization: LocalizationConfig
    training: dict[str, Any] = Field(description="the full training configuration")
    figures: dict[str, float | str] = Field(
        description="what hrpro evaluate measured before the export, and on what"
    )
    verified: dict[str, float] = Field(description="largest difference of ONNX Runtime from torch")
    tolerances: dict[str, float] = Field(
        description="by how much the outputs of the golden windows may differ, by kind"
    )
    compared: dict[str, float] = Field(
        description="mAP and speed beside fp32, where they were measured"
    )
    versions: dict[str, str] = Field(description="packages that made the bundle")
    files: dict[str, str] = Field(description="SHA-256 of each file")

    @model_validator(mode="after")
    def _classes_fit_topics(self) -> Manifest:
        for label in self.classes:
            checked("classes", wire_label, label)
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: expected distinct names")
        unknown = sorted(set(self.display_names) - set(self.classes))
        if unknown:
            raise ValueError(f"display_names: expected names of classes, got {unknown[0]!r}")
        return self

    @model_validator(mode="after")
    def _seconds_are_those_of_the_clock(self) -> Manifest:
        if not math.isclose(self.snippet_s, self.clock.snippet_s):
            raise ValueError(
                f"snippet_s: expected {self.clock.snippet_s:g}, {self.snippet_frames} frames at "
                f"{self.frames_per_s:g} frames/s, got {self.snippet_s:g}"
            )
        return self

    @property
    def window_snippets(self) -> int:
        """Snippets in a window with the bundle's settings as they are.

        Raises SettingsError if they are too few.
        """
        return self.window.length(self.context_snippets, self.lookahead_snippets)

    @property
    def clock(self) -> SnippetClock:
        """The clock of the streams that the bundle is for."""
        return SnippetClock(frames_per_s=self.frames_per_s, snippet_frames=self.snippet_frames)


class Bundle:
    """A bundle on disk whose files are what its manifest says."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @property
    def snippet_graph(self) -> Path:
        """Stage 1."""
        return self.folder / SNIPPET_GRAPH

    @property
    def step_graph(self) -> Path | None:
        """Stage 1 a step at a time, where there is one."""
        return None if self.manifest.step is None else self.folder / STEP_GRAPH

    @property
    def instance_graph(self) -> Path:
        """Stage 2."""
        return self.folder / INSTANCE_GRAPH

    @property
    def golden(self) -> Path | None:
        """Golden windows; bundles of schema version 1 have none."""
        return self.folder / GOLDEN if GOLDEN in self.manifest.files else None


def read_bundle(folder: Path, manifest_bytes: bytes | None = None) -> Bundle:
    """Read and check a bundle, whose bundle.json may have been read. Raises BundleError."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes() if manifest_bytes is None else manifest_bytes)
    except FileNotFoundError:
        raise BundleError(
            f"{path}: file is missing; expected a bundle made by hrpro export"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: expected JSON: {error}") from None
    if _is_deeper(content, _MOST_LEVELS):
        raise BundleError(f"{path}: expected JSON of at most {_MOST_LEVELS} levels, got more")
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int or version not in (*_UPGRADES, SCHEMA_VERSION):
        raise BundleError(
            f"{path}: expected schema_version {SCHEMA_VERSION} or lower, got {version!r}"
        )
    expected_id = content_id(content)
    for older in range(version, SCHEMA_VERSION):
        content = _UPGRADES[older](content)
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if not where:  # of the whole: its message names the places
            raise BundleError(f"{path}: {first['msg'].removeprefix('Value error, ')}") from None
        raise BundleError(f"{path}: {where}: {first['msg']}, got {first['input']!r}") from None
    absent = {GOLDEN} if version == 1 else set()
    absent |= {STEP_GRAPH} if manifest.step is None else set()
    _check_files(folder, manifest, [name for name in FILES if name not in absent])
    if manifest.bundle_id != expected_id:
        raise BundleError(
            f"{path}: bundle_id: expected {expected_id} for this content, "
            f"got {manifest.bundle_id}; the file was changed"
        )
    return Bundle(folder, manifest)


def _is_deeper(value: object, levels: int) -> bool:
    """Whether what was read of JSON has more levels than that."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in inner)


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    empty: dict[str, Any] = {"display_names": {}, "tolerances": {}, "compared": {}}
    known = {"schema_version": 2, "created": "", "precision": "fp32", "window_flops": 0}
    return content | empty | known


def _from_version_2(content: dict[str, Any]) -> dict[str, Any]:
    return content | {"schema_version": 3, "step": None}


def _from_version_3(content: dict[str, Any]) -> dict[str, Any]:
    return content | {"schema_version": 4}


# From each version to the next.
_UPGRADES = {1: _from_version_1, 2: _from_version_2, 3: _from_version_3}


def _check_files(folder: Path, manifest: Manifest, names: Sequence[str]) -> None:
    if set(manifest.files) != set(names):
        raise BundleError(
            f"{folder / MANIFEST}: files: expected {', '.join(names)}, "
            f"got {', '.join(sorted(manifest.files)) or 'none'}"
        )
    for name, expected in manifest.files.items():
        try:
            _check_stays(folder, folder / name)
            found = sha256(folder / name)
        except (OSError, RuntimeError) as error:  # the latter for links in a circle
            raise BundleError(f"{folder / name}: cannot be read: {error}") from None
        if found != expected:
            raise BundleError(f"{folder / name}: expected SHA-256 {expected}, got {found}")


def _check_stays(folder: Path, path: Path) -> None:
    """Nothing of a bundle is read that is not in its folder, and has no hash.

    ONNX calls the file of a tensor that is kept elsewhere its `location`; exported graphs have all
    they need inside, and that word nowhere.
    """
    if not path.resolve(strict=True).is_relative_to(folder.resolve()):
        raise BundleError(
            f"{path}: expected a file of the bundle, got a link that leaves its folder"
        )
    if path.suffix == ".onnx":
        with path.open("rb") as file, _mapped(file) as content:
            if content.find(b"location") >= 0:
                raise BundleError(f"{path}: expected a graph without tensors in other files")


@contextmanager
def _mapped(file: BinaryIO) -> Iterator[mmap.mmap | bytes]:
    """The content of a file; an empty one cannot be mapped."""
    if os.fstat(file.fileno()).st_size == 0:
        yield b""
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def sha256(path: Path) -> str:
    """Hash of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_id(manifest: dict[str, Any]) -> str:
    """Identity of a bundle: 16 hex digits over its manifest, the files' hashes among it, but for
    the id itself, the time, and what the export measured; that of schema versions up to 3 has this
    inside."""
    left_out = _NOT_OF_IDENTITY if manifest["schema_version"] <= 3 else _NOT_OF_IDENTITY + _MEASURED
    content = {key: value for key, value in manifest.items() if key not in left_out}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def write_manifest(folder: Path, content: dict[str, Any]) -> Manifest:
    """Write bundle.json for the files in ``folder``; hashes, time and identity are filled in."""
    content = content | {
        "schema_version": SCHEMA_VERSION,
        "bundle_id": "",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {name: sha256(folder / name) for name in FILES if (folder / name).exists()},
    }
    # Once through the model, so that the identity is of what will be read back.
    dumped = Manifest.model_validate(content).model_dump(mode="json")
    dumped["bundle_id"] = content_id(dumped)
    (folder / SIGNATURE).unlink(missing_ok=True)  # it was of another content
    temporary = folder / UNFINISHED
    temporary.write_text(json.dumps(dumped, indent=2) + "\n")
    temporary.replace(folder / MANIFEST)
    return Manifest.model_validate(dumped)


class _Overridable(Settings):
    """What of a bundle can be set without a new export."""

    window: WindowConfig
    localization: LocalizationConfig


def change_settings(
    folder: Path, assignments: Sequence[str], display_names: Mapping[str, str]
) -> Manifest:
    """Override settings and names of a bundle where it lies; it gets another id.

    A signature goes. Raises BundleError and SettingsError, and changes nothing then.
    """
    manifest = read_bundle(folder).manifest
    content = manifest.model_dump(mode="json")
    base = {name: content[name] for name in _Overridable.model_fields}
    changed = load_settings(_Overridable, None, assignments, base)
    check_fixed_settings(manifest, changed.localization)
    changed.window.length(manifest.context_snippets, manifest.lookahead_snippets)
    names = manifest.display_names | dict(display_names)
    content |= changed.model_dump(mode="json") | {"display_names": names}
    try:
        return write_manifest(folder, content)
    except ValidationError as error:
        raise BundleError(f"{folder}: {error.errors()[0]['msg']}") from None


def check_fixed_settings(manifest: Manifest, localization: LocalizationConfig) -> None:
    """Raise SettingsError for settings that the bundle's graph has otherwise."""
    differing = []
    for name in _FIXED_BY_GRAPH:
        trained, given = getattr(manifest.localization, name), getattr(localization, name)
        if given != trained:
            differing.append(
                f"localization.{name}: expected {trained}, which the bundle was trained with and "
                f"its graph contains, got {given}"
            )
    if differing:
        raise SettingsError("\n  ".join(differing))
