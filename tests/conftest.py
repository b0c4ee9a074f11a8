"""A bundle that all tests share: making one takes seconds."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
    from hrpro.export.bundle import Bundle


# Begun first, so that none of them is left to one worker at the end: each takes a minute or more.
LONG_FILES = ("test_accuracy", "test_chaos", "test_recovery", "test_first_camera", "test_dashboard")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.stem.startswith(LONG_FILES))  # else as they stand


def pytest_configure() -> None:
    # The workers of pytest-xdist ignore Ctrl-C, and so would the processes that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    # Imported here: most tests need no torch, and one worker makes it for all.
    from filelock import FileLock

    from hrpro.export.bundle import read_bundle

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    target = folder / "tiny-bundle"
    with FileLock(folder / "tiny-bundle.lock"):
        if not target.exists():
            from tiny_model import tiny_bundle

            tiny_bundle(target)
    return read_bundle(target)


@pytest.fixture(scope="session")
def backend(bundle: Bundle) -> OnnxRuntimeBackend:
    from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
    from hrpro.engine.config import EngineConfig

    return OnnxRuntimeBackend(bundle, EngineConfig(threads=1))
