"""Shared memory between an engine and a real Triton server: that it is used, and that it goes."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import engine, wait_for
from driving import PATIENCE_S, Drive
from numpy.typing import NDArray
from tiny_model import CONTEXT, LOOKAHEAD, tiny_recording
from triton_place import Place, new_place
from tritonclient import grpc

from hrpro.engine.backends import triton, triton_connection, triton_memory
from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.backends.triton import TritonBackend
from hrpro.engine.inference import BackendError
from hrpro.export.bundle import Bundle

LENGTH = CONTEXT + 1 + LOOKAHEAD
WINDOWS = np.stack([tiny_recording(LENGTH, seed) for seed in (1, 2, 3)])
VALID: NDArray[np.bool_] = np.arange(LENGTH) >= np.array([[0], [5], [9]])


@pytest.fixture
def place(bundle: Bundle, tmp_path: Path) -> Iterator[Place]:
    made = new_place(bundle, tmp_path)
    yield made
    gc.collect()  # backends of a test that failed
    assert made.files() == set()


def assert_scores(there: TritonBackend, here: OnnxRuntimeBackend, sign: int = 1) -> None:
    got = there.score_snippets(sign * WINDOWS, VALID)
    for one, expected in zip(got, here.score_snippets(sign * WINDOWS, VALID), strict=True):
        np.testing.assert_allclose(one[VALID], expected[VALID], atol=1e-5)


def scores_again(there: TritonBackend) -> bool:
    with contextlib.suppress(BackendError):
        there.score_snippets(WINDOWS, VALID)
        return True
    return False


# --- while all is well ---------------------------------------------------------------------------


def test_a_region_a_batch_in_flight_until_the_backend_goes(
    bundle: Bundle, backend: OnnxRuntimeBackend, place: Place
) -> None:
    """Also answers that were read before are not written over."""
    config = place.config(bundle, shared_memory="always")
    with place.served():
        there = TritonBackend(bundle, config)
        assert place.files() == set()  # allocated when they are needed
        first = there.score_snippets(WINDOWS, VALID)
        kept = [each.copy() for each in first]
        assert_scores(there, backend, sign=-1)
        for one, before in zip(first, kept, strict=True):
            np.testing.assert_array_equal(one, before)
        assert len(place.files()) == 1
        assert place.regions() == place.files()
        drive = Drive(bundle.manifest, there, config, {"a": tiny_recording(60, 1)})
        drive.finish()
        assert 1 <= len(place.files()) <= config.batches_in_flight
        assert place.regions() == place.files()
        (mode,) = {(triton_memory.SHARED_MEMORY / name).stat().st_mode for name in place.files()}
        assert mode & 0o777 == 0o600
        del there, drive
        gc.collect()
        assert place.regions() == place.files() == set()


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1:8001", True),
        ("127.8.0.1:8001", True),
        ("localhost:8001", True),
        ("[::1]:8001", True),
        ("10.0.0.1:8001", False),
        ("triton.local:8001", False),
        ("[2001:db8::1]:8001", False),
        ("dns:///localhost", False),
    ],
)
def test_auto_is_for_addresses_of_this_machine(
    bundle: Bundle, place: Place, address: str, here: bool
) -> None:
    config = place.config(bundle)
    changed = config.triton.model_copy(update={"address": address})
    config = config.model_copy(update={"triton": changed})
    assert (triton._new_regions(bundle.manifest, config) is not None) == here


def test_never_uses_none(bundle: Bundle, backend: OnnxRuntimeBackend, place: Place) -> None:
    with place.served():
        there = TritonBackend(bundle, place.config(bundle, shared_memory="never"))
        assert_scores(there, backend)
        assert place.regions() == place.files() == set()


# --- where the server does not take it -----------------------------------------------------------


def test_a_server_that_cannot_open_it(
    bundle: Bundle,
    backend: OnnxRuntimeBackend,
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its files are not where the server looks, as with a container that has its own /dev/shm."""
    monkeypatch.setattr(triton_memory, "SHARED_MEMORY", tmp_path)
    reason = r"Unable to open shared memory region: '/hrpro-triton-\d+-\w+'"
    with place.served(), caplog.at_level(logging.WARNING):
        there = TritonBackend(bundle, place.config(bundle))
        assert_scores(there, backend)
        assert_scores(there, backend, sign=-1)
        (record,) = caplog.records
        with pytest.raises(BackendError, match=f"triton.shared_memory always: {reason}"):
            TritonBackend(bundle, place.config(bundle, shared_memory="always")).score_snippets(
                WINDOWS, VALID
            )
        del there
    assert record.getMessage().startswith(
        f"Triton at {place.address}: windows go through gRPC, not through shared memory: "
        "Unable to open shared memory region"
    )
    gc.collect()
    assert list(tmp_path.glob("hrpro-triton-*")) == []


def test_no_room_in_shared_memory(
    bundle: Bundle,
    backend: OnnxRuntimeBackend,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """More than there is in any machine; nothing of it is left."""
    monkeypatch.setattr(triton, "padded_bytes", lambda *_: 1 << 50)
    with place.served(), caplog.at_level(logging.WARNING):
        there = TritonBackend(bundle, place.config(bundle))
        assert_scores(there, backend)
        assert place.files() == set()
    assert ["through gRPC" in each.getMessage() for each in caplog.records] == [True]


# --- a server that goes, hangs, or forgets -------------------------------------------------------


def test_a_server_that_lost_the_regions_gets_them_again(
    bundle: Bundle, backend: OnnxRuntimeBackend, place: Place
) -> None:
    with place.served():
        there = TritonBackend(bundle, place.config(bundle, shared_memory="always"))
        assert_scores(there, backend)
        with contextlib.closing(grpc.InferenceServerClient(place.address)) as client:
            client.unregister_system_shared_memory()
        assert place.regions() == set()
        wait_for(lambda: scores_again(there))
        assert_scores(there, backend, sign=-1)
        assert len(place.regions()) == 1


def test_a_region_without_an_answer_is_not_used_again_until_the_server_has_done_with_it(
    bundle: Bundle, backend: OnnxRuntimeBackend, place: Place
) -> None:
    place.slow_down(pause_s=1.0)
    with place.served():
        there = TritonBackend(bundle, place.config(bundle, shared_memory="always"))
        assert_scores(there, backend)
        (first,) = place.files()
        there._deadline_s = 0.2
        there._connection = None
        with pytest.raises(BackendError, match=r"triton.deadline_s 0.2, got none"):
            there.score_snippets(WINDOWS, VALID)
        there._deadline_s = PATIENCE_S
        assert_scores(there, backend, sign=-1)
        (second,) = place.files() - {first}

        def is_gone() -> bool:
            return scores_again(there) and place.regions() == place.files() == {second}

        wait_for(is_gone)


def test_regions_that_a_stuck_server_keeps_are_bounded(
    bundle: Bundle, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """The server answers, but its model does not."""
    place.slow_down(pause_s=0.5)
    with place.served():
        config = place.config(bundle, deadline_s=0.1)
        there = TritonBackend(bundle, config)
        most = 2 * config.batches_in_flight + 1

        def is_said() -> bool:
            there._pause_s = 0.0
            assert not scores_again(there)
            assert len(place.files()) <= most
            return any("regions" in each.getMessage() for each in caplog.records)

        wait_for(is_said)
        assert f"still uses {most} regions" in caplog.records[-1].getMessage()


def test_a_call_that_grpc_does_not_end_ends(
    bundle: Bundle, backend: OnnxRuntimeBackend, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of our own, here before that of gRPC; the next connection is as good as new."""
    with place.served() as server:
        there = TritonBackend(bundle, place.config(bundle, deadline_s=PATIENCE_S))
        assert_scores(there, backend)
        server.stop()
        try:
            with monkeypatch.context() as patched:
                patched.setattr(triton_connection, "_GRACE_S", 0.2 - PATIENCE_S)
                with pytest.raises(BackendError, match=r"got none, nor an error of gRPC"):
                    there.score_snippets(WINDOWS, VALID)
        finally:
            server.go_on()
        assert_scores(there, backend, sign=-1)


# --- an engine that is killed --------------------------------------------------------------------


def test_killed_engines_leave_no_more_than_the_last_of_them(bundle: Bundle, place: Place) -> None:
    """Neither in /dev/shm nor in the server; one that is drained leaves nothing."""
    settings = {
        "backend": "triton",
        "triton.address": place.address,
        "triton.shared_memory": "always",
        "max_batch": 4,
    }
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    seen: list[set[str]] = []
    with place.served():
        for _ in range(3):
            with engine(bundle.folder, *options) as served:
                seen.append(place.files())
                assert place.regions() == place.files()
                served.kill()
            assert place.regions() == place.files() == seen[-1]
        with engine(bundle.folder, *options) as served:
            seen.append(place.files())
        assert [len(each) for each in seen] == [1, 1, 1, 1]
        assert len(set.union(*seen)) == 4
        assert served.process.returncode == 0
        assert place.regions() == place.files() == set()


def test_the_regions_of_a_living_engine_are_left_to_it(
    bundle: Bundle, backend: OnnxRuntimeBackend, place: Place
) -> None:
    with place.served():
        config = place.config(bundle, shared_memory="always")
        one = TritonBackend(bundle, config)
        assert_scores(one, backend)
        other = TritonBackend(bundle, config)
        assert_scores(other, backend)
        assert len(place.regions() & place.files()) == 2
        del other
        gc.collect()
        assert len(place.regions() & place.files()) == 1
        assert_scores(one, backend, sign=-1)
