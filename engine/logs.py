"""Log lines: one for each fact, for people or as JSON, and never more than a reader can take.

A line for people is its message. A line of JSON has `time`, `level` and `message`, and what the
caller gives as `extra=fact(...)`: `event`, what happened, and its `stream`, `code` and the like.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

LINES_PER_S = 10

LogFormat = Literal["human", "json"]
LogLevel = Literal["info", "warning"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def fact(event: str, **fields: Any) -> dict[str, Any]:
    """What happened, for the `extra` of a log call; fields that are None are left out."""
    return {"fact": {"event": event} | {n: each for n, each in fields.items() if each is not None}}


def configure_logs(log_format: LogFormat, level: LogLevel | None = None) -> None:
    """The form of all lines, and from which level on the engine's are written.

    The default is warning for people, who see the streams elsewhere, and info for JSON.
    """
    formatter = JsonFormatter() if log_format == "json" else HumanFormatter()
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
    level = level or ("info" if log_format == "json" else "warning")
    logging.getLogger("hrpro.engine").setLevel(level.upper())


class HumanFormatter(logging.Formatter):
    """The message in one line, whatever a peer has made it contain."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Called by `format`, which appends a traceback, if there is one."""
        return "hrpro: " + _CONTROL.sub(" ", record.message)


class JsonFormatter(logging.Formatter):
    """An object in one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time is UTC."""
        at = datetime.fromtimestamp(record.created, UTC)
        said = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fact", {}),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said)


@dataclass
class _Second:
    began_s: float
    level: int
    lines: int = 0


class PeerLog:
    """For what peers bring about: of each event at most LINES_PER_S a second, then how many not.

    `now_s` is a clock that never goes back.
    """

    def __init__(self, log: logging.Logger, now_s: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._now_s = now_s
        self._seconds: dict[str, _Second] = {}

    def say(self, level: int, event: str, message: str, **fields: Any) -> None:
        """A line, unless there were too many."""
        if not self._log.isEnabledFor(level):
            return
        self.say_left_out()
        second = self._seconds.setdefault(event, _Second(self._now_s(), level))
        second.lines += 1
        if second.lines <= LINES_PER_S:
            self._log.log(level, "%s", message, extra=fact(event, **fields))

    def due_in_s(self) -> float | None:
        """When `say_left_out` has something to say, if it has."""
        due_s = [each.began_s + 1 for each in self._seconds.values() if each.lines > LINES_PER_S]
        return max(0.0, min(due_s) - self._now_s()) if due_s else None

    def say_left_out(self, now: bool = False) -> None:
        """How many lines were left out in the seconds that are over, or until now."""
        for event, second in list(self._seconds.items()):
            if now or self._now_s() >= second.began_s + 1:
                del self._seconds[event]
                if second.lines > LINES_PER_S:
                    count = second.lines - LINES_PER_S
                    left_out = fact("left_out", of=event, count=count)
                    text = f"{event}: {count} lines more left out"
                    self._log.log(second.level, "%s", text, extra=left_out)
