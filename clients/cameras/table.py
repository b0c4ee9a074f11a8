"""How cameras are, for people: a table that is kept up to date."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from hrpro.clients.cameras.camera import CameraStatus

_STYLES = {"reading": "green", "ended": "dim", "opening": "yellow", "away": "yellow"}


def camera_table(cameras: Sequence[CameraStatus]) -> Table:
    """A row for each camera."""
    table = Table(box=None, pad_edge=False)
    for name in ("stream", "state"):
        table.add_column(name)
    for name in ("frames/s", "sent", "skipped", "missing", "lag", "behind", "reconnects"):
        table.add_column(name, justify="right")
    table.add_column("")
    for each in cameras:
        style = _STYLES.get(each.state, "red")
        table.add_row(
            each.stream,
            Text(each.state, style),
            f"{each.frames_per_s:.1f}",
            str(each.sent),
            str(each.skipped),
            str(each.missing),
            str(each.lag),
            f"{each.behind_s:.1f} s",
            str(each.reconnects),
            Text(each.reason),
        )
    return table
