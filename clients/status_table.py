"""The answer to a status request, for people: a table that is kept up to date, or lines."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hrpro.clients.cli_shared import aligned
from hrpro.clients.connection import Key
from hrpro.clients.control import request_status
from hrpro.engine.protocol import NoReplyError

Entry = Mapping[str, Any]
# (engine's run, session of the stream) -> next snippet, when the engine was asked last
Positions = dict[tuple[str, str, int], int]

_REFUSED = "refused_"
_NUMBERS = ("lag", "credit", "open", "drops", "events", "finals")


def show_status(
    control: str, console: Console, interval_s: float, timeout_s: float, key: Key = None
) -> None:
    """Ask again and again, until interrupted; an engine that does not answer may come back."""
    reply: Entry | None = None
    rates = Rates()
    answered_s = time.monotonic()
    with Live(Text(f"asking {control}"), console=console, auto_refresh=False) as live:
        while True:
            try:
                reply = request_status(control, timeout_s, key)
            except NoReplyError:
                live.update(_silent(control, time.monotonic() - answered_s, reply), refresh=True)
            else:
                answered_s = time.monotonic()
                rates.take(reply, answered_s)
                live.update(status_table(reply, rates), refresh=True)
            time.sleep(interval_s)


class Rates:
    """Snippets a second of each stream, from two answers."""

    def __init__(self) -> None:
        self._before: Positions = {}
        self._rates: dict[tuple[str, str, int], float] = {}
        self._at_s = 0.0

    def take(self, reply: Entry, at_s: float) -> None:
        """An answer, and when it came."""
        now = {_key(reply, each): each["next_index"] for each in reply["streams"]}
        self._rates = {
            key: (index - self._before[key]) / (at_s - self._at_s)
            for key, index in now.items()
            if key in self._before
        }
        self._before, self._at_s = now, at_s

    def of(self, reply: Entry, stream: Entry) -> float | None:
        """None if the session was not there before."""
        return self._rates.get(_key(reply, stream))


def _key(reply: Entry, stream: Entry) -> tuple[str, str, int]:
    return reply["instance"], stream["stream"], stream["session"]


def status_table(reply: Entry, rates: Rates | None = None) -> Group:
    """The engine in some lines, then its streams, those that lag first."""
    table = Table(padding=0)  # a rate and all else in 80 columns
    for name in ("stream", "snippets", *(["rate"] if rates else []), *_NUMBERS, "feeder"):
        left = name in {"stream", "feeder"}
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for each in _by_lag(reply):
        rate = rates.of(reply, each) if rates else None
        stream, snippets, *others = _cells(each)
        shown = [] if rates is None else ["" if rate is None else f"{rate:.1f}/s"]
        table.add_row(stream, snippets, *shown, *others, style=_style(each))
    return Group(*map(Text, _summary(reply)), table)


def status_lines(reply: Entry) -> list[str]:
    """The same where there is no terminal, of any width."""
    names = ("stream", "snippets", *_NUMBERS, "feeder")
    return [*_summary(reply), "", *aligned([names, *map(_cells, _by_lag(reply))])]


def _by_lag(reply: Entry) -> list[Entry]:
    return sorted(reply["streams"], key=lambda each: (-each["lag_snippets"], each["stream"]))


def _cells(stream: Entry) -> list[str]:
    names = "credit_snippets", "open_actions", "dropped", "events", "proposals"
    numbers = [str(stream[name]) for name in names]
    return [stream["stream"], str(stream["next_index"]), _lag(stream), *numbers, _feeder(stream)]


def stream_lines(streams: Sequence[Entry]) -> list[str]:
    """A heading and a line for each stream."""
    names = [
        *("session", "next_index", "processed", "lag_snippets", "open_actions"),
        *("dropped", "missing", "bundle_id"),
    ]
    rows = [(each["stream"], *(str(each[name]) for name in names)) for each in streams]
    return aligned([("stream", *names), *rows])


def _summary(reply: Entry) -> list[str]:
    streams, counters = reply["streams"], reply["counters"]
    worst = max(streams, key=lambda each: each["lag_snippets"], default=None)
    dropped = counters["snippets_dropped_oldest"] + counters["snippets_dropped_newest"]
    refused = {
        name.removeprefix(_REFUSED): count
        for name, count in sorted(counters.items())
        if name.startswith(_REFUSED)
    }
    reasons = f" ({', '.join(f'{code} {count}' for code, count in refused.items())})"
    bundles = [reply["bundle_id"]]
    bundles += [
        f"{name} {reply[f'{name}_bundle_id']}"
        for name in ("canary", "previous")
        if reply[f"{name}_bundle_id"] is not None
    ]
    return [
        f"state     {reply['state']}"
        + (f": {reply['waits_for']}" if reply.get("waits_for") else ""),
        f"bundle    {', '.join(bundles)}"
        + (f"; provider {reply['provider']}" if reply.get("provider") else ""),
        f"streams   {len(streams)} open, {counters['ended_streams']} ended, "
        f"worst lag {_lag(worst) if worst else 'none'}",
        f"snippets  {counters['snippets_in']} in, {counters['snippets_processed']} processed, "
        f"{sum(each['lag_snippets'] for each in streams)} waiting",
        f"actions   {sum(each['open_actions'] for each in streams)} open, "
        f"{counters['events']} events, {counters['proposals']} final proposals",
        f"refused   {sum(refused.values())} messages{reasons if refused else ''}; "
        f"{counters['snippets_duplicate']} duplicate snippets",
        f"lost      {dropped} snippets dropped, {counters['snippets_missing']} missing in "
        f"{counters['gaps']} gaps",
        f"deploys   {counters['deploys']}, {counters['deploys_refused']} refused",
    ]


def _lag(stream: Entry) -> str:
    return f"{stream['lag_snippets']} ({stream['lag_ms'] / 1000:.1f} s)"


def _feeder(stream: Entry) -> str:
    if not stream["fed_by"]:
        return "gone"
    return "idle" if stream["idle"] else ""


def _style(stream: Entry) -> str:
    if _feeder(stream):
        return "dim"
    return "yellow" if stream["credit_snippets"] == 0 else ""


def _silent(control: str, silent_s: float, reply: Entry | None) -> Group:
    said = Text(f"no answer from {control} for {silent_s:.0f} s", style="bold red")
    if reply is None:
        return Group(said)
    return Group(said, Text("it was, when it answered last:"), status_table(reply))
