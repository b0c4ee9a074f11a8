"""Golden windows: inputs with the outputs that a bundle gave where it was made.

An engine runs them when it loads the bundle: what a driver, a library or a processor computes
otherwise is found before the first snippet comes.

    golden.npz    features (2, T, D), valid (2, T) -> scores (2, T, C), embedding (2, T, W)
                  stretch (T, W), proposals (N, 2) -> completeness (N, C), refined (N, 2),
                  refined_completeness (N, C)
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.backends.onnxruntime import RUNTIME_ERRORS
from hrpro.export.bundle import GOLDEN, MANIFEST, Bundle, BundleError

if TYPE_CHECKING:
    from hrpro.engine.inference import Backend

Floats = NDArray[np.float32]

_PROPOSALS = 5
# What golden.npz has; the sizes are those of the manifest, and N that of the proposals.
_AXES: dict[str, tuple[str | int, ...]] = {
    "features": (2, "T", "D"),
    "valid": (2, "T"),
    "scores": (2, "T", "C"),
    "embedding": (2, "T", "W"),
    "stretch": ("T", "W"),
    "proposals": ("N", 2),
    "completeness": ("N", "C"),
    "refined": ("N", 2),
    "refined_completeness": ("N", "C"),
}
# The kind of difference, which has a tolerance, of each output.
_KINDS = {
    "scores": "scores",
    "embedding": "embedding",
    "completeness": "completeness",
    "refined": "borders",
    "refined_completeness": "completeness",
}
# What numpy and zipfile raise for files that are none; a single array is no context (TypeError).
_UNREADABLE = (
    OSError, ValueError, EOFError, TypeError, MemoryError, NotImplementedError, RuntimeError,
    BadZipFile, zlib.error,
)  # fmt: skip
# A ValueError is of inputs that a graph expects, and is not given.
_NOT_COMPUTED: tuple[type[Exception], ...] = (*RUNTIME_ERRORS, ValueError)


def write_golden(path: Path, backend: Backend, features: Floats) -> None:
    """Write what ``backend`` makes of two windows, features (2, T, D); the first begins later."""
    B, T, _ = features.shape
    valid = np.ones((B, T), dtype=np.bool_)
    valid[0, : T // 3] = False
    scores, embedding, _ = backend.score_snippets(features, valid)
    random = np.random.default_rng(0)
    start = random.uniform(0, T, _PROPOSALS)
    borders = np.stack([start, start + random.uniform(0.5, 20, _PROPOSALS)], axis=1)
    proposals = borders.astype(np.float32)
    completeness, refined, again = backend.score_instances(embedding[1], proposals)
    np.savez(
        path, features=features, valid=valid, scores=scores, embedding=embedding,
        stretch=embedding[1], proposals=proposals, completeness=completeness, refined=refined,
        refined_completeness=again,
    )  # fmt: skip


def read_golden(bundle: Bundle) -> dict[str, NDArray[Any]]:
    """The arrays of golden.npz by name. Raises BundleError where they are not what the manifest
    says."""
    path = bundle.folder / GOLDEN
    try:
        # Opened here, since numpy leaves the files of damaged archives open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            golden = {name: np.asarray(archive[name]) for name in _AXES}
    except KeyError as error:
        raise BundleError(f"{path}: expected {', '.join(_AXES)}: {error.args[0]}") from None
    except _UNREADABLE as error:
        raise BundleError(f"{path}: expected an archive of arrays (.npz): {error}") from None
    manifest = bundle.manifest
    sizes = {
        "T": manifest.window_length,
        "D": manifest.feature_dim,
        "C": len(manifest.classes),
        "W": manifest.embedding_width,
        "N": max([1, *golden["proposals"].shape[:1]]),
    }
    for name, axes in _AXES.items():
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)
        dtype = "bool" if name == "valid" else "float32"
        got = golden[name]
        if got.dtype != dtype or got.shape != shape:
            raise BundleError(
                f"{path}: {name}: expected {dtype} {shape} for this bundle, got "
                f"{got.dtype} {got.shape}"
            )
    if not golden["valid"].any():
        raise BundleError(f"{path}: valid: expected snippets that are there, got none")
    return golden


def check_golden(bundle: Bundle, backend: Backend) -> dict[str, float]:
    """The largest difference by kind; nothing for a bundle without golden windows.

    Raises BundleError for one above the bundle's tolerance, and where golden windows, tolerances
    and graphs do not belong together.
    """
    if bundle.golden is None:
        return {}
    tolerances = bundle.manifest.tolerances
    missing = [kind for kind in dict.fromkeys(_KINDS.values()) if kind not in tolerances]
    if missing:
        raise BundleError(
            f"{bundle.folder / MANIFEST}: tolerances: expected those of golden windows, "
            f"{', '.join(missing)} is missing"
        )
    golden = read_golden(bundle)
    worst = dict.fromkeys(tolerances, 0.0)
    for name, got in _computed(bundle, backend, golden).items():
        expected, kind = golden[name], _KINDS[name]
        if got.shape != expected.shape:
            raise BundleError(
                f"{bundle.golden}: {name}: expected {got.shape}, which the graphs give, got "
                f"{expected.shape}"
            )
        # What is not there has outputs, too, but nobody reads them.
        read = golden["valid"] if name in ("scores", "embedding") else slice(None)
        most = np.abs(got[read] - expected[read]).max()
        worst[kind] = float(np.maximum(worst[kind], most))
    for kind, tolerance in tolerances.items():
        if not worst[kind] <= tolerance:  # NaN does not pass
            raise BundleError(
                f"{bundle.folder}: golden windows: {kind} differ by {worst[kind]:.3g} from those "
                f"of the export, expected at most {tolerance:g}: this machine computes otherwise"
            )
    return worst


def _computed(
    bundle: Bundle, backend: Backend, golden: Mapping[str, NDArray[Any]]
) -> dict[str, Floats]:
    """The outputs of this machine. Raises BundleError for graphs that cannot compute them."""
    try:
        scores, embedding, _ = backend.score_snippets(golden["features"], golden["valid"])
        completeness, refined, again = backend.score_instances(
            golden["stretch"], golden["proposals"]
        )
    except _NOT_COMPUTED as error:
        raise BundleError(
            f"{bundle.folder}: expected graphs that compute the golden windows: {error}"
        ) from None
    return {
        "scores": scores, "embedding": embedding, "completeness": completeness, "refined": refined,
        "refined_completeness": again,
    }  # fmt: skip
