"""A real Triton Inference Server on loopback, from the nvidia-pytriton wheel, for tests.

The wheel has the Python backend alone, with a stub for each version of Python. `make triton-server`
puts it beside the environment's own packages, without what it wants for an interface that nobody
uses here: that asks for an older numpy.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

# Only bounds how long a failure takes to show.
PATIENCE_S = 60.0
SHARED_MEMORY = Path("/dev/shm")
_LIBRARY = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
_READY = "Started GRPCInferenceService"
_NUMBERS = itertools.count()  # of the servers of this process
_WHEEL = Path(sys.prefix) / "triton-server" / "pytriton"


@dataclass
class TritonServer:
    url: str
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    killed: bool = False

    def kill(self) -> None:
        """As `kill -9` does, with the processes of its models; returns when it is gone."""
        self.killed = True
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)

    def stop(self) -> None:
        """It answers nothing until `go_on`."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


def wheel() -> Path:
    """The installed package; skips the test, saying why, where this Python cannot run it."""
    found = _WHEEL
    if not found.is_dir():
        pytest.skip(f"no Triton server was run: there is none at {found}; make triton-server")
    if not _stub(found).exists():
        pytest.skip(f"no Triton server was run: it has no stub for this Python, {_stub(found)}")
    if not any((folder / _LIBRARY).exists() for folder in _library_folders()):
        pytest.skip(f"no Triton server was run: this Python has no shared library, {_LIBRARY}")
    if not SHARED_MEMORY.is_dir():
        pytest.skip("no Triton server was run: its Python backend needs /dev/shm")
    return found


def _library_folders() -> list[Path]:
    """Where this Python's own library may be: Debian has a folder for each architecture."""
    folder = Path(sysconfig.get_config_var("LIBDIR"))
    return [folder, folder / (sysconfig.get_config_var("MULTIARCH") or "")]


def _stub(found: Path) -> Path:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = found / "tritonserver" / "python_backend_stubs"
    return stubs / version / "triton_python_backend_stub"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def triton_server(
    repository: Path, scratch: Path, models: Sequence[str] = (), port: int | None = None
) -> Iterator[TritonServer]:
    """A server that is ready, with these models; at the end it leaves nothing."""
    region = f"hrpro_test_{os.getpid()}_{next(_NUMBERS)}_"
    port = port or free_port()
    found = wheel()
    process = subprocess.Popen(
        [
            *_executable(found, scratch),
            f"--model-repository={repository}",
            f"--backend-config=python,shm-region-prefix-name={region}",
            "--model-control-mode=explicit",
            "--disable-auto-complete-config",
            "--pinned-memory-pool-byte-size=0",
            "--allow-http=false",
            "--allow-metrics=false",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={port}",
            *(f"--load-model={model}" for model in models),
        ],
        start_new_session=True,
        env=_environment(found),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with _reading(process, f"127.0.0.1:{port}") as server:
        yield server
    leftovers = [path.name for path in SHARED_MEMORY.glob(f"{region}*")]
    for name in leftovers:
        (SHARED_MEMORY / name).unlink()
    assert leftovers == [] or server.killed


def _executable(found: Path, scratch: Path) -> list[str]:
    """The server with its backend, put together in ``scratch``."""
    backends = scratch / "backends"
    shutil.copytree(found / "tritonserver" / "backends", backends, dirs_exist_ok=True)
    stub = backends / "python" / "triton_python_backend_stub"
    server = scratch / "tritonserver"
    shutil.copy(_stub(found), stub)
    shutil.copy(found / "tritonserver" / "bin" / "tritonserver", server)
    for each in (stub, server):  # a wheel's files need not be executable
        each.chmod(0o755)
    return [str(server), f"--backend-directory={backends}"]


@contextlib.contextmanager
def _reading(process: subprocess.Popen[str], url: str) -> Iterator[TritonServer]:
    """From when it takes requests until it is gone."""
    server, ready = TritonServer(url, process), _Ready()
    assert process.stderr is not None
    reader = threading.Thread(target=_read, args=(process.stderr, server.log, ready))
    reader.start()
    try:
        assert ready.wait(PATIENCE_S) and ready.is_ready, "".join(server.log)
        yield server
        if not server.killed:
            process.terminate()
            assert process.wait(PATIENCE_S) == 0, "".join(server.log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(PATIENCE_S)
        reader.join(PATIENCE_S)
        process.stderr.close()


class _Ready(threading.Event):
    """Set when the server takes requests, or when it is gone."""

    is_ready = False


def _read(stream: IO[str], log: list[str], ready: _Ready) -> None:
    """A pipe that nobody empties would stop the server."""
    for line in stream:
        log.append(line)
        if _READY in line:
            ready.is_ready = True
            ready.set()
    ready.set()


def _environment(found: Path) -> dict[str, str]:
    """The stub is linked to this Python's library, and finds packages by the first in PATH."""
    libraries = [*_library_folders(), found.parent / "nvidia_pytriton.libs"]
    folders = [Path(sys.executable).parent, os.environ.get("PATH", os.defpath)]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "PATH": os.pathsep.join(map(str, folders)),
    }
