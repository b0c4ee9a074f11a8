"""A drain that cannot be completed is given up in time, and tells what is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from commands import PATIENCE_S, environment
from serving import ANY_PORT, RawPeer, TinyPipeline, chunk, hello, no_bundle

from hrpro.clients import FeatureFeeder
from hrpro.clients.control import request_drain, request_status
from hrpro.engine.deployer import Deployer
from hrpro.engine.protocol import StreamError
from hrpro.engine.server import DrainError, Server

LOST = (
    r"the drain was given up after 0\.2 s \(drain_s\): 1 streams are not finished, "
    r"8 of their snippets not processed"
)


def test_who_asked_for_a_drain_is_told_what_is_lost() -> None:
    pipeline = TinyPipeline()
    raised: list[DrainError] = []
    server = Server(pipeline, ANY_PORT, ANY_PORT, ANY_PORT, Deployer(no_bundle), drain_s=0.2)

    def run() -> None:
        try:
            server.run()
        except DrainError as error:
            raised.append(error)

    with server:
        thread = threading.Thread(target=run)
        thread.start()
        with RawPeer(server.feed_address) as peer:
            peer.ask(hello())
            pipeline.paused = True  # as with a backend that is away
            peer.ask(chunk(0, 8))
            with pytest.raises(StreamError, match=LOST) as told:
                request_drain(server.control_address, PATIENCE_S)
        thread.join(PATIENCE_S)
    assert told.value.code == "draining"
    assert [str(error) for error in raised] == [str(told.value)]


# An engine without a model, which computes nothing.
_STUCK_ENGINE = """
from types import SimpleNamespace
from serving import ANY_PORT, TinyPipeline
from hrpro.clients import cli
from hrpro.engine import serve

pipeline = TinyPipeline()
pipeline.paused = True
serve.new_deployment = lambda *_: SimpleNamespace(backend=None)
serve.Pipeline = lambda _: pipeline
cli.app = lambda: serve.serve(
    None,
    lambda _: (None, SimpleNamespace(drain_s=0.2, limits=None)),
    serve.Addresses(ANY_PORT, ANY_PORT, ANY_PORT),
    lambda bound, _: print(bound.feed, bound.control, flush=True),
)
cli.main()
"""


def test_sigterm_ends_an_engine_that_cannot_finish() -> None:
    path = f"{Path(__file__).parent}:{environment().get('PYTHONPATH', '')}"
    with subprocess.Popen(
        [sys.executable, "-c", _STUCK_ENGINE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), "PYTHONPATH": path},
    ) as process:
        try:
            assert process.stdout is not None
            feed, control = process.stdout.readline().split()
            with FeatureFeeder(feed, "cam", 2) as feeder:
                feeder.send(chunk(0, 8).features)
                feeder.flush()
                assert request_status(control, PATIENCE_S)["streams"][0]["next_index"] == 8
                process.send_signal(signal.SIGTERM)
                _, said = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 1
    (line,) = [each for each in said.splitlines() if "given up" in each]
    assert line.startswith("hrpro: the drain was given up after 0.2 s (drain_s): 1 streams")
