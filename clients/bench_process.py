"""A feeder of a benchmark as a process of its own: it is told what to do by lines of JSON on stdin,
and answers each on stdout.

    python -m MODULE ADDRESS FEATURES.npy FRAMES_PER_S SNIPPET_FRAMES
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrpro.engine.protocol import NoReplyError
from hrpro.engine.timebase import SnippetClock

# What a feeder does with an order, and answers.
Work = Callable[[Any], Any]


class ToldProcess:
    """The other end of a feeder's process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def begin(self, order: Any) -> None:
        """Returns at once."""
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)

    def finish(self) -> Any:
        """Waits until what was begun is done. Raises NoReplyError where the feeder has failed."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise NoReplyError(f"the feeder of the benchmark left: exit {self._process.wait()}")
        return json.loads(line)


@contextlib.contextmanager
def told_process(
    module: str, address: str, features: Path, clock: SnippetClock
) -> Iterator[ToldProcess]:
    """A process of the module, which calls `work_as_told`; it ends with the block."""
    command = [sys.executable, "-m", module, address, str(features)]
    command += [str(clock.frames_per_s), str(clock.snippet_frames)]
    process = subprocess.Popen(  # noqa: S603 - this very interpreter
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield ToldProcess(process)
    finally:
        process.kill()
        process.communicate()


def work_as_told(feeder: Callable[[str, NDArray[np.float32], SnippetClock], Work]) -> None:
    """In the process: until stdin is closed. ``feeder`` takes an address, a recording (T, D) and
    its clock."""
    address, features, frames_per_s, snippet_frames = sys.argv[1:]
    work = feeder(
        address,
        np.load(features, allow_pickle=False),
        SnippetClock(float(frames_per_s), int(snippet_frames)),
    )
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), flush=True)  # noqa: T201 - for the other process
