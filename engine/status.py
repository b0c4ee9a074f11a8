"""What a StatusReply says; docs/PROTOCOL.md lists the entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from hrpro.engine.feeds import Counters, Feeds

if TYPE_CHECKING:
    from hrpro.engine.pipeline import Pipeline

Entry = dict[str, int | str | bool]


def stream_statuses(pipeline: Pipeline, feeds: Feeds) -> Iterator[Entry]:
    """Each open stream as it is now."""
    for stream in pipeline.streams.values():
        feed = feeds.live.get(stream.stream)
        yield {
            "stream": stream.stream,
            "session": stream.session,
            "bundle_id": stream.bundle_id,
            "next_index": stream.next_index,
            "processed": stream.processed,
            "lag_snippets": stream.lag,
            "lag_ms": round(stream.lag * pipeline.clock.snippet_s * 1000),
            "credit_snippets": max(0, stream.send_until - stream.next_index),
            "open_actions": stream.open_actions,
            "proposals": stream.proposals,
            "events": stream.events,
            "duplicates": stream.duplicates,
            "dropped": stream.dropped,
            "missing": stream.missing,
            "policy": stream.policy,
            "idle": stream.idle,
            "fed_by": feed is not None and feed.reachable,
        }


def all_counters(pipeline: Pipeline, counters: Counters, refused: Mapping[str, int]) -> Entry:
    """What was counted since the start; ``refused`` messages by the code of their Error."""
    return {
        **asdict(counters),
        "snippets_processed": pipeline.snippets_scored,
        "batches": pipeline.batches,
        **{f"refused_{code}": count for code, count in refused.items()},
    }
