"""`hrpro feed features`: recorded features, or those that another program is making."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hrpro.clients.cli_shared import (
    JsonFlag,
    KeyFile,
    address_errors,
    progress,
    say,
    speed_factor,
)
from hrpro.engine.protocol import Policy
from hrpro.engine.timebase import SnippetClock
from hrpro.engine.wire import HrproError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hrpro.engine.protocol import Ended

    Feed = Callable[..., dict[str, Ended]]

_STDIN = Path("-")


def features(
    paths: Annotated[
        list[Path],
        typer.Argument(help=".npy files, data folders (test split), or - for stdin."),
    ],
    to: Annotated[str, typer.Option("--to", help="Feed address of the engine.")],
    speed: Annotated[
        str | None,
        typer.Option(help="Of recordings: times the pace of the clock, or max. Default: 1."),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="The files grow: feed rows as they come, until Ctrl-C."),
    ] = False,
    end_after: Annotated[
        float | None,
        typer.Option(metavar="S", help="End when a followed file has not grown for S s.", min=0),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(help="D of raw float32 rows without a .npy header (--follow, stdin).", min=1),
    ] = None,
    stream: Annotated[
        str | None, typer.Option(help="Name of the one stream. Default: that of its file.")
    ] = None,
    frames_per_s: Annotated[
        float, typer.Option(help="Frame rate of the snippet clock.")
    ] = SnippetClock.frames_per_s,
    snippet_frames: Annotated[
        int, typer.Option(help="Frames in a snippet.")
    ] = SnippetClock.snippet_frames,
    timeout: Annotated[
        float, typer.Option(help="Seconds without progress after which to give up.", min=0)
    ] = 60.0,
    policy: Annotated[
        Policy, typer.Option(help="What becomes of snippets that the engine has no room for.")
    ] = "wait",
    key: KeyFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Feed features as live streams, named after their files, and end them: recordings at the pace
    of their clock, or, with --follow or from stdin, what another program makes as it comes."""
    try:
        clock = SnippetClock(frames_per_s, snippet_frames)
    except ValueError as error:
        raise HrproError(str(error)) from None
    _check(paths, speed, follow, end_after, dim, stream)
    if follow or _STDIN in paths:
        from hrpro.clients.feeding_live import feed_live

        total = None
        feed: Feed = partial(feed_live, paths, stream=stream, dim=dim, end_after_s=end_after)
    else:
        feed, total = _feed_of_recordings(paths, stream, speed_factor(speed or "1"))
    fed = 0

    def advance_by(snippets: int) -> None:
        nonlocal fed
        fed += snippets
        advance(snippets)

    with address_errors(to), progress(total, "snippets") as advance:
        ended = feed(
            address=to,
            clock=clock,
            timeout_s=timeout,
            policy=policy,
            progress=advance_by,
            key=key,
        )
    if as_json:
        streams = {name: said.next_index for name, said in ended.items()}
        print(json.dumps({"streams": streams, "snippets": fed}))
        return
    for name, said in ended.items():
        say(f"{name}: {said.next_index} snippets, {said.proposals} proposals, {said.events} events")


def _feed_of_recordings(
    paths: Sequence[Path], stream: str | None, factor: float | None
) -> tuple[Feed, int]:
    """How to feed them, and how many snippets they have."""
    from hrpro.clients.feeding import feed_sources, read_sources

    sources = read_sources(paths)
    if stream is not None:
        if len(sources) != 1:
            raise typer.BadParameter(
                f"expected one recording, came {len(sources)}", param_hint="--stream"
            )
        sources = [replace(sources[0], stream=stream)]
    chunk_snippets = 8 if factor is None else 1
    feed = partial(feed_sources, sources, speed=factor, chunk_snippets=chunk_snippets)
    return feed, sum(len(source.features) for source in sources)


def _check(
    paths: Sequence[Path],
    speed: str | None,
    follow: bool,
    end_after: float | None,
    dim: int | None,
    stream: str | None,
) -> None:
    """What does not go together."""
    is_stdin = _STDIN in paths
    wrong = [
        (is_stdin and len(paths) > 1, "PATHS", "expected - alone"),
        (is_stdin and follow, "--follow", "expected files; stdin ends by itself"),
        (is_stdin and stream is None, "--stream", "expected the name of the stream of stdin"),
        (stream is not None and len(paths) > 1, "--stream", "expected one file"),
        (
            (is_stdin or follow) and speed is not None,
            "--speed",
            "expected recordings; another program sets the pace",
        ),
        (end_after is not None and not follow, "--end-after", "expected it with --follow"),
        (dim is not None and not (is_stdin or follow), "--dim", "expected --follow or stdin"),
    ]
    for is_wrong, option, message in wrong:
        if is_wrong:
            raise typer.BadParameter(message, param_hint=option)
