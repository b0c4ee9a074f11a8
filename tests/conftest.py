"""A bundle that all tests share: making one takes seconds."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from made_once import made_once

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
    from hrpro.export.bundle import Bundle


# How long an example takes is the machine's affair.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Begun first, so that none of them is left to one worker at the end: each takes a minute or more.
LONG_FILES = ("test_accuracy", "test_bundle", "test_parallel", "test_first_camera", "test_chaos")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.stem.startswith(LONG_FILES))  # else as they stand


def pytest_configure() -> None:
    # The workers of pytest-xdist ignore Ctrl-C, and so would the processes that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    # Imported here: most tests need no torch.
    from tiny_model import tiny_bundle

    from hrpro.export.bundle import read_bundle

    return read_bundle(made_once(tmp_path_factory, "tiny", tiny_bundle))


@pytest.fixture(scope="session")
def backend(bundle: Bundle) -> OnnxRuntimeBackend:
    from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
    from hrpro.engine.config import EngineConfig

    return OnnxRuntimeBackend(bundle, EngineConfig(threads=1))


@pytest.fixture
def nothing_left_open() -> Iterator[None]:
    """A file or a socket that the test has opened is closed at its end."""
    from serving import open_files

    before = open_files()
    yield
    assert not open_files() - before  # what an earlier test has left may close meanwhile
