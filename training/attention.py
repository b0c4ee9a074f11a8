"""Reliability-aware attention (paper, eq. 4 to 6), limited to a band and computed in blocks.

A snippet sees the `past` snippets before it, itself, the `future` ones after it and all
prototypes. Snippets are cut into blocks; a block needs the tail of the block before it and the head
of the next, so cost grows with T times the band and not with T squared:

    band past 2, future 1, blocks of 4       queries   keys
    snippets 0 1 2 3 | 4 5 6 7 | 8 9 . .     4 5 6 7   2 3 4 5 6 7 8  and the prototypes

Without a band (full attention), and in an exported graph, whose windows are hardly longer than the
band, the whole length is one block.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SHORTEST_BLOCK = 16

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
Activation = Literal["gelu", "relu"]


def reliability_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Eq. 6: softmax(Q K^T / sqrt(d)) V, over what a query may see.

    ``query`` (..., L, d), ``key`` and ``value`` (..., K, d) of snippets and prototypes,
    ``visible`` (..., L, K) bool -> (..., L, d).
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)


class Dropout(nn.Module):
    """Dropout by one random byte a number: `nn.Dropout` draws one after the other on a CPU.

    There it took a quarter of a training step. The share is rounded to 1/256, and what is kept is
    scaled by just that share.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.dropped = round(256 * share)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; nothing is dropped in evaluation."""
        if not self.training or not self.dropped:
            return x
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None)  # all 64 bits
        bytes_ = words.view(torch.uint8)[: x.numel()].view(x.shape)
        return x * (bytes_ >= self.dropped) * (256 / (256 - self.dropped))


class Band:
    """How T snippets are cut into blocks for a band; ``past`` None is full attention."""

    def __init__(self, length: int, past: int | None, future: int) -> None:
        self.length = length
        self.past, self.future = past, future
        self.blocks = 1
        self.block = length
        # The exporter's T is no number: it must not be compared.
        if past is None or torch.compiler.is_exporting():
            return
        block = max(past, future, _SHORTEST_BLOCK)
        if length > 2 * block:
            self.blocks, self.block = -(-length // block), block

    def padded(self, x: Tensor) -> Tensor:
        """(B, T, W) -> (B, blocks * block, W), zeros behind the end."""
        if self.blocks == 1:
            return x
        return F.pad(x, (0, 0, 0, self.blocks * self.block - self.length))

    def visible(self, valid: Tensor, prototype_count: int) -> Tensor:
        """What each snippet may see, (B * blocks, 1, block, keys), from ``valid`` (B, T)."""
        B = valid.shape[0]
        seen = self.neighbours(self.padded(valid[..., None]))[..., 0]  # (B, blocks, keys)
        query = torch.arange(self.block, device=valid.device)
        first = 0 if self.blocks == 1 else -(self.past or 0)
        key = torch.arange(seen.shape[-1], device=valid.device) + first
        offset = key - query[:, None]  # key position minus query position
        if self.past is None:
            band = torch.ones_like(offset, dtype=torch.bool)
        else:
            band = (offset >= -self.past) & (offset <= self.future)
        snippets = (band & seen[:, :, None]).flatten(0, 1)  # (B * blocks, block, keys)
        prototypes = snippets.new_ones(B * self.blocks, self.block, prototype_count)
        return torch.cat([snippets, prototypes], dim=-1)[:, None]

    def neighbours(self, x: Tensor) -> Tensor:
        """(B, blocks * block, W) -> what the blocks see, (B, blocks, past + block + future, W)."""
        x = x.unflatten(1, (self.blocks, self.block))
        if self.blocks == 1:
            return x
        assert self.past is not None
        before = F.pad(x[:, :-1, self.block - self.past :], (0, 0, 0, 0, 1, 0))
        after = F.pad(x[:, 1:, : self.future], (0, 0, 0, 0, 0, 1))
        return torch.cat([before, x, after], dim=2)


class ReliabilityAwareBlock(nn.Module):
    """Reliability-aware attention block (RAB): attention, then FC-activation-FC, each with a
    residual and LayerNorm."""

    def __init__(
        self, width: int, heads: int, ffn_width: int, activation: Activation, dropout: float
    ) -> None:
        super().__init__()
        assert width % heads == 0, (width, heads)
        self.heads = heads
        self.query = nn.Linear(width, width)  # f_q, eq. 4
        self.key_value = nn.Linear(width, 2 * width)  # f_k and f_v, eq. 4 and 5
        self.output = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, ffn_width),
            ACTIVATIONS[activation](),
            Dropout(dropout),
            nn.Linear(ffn_width, width),
        )
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, visible: Tensor, band: Band) -> Tensor:
        """Snippets (B, T, W), padded to blocks, and prototypes (C, W) -> (B, T, W).

        ``visible`` is `Band.visible`, the same for all blocks of the model.
        """
        B, T, W = x.shape  # recordings or windows, snippets, width
        query = self.query(x).reshape(B * band.blocks, band.block, self.heads, -1)
        seen = band.neighbours(self.key_value(x))  # (B, blocks, keys, 2 W)
        prototypes = self.key_value(memory).expand(B, band.blocks, -1, -1)
        keyed = torch.cat([seen, prototypes], dim=2).flatten(0, 1)
        keyed = keyed.unflatten(-1, (2 * self.heads, -1)).transpose(1, 2)
        key, value = keyed.chunk(2, dim=1)  # (B * blocks, H, keys + C, W / H) each
        mixed = reliability_attention(query.transpose(1, 2), key, value, visible)
        mixed = mixed.transpose(1, 2).reshape(B, T, W)
        x = self.attention_norm(x + self.dropout(self.output(mixed)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
