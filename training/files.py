"""Files that are written as a whole or not at all, and files of JSON lines that may be torn."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of ``path`` if nothing was raised.

    The whole file or none is there, also if the machine goes down.
    """
    temporary = path.with_name(path.name + ".part")
    yield temporary
    _to_disk(temporary)
    temporary.replace(path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Have what was written to a file, or which files a folder has, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_array(path: Path, array: NDArray[np.generic]) -> None:
    """A ``.npy`` file. Raises OSError where not all of it could be written: what numpy writes to a
    file itself goes through a buffer whose last write may fail without a word."""
    data = io.BytesIO()
    np.save(data, array)
    path.write_bytes(data.getbuffer())


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; what is no object, as a torn last line, is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
