"""What the tests of the command line share: commands as processes, engines among them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.messages import ActionEvent, FinalProposal, Publication, StreamNotice
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.serve import Addresses, load_engine_config, new_deployment
from hrpro.export.bundle import read_bundle

Floats = NDArray[np.float32]

HRPRO = (sys.executable, "-m", "hrpro.clients.cli")
ANY_PORT = "tcp://127.0.0.1:*"
ANYWHERE = Addresses(ANY_PORT, ANY_PORT, ANY_PORT)
# Far more than any step of a test takes; it only bounds how long a failure takes to show.
PATIENCE_S = 300.0
MESSAGES: Mapping[str, type[Publication]] = {
    kind.TYPE: kind for kind in (ActionEvent, FinalProposal, StreamNotice)
}


def environment() -> dict[str, str]:
    """One thread, lines that are long enough for any path, and no colours."""
    inherited = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    return {**inherited, "OMP_NUM_THREADS": "1", "COLUMNS": "500", "NO_COLOR": "1"}


def hrpro(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """A command that runs to its end; whatever it says, it is no traceback and no warning."""
    said = subprocess.run(
        [*HRPRO, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=environment(),
    )
    assert said.returncode == status, said.stdout + said.stderr
    assert "Traceback" not in said.stderr
    assert "Warning" not in said.stderr
    return said


def hrpro_json(*arguments: object) -> dict[str, Any]:
    """The one JSON object that a command prints on stdout."""
    stdout = hrpro(*arguments, "--json").stdout
    assert len(stdout.splitlines()) == 1
    return json.loads(stdout)


def refusal(*arguments: object) -> str:
    """The one line on stderr of a command that refuses."""
    said = hrpro(*arguments, status=1)
    assert said.stdout == ""
    return one_line(said.stderr)


def one_line(stderr: str) -> str:
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("hrpro: ")
    return lines[0].removeprefix("hrpro: ")


def command_lines(document: Path, section: str = "") -> list[str]:
    """The `hrpro` command lines of a document's indented blocks, each in one line."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)  # what commands say
    if section:
        text = re.split(rf"^## {re.escape(section)}\n", text, flags=re.MULTILINE)[1]
        text = text.split("\n## ")[0]
    indented = (line.strip() for line in text.splitlines() if line.startswith("    "))
    return [line for line in indented if line.startswith("hrpro ")]


def words_of(line: str) -> list[str]:
    """A command line's words behind `hrpro`, as a shell hands them over."""
    words = shlex.split(line, comments=True)[1:]
    return words[: words.index(">")] if ">" in words else words


def program(document: Path, name: str) -> str:
    """The python program that a document marks with a name."""
    pattern = rf"<!-- example: {name} -->\n```python\n(.*?)```\n"
    (found,) = re.findall(pattern, document.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


@dataclass(frozen=True)
class Engine:
    process: subprocess.Popen[str]
    addresses: Addresses
    metrics: str = ""
    said: list[str] = field(default_factory=list)  # on stderr, once it has left

    @property
    def feed(self) -> str:
        return self.addresses.feed

    @property
    def events(self) -> str:
        return self.addresses.events

    @property
    def control(self) -> str:
        return self.addresses.control

    def kill(self) -> None:
        """As `kill -9` does; returns when it is gone."""
        self.process.kill()
        self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def running(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command while it runs; killed if it is still there at the end."""
    command = [*HRPRO, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **{"env": environment(), **pipes, **options})
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=PATIENCE_S)


@contextlib.contextmanager
def engine(
    bundle: Path,
    *options: object,
    addresses: Addresses = ANYWHERE,
    quiet: bool = True,
    state: object = "none",
) -> Iterator[Engine]:
    """An engine as a process; leaves, unless it was killed, in peace and, if quiet, silently."""
    sides: list[object] = [p for side, at in vars(addresses).items() for p in (f"--{side}", at)]
    sides += ["--state", state]
    with running("serve", bundle, "--json", *sides, "--set", "threads=1", *options) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        ready = json.loads(line)
        assert ready["state"] == "READY"
        bound = Addresses(*(ready[side] for side in vars(addresses)))
        served = Engine(process, bound, ready.get("metrics", ""))
        yield served
        process.terminate()
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
        served.said.extend(stderr.splitlines())
        assert stdout == ""
        assert not (quiet and stderr), stderr
        assert "Traceback" not in stderr
        assert process.returncode in (0, -9)


class Screen:
    """What a program writes to a terminal."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self.text = ""

    def shows(self, wanted: str) -> bool:
        """Whether it has been on the screen; waits a moment for more."""
        while select.select([self._terminal], [], [], 0.05)[0]:
            try:
                data = os.read(self._terminal, 65536)
            except OSError:  # the program has left its terminal
                break
            if not data:
                break
            self.text += data.decode(errors="replace")
        return wanted in self.text


def wait_for(happened: Callable[[], bool]) -> None:
    """Asks until it has happened; `happened` should do or wait for something itself."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline_s, "it did not happen"


def published_in_process(
    bundle: Path, recordings: Mapping[str, Floats], *assignments: str
) -> dict[str, list[Publication]]:
    """What the pipeline publishes of each recording, without an engine around it."""
    loaded = read_bundle(bundle)
    config = load_engine_config(loaded, None, ["threads=1", *assignments])
    pipeline = Pipeline(new_deployment(loaded, config))
    published: dict[str, list[Publication]] = {}
    for name, features in recordings.items():
        stream = pipeline.open(name, 0)
        published[name] = []
        while (at := stream.next_index) < len(features):
            pipeline.append(name, at, features[at : stream.send_until])
            published[name] += pipeline.step()
        pipeline.end(name, len(features))
        while pipeline.pending():
            published[name] += pipeline.step()
    return published


def read_json_lines(file: Path) -> list[Publication]:
    """The messages in a file of `hrpro watch --jsonl`; a message checks its fields itself."""
    # The last line may be on its way.
    whole_lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    lines = [json.loads(line) for line in whole_lines]
    assert all(len(line.pop("instance")) == 16 for line in lines)
    return [MESSAGES[line.pop("type")](**line) for line in lines]


# ---- the run and the bundle that the tests share (cli_fixtures) ----------------------------------

# A small model and few steps, but enough for actions to start and end.
TRAINING = {
    "threads": 1,
    "model": {"width": 16, "attention_past": 8},
    "snippet_stage": {"steps": 80, "batch_size": 4, "learning_rate": 0.01, "average_decay": 0.8},
    "instance_stage": {"steps": 40, "batch_size": 32, "average_decay": 0.8},
}


@dataclass(frozen=True)
class Trained:
    data: Path
    run: Path
    bundle: Path
    summary: dict[str, Any]
    exported: dict[str, Any]

    def recording(self, subset: str, name: str) -> Floats:
        return np.load(self.data / "features" / subset / f"{name}.npy")

    @property
    def recordings(self) -> dict[str, Floats]:
        """The test split."""
        return {name: self.recording("test", name) for name in ("seq5", "seq6")}


def assignments(settings: dict[str, Any]) -> list[str]:
    """Nested settings as `--set` options."""
    options = []
    for name, value in settings.items():
        group = value.items() if isinstance(value, dict) else [(None, value)]
        for inner, each in group:
            options += ["--set", f"{name}.{inner}={each}" if inner else f"{name}={each}"]
    return options
