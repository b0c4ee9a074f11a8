"""What the event log costs a turn of the engine's loop, and what a page of it costs.

python benchmarks/event_log.py [--folder FOLDER]     on the disk of FOLDER; default: of /tmp
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import get_args

from hrpro.engine import protocol
from hrpro.engine.config import Fsync, LogConfig
from hrpro.engine.event_log import EventLog
from hrpro.engine.messages import ActionEvent

_KINDS = ("start", "update", "update", "end")


def _event(turn: int, stream: int) -> ActionEvent:
    kind = _KINDS[turn % 4]
    end_s = 3.2 if kind == "end" else None
    return ActionEvent(
        f"cam{stream}", 1, turn, turn // 4, kind, turn % 4, "Long Jump", 1.28, end_s, 0.75, turn,
        3.84, "thumos-1f3a",
    )  # fmt: skip


def _commits_us(log: EventLog, publications: int, turns: int) -> list[float]:
    taken_us = []
    for turn in range(turns):
        events = [_event(turn, stream) for stream in range(publications)]
        began_s = time.perf_counter()
        log.commit(events)
        taken_us.append((time.perf_counter() - began_s) * 1e6)
    return taken_us


def main() -> None:
    """Print a line for each policy and number of publications."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    folder = parser.parse_args().folder
    event = _event(0, 0)
    began_s = time.perf_counter()
    for _ in range(10_000):
        protocol.encode(event)
    print(f"encode: {(time.perf_counter() - began_s) * 100:.1f} us a publication, in a log or not")
    for fsync in get_args(Fsync):
        for publications in (1, 10, 100):
            turns = 20_000 // publications if fsync == "checkpoint" else 200
            with (
                tempfile.TemporaryDirectory(dir=folder) as made,
                EventLog(Path(made), LogConfig(fsync=fsync)) as log,
            ):
                us = _commits_us(log, publications, turns)
                began_s = time.perf_counter()
                log.read(0)
                page_us = (time.perf_counter() - began_s) * 1e6
            print(
                f"fsync {fsync}, {publications} a turn: mean {statistics.mean(us):.0f} us, "
                f"p50 {statistics.median(us):.0f}, p99 {statistics.quantiles(us, n=100)[98]:.0f}, "
                f"max {max(us):.0f}; a page {page_us:.0f} us"
            )


if __name__ == "__main__":
    main()
