"""`hrpro serve --check`: all that would keep an engine from starting, and what it would be like.

Nothing is bound, and nothing is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hrpro.clients.cli_shared import say
from hrpro.engine.config import EngineConfig
from hrpro.engine.event_log import check_folder
from hrpro.engine.footprint import derived
from hrpro.engine.metrics_http import parse_address
from hrpro.engine.serve import Doors, load_engine_config, new_deployment, streams_and_events
from hrpro.engine.settings import load_settings
from hrpro.engine.wire import HrproError
from hrpro.export.bundle import Bundle

T = TypeVar("T")

# A host is a name, an interface, an IPv4 address, an IPv6 one in brackets, or * for all of them.
_TCP = re.compile(r"tcp://(\*|[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.%]+\]):(\*|[0-9]{1,5})")


def check(
    read: Callable[[], Bundle],
    addresses: Mapping[str, str | None],
    doors: Doors,
    metrics: str | None,
    state: Path | None,
    config_file: Path | None,
    assignments: Sequence[str],
) -> tuple[list[str], dict[str, Any]]:
    """What is wrong, a line each; and where nothing is, what `hrpro.engine.footprint` derives.

    ``addresses`` are those of the sides, None where none was given; so is the folder ``state``.
    """
    problems = address_problems(addresses)
    well_formed = {side: at for side, at in addresses.items() if at is not None and _is_address(at)}
    problem = doors.problem(well_formed)
    problems += [] if problem is None else [problem]
    _tried(doors.keyring, problems)
    if metrics is not None:
        _tried(lambda: parse_address(metrics), problems)
    bundle = _tried(read, problems)
    if bundle is not None and state is not None:
        features = streams_and_events(bundle.manifest)
        _tried(lambda: check_folder(state, features), problems)

    def load() -> EngineConfig:
        if bundle is None:
            return load_settings(EngineConfig, config_file, assignments)
        return load_engine_config(bundle, config_file, assignments)

    config = _tried(load, problems)
    if bundle is None or config is None:
        return problems, {}
    figures = _tried(lambda: derived(new_deployment(bundle, config)), problems)
    return problems, {} if problems or figures is None else figures


def show(problems: Sequence[str], figures: Mapping[str, Any]) -> None:
    """For people: the figures, or nothing where something is wrong."""
    if problems:
        return
    say(
        f"bundle      {figures['bundle_id']}, {figures['classes']} classes, "
        f"{figures['feature_dim']} features a snippet of {figures['snippet_s']:g} s"
    )
    say(
        f"window      {figures['window_snippets']} snippets ({figures['window_s']:.2f} s), "
        f"hop {figures['hop_snippets']} ({figures['hop_s']:.2f} s)"
    )
    say(
        f"look-ahead  {figures['lookahead_s']:g} s, of which the model needs "
        f"{figures['model_lookahead_s']:.2f} s"
    )
    say(
        f"memory      {figures['stream_bytes']} bytes a stream ({figures['buffer_bytes']} of "
        f"buffers, {figures['state_bytes']} of its state), "
        f"{figures['max_streams_bytes'] / 1e6:.1f} MB for {figures['max_streams']} streams, "
        f"{figures['batch_bytes'] / 1e6:.1f} MB for a batch"
    )
    call = "window" if figures["inference"] == "window" else "step"
    gflop = figures["hop_gflop"]
    cost = (
        "not known to this bundle"
        if gflop is None
        else (f"{gflop:.3g} GFLOP a {call}, {figures['stream_gflop_per_s']:.3g} GFLOP/s a stream")
    )
    say(f"compute     {figures['inference']}, {cost}")
    say(
        f"measured    {figures['hop_ms']:.3g} ms a {call} here, {figures['batch_ms']:.3g} ms "
        f"{figures['batch_hops']} together: {figures['streams_in_real_time']} streams in real "
        "time, inference alone"
    )
    say("OK")


def as_json(problems: Sequence[str], figures: Mapping[str, Any]) -> str:
    """For programs."""
    return json.dumps({"ok": not problems, "problems": list(problems), **figures})


def address_problems(addresses: Mapping[str, str | None]) -> list[str]:
    """Addresses that no engine could bind, a line each; by side."""
    problems = []
    taken: dict[str, str] = {}
    for side, address in addresses.items():
        if address is None:
            continue
        if not _is_address(address):
            problems.append(
                f"--{side}: expected tcp://HOST:PORT, such as tcp://127.0.0.1:5555, "
                f"or ipc://PATH, got {address}"
            )
        elif address in taken:
            problems.append(f"--{side}: expected its own address, got that of {taken[address]}")
        elif not address.endswith((":*", ":0")):  # those take a free port each
            taken[address] = f"--{side}"
    return problems


def _is_address(address: str) -> bool:
    if address.startswith("ipc://"):
        return len(address) > len("ipc://")
    found = _TCP.fullmatch(address)
    return found is not None and (found[2] == "*" or int(found[2]) <= 65535)


def _tried(step: Callable[[], T], problems: list[str]) -> T | None:
    """What a step gives; what it complains of is put to the problems, a line each."""
    try:
        return step()
    except (HrproError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        # Settings say how many are wrong before they say which.
        problems += lines[1:] if len(lines) > 1 and lines[0].endswith("are wrong:") else lines
        return None
