"""I3D (Carreira and Zisserman, *Quo Vadis, Action Recognition?*, CVPR 2017) and its weights.

Names and shapes of the weights are those of the PyTorch release rgb_imagenet.pt and
flow_imagenet.pt (trained on ImageNet and Kinetics-400), padding is TensorFlow's.

    WeightsError    a file is not one of these
"""

from __future__ import annotations

import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hrpro.engine.wire import HrproError
from hrpro.export.tracing import Folded

FEATURES = 1024
FRAMES, SIDE = 16, 224
Stream = Literal["rgb", "flow"]
CHANNELS: dict[Stream, int] = {"rgb": 3, "flow": 2}
_NORM_EPSILON = 1e-3
_FIRST = "Conv3d_1a_7x7"
# The classifier is not used, and files of old versions of torch do not count batches.
_UNUSED = ("logits.", "num_batches_tracked")
_NAMED = 3  # of the weights that do not fit

# Widths of an inception block: 1x1; 1x1 and 3x3; 1x1 and 3x3; 1x1 behind the pooling.
_Widths = tuple[int, int, int, int, int, int]
_BLOCKS: dict[str, _Widths] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Kernel and stride of the pooling that stands before a block.
_Sizes = tuple[int, int, int]
_POOLS: dict[str, tuple[str, _Sizes, _Sizes]] = {
    "Mixed_3b": ("MaxPool3d_3a_3x3", (1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ("MaxPool3d_4a_3x3", (3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ("MaxPool3d_5a_2x2", (2, 2, 2), (2, 2, 2)),
}


class WeightsError(HrproError, ValueError):
    """A file that does not hold the weights of this network."""


class I3D(nn.Sequential):
    """One stream: clips (N, C, 16, 224, 224) -> features (N, 1024), the classifier's input.

    A frame of 224 x 224 has become one of 7 x 7 and 16 frames 2 there; the mean is over all.
    """

    def __init__(self, channels: int) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers[_FIRST] = _Unit(channels, 64, 7, stride=2)
        layers["MaxPool3d_2a_3x3"] = _SamePool((1, 3, 3), (1, 2, 2))
        layers["Conv3d_2b_1x1"] = _Unit(64, 64, 1)
        layers["Conv3d_2c_3x3"] = _Unit(64, 192, 3)
        width = 192
        for name, widths in _BLOCKS.items():
            if name in _POOLS:
                pool, kernel, stride = _POOLS[name]
                layers[pool] = _SamePool(kernel, stride)
            layers[name] = _Inception(width, widths)
            width = widths[0] + widths[2] + widths[4] + widths[5]
        super().__init__(layers)

    def forward(self, clips: Tensor) -> Tensor:
        """See the class."""
        features: Tensor = super().forward(clips).mean(dim=(2, 3, 4))
        return features


class _Unit(Folded):
    """Convolution, batch normalisation, ReLU."""

    FOLDED: ClassVar = {"conv3d": "bn"}

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, width, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(width, eps=_NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        padded = _same(x, self.conv3d.kernel_size, self.conv3d.stride)
        return F.relu(self.bn(self.conv3d(padded)))


class _SamePool(nn.Module):
    """The largest of each neighbourhood, among zeros: behind a ReLU these change nothing."""

    def __init__(self, kernel: _Sizes, stride: _Sizes) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(_same(x, self.kernel, self.stride), self.kernel, self.stride)


class _Inception(nn.Module):
    """Four branches side by side."""

    def __init__(self, channels: int, widths: _Widths) -> None:
        super().__init__()
        self.b0 = _Unit(channels, widths[0], 1)
        self.b1a = _Unit(channels, widths[1], 1)
        self.b1b = _Unit(widths[1], widths[2], 3)
        self.b2a = _Unit(channels, widths[3], 1)
        self.b2b = _Unit(widths[3], widths[4], 3)
        self.b3a = _SamePool((3, 3, 3), (1, 1, 1))
        self.b3b = _Unit(channels, widths[5], 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.b0(x),
            self.b1b(self.b1a(x)),
            self.b2b(self.b2a(x)),
            self.b3b(self.b3a(x)),
        )
        return torch.cat(branches, dim=1)


def _same(x: Tensor, kernel: Any, stride: Any) -> Tensor:
    """Zeros around x (N, C, T, H, W) for an output of ceil(size / stride); more at the end."""
    sides: list[int] = []
    for size, k, s in zip(x.shape[:1:-1], reversed(kernel), reversed(stride), strict=True):
        total = max(k - (size % s or s), 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)


def read_i3d(path: Path, stream: Stream) -> I3D:
    """The network of a stream with the weights of a file. Raises WeightsError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what comes of a file is checked below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path}: file is missing; expected {stream}_imagenet.pt") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: expected weights of PyTorch: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(each, Tensor) for each in state.values()):
        raise WeightsError(f"{path}: expected a state dict of PyTorch, tensors by name")
    model = I3D(CHANNELS[stream])
    _check(path, stream, state, model)
    own = model.state_dict()
    model.load_state_dict({name: state[name] for name in own if not _unused(name)}, strict=False)
    return model.eval()


def _check(path: Path, stream: Stream, state: dict[str, Tensor], model: I3D) -> None:
    first = state.get(f"{_FIRST}.conv3d.weight")
    if first is not None and first.ndim == 5 and first.shape[1] != CHANNELS[stream]:
        of = {count: name for name, count in CHANNELS.items()}.get(first.shape[1], "another")
        raise WeightsError(
            f"{path}: expected the {stream} stream, with {CHANNELS[stream]} channels, got "
            f"{first.shape[1]}, those of the {of} stream; expected are RGB.pt, then FLOW.pt"
        )
    expected = {
        name: tuple(value.shape) for name, value in model.state_dict().items() if not _unused(name)
    }
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected and not _unused(name)],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {shape}"
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != shape
        ],
    }
    said = "; ".join(
        f"{len(names)} {what}: {', '.join(names[:_NAMED])}{', ...' if names[_NAMED:] else ''}"
        for what, names in problems.items()
        if names
    )
    if said:
        raise WeightsError(f"{path}: not the weights of I3D's {stream} stream: {said}")


def _unused(name: str) -> bool:
    return name.startswith(_UNUSED[0]) or name.endswith(_UNUSED[1])
