"""Ask a running engine how it is, to go on with another bundle, or to finish.

`key` is the key of an operator, or its file, for an engine that has keys.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import zmq

from hrpro.clients.connection import Connection, Deadline, Key
from hrpro.engine import protocol
from hrpro.engine.protocol import (
    LATER_CODES,
    MAX_REQUEST_HEADER_BYTES,
    ControlReply,
    ControlRequest,
    DeployReply,
    DeployRequest,
    DrainReply,
    DrainRequest,
    Error,
    NoReplyError,
    ProtocolError,
    RollBackRequest,
    StatusReply,
    StatusRequest,
    StreamError,
)

# When a request that was refused as one too many is made again.
_LATER_S = 0.2

Reply = TypeVar("Reply", bound=ControlReply)


def request_status(address: str, timeout_s: float = 5.0, key: Key = None) -> dict[str, Any]:
    """The engine's StatusReply as a dict; docs/PROTOCOL.md lists its entries.

    Raises NoReplyError when no answer comes in time.
    """
    return asdict(_ask(address, StatusRequest(), StatusReply, timeout_s, key))


def request_deploy(
    address: str,
    folder: Path,
    canary_streams: Collection[str] = (),
    timeout_s: float = 60.0,
    key: Key = None,
) -> DeployReply:
    """Lets the engine load the bundle in a folder of its machine and work with it.

    For all streams, or for those that are named. Raises StreamError with the engine's reason when
    it refuses, and NoReplyError when it takes longer; the engine goes on with it nevertheless.
    """
    request = DeployRequest(str(folder), tuple(canary_streams))
    return _ask(address, request, DeployReply, timeout_s, key)


def request_roll_back(address: str, timeout_s: float = 5.0, key: Key = None) -> DeployReply:
    """Ends a canary, or else lets the engine go back to the bundle before. Raises as a deploy."""
    return _ask(address, RollBackRequest(), DeployReply, timeout_s, key)


def request_drain(address: str, timeout_s: float = 60.0, key: Key = None) -> None:
    """Ends all streams and stops the engine; returns when everything is published.

    Raises NoReplyError when it takes longer; the engine goes on with it nevertheless.
    """
    _ask(address, DrainRequest(), DrainReply, timeout_s, key)


def _ask(
    address: str, request: ControlRequest, expected: type[Reply], timeout_s: float, key: Key
) -> Reply:
    frames = protocol.encode(request)
    if len(frames[0]) > MAX_REQUEST_HEADER_BYTES:  # the engine would drop the connection
        raise ProtocolError(
            f"{request.TYPE}: expected at most {MAX_REQUEST_HEADER_BYTES} bytes, got "
            f"{len(frames[0])}; fewer streams fit"
        )
    deadline = Deadline(timeout_s)
    connection = Connection(zmq.DEALER, address, {zmq.LINGER: 0}, key)
    try:
        # Queued until the connection stands, so this needs no second try.
        connection.try_send(frames)
        while not deadline.passed():
            connection.wait(deadline.at_s)
            answer = connection.receive()
            if answer is None:
                continue
            try:
                return _reply(address, answer, expected)
            except StreamError as error:
                if error.code not in LATER_CODES:
                    raise
            time.sleep(min(_LATER_S, max(0.0, deadline.at_s - time.monotonic())))
            connection.try_send(frames)
    finally:
        connection.close()
    raise NoReplyError(
        f"engine at {address}: expected an answer to {request.TYPE} within {timeout_s} s, none came"
        f"{connection.doubt}"
    )


def _reply(address: str, frames: list[bytes], expected: type[Reply]) -> Reply:
    reply = protocol.decode_control_reply(frames)
    if isinstance(reply, Error):
        raise StreamError(reply.code, reply.message, reply.next_index)
    if not isinstance(reply, expected):
        raise ProtocolError(f"engine at {address}: expected {expected.TYPE}, came {reply.TYPE}")
    return reply
