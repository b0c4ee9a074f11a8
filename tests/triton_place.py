"""Where a Triton server is for a test: its repository, its address, and its shared memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from driving import PATIENCE_S, engine_config
from triton_server import SHARED_MEMORY, TritonServer, free_port, triton_server
from tritonclient import grpc

from hrpro.engine.config import EngineConfig, SharedMemory, TritonConfig
from hrpro.export.bundle import Bundle
from hrpro.export.triton import write_repository

MODEL = "hrpro-snippet"


@dataclass
class Place:
    """A repository, and the address of the server that serves it whenever there is one."""

    repository: Path
    scratch: Path
    port: int = field(default_factory=free_port)
    server: TritonServer | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def served(self) -> Iterator[TritonServer]:
        with triton_server(self.repository, self.scratch, [MODEL], self.port) as server:
            self.server = server
            yield server
        sys.stderr.write("".join(server.log))  # pytest shows it beside a failure

    def config(
        self,
        bundle: Bundle,
        deadline_s: float = 10.0,
        shared_memory: SharedMemory = "auto",
        **options: int,
    ) -> EngineConfig:
        triton = TritonConfig(
            address=self.address, deadline_s=deadline_s, shared_memory=shared_memory
        )
        config = engine_config(bundle.manifest, backlog=64, **options)
        return config.model_copy(update={"backend": "triton", "triton": triton})

    def write(self, bundle: Bundle, version: int) -> None:
        write_repository(bundle, self.repository, "hrpro", "python", version, "cpu", 1)

    def load(self) -> None:
        """Let the server read the repository again."""
        with contextlib.closing(grpc.InferenceServerClient(self.address)) as client:
            client.load_model(MODEL, client_timeout=PATIENCE_S)

    def regions(self) -> set[str]:
        """What the server has as shared memory of engines."""
        with contextlib.closing(grpc.InferenceServerClient(self.address)) as client:
            return set(client.get_system_shared_memory_status(client_timeout=PATIENCE_S).regions)

    def files(self) -> set[str]:
        """What engines of this address have in shared memory."""
        return {path.name for path in SHARED_MEMORY.glob(f"hrpro-triton-{self.port}-*")}

    def slow_down(self, pause_s: float) -> None:
        """Before it is served: each batch takes so much longer."""
        code = self.repository / MODEL / "1" / "model.py"
        text = code.read_text()
        execute = '    def execute(self, requests: list[Any]) -> list[Any]:\n        """'
        assert execute in text
        slow = f"import time\n_pause = lambda: time.sleep({pause_s})\n"
        text = text.replace(
            "        tensors = [[_input", "        _pause()\n        tensors = [[_input", 1
        )
        code.write_text(text.replace("\nArrays = ", f"\n{slow}\nArrays = ", 1))


def new_place(bundle: Bundle, folder: Path) -> Place:
    """In an empty folder; version 1 has the bundle."""
    made = Place(folder / "repository", folder / "scratch")
    made.repository.mkdir()
    made.scratch.mkdir()
    made.write(bundle, 1)
    return made
