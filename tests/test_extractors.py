"""Extractors: what their manifest says is what is computed, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_extractor import frame_of, mean_over, network, plain_frame, write_extractor

from hrpro.clients.cameras.extractor import ExtractorError, load_extractor
from hrpro.clients.cameras.manifest import MANIFEST
from hrpro.engine.timebase import SnippetClock

FLOW = {"method": "dis", "limit_px": 3.0}


def snippets_of(*colours: list[int]) -> np.ndarray:
    """Snippets of a colour a frame, (n, F, 8, 8, 3), from their grey levels."""
    levels = np.array(colours, np.uint8)
    return np.broadcast_to(levels[:, :, None, None, None], (*levels.shape, 8, 8, 3)).copy()


# ---- what is computed --------------------------------------------------------------------------


def test_a_loaded_extractor_says_what_it_is(tmp_path: Path) -> None:
    extractor = load_extractor(write_extractor(tmp_path / "tiny"))
    assert extractor.name == "tiny"
    assert extractor.clock == SnippetClock(25, 16)
    assert (extractor.feature_dim, extractor.frame_offsets) == (3, (0, 5, 10))
    assert (extractor.height, extractor.width) == (8, 8)


def test_frames_become_features(tmp_path: Path) -> None:
    extractor = load_extractor(write_extractor(tmp_path))
    given = snippets_of([0, 51, 102], [255, 255, 255])
    given[1, ..., 2] = 0
    features = extractor.extract(given)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, [[0.2, 0.2, 0.2], [1, 1, 0]], atol=1e-6)
    assert extractor.extract(given[:0]).shape == (0, 3)


def test_a_batch_gives_what_each_snippet_gives_alone(tmp_path: Path) -> None:
    extractor = load_extractor(write_extractor(tmp_path))
    given = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8, 3), dtype=np.uint8)
    together = extractor.extract(given)  # in several runs of the network
    alone = np.concatenate([extractor.extract(each[None]) for each in given])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_differences_of_neighbours_stand_behind_the_mean(tmp_path: Path) -> None:
    extractor = load_extractor(
        write_extractor(tmp_path, network(pooling="mean_and_difference", channels="bgr"))
    )
    given = snippets_of([0, 255, 51])
    given[..., 2] = 255  # blue, which comes first
    np.testing.assert_allclose(extractor.extract(given), [[1, 0.4, 0.4, 0, 0.9, 0.9]], atol=1e-6)


def test_scale_mean_and_std_are_of_each_channel(tmp_path: Path) -> None:
    folder = write_extractor(
        tmp_path, network(scale=1 / 255, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    )
    features = load_extractor(folder).extract(snippets_of([255, 255, 255]))
    np.testing.assert_allclose(features, [[1, 0.75, 0.5]], atol=1e-6)


@pytest.mark.parametrize("layout", ["NCTHW", "NTCHW", "NTHWC"])
def test_a_network_of_clips_sees_the_middle_of_all_frames(tmp_path: Path, layout: str) -> None:
    mean_over(tmp_path / "clip.onnx", layout, {"N": 1, "C": 3, "T": 3, "H": 4, "W": 6})
    folder = write_extractor(
        tmp_path, network("clip.onnx", layout=layout, pooling="none", crop=(4, 6))
    )
    given = snippets_of([30, 60, 90], [0, 0, 153])
    given[:, :, :2], given[:, :, 6:], given[..., :1, :], given[..., 7:, :] = 255, 255, 255, 255
    features = load_extractor(folder).extract(given)
    np.testing.assert_allclose(features, [[60 / 255] * 3, [0.2] * 3], atol=1e-6)


def test_networks_stand_one_after_another_and_pick_their_frames(tmp_path: Path) -> None:
    folder = write_extractor(tmp_path, network(frames=(15,)), network(frames=(-1, 0)))
    extractor = load_extractor(folder)
    assert extractor.frame_offsets == (-1, 0, 15)
    features = extractor.extract(snippets_of([0, 102, 255]))
    np.testing.assert_allclose(features, [[1, 1, 1, 0.2, 0.2, 0.2]], atol=1e-6)


# ---- frames ------------------------------------------------------------------------------------


def test_a_frame_is_scaled_by_its_shorter_side_and_cropped(tmp_path: Path) -> None:
    extractor = load_extractor(write_extractor(tmp_path))
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, 32:64] = (200, 100, 50)  # all of the middle third, which is what is kept
    assert extractor.prepare(frame_of(image)).shape == (8, 8, 3)
    inner = extractor.prepare(frame_of(image))[:, 2:6].reshape(-1, 3).astype(int)
    assert np.abs(inner - (200, 100, 50)).max() <= 2
    upright = extractor.prepare(frame_of(np.ascontiguousarray(image.transpose(1, 0, 2))))
    assert np.abs(upright[2:6].reshape(-1, 3).astype(int) - (200, 100, 50)).max() <= 2


def test_a_frame_is_stretched_where_the_manifest_says_so(tmp_path: Path) -> None:
    extractor = load_extractor(write_extractor(tmp_path, short_side=None))
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, :48] = 255
    prepared = extractor.prepare(frame_of(image))
    assert prepared.shape == (8, 8, 3)
    assert prepared[:, :3].min() > 250
    assert prepared[:, 5:].max() < 5


def test_a_frame_of_a_camera_has_its_colours(tmp_path: Path) -> None:
    extractor = load_extractor(write_extractor(tmp_path))
    frame = plain_frame(48, 64, 220, 40, 90).reformat(format="yuv420p")
    assert np.abs(extractor.prepare(frame).astype(int) - (220, 40, 90)).max() <= 3


# ---- what does not fit -------------------------------------------------------------------------


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(ExtractorError) as raised:
        load_extractor(folder, **options)
    return str(raised.value)


def edited(folder: Path, change: Any) -> Path:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))
    return folder


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    assert "extractor.json: file is missing" in refused(tmp_path / "nowhere")
    (tmp_path / MANIFEST).write_text("{")
    assert "extractor.json: expected JSON" in refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(depth=1), "depth: no such key"),
        (lambda m: m["networks"][0].update(std=[1, 1]), "std: expected 3 numbers, one a channel"),
        (lambda m: m["networks"][0].update(std=[1, 1, 0]), "std: expected numbers above 0"),
        (lambda m: m["networks"][0].update(frames=[0, 16]), "frames: expected -1 to 15, came 0 to"),
        (lambda m: m["networks"][0].update(frames=[5, 0]), "frames: expected each once and in"),
        (lambda m: m["networks"][0].update(pooling="none"), "pooling: expected none with a layout"),
        (lambda m: m["networks"][0].update(crop=[9, 8]), "crop: expected at most height and width"),
        (lambda m: m["networks"][0].update(flow=FLOW, frames=[0]), "frames: expected at least"),
        (lambda m: m.update(feature_dim=4), "feature_dim: expected 3, which the networks make"),
        (lambda m: m.update(short_side=4), "short_side: expected at least height and width"),
        (lambda m: m.update(schema_version=2), "schema_version: Input should be 1, got 2"),
        (lambda m: m.pop("width"), "width: Field required"),
        (lambda m: m["files"].update({"../x": "0"}), "expected names of files in the folder"),
        (lambda m: m["files"].update(more=""), "more: cannot be read: No such file"),
        (lambda m: m["files"].clear(), "files: expected the SHA-256 of mean.onnx, came none"),
    ],
)
def test_a_manifest_that_does_not_hold_together(tmp_path: Path, change: Any, said: str) -> None:
    assert said in refused(edited(write_extractor(tmp_path), change))


def test_a_file_that_was_changed(tmp_path: Path) -> None:
    write_extractor(tmp_path)
    with (tmp_path / "mean.onnx").open("ab") as file:
        file.write(b"\0")
    assert "mean.onnx: expected SHA-256 " in refused(tmp_path)


def test_a_file_that_is_no_network(tmp_path: Path) -> None:
    (tmp_path / "mean.onnx").write_bytes(b"nonsense")
    said = refused(write_extractor(tmp_path))
    assert "mean.onnx: no ONNX model that can be run: " in said


def test_a_network_of_another_input(tmp_path: Path) -> None:
    mean_over(tmp_path / "mean.onnx", "NCHW", {"C": 3, "H": 4, "W": 4})
    said = refused(write_extractor(tmp_path))
    assert "expected an input that NCHW = (1, 3, 8, 8) fits, N being 1 or any, got" in said


def test_a_network_of_another_output(tmp_path: Path) -> None:
    said = refused(write_extractor(tmp_path, network(features=4)))
    assert "mean.onnx: expected an output (1, 4), as features of images, got (1, 3)" in said
    said = refused(write_extractor(tmp_path, network(output="logits")))
    assert "mean.onnx: expected an output 'logits', got features" in said


def test_snippets_of_another_shape(tmp_path: Path) -> None:
    extractor = load_extractor(write_extractor(tmp_path))
    with pytest.raises(
        ExtractorError, match=r"expected snippets uint8 \(n, 3, 8, 8, 3\), got uint"
    ):
        extractor.extract(np.zeros((1, 3, 8, 9, 3), np.uint8))
