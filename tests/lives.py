"""Engines one after the other, of which each goes on from what the one before has written."""

from __future__ import annotations

import threading

import numpy as np
from driving import PATIENCE_S, engine_config
from tiny_model import tiny_recording

from hrpro.engine.backends.onnxruntime import OnnxRuntimeBackend
from hrpro.engine.config import EngineConfig
from hrpro.engine.deployment import Deployment
from hrpro.engine.messages import Publication
from hrpro.engine.pipeline import Pipeline
from hrpro.engine.recovery import restore, save
from hrpro.export.bundle import Bundle

NAMES = ("a", "b")
LENGTH, FIRST_INDEX = 80, 5


class Life:
    """Engines one after the other, what they write down, and the feeders of two streams, which keep
    no more than they have to."""

    def __init__(self, bundle: Bundle, backend: OnnxRuntimeBackend, config: EngineConfig) -> None:
        self.made_of = bundle.manifest, backend, config
        self.woken = threading.Event()
        self.log: list[Publication] = []
        self.states: dict[str, bytes] = {}
        self.rows = {name: tiny_recording(LENGTH, seed) for seed, name in enumerate(NAMES)}
        self.here = {name: np.ones(LENGTH, dtype=bool) for name in NAMES}
        self.sent = dict.fromkeys(NAMES, FIRST_INDEX)
        self.kept_from = dict.fromkeys(NAMES, FIRST_INDEX)
        self.pipeline = self.started_again()
        for name in NAMES:
            self.pipeline.open(name, FIRST_INDEX)

    def started_again(self) -> Pipeline:
        pipeline = Pipeline(Deployment(*self.made_of))
        pipeline.wake = self.woken.set
        pipeline.is_durable = True
        restore(pipeline, self.states.items())
        return pipeline

    def kill(self) -> None:
        """What is not written is lost; the feeders send again from where they are asked to."""
        self.pipeline = self.started_again()
        for name in NAMES:
            if name not in self.pipeline.streams:
                self.pipeline.open(name, FIRST_INDEX)
            welcome = self.pipeline.streams[name].next_index
            assert welcome >= self.kept_from[name], "what was asked for is forgotten"
            until, self.sent[name] = self.sent[name], welcome
            self.send_to(name, until)

    def step(self, is_written: bool = True) -> None:
        publications = list(self.pipeline.step())
        saved = save(self.pipeline, publications)
        self.pipeline.moved.clear()
        if not is_written:
            return
        self.log += publications
        for each in saved:
            if each.data is not None:
                self.states[each.name] = each.data
        for each in saved:
            each.settle()
            if each.stream is not None:
                assert each.needed_from >= self.kept_from[each.name], "it never goes back"
                self.kept_from[each.name] = each.needed_from

    def settle(self) -> None:
        while True:
            self.woken.clear()
            if self.pipeline.pending():
                self.step()
            elif any(each.asked > each.processed for each in self.pipeline.streams.values()):
                assert self.woken.wait(PATIENCE_S), "no answer came"
            else:
                return

    def send_to(self, name: str, until: int) -> None:
        """All snippets below this index, as there is room."""
        stream = self.pipeline.streams[name]
        while self.sent[name] < until:
            first = self.sent[name]
            stop = min(until, stream.send_until, first + 7)
            here = self.here[name][first - FIRST_INDEX : stop - FIRST_INDEX]
            if not len(here):
                self.settle()
            elif not here[0]:
                self.sent[name] += 1
                self.pipeline.give_up(name, first + 1)
            else:
                count = int(np.argmin([*here, False]))  # until one is lost
                self.sent[name] += count
                rows = self.rows[name][first - FIRST_INDEX :][:count]
                self.pipeline.append(name, first, rows)

    def happen(self, name: str, what: str, count: int) -> None:
        if what == "send":
            self.send_to(name, min(self.sent[name] + count, FIRST_INDEX + LENGTH))
        elif what == "step" and self.pipeline.pending():
            self.step()
        elif what == "rest":
            self.settle()
            self.pipeline.rest(name)
            self.settle()
        elif what in ("kill", "crash"):
            if what == "crash":
                for _ in range(count % 3):
                    if self.pipeline.pending():
                        self.step(is_written=False)
            self.kill()

    def finish(self) -> None:
        for name in NAMES:
            self.send_to(name, FIRST_INDEX + LENGTH)
            self.pipeline.end(name, FIRST_INDEX + LENGTH)
        self.settle()
        assert not self.pipeline.streams


def durable_config(bundle: Bundle, hop: int, history: int, **changes: object) -> EngineConfig:
    config = engine_config(bundle.manifest, hop=hop, lookahead_s="strict", backlog=12)
    localization = config.localization.model_copy(update={"history_snippets": history})
    return config.model_copy(update={"localization": localization, **changes})
