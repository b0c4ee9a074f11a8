"""What users of HR-Pro Stream import: feed snippets, watch actions, control the engine.

Needs numpy, pyzmq and msgpack alone.
"""

from hrpro.clients.control import request_drain, request_status
from hrpro.clients.feeder import AsyncFeatureFeeder, FeatureFeeder
from hrpro.clients.score_subscriber import AsyncScoreSubscriber, ScoreSubscriber
from hrpro.clients.subscriber import AsyncEventSubscriber, EventSubscriber, ReplayError
from hrpro.engine.client_key import ClientKey, KeyFileError, read_client_key
from hrpro.engine.protocol import (
    ActionEvent,
    Ended,
    FinalProposal,
    HrproError,
    NoReplyError,
    ProtocolError,
    SnippetScores,
    StreamError,
    StreamNotice,
    Welcome,
)
from hrpro.engine.timebase import SnippetClock

__all__ = [
    "ActionEvent",
    "AsyncEventSubscriber",
    "AsyncFeatureFeeder",
    "AsyncScoreSubscriber",
    "ClientKey",
    "Ended",
    "EventSubscriber",
    "FeatureFeeder",
    "FinalProposal",
    "HrproError",
    "KeyFileError",
    "NoReplyError",
    "ProtocolError",
    "ReplayError",
    "ScoreSubscriber",
    "SnippetClock",
    "SnippetScores",
    "StreamError",
    "StreamNotice",
    "Welcome",
    "read_client_key",
    "request_drain",
    "request_status",
]
