"""What all workers of a test run share: the first that asks makes it, and each has a copy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of this worker's own, as ``make`` fills one that is not there yet."""
    common = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent
    made, begun = common / f"{name}-made", common / f"{name}-begun"
    with FileLock(common / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(begun, ignore_errors=True)  # by one that has failed
            make(begun)
            begun.rename(made)
    return Path(shutil.copytree(made, factory.mktemp(name) / name))
