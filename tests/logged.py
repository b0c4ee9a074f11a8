"""What the tests of the event log share: publications to log, and what is in a log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hrpro.engine.event_reader import EventReader, reading
from hrpro.engine.messages import ActionEvent, EventKind, Publication, StreamNotice
from hrpro.engine.protocol import decode_logged


def notice(stream: str = "cam", kind: Any = "gap", session: int = 1) -> StreamNotice:
    return StreamNotice(stream, session, 0, kind, 0, 9, 0, 0)


def action(
    kind: EventKind, number: int = 0, stream: str = "cam", session: int = 1, revision: int = 0
) -> ActionEvent:
    return ActionEvent(
        stream, session, 0, number, kind, revision, "high", 1.0, None, 0.5, 3, 2.56, "tiny"
    )


def everything(log: EventReader, stream: str | None = None, since: int = 0) -> list[Publication]:
    """All that is in a log behind a number, page by page."""
    found: list[Publication] = []
    while True:
        page, since = log.read(since, stream)
        found += [decode_logged(each.header) for each in page]
        assert [each.number for each in page] == [each.number for each in found[-len(page) :]][
            : len(page)
        ]
        if since >= log.newest:
            return found


def numbers(publications: Sequence[Publication | None]) -> list[int | None]:
    return [None if each is None else each.number for each in publications]


def logged_in(folder: Path) -> list[Publication]:
    """All that is in the log of a folder, whether an engine has it or not."""
    with reading(folder) as log:
        return everything(log)
