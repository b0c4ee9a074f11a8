"""A bundle is written to a temporary folder beside its place, which is renamed when all went well.

Where it takes the place of another one, that one is moved aside first and comes back if the rename
fails.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hrpro.export.bundle import FILES, MANIFEST, SIGNATURE, UNFINISHED


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``target`` when all went well.

    A link is followed, and stays. Raises FileExistsError if ``target`` exists and is not a bundle,
    or has more in it than one: nothing else is overwritten.
    """
    target = Path(os.path.realpath(target))
    _check_free_or_bundle(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        if target.exists():
            old = temporary.with_name(temporary.name + ".old")
            try:
                target.rename(old)
                temporary.rename(target)
            except BaseException:  # a signal, too, which may come when either is done
                if not target.exists():
                    old.rename(target)
                raise
            finally:
                if target.exists():  # else the old one is all that there is
                    shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_free_or_bundle(target: Path) -> None:
    if target.is_symlink():  # all others are followed
        raise FileExistsError(f"{target}: expected a folder, got links in a circle")
    if not target.exists():
        return
    names = {each.name for each in target.iterdir()} if target.is_dir() else None
    if names == set():
        return
    if names is None or not _is_manifest(target / MANIFEST):
        raise FileExistsError(f"{target}: exists and is not a bundle; not overwritten")
    others = sorted(names - {MANIFEST, UNFINISHED, SIGNATURE, *FILES})
    if others:
        raise FileExistsError(
            f"{target}: expected nothing but a bundle, which another one replaces as a whole, "
            f"found {others[0]!r}; not overwritten"
        )


def _is_manifest(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "schema_version" in content
