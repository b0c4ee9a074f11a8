"""`hrpro stream-eval --curve`: what it measures is what an engine publishes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from commands import ANY_PORT, PATIENCE_S, Trained, hrpro, hrpro_json, refusal, running
from driving import assert_same, of_stream

from hrpro.clients import curve as curves
from hrpro.clients.curve import (
    HOPS,
    Cost,
    Curve,
    Point,
    count_points,
    curve_table,
    measure_curve,
    run_in_process,
)
from hrpro.clients.curve_plot import plot_curve
from hrpro.clients.engine_process import running_engine
from hrpro.clients.feeder import FeatureFeeder
from hrpro.clients.feeding import Source
from hrpro.clients.stream_eval import read_evaluation_data, stream_recordings
from hrpro.engine.serve import load_engine_config, new_deployment
from hrpro.export.bundle import read_bundle

pytest_plugins = ("cli_fixtures",)

LOOKAHEADS = ["strict", 0.64, 1.3, 2.6, 4.0, 5.0, 10.0, "infinite"]
# Of the small model that the tests train: one snippet that it looks ahead, and the hop.
LEAST_S = {hop: (1 + hop) * 0.64 for hop in HOPS}
POINT_KEYS = [
    "hop_snippets", "lookahead", "lookahead_s", "least_lookahead_s", "streaming_average_map",
    "retention", "publish_delay_s", "inference_ms_per_snippet", "total_ms_per_snippet",
]  # fmt: skip


@pytest.fixture(scope="module")
def measured(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    file = tmp_path_factory.mktemp("curve") / "curve.png"
    said = hrpro_json(
        "stream-eval", trained.bundle, "--data", trained.data, "--curve", "--plot", file,
        "--set", "threads=1",
    )  # fmt: skip
    assert list(said) == ["offline_average_map", "snippets", "points"]
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    points = []
    for each in said["points"]:
        assert list(each) == POINT_KEYS
        inference_ms = each["inference_ms_per_snippet"]
        cost = None if inference_ms is None else Cost(inference_ms, each["total_ms_per_snippet"])
        points.append(
            Point(
                each["hop_snippets"], each["lookahead"], each["lookahead_s"],
                each["least_lookahead_s"], each["streaming_average_map"], each["publish_delay_s"],
                cost,
            )
        )  # fmt: skip
    curve = Curve(said["offline_average_map"], said["snippets"], tuple(points))
    assert json.loads(json.dumps(curve.figures())) == said
    return curve


def test_every_lookahead_at_every_hop(measured: Curve) -> None:
    assert measured.snippets == 120
    asked = [(point.hop_snippets, point.lookahead) for point in measured.points]
    assert asked == [(hop, lookahead) for hop in HOPS for lookahead in LOOKAHEADS]


def test_below_the_least_there_is_no_figure(measured: Curve) -> None:
    for point in measured.points:
        assert point.least_s == pytest.approx(LEAST_S[point.hop_snippets])
        if isinstance(point.lookahead, float):
            assert point.lookahead_s == point.lookahead
            can_be = point.lookahead >= point.least_s
        else:
            expected = point.least_s if point.lookahead == "strict" else None
            assert point.lookahead_s == expected
            can_be = True
        figures = (point.average_map, point.delay_s, point.cost)
        assert [each is not None for each in figures] == [can_be] * 3


def test_with_the_whole_recording_it_is_offline(measured: Curve) -> None:
    endless = [point for point in measured.points if point.lookahead == "infinite"]
    assert len(endless) == len(HOPS)
    for point in endless:
        assert point.average_map == pytest.approx(measured.offline_average_map, abs=1e-6)
        assert measured.retention(point) == pytest.approx(1.0, abs=1e-5)


def test_who_looks_further_ahead_publishes_later(measured: Curve) -> None:
    at_hop_1 = [p for p in measured.points if p.hop_snippets == 1 and p.delay_s is not None]
    medians = [point.delay_s["p50"] for point in at_hop_1 if point.delay_s is not None]
    assert medians == sorted(medians)
    assert medians[0] < 2 < medians[-1]


def test_the_cost_is_of_inference_and_of_the_rest(measured: Curve) -> None:
    costs = [point.cost for point in measured.points if point.cost is not None]
    assert all(0 < cost.inference_ms < cost.total_ms < 1000 for cost in costs)


@pytest.mark.parametrize("hop", [1, 4])
def test_in_this_process_the_same_is_published_as_by_an_engine(trained: Trained, hop: int) -> None:
    bundle = read_bundle(trained.bundle)
    assignments = ["threads=1", "lookahead_s=strict", f"window.hop_snippets={hop}"]
    config = load_engine_config(bundle, None, assignments)
    here = run_in_process(new_deployment(bundle, config), trained.recordings)
    sources = [Source(name, features) for name, features in trained.recordings.items()]
    with running_engine(trained.bundle, config) as addresses:
        there = stream_recordings(addresses, sources, bundle.manifest.clock)
    for name in trained.recordings:
        assert len(of_stream(here, name)) > 10
        assert_same(of_stream(here, name), of_stream(there.publications, name))


def test_an_engine_says_what_strict_is(trained: Trained) -> None:
    sides = [part for side in ("feed", "events", "control") for part in (f"--{side}", ANY_PORT)]
    sides += ["--state", "none"]
    chosen = ("--set", "lookahead_s=strict", "--set", "window.hop_snippets=2")
    with running("serve", trained.bundle, *sides, "--set", "threads=1", *chosen) as process:
        assert process.stdout is not None
        said: dict[str, str] = {}
        for line in process.stdout:
            name, _, text = line.strip().partition(" ")
            said[name] = text.strip()
            if name == "READY":
                break
        assert said["window"].endswith("hop 2, look-ahead 1.92 s (strict)")
        with FeatureFeeder(said["feed"], "cam", 96) as feeder:
            assert feeder.connect(PATIENCE_S).lookahead_s == pytest.approx(1.92)


def test_hops_that_a_window_is_too_short_for_have_no_figures(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(curves, "HOPS", (1, 2, 4))
    monkeypatch.setattr(curves, "LOOKAHEADS", ("strict", "infinite"))
    bundle = read_bundle(trained.bundle)
    shortest = bundle.manifest.context_snippets + 2 + bundle.manifest.lookahead_snippets
    settings = ["threads=1", "window.hop_snippets=2", f"window.window_snippets={shortest}"]
    config = load_engine_config(bundle, None, settings)
    data, truth = read_evaluation_data(trained.data, bundle)
    told: list[int] = []
    curve = measure_curve(bundle, config, data, truth, told.append)
    assert len(told) == count_points(config) == len(curve.points) == 9
    for point in curve.points:
        can_be = point.hop_snippets < 4
        figures = (point.average_map, point.delay_s, point.cost)
        assert [each is not None for each in figures] == [can_be] * 3
        assert point.least_s == pytest.approx(LEAST_S[point.hop_snippets])
    assert [each["streaming_average_map"] for each in json_points(curve)[-3:]] == [None] * 3
    rows = table_rows(curve)
    for start in (["4", "strict"], ["4", "4"], ["4", "infinite"]):
        assert [*start, "n/a", "window", "too", "short"] in rows
    plot_curve(curve, tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")


def json_points(curve: Curve) -> list[dict[str, object]]:
    return json.loads(json.dumps(curve.figures()))["points"]


def table_rows(curve: Curve) -> list[list[str]]:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(curve_table(curve))
    return [line.split() for line in console.export_text().splitlines()]


# ---- what is shown -----------------------------------------------------------------------------

SOON = {"p50": 1.0, "p90": 2.0, "p99": 3.0}
LATE = {"p50": 9.0, "p90": 9.5, "p99": 10.0}
FEW = Curve(
    0.8,
    100,
    (
        Point(1, "strict", 1.28, 1.28, 0.76, SOON, Cost(0.5, 0.75)),
        Point(1, 0.64, 0.64, 1.28),
        Point(2, "infinite", None, 1.92, 0.8, LATE, Cost(0.25, 0.5)),
    ),
)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=100).print(curve_table(FEW))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [
        "1",
        "strict",
        "1.28",
        "0.7600",
        "0.950",
        "1.00",
        "2.00",
        "3.00",
        "0.50",
        "0.75",
    ] in lines
    assert ["1", "0.64", "n/a", "least", "1.28"] in lines
    assert ["2", "infinite", "0.8000", "1.000", "9.00", "9.50", "10.00", "0.25", "0.50"] in lines


def test_a_curve_of_few_points_is_drawn(tmp_path: Path) -> None:
    for curve in (FEW, Curve(0.0, 0, FEW.points[1:2])):
        plot_curve(curve, tmp_path / "curve.svg")
        assert (tmp_path / "curve.svg").read_text().startswith("<?xml")


def test_a_picture_needs_the_curve(trained: Trained, tmp_path: Path) -> None:
    said = hrpro(
        "stream-eval", trained.bundle, "--data", trained.data, "--plot", tmp_path / "x.png",
        status=2,
    )  # fmt: skip
    assert "--plot: expected --curve with it" in said.stderr


def test_settings_are_checked_first(trained: Trained) -> None:
    said = refusal(
        "stream-eval",
        trained.bundle,
        "--data",
        trained.data,
        "--curve",
        "--set",
        "windw.hop_snippets=2",
    )
    assert said.startswith("windw: no such setting, did you mean window?")
