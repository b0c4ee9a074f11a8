"""A client's key file, and the checks of any file that holds a secret; shared with the clients.

    HrproError
    +-- KeyFileError            a key or a folder of keys that is not there, open to others, or none

A key file is JSON, written by `hrpro keys new`: the client's own pair of CURVE keys and the public
key of the engine that it is for, each as 40 characters of Z85. Whoever can read it is the client.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hrpro.engine.wire import HrproError

VERSION = 1

Role = Literal["producer", "subscriber", "operator"]

_Z85 = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


class KeyFileError(HrproError):
    """A key file, or a folder of them, that cannot be used; the message says how it could be."""


@dataclass(frozen=True)
class ClientKey:
    """What a client needs: its pair of keys, and the engine's public one to know the engine by."""

    public: bytes
    secret: bytes
    engine: bytes

    def __repr__(self) -> str:
        return f"ClientKey(public={self.public!r})"


def is_z85_key(value: object) -> bool:
    """Whether it is the text of a CURVE key."""
    return isinstance(value, str) and _Z85.fullmatch(value) is not None


def read_client_key(file: Path) -> ClientKey:
    """The key in a file that `hrpro keys new` has written. Raises KeyFileError."""
    content = read_private_json(file)
    names = ("public", "secret", "engine")
    wrong = [name for name in names if not is_z85_key(content.get(name))]
    if content.get("version") != VERSION or wrong:
        raise KeyFileError(
            f"{file}: expected a client's key of version {VERSION} with {', '.join(names)}, as"
            f" hrpro keys new writes it, got {', '.join(map(str, content)) or 'nothing'}"
        )
    return ClientKey(*(str(content[name]).encode() for name in names))


def read_private_json(file: Path) -> dict[str, object]:
    """A JSON object in a file that its owner alone can read. Raises KeyFileError."""
    try:
        with file.open("rb") as opened:
            mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
            if mode & 0o077:
                raise KeyFileError(
                    f"{file}: expected a secret that its owner alone can read, got mode {mode:04o};"
                    f" chmod 600 {file}"
                )
            content = json.loads(opened.read())
    except OSError as error:
        raise KeyFileError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise KeyFileError(f"{file}: expected JSON: {error}") from None
    if not isinstance(content, dict):
        raise KeyFileError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def write_private_json(file: Path, content: dict[str, object]) -> None:
    """Writes a new file that its owner alone can read. Raises KeyFileError if there is one."""
    write_new(file, json.dumps(content, indent=2) + "\n", 0o600)


def write_new(file: Path, text: str, mode: int) -> None:
    """Writes a new file with these permissions, whatever the umask is. Raises KeyFileError."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise KeyFileError(f"{file}: exists; not overwritten") from None
    except OSError as error:
        raise KeyFileError(f"{file}: cannot be written: {error.strerror}") from None
    with os.fdopen(descriptor, "w") as opened:
        opened.write(text)
        opened.flush()
        os.fchmod(descriptor, mode)
