"""I3D: names and shapes of the published weights, its arithmetic, and the extractor made of it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from commands import refusal
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hrpro.clients.cameras.extractor import Extractor, load_extractor
from hrpro.clients.cameras.import_i3d import import_i3d
from hrpro.export.i3d import CHANNELS, I3D, Stream, WeightsError, _same, read_i3d

# Input and output channels of the units of each block, as published: 1x1; 1x1, 3x3; 1x1, 3x3; 1x1.
MIXED = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}


def units(channels: int) -> Iterator[tuple[str, int, int, int]]:
    """Name, input channels, output channels and kernel of all convolutions behind which a
    normalisation stands."""
    yield "Conv3d_1a_7x7", channels, 64, 7
    yield "Conv3d_2b_1x1", 64, 64, 1
    yield "Conv3d_2c_3x3", 64, 192, 3
    for block, (into, b0, b1a, b1b, b2a, b2b, b3b) in MIXED.items():
        yield f"{block}.b0", into, b0, 1
        yield f"{block}.b1a", into, b1a, 1
        yield f"{block}.b1b", b1a, b1b, 3
        yield f"{block}.b2a", into, b2a, 1
        yield f"{block}.b2b", b2a, b2b, 3
        yield f"{block}.b3b", into, b3b, 1


def published(stream: Stream) -> dict[str, Tensor]:
    """Random weights with the names and shapes of the release's file, which counts no batches."""
    random = torch.Generator().manual_seed(CHANNELS[stream])

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=random) * (high - low) + low

    state = {}
    for name, into, out, kernel in units(CHANNELS[stream]):
        bound = (3 / (into * kernel**3)) ** 0.5 * 1.4
        state[f"{name}.conv3d.weight"] = uniform(-bound, bound, out, into, kernel, kernel, kernel)
        state[f"{name}.bn.weight"] = uniform(0.5, 1.5, out)
        state[f"{name}.bn.bias"] = uniform(-0.1, 0.1, out)
        state[f"{name}.bn.running_mean"] = uniform(-0.1, 0.1, out)
        state[f"{name}.bn.running_var"] = uniform(0.5, 1.5, out)
    state["logits.conv3d.weight"] = torch.zeros(400, 1024, 1, 1, 1)
    state["logits.conv3d.bias"] = torch.zeros(400)
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[Stream, Path]:
    folder = tmp_path_factory.mktemp("weights")
    paths: dict[Stream, Path] = {}
    for stream in CHANNELS:
        paths[stream] = folder / f"{stream}_imagenet.pt"
        torch.save(published(stream), paths[stream])
    return paths


@pytest.fixture(scope="module")
def folder(files: dict[Stream, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("extractors") / "i3d"
    import_i3d(files["rgb"], files["flow"], out, "dis")
    return out


@pytest.fixture(scope="module")
def extractor(folder: Path) -> Extractor:
    return load_extractor(folder)


# ---- the network -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", list(CHANNELS))
def test_every_published_weight_has_its_place(stream: Stream, files: dict[Stream, Path]) -> None:
    own = read_i3d(files[stream], stream).state_dict()
    for name, value in published(stream).items():
        if not name.startswith("logits."):
            torch.testing.assert_close(own.pop(name), value, rtol=0, atol=0)
    assert all(name.endswith("num_batches_tracked") for name in own)
    assert len(own) == 57


def test_a_file_of_a_newer_torch_counts_batches(tmp_path: Path) -> None:
    state = published("rgb")
    for name, *_ in units(3):
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)
    torch.save(state, tmp_path / "rgb.pt")
    read_i3d(tmp_path / "rgb.pt", "rgb")


def test_sizes_on_the_way() -> None:
    with torch.device("meta"):
        x, network = torch.zeros(2, 3, 16, 224, 224), I3D(3).eval()
    sizes = {}
    for name, layer in network.named_children():
        x = layer(x)
        sizes[name] = tuple(x.shape[1:])
    assert sizes["Conv3d_1a_7x7"] == (64, 8, 112, 112)
    assert sizes["MaxPool3d_2a_3x3"] == (64, 8, 56, 56)
    assert sizes["Conv3d_2c_3x3"] == (192, 8, 56, 56)
    assert sizes["MaxPool3d_3a_3x3"] == (192, 8, 28, 28)
    assert sizes["Mixed_3c"] == (480, 8, 28, 28)
    assert sizes["MaxPool3d_4a_3x3"] == (480, 4, 14, 14)
    assert sizes["Mixed_4f"] == (832, 4, 14, 14)
    assert sizes["MaxPool3d_5a_2x2"] == (832, 2, 7, 7)
    assert sizes["Mixed_5c"] == (1024, 2, 7, 7)
    assert list(sizes) == [
        "Conv3d_1a_7x7", "MaxPool3d_2a_3x3", "Conv3d_2b_1x1", "Conv3d_2c_3x3",
        "MaxPool3d_3a_3x3", "Mixed_3b", "Mixed_3c", "MaxPool3d_4a_3x3", "Mixed_4b", "Mixed_4c",
        "Mixed_4d", "Mixed_4e", "Mixed_4f", "MaxPool3d_5a_2x2", "Mixed_5b", "Mixed_5c",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "before", "behind"),
    [
        (224, 7, 2, 2, 3),  # the first convolution: one more at the end
        (5, 3, 2, 1, 1),  # an odd size
        (4, 3, 2, 0, 1),
        (6, 3, 1, 1, 1),
        (6, 2, 2, 0, 0),
        (5, 2, 2, 0, 1),
        (5, 1, 1, 0, 0),
    ],
)
def test_padding_is_that_of_tensorflow(
    size: int, kernel: int, stride: int, before: int, behind: int
) -> None:
    for axis in range(3):
        shape, kernels, strides = [1, 1, 1], [1, 1, 1], [1, 1, 1]
        shape[axis], kernels[axis], strides[axis] = size, kernel, stride
        padded = _same(torch.ones(1, 1, *shape), kernels, strides)
        expected = torch.cat([torch.zeros(before), torch.ones(size), torch.zeros(behind)])
        assert torch.equal(padded.flatten(), expected)
        assert padded.shape[2 + axis] == before + size + behind


def test_a_unit_normalises_with_its_epsilon() -> None:
    unit = I3D(2).eval()[0]
    state = published("flow")
    own = {k.removeprefix("Conv3d_1a_7x7."): v for k, v in state.items() if "_1a_" in k}
    unit.load_state_dict(own, strict=False)
    x = torch.rand(1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    y = F.conv3d(F.pad(x, (2, 3) * 3), own["conv3d.weight"], stride=2)
    by_channel = {k: v[:, None, None, None] for k, v in own.items() if k.startswith("bn.")}
    y = (y - by_channel["bn.running_mean"]) / (by_channel["bn.running_var"] + 1e-3).sqrt()
    y = (y * by_channel["bn.weight"] + by_channel["bn.bias"]).clamp(min=0)
    with torch.inference_mode():
        torch.testing.assert_close(unit(x), y, rtol=1e-5, atol=1e-5)


# ---- the extractor -----------------------------------------------------------------------------


def test_an_imported_extractor_says_what_it_is(extractor: Extractor) -> None:
    assert (extractor.name, extractor.feature_dim) == ("i3d-dis", 2048)
    assert extractor.frame_offsets == tuple(range(-1, 16))
    assert (extractor.height, extractor.width) == (256, 256)
    assert (extractor.clock.frames_per_s, extractor.clock.snippet_frames) == (25, 16)


def moving(extractor: Extractor) -> NDArray[np.uint8]:
    """One snippet (1, 17, 256, 256, 3) of clouds that drift."""
    random = np.random.default_rng(3)
    clouds = cv2.resize(random.integers(0, 256, (40, 40, 3), dtype=np.uint8), (320, 320))
    frames = [clouds[n : n + 256, 2 * n : 2 * n + 256] for n in range(17)]
    return np.stack(frames)[None]


def test_features_are_those_of_torch(extractor: Extractor, files: dict[Stream, Path]) -> None:
    snippet = moving(extractor)
    got = extractor.extract(snippet)
    assert got.shape == (1, 2048)

    frames = snippet[0]
    colours = torch.from_numpy(frames[1:, 16:240, 16:240].astype(np.float32) / 127.5 - 1)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = np.stack([dis.calc(grey[n], grey[n + 1], None) for n in range(16)])
    assert np.abs(np.median(flows, axis=(0, 1, 2)) - (-2, -1)).max() < 0.1
    motion = torch.from_numpy(flows[:, 16:240, 16:240].clip(-20, 20) / 20)
    with torch.inference_mode():
        for part, stream, images in ((0, "rgb", colours), (1, "flow", motion)):
            model = read_i3d(files[stream], stream)  # type: ignore[index,arg-type]
            expected = model(images.permute(3, 0, 1, 2)[None]).numpy()
            assert np.abs(expected).max() > 0.01
            np.testing.assert_allclose(
                got[:, 1024 * part :][:, :1024], expected, atol=1e-4 * np.abs(expected).max()
            )


def test_an_extractor_is_not_overwritten(files: dict[Stream, Path], folder: Path) -> None:
    with pytest.raises(FileExistsError, match="is there already"):
        import_i3d(files["rgb"], files["flow"], folder, "dis")


# ---- files that are something else -------------------------------------------------------------


def refused(path: Path, stream: Stream = "rgb") -> str:
    with pytest.raises(WeightsError) as raised:
        read_i3d(path, stream)
    return str(raised.value)


def test_streams_that_are_swapped(files: dict[Stream, Path], tmp_path: Path) -> None:
    said = refusal(
        "features", "import-i3d", files["flow"], files["rgb"], "--out", tmp_path / "out"
    )  # fmt: skip
    assert said == (
        f"{files['flow']}: expected the rgb stream, with 3 channels, got 2, those of the flow "
        "stream; expected are RGB.pt, then FLOW.pt"
    )
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = published("rgb")
    for name in [name for name in state if name.startswith("Mixed_5c.b0")]:
        del state[name]
    state["Mixed_3b.b1b.conv3d.weight"] = torch.zeros(128, 95, 3, 3, 3)
    state["fc.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "odd.pt")
    assert refused(tmp_path / "odd.pt") == (
        f"{tmp_path / 'odd.pt'}: not the weights of I3D's rgb stream: "
        "5 missing: Mixed_5c.b0.conv3d.weight, Mixed_5c.b0.bn.weight, Mixed_5c.b0.bn.bias, ...; "
        "1 unexpected: fc.weight; 1 of another shape: Mixed_3b.b1b.conv3d.weight "
        "(128, 95, 3, 3, 3) instead of (128, 96, 3, 3, 3)"
    )


class Anything:
    """What a file may not bring to life."""


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "rgb.pt"
    assert "rgb.pt: file is missing" in refused(path)
    path.write_bytes(b"nonsense")
    assert "rgb.pt: expected weights of PyTorch: " in refused(path)
    path.write_bytes(pickle.dumps({"x": 1}))
    assert "rgb.pt: expected weights of PyTorch: " in refused(path)
    torch.save({"model": Anything()}, path)
    assert "rgb.pt: expected weights of PyTorch: " in refused(path)
    torch.save({"model": published("rgb")}, path)
    assert "rgb.pt: expected a state dict of PyTorch, tensors by name" in refused(path)
    torch.save(published("rgb"), path)
    path.write_bytes(path.read_bytes()[:100_000])
    assert "rgb.pt: expected weights of PyTorch: " in refused(path)
