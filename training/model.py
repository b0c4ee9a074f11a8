"""The snippet model of HR-Pro's first stage (paper, section "Snippet-level Action Discrimination
Learning"), with attention limited to a band so that a window can give the same scores as the
whole recording.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hrpro.training.attention import Band, Dropout, ReliabilityAwareBlock
from hrpro.training.config import ModelConfig

EMBEDDING_KERNEL = 3
_FEATURE_LIMIT = 1e4  # standard deviations
# A model that attends to everything is exact nowhere; so much before and after is given to it.
_FULL_ATTENTION = (64, 4)


def band_reach(config: ModelConfig) -> tuple[int, int] | None:
    """How many snippets before and after a position its outputs depend on; None: all of them.

    Each block reaches attention_past back and attention_future ahead, the convolution of the
    embedding half its kernel both ways.
    """
    if config.attention_past is None:
        return None
    reach = EMBEDDING_KERNEL // 2
    return (
        config.blocks * config.attention_past + reach,
        config.blocks * config.attention_future + reach,
    )


def window_reach(config: ModelConfig) -> tuple[int, int]:
    """How many snippets a window has before and after its hop: the reach of a band, or, without
    one, where nothing is exact, what is given to it."""
    return band_reach(config) or _FULL_ATTENTION


class SnippetOutput(NamedTuple):
    """What the snippet model says of each position.

    ``scores`` P (B, T, C), ``cas`` S (B, T, C), ``attention`` A (B, T), all in [0, 1];
    ``embedding`` X^e (B, T, W).
    """

    scores: Tensor
    cas: Tensor
    attention: Tensor
    embedding: Tensor


class SnippetModel(nn.Module):
    """Snippet features (B, T, D) and their validity (B, T) -> scores of each position."""

    feature_mean: Tensor
    feature_scale: Tensor
    prototypes: Tensor

    def __init__(self, feature_dim: int, class_count: int, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_dim = feature_dim
        self.class_count = class_count
        # Lean is 512 for the 2048 features of two-stream I3D.
        own = feature_dim if config.size == "full" else max(1, feature_dim // 4)
        self.width = width = config.width or own
        heads = math.gcd(width, config.attention_heads)  # each has the same share of the width
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_scale", torch.ones(feature_dim))
        self.register_buffer("prototypes", torch.zeros(class_count, feature_dim))
        self.project = nn.Identity() if width == feature_dim else nn.Linear(feature_dim, width)
        self.blocks = nn.ModuleList(
            ReliabilityAwareBlock(
                width, heads, config.ffn_width or 2 * width, config.activation, config.dropout
            )
            for _ in range(config.blocks)
        )
        self.embed = nn.Conv1d(width, width, EMBEDDING_KERNEL, padding=EMBEDDING_KERNEL // 2)
        self.dropout = Dropout(config.dropout)
        self.classify = nn.Linear(width, class_count)
        self.attend = nn.Linear(width, 1)

    def forward(self, features: Tensor, valid: Tensor) -> SnippetOutput:
        """See `SnippetOutput`; the memory is the model's own."""
        return self.attend_to(features, valid, self.prototypes)

    def attend_to(self, features: Tensor, valid: Tensor, prototypes: Tensor) -> SnippetOutput:
        """The forward pass with the given prototypes (C, D) in the memory."""
        x = self.normalised(features)  # (B, T, W)
        # As a batch of one: exported as the same product as that of the snippets.
        memory = self.normalised(prototypes[None])[0]  # (C, W)
        band = Band(x.shape[1], self.config.attention_past, self.config.attention_future)
        bias = band.bias(valid, len(memory))
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # The residuals too: float32 beside the products would be converted at each of them.
            dtype = torch.get_autocast_dtype(device)
            x, memory, bias = (each.to(dtype) for each in (x, memory, bias))
        x = band.padded(x)
        for block in self.blocks:
            x = block(x, memory, bias, band)
        x = x[:, : band.length]
        # What is not there counts as zero, as the convolution's own padding does.
        x = torch.where(valid[..., None], x, 0.0)
        around = EMBEDDING_KERNEL // 2
        return self.outputs(self.embedding(F.pad(x, (0, 0, around, around))))

    def embedding(self, x: Tensor) -> Tensor:
        """X^e (B, T, W) of blocks' outputs (B, T + 2, W), one more before and after.

        The convolution is one matrix product: that is quicker on a CPU, and can be quantised.
        """
        length = x.shape[1] - EMBEDDING_KERNEL + 1
        shifted = torch.cat([x[:, k : k + length] for k in range(EMBEDDING_KERNEL)], dim=-1)
        weight = self.embed.weight.transpose(1, 2).flatten(1)
        return F.relu(F.linear(shifted, weight, self.embed.bias))

    def outputs(self, embedding: Tensor) -> SnippetOutput:
        """What the heads say of X^e (B, T, W)."""
        hidden = self.dropout(embedding)
        # In float32 also where products are bfloat16, which cannot tell 0.998 from 1.
        cas = self.classify(hidden).float().sigmoid()  # (B, T, C)
        attention = self.attend(hidden).float().sigmoid()  # (B, T, 1)
        return SnippetOutput(cas * attention, cas, attention[..., 0], embedding.float())

    def normalised(self, features: Tensor) -> Tensor:
        """What the first block sees of features (..., D): (..., W)."""
        normalised = (features - self.feature_mean) * self.feature_scale
        # Beyond there is no evidence, and what overflows would spread past the band as NaN.
        normalised = normalised.clamp(-_FEATURE_LIMIT, _FEATURE_LIMIT)
        projected: Tensor = self.project(normalised)
        return projected
