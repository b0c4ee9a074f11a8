"""Ask a running engine how it is, or to finish."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import zmq

from hrpro.clients.connection import Connection, Deadline
from hrpro.engine import protocol
from hrpro.engine.protocol import (
    DrainReply,
    DrainRequest,
    Error,
    Message,
    NoReplyError,
    ProtocolError,
    StatusReply,
    StatusRequest,
    StreamError,
)


def request_status(address: str, timeout_s: float = 5.0) -> dict[str, Any]:
    """The engine's StatusReply as a dict; docs/PROTOCOL.md lists its entries.

    Raises NoReplyError when no answer comes in time.
    """
    reply = _ask(address, StatusRequest(), timeout_s)
    if not isinstance(reply, StatusReply):
        raise ProtocolError(f"engine at {address}: expected status_reply, came {reply.TYPE}")
    return asdict(reply)


def request_drain(address: str, timeout_s: float = 60.0) -> None:
    """Ends all streams and stops the engine; returns when everything is published.

    Raises NoReplyError when it takes longer; the engine goes on with it nevertheless.
    """
    reply = _ask(address, DrainRequest(), timeout_s)
    if not isinstance(reply, DrainReply):
        raise ProtocolError(f"engine at {address}: expected drain_reply, came {reply.TYPE}")


def _ask(address: str, request: Message, timeout_s: float) -> StatusReply | DrainReply | Error:
    deadline = Deadline(timeout_s)
    connection = Connection(zmq.DEALER, address, {zmq.LINGER: 0})
    try:
        # Queued until the connection stands, so this needs no second try.
        connection.try_send(protocol.encode(request))
        while not deadline.passed():
            connection.wait(deadline.at_s)
            frames = connection.receive()
            if frames is not None:
                return _reply(frames)
    finally:
        connection.close()
    raise NoReplyError(
        f"engine at {address}: expected an answer to {request.TYPE} within {timeout_s} s, none came"
    )


def _reply(frames: list[bytes]) -> StatusReply | DrainReply | Error:
    reply = protocol.decode_control_reply(frames)
    if isinstance(reply, Error):
        raise StreamError(reply.code, reply.message, reply.next_index)
    return reply
