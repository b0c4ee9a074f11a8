"""The commands that train, measure, export and feed: what they write and what they print."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from commands import (
    ANYWHERE,
    TRAINING,
    Engine,
    Trained,
    assignments,
    engine,
    hrpro,
    hrpro_json,
    published_in_process,
    refusal,
)
from driving import finals

from hrpro.clients.feeding import Source, feed_sources
from hrpro.engine.messages import ActionEvent
from hrpro.engine.timebase import SnippetClock
from hrpro.export.bundle import read_bundle
from hrpro.training.run import read_run

pytest_plugins = ("cli_fixtures",)


@pytest.fixture(scope="module")
def served(trained: Trained) -> Iterator[Engine]:
    with engine(trained.bundle) as running_engine:
        yield running_engine


def weights(run: Path) -> dict[str, torch.Tensor]:
    _, model = read_run(run)
    stages = {"snippet": model.snippet, "instance": model.instance}
    return {
        f"{stage}.{name}": value
        for stage, module in stages.items()
        for name, value in module.state_dict().items()
    }


# ---- train -------------------------------------------------------------------------------------


def test_train_says_what_it_was_trained_on(trained: Trained) -> None:
    summary = dict(trained.summary)
    assert summary.pop("seconds") > 0
    assert summary.pop("snippet_loss") > 0
    assert summary.pop("instance_loss") > 0
    assert summary == {"data_set": "data", "recordings": 4, "classes": 6, "points": 21}


def test_a_run_has_metrics_and_the_same_as_tensorboard_scalars(trained: Trained) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    lines = [json.loads(line) for line in (trained.run / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["stage"], line["step"]) for line in lines]
    assert steps == [
        *(("snippet", step) for step in range(10, 81, 10)),
        *(("instance", step) for step in range(10, 41, 10)),
    ]
    assert [lines[7]["loss"], lines[11]["loss"]] == [
        trained.summary["snippet_loss"], trained.summary["instance_loss"]
    ]  # fmt: skip
    scalars = {
        (value.tag, event.step): value.tensor.float_val[0]
        for events in (trained.run / "tensorboard").glob("*/*")
        for event in EventFileLoader(str(events)).Load()
        for value in event.summary.value
    }
    for line in lines:
        stage, step = line.pop("stage"), line.pop("step")
        for name, value in line.items():
            assert scalars.pop((f"{stage}/{name}", step)) == pytest.approx(value, rel=1e-6)
    assert not scalars


def test_settings_from_a_file_give_the_same_weights(trained: Trained, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    stage = {**TRAINING["snippet_stage"], "steps": 1}
    file.write_text(yaml.safe_dump({**TRAINING, "snippet_stage": stage}))
    # An assignment wins over the file.
    hrpro_json(
        "train", trained.data, "--out", tmp_path / "run", "--config", file,
        "--set", "snippet_stage.steps=80",
    )  # fmt: skip
    assert read_run(tmp_path / "run")[0] == read_run(trained.run)[0]
    expected, got = weights(trained.run), weights(tmp_path / "run")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_another_seed_gives_other_weights(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = hrpro("train", trained.data, "--out", run, "--seed", 1, *assignments(TRAINING))
    assert said.stdout.splitlines()[-1] == f"next: hrpro evaluate {run} --data {trained.data}"
    assert read_run(run)[0].config.seed == 1
    expected, got = weights(trained.run), weights(run)
    assert not torch.equal(got["snippet.classify.weight"], expected["snippet.classify.weight"])


# ---- evaluate, export, stream-eval -------------------------------------------------------------


def test_evaluate_prints_these_figures(trained: Trained) -> None:
    figures = hrpro_json("evaluate", trained.run, "--data", trained.data)
    assert list(figures) == ["average_map", "map", "stage1_average_map", "recordings", "instances"]
    assert list(figures["map"]) == ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7"]
    assert figures["average_map"] == pytest.approx(np.mean(list(figures["map"].values())))
    assert 0.2 < figures["average_map"] < 1
    assert 0.2 < figures["stage1_average_map"] < 1
    assert (figures["recordings"], figures["instances"]) == (2, 10)
    noted = json.loads((trained.run / "figures.json").read_text())
    for name in ("average_map", "stage1_average_map", "recordings"):
        assert noted[name] == figures[name]


def test_the_same_run_exported_twice_is_the_same_bundle(trained: Trained, tmp_path: Path) -> None:
    bundle_id = trained.exported["bundle_id"]
    assert bundle_id == read_bundle(trained.bundle).manifest.bundle_id
    assert set(trained.exported["verified"]) == {"scores", "embedding", "completeness", "borders"}
    run = Path(shutil.copytree(trained.run, tmp_path / "run"))
    (run / "figures.json").unlink(missing_ok=True)  # where it was evaluated since
    out = Path(shutil.copytree(trained.bundle, tmp_path / "bundle"))
    with (out / "step.onnx").open("ab") as file:
        file.write(b"damaged")
    said = hrpro("export", run, "--out", out).stdout.splitlines()
    assert said[0].startswith(f"bundle {bundle_id} in {out}, ")
    assert said[-1].startswith(f"next: hrpro serve {out} --feed tcp://127.0.0.1:")
    bundle = read_bundle(out)
    assert (bundle.manifest.bundle_id, bundle.manifest.feature_dim) == (bundle_id, 96)
    assert {each.name for each in tmp_path.iterdir()} == {"run", "bundle"}  # nothing is left beside
    # The other one was made in another process: what the exporter notes of nodes has addresses.
    for graph in (bundle.snippet_graph, bundle.step_graph, bundle.instance_graph):
        assert graph is not None
        assert not any(node.metadata_props for node in onnx.load(graph).graph.node)


def test_stream_eval_prints_these_figures(trained: Trained) -> None:
    figures = hrpro_json("stream-eval", trained.bundle, "--data", trained.data)
    assert list(figures) == [
        "offline_average_map", "streaming_average_map", "retention", "lookahead_s",
        "publish_delay_s", "snippets_sent", "snippets_processed", "lost", "duplicated",
        "proposals", "events", "actions",
    ]  # fmt: skip
    assert figures["snippets_sent"] == figures["snippets_processed"] == 120
    assert figures["lost"] == figures["duplicated"] == 0
    assert figures["lookahead_s"] == 4.0
    assert list(figures["publish_delay_s"]) == ["p50", "p90", "p99"]
    delays_s = list(figures["publish_delay_s"].values())
    # Decided at most so long after the run of its snippets; a refined border may lie before it.
    assert delays_s == sorted(delays_s) and delays_s[0] <= 4.0
    offline, streaming = figures["offline_average_map"], figures["streaming_average_map"]
    assert figures["retention"] == pytest.approx(streaming / offline)
    published = published_in_process(trained.bundle, trained.recordings).values()
    assert figures["proposals"] == sum(len(finals(each)) for each in published)
    events = [message for each in published for message in each if isinstance(message, ActionEvent)]
    assert figures["events"] == len(events) > 0
    kinds = Counter(each.kind for each in events)
    actions = figures["actions"]
    assert list(actions) == ["started", "ended", "ended_true", "retracted", "retracted_true"]
    assert actions["started"] == kinds["start"] == actions["ended"] + actions["retracted"] > 0
    assert actions["retracted"] == kinds["retract"]
    assert 0 < actions["ended_true"] <= actions["ended"] == kinds["end"]
    assert 0 <= actions["retracted_true"] <= actions["retracted"]


def test_the_lookahead_is_a_setting(trained: Trained) -> None:
    figures = hrpro_json(
        "stream-eval", trained.bundle, "--data", trained.data, "--set", "lookahead_s=1.28"
    )
    assert figures["lookahead_s"] == 1.28
    assert figures["publish_delay_s"]["p50"] < 2.0  # above 3 s by default
    assert figures["lost"] == figures["duplicated"] == 0


# ---- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ("train", "{data}", "--out", "run", "--set", "snippet_stage.stpes=3"),
            "snippet_stage.stpes: no such setting, did you mean snippet_stage.steps?",
        ),
        (
            ("serve", "{bundle}", "--feed", "{any}", "--events", "{any}", "--control", "{any}",
             "--state", "none", "--set", "windw.hop_snippets=2"),
            "windw: no such setting, did you mean window?",
        ),
        (
            ("stream-eval", "{bundle}", "--data", "{data}", "--set", "lokahead_s=2.0"),
            "lokahead_s: no such setting, did you mean lookahead_s?",
        ),
    ],
)  # fmt: skip
def test_an_unknown_setting_is_refused_with_the_nearest(
    trained: Trained, arguments: tuple[str, ...], complaint: str
) -> None:
    known = {"{data}": trained.data, "{bundle}": trained.bundle, "{any}": ANYWHERE.feed}
    said = refusal(*(known.get(argument, argument) for argument in arguments))
    assert said == f"{complaint} (--set {arguments[-1]})"


# ---- feed --------------------------------------------------------------------------------------


def test_a_file_is_fed_as_a_stream_of_its_name(
    trained: Trained, served: Engine, tmp_path: Path
) -> None:
    recording = trained.recordings["seq5"]
    np.save(tmp_path / "camera-1.npy", recording.astype(np.float64))
    said = hrpro(
        "feed", "features", tmp_path / "camera-1.npy", "--to", served.feed, "--speed", "max"
    )
    published = published_in_process(trained.bundle, {"camera-1": recording})["camera-1"]
    proposals = len(finals(published))
    events = sum(isinstance(message, ActionEvent) for message in published)
    expected = f"camera-1: {len(recording)} snippets, {proposals} proposals, {events} events"
    assert said.stdout.splitlines() == [expected]
    assert proposals > 0 and events > 0


def test_a_data_folder_feeds_its_test_split(trained: Trained, served: Engine) -> None:
    said = hrpro_json("feed", "features", trained.data, "--to", served.feed, "--speed", "max")
    lengths = {name: len(features) for name, features in trained.recordings.items()}
    assert said == {"streams": lengths, "snippets": 120}


def test_feeding_keeps_the_pace_of_the_clock(trained: Trained, served: Engine) -> None:
    sources = [Source(name, each[:20]) for name, each in trained.recordings.items()]
    told: list[int] = []
    started_s = time.monotonic()
    ended = feed_sources(sources, served.feed, SnippetClock(), speed=40, progress=told.append)
    assert time.monotonic() - started_s >= 20 * 0.64 / 40
    assert told == [1] * 40
    assert {name: each.next_index for name, each in ended.items()} == {"seq5": 20, "seq6": 20}
