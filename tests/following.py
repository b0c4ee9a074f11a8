"""What the tests that follow a page of docs/ share: its lines and programs, with other ports."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from commands import PATIENCE_S, Engine, environment, program, running, words_of


class Place:
    """A folder in which a page is followed, and what its text becomes there."""

    def __init__(self, folder: Path, **puts: str) -> None:
        self.folder = folder
        self.puts = dict(puts)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._options = {"cwd": folder, "env": environment() | {"PATH": path}}

    def put(self, text: str) -> str:
        for old, new in self.puts.items():
            text = text.replace(old, new)
        return text

    def at(self, served: Engine) -> None:
        """What is said of the ports of the page means this engine."""
        for port, address in (("5555", served.feed), ("5556", served.events)):
            self.puts[f"tcp://127.0.0.1:{port}"] = address
        self.puts["tcp://127.0.0.1:5557"] = served.control

    def shell(self, line: str, status: int = 0) -> str:
        """A command line to its end; what it says."""
        done = subprocess.run(
            ["/bin/sh", "-c", self.put(line)],
            check=False,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            **self._options,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr and "Warning" not in done.stderr
        return done.stdout

    def save(self, page: Path, name: str) -> Path:
        """A program of the page as a file."""
        file = self.folder / f"{name}.py"
        file.write_text(self.put(program(page, name)))
        return file

    @contextlib.contextmanager
    def beside(self, line: str, *options: str) -> Iterator[subprocess.Popen[str]]:
        """A command line while it runs; for `hrpro watch` from when it watches."""
        words = words_of(self.put(line))
        with running(*words, *options, **self._options) as process:
            if words[0] == "watch":
                assert process.stderr is not None
                assert "watching" in process.stderr.readline()
            yield process
