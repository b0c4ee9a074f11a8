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

from hrpro.training.config import ModelConfig

EMBEDDING_KERNEL = 3
_FEATURE_LIMIT = 1e4  # standard deviations


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


class SnippetOutput(NamedTuple):
    """What the snippet model says of each position.

    ``scores`` P (B, T, C), ``cas`` S (B, T, C), ``attention`` A (B, T), all in [0, 1];
    ``embedding`` X^e (B, T, W).
    """

    scores: Tensor
    cas: Tensor
    attention: Tensor
    embedding: Tensor


class ReliabilityAwareBlock(nn.Module):
    """Reliability-aware attention block (RAB, eq. 4-6) over snippets and prototypes."""

    def __init__(self, width: int, heads: int, ffn_width: int, dropout: float) -> None:
        super().__init__()
        assert width % heads == 0, (width, heads)
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, ffn_width), nn.GELU(), nn.Dropout(dropout), nn.Linear(ffn_width, width)
        )
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, visible: Tensor) -> Tensor:
        """Snippets (B, T, W), prototypes (C, W), what may be seen (B, T, T + C) -> (B, T, W)."""
        B, T, W = x.shape  # recordings or windows, snippets, width
        C = memory.shape[0]  # prototypes
        keyed = torch.cat([x, memory.expand(B, C, W)], dim=1)  # (B, T + C, W)
        query = self._split(self.query(x))  # (B, H, T, W / H)
        key = self._split(self.key(keyed))  # (B, H, T + C, W / H)
        value = self._split(self.value(keyed))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None])
        mixed = mixed.transpose(1, 2).reshape(B, T, W)
        x = self.attention_norm(x + self.dropout(self.output(mixed)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))

    def _split(self, x: Tensor) -> Tensor:
        B, L, W = x.shape
        return x.reshape(B, L, self.heads, W // self.heads).transpose(1, 2)


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
        self.width = width = config.width or feature_dim
        heads = math.gcd(width, config.attention_heads)  # each has the same share of the width
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_scale", torch.ones(feature_dim))
        self.register_buffer("prototypes", torch.zeros(class_count, feature_dim))
        self.project = nn.Linear(feature_dim, width) if config.width else nn.Identity()
        self.blocks = nn.ModuleList(
            ReliabilityAwareBlock(width, heads, round(config.ffn_ratio * width), config.dropout)
            for _ in range(config.blocks)
        )
        self.embed = nn.Conv1d(width, width, EMBEDDING_KERNEL, padding=EMBEDDING_KERNEL // 2)
        self.dropout = nn.Dropout(config.dropout)
        self.classify = nn.Linear(width, class_count)
        self.attend = nn.Linear(width, 1)

    def forward(self, features: Tensor, valid: Tensor) -> SnippetOutput:
        """See `SnippetOutput`; the memory is the model's own."""
        return self.attend_to(features, valid, self.prototypes)

    def attend_to(self, features: Tensor, valid: Tensor, prototypes: Tensor) -> SnippetOutput:
        """The forward pass with the given prototypes (C, D) in the memory."""
        x = self._input(features)  # (B, T, W)
        memory = self._input(prototypes)  # (C, W)
        visible = self._visible(valid, len(memory))
        for block in self.blocks:
            x = block(x, memory, visible)
        # What is not there counts as zero, as the convolution's own padding does.
        x = torch.where(valid[..., None], x, 0.0)
        embedding = F.relu(self.embed(x.transpose(1, 2)).transpose(1, 2))  # (B, T, W)
        hidden = self.dropout(embedding)
        cas = self.classify(hidden).sigmoid()  # (B, T, C)
        attention = self.attend(hidden).sigmoid()  # (B, T, 1)
        return SnippetOutput(cas * attention, cas, attention[..., 0], embedding)

    def _input(self, features: Tensor) -> Tensor:
        normalised = (features - self.feature_mean) * self.feature_scale
        # Beyond there is no evidence, and what overflows would spread past the band as NaN.
        normalised = normalised.clamp(-_FEATURE_LIMIT, _FEATURE_LIMIT)
        projected: Tensor = self.project(normalised)
        return projected

    def _visible(self, valid: Tensor, prototype_count: int) -> Tensor:
        B, T = valid.shape
        index = torch.arange(T, device=valid.device)
        offset = index[None, :] - index[:, None]  # key position minus query position
        if self.config.attention_past is None:
            band = torch.ones_like(offset, dtype=torch.bool)
        else:
            band = (offset >= -self.config.attention_past) & (
                offset <= self.config.attention_future
            )
        snippets = band[None] & valid[:, None, :]  # (B, T, T)
        return torch.cat([snippets, snippets.new_ones(B, T, prototype_count)], dim=-1)
