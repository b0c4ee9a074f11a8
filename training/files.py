"""Files that are written as a whole or not at all, and files of JSON lines that may be torn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of ``path`` if nothing was raised."""
    temporary = path.with_name(path.name + ".part")
    yield temporary
    temporary.replace(path)


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
