"""An engine that is killed at any instant, and one that goes on: together they publish what an
undisturbed one does."""

from __future__ import annotations

from typing import Literal

import pytest
from driving import assert_same, of_stream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lives import FIRST_INDEX, LENGTH, NAMES, Life, durable_config

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.deployment import Deployment
from hrpro.engine.event_reader import LogError
from hrpro.engine.messages import FinalProposal, StreamNotice
from hrpro.engine.settings import SettingsError
from hrpro.export.bundle import Bundle

happening = st.tuples(
    st.sampled_from(NAMES),
    st.sampled_from(["send", "send", "send", "step", "rest", "kill", "crash"]),
    st.integers(1, 24),
)
# Snippets that do not exist: (stream, first, how many)
lost = st.tuples(st.sampled_from(NAMES), st.integers(0, LENGTH - 9), st.integers(1, 9))


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    happenings=st.lists(happening, max_size=25),
    gaps=st.lists(lost, max_size=3),
    hop=st.sampled_from([1, 3]),
    inference=st.sampled_from(["incremental", "window"]),
    mode=st.sampled_from(["latency", "throughput"]),  # in the loop, or beside it
    history=st.sampled_from([32, 128]),
)
def test_engines_that_are_killed_publish_what_one_does(
    bundle: Bundle,
    backend: OnnxRuntimeBackend,
    happenings: list[tuple[str, str, int]],
    gaps: list[tuple[str, int, int]],
    hop: int,
    inference: str,
    mode: Literal["latency", "throughput"],
    history: int,
) -> None:
    changes = {"inference": inference, "mode": mode, "max_wait_ms": 0.0}
    config = durable_config(bundle, hop, history, **changes)
    lives = [Life(bundle, backend, config) for _ in range(2)]
    for is_disturbed, life in zip((False, True), lives, strict=True):
        for name, first, count in gaps:
            life.here[name][first : first + count] = False
        for each in happenings:
            if is_disturbed or each[1] not in ("kill", "crash"):
                life.happen(*each)
        life.finish()
    undisturbed, disturbed = lives
    for name in NAMES:
        assert_same(of_stream(disturbed.log, name), of_stream(undisturbed.log, name))


def notices(life: Life, name: str) -> list[tuple[int, str]]:
    return [
        (each.sequence, each.kind)
        for each in of_stream(life.log, name)
        if isinstance(each, StreamNotice)
    ]


@pytest.mark.parametrize("is_killed", [False, True])
def test_what_comes_while_a_silence_is_processed_is_told_with_it(
    bundle: Bundle, backend: OnnxRuntimeBackend, is_killed: bool
) -> None:
    life = Life(bundle, backend, durable_config(bundle, hop=1, history=32))
    life.send_to("a", 30)
    life.settle()
    life.pipeline.rest("a")
    life.send_to("a", 34)
    while "idle" not in (kind for _, kind in notices(life, "a")):
        life.step()
    if is_killed:
        life.kill()
    life.finish()
    assert [kind for _, kind in notices(life, "a")] == ["opened", "idle", "resumed", "ended"]
    told = of_stream(life.log, "a")
    assert [each.sequence for each in told] == list(range(len(told)))


def test_a_stream_whose_feeder_stays_away_is_idle_once(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    life = Life(bundle, backend, durable_config(bundle, hop=1, history=32))
    for name in NAMES:
        life.send_to(name, 40)
    life.settle()
    life.pipeline = life.started_again()
    for _ in range(3):
        for name in NAMES:
            life.pipeline.rest(name)
        life.settle()
    for name in NAMES:
        assert [kind for _, kind in notices(life, name)] == ["opened", "idle"]
        stream = life.pipeline.streams[name]
        assert stream.idle
        assert stream.processed == stream.next_index == 37  # the model looks 3 snippets ahead


@pytest.mark.parametrize("at", range(20, 60, 8))
def test_a_silence_that_was_not_processed_at_a_kill_is_processed_then(
    bundle: Bundle, backend: OnnxRuntimeBackend, at: int
) -> None:
    life = Life(bundle, backend, durable_config(bundle, hop=1, history=32))
    life.send_to("a", at)
    life.settle()
    life.pipeline.rest("a")
    life.step()
    assert life.pipeline.streams["a"].idle
    assert [kind for _, kind in notices(life, "a")] == ["opened"]
    life.pipeline = life.started_again()
    for _ in range(2):
        life.pipeline.rest("a")
        life.settle()
    assert [kind for _, kind in notices(life, "a")] == ["opened", "idle"]
    assert life.pipeline.streams["a"].open_actions == 0


@pytest.mark.parametrize("at", range(20, 76, 9))
def test_what_is_needed_never_goes_back_when_another_bundle_looks_further(
    bundle: Bundle, backend: OnnxRuntimeBackend, at: int
) -> None:
    low = durable_config(bundle, hop=1, history=128)
    settings = {"thresholds": (0.7,), "event_start": 0.9, "event_end": 0.85}
    localization = low.localization.model_copy(update=settings)
    life = Life(bundle, backend, low.model_copy(update={"localization": localization}))
    for name in NAMES:
        life.send_to(name, at)
    life.settle()
    life.made_of = (bundle.manifest, backend, low)
    life.pipeline.deploy(Deployment(*life.made_of))
    for name in NAMES:
        life.send_to(name, at + 2)
    life.settle()  # `step` sees to what is needed
    life.kill()
    life.finish()
    for name in NAMES:
        last = of_stream(life.log, name)[-1]
        assert isinstance(last, StreamNotice)
        assert (last.kind, last.next_index) == ("ended", FIRST_INDEX + LENGTH)
        assert not [each for each in notices(life, name) if each[1] == "gap"]


def test_a_log_with_more_streams_than_there_may_be_is_refused(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    config = durable_config(bundle, hop=1, history=32)
    life = Life(bundle, backend, config)
    life.settle()
    life.made_of = (bundle.manifest, backend, config.model_copy(update={"max_streams": 1}))
    expected = "max_streams: expected at least 2, as many streams as the event log has open, got 1"
    with pytest.raises(SettingsError, match=expected):
        life.started_again()


@pytest.mark.parametrize("spoilt", [b"", b"\xc1", b"\x80", b"\x81\xa7session\x01", b"\x05"])
def test_a_state_that_cannot_be_read_is_named(
    bundle: Bundle, backend: OnnxRuntimeBackend, spoilt: bytes
) -> None:
    life = Life(bundle, backend, durable_config(bundle, hop=1, history=32))
    life.settle()
    life.states["b"] = spoilt
    with pytest.raises(LogError, match="stream 'b': its state in the event log cannot be read: "):
        life.started_again()


def test_a_run_that_is_longer_than_what_is_remembered_is_the_same_after_a_restart(
    bundle: Bundle, backend: OnnxRuntimeBackend
) -> None:
    config = durable_config(bundle, hop=1, history=32)
    whole = Life(bundle, backend, config)
    whole.finish()
    found = [each for each in whole.log if isinstance(each, FinalProposal)]
    snippets = [(each.end_s - each.start_s) / bundle.manifest.clock.snippet_s for each in found]
    assert max(snippets) > 32
    for killed_at in range(FIRST_INDEX + 32, FIRST_INDEX + LENGTH, 9):
        killed = Life(bundle, backend, config)
        for name in NAMES:
            killed.send_to(name, killed_at)
        killed.settle()
        killed.kill()
        killed.finish()
        for name in NAMES:
            assert_same(of_stream(killed.log, name), of_stream(whole.log, name))
