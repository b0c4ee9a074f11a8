"""Reliability-aware attention (paper, eq. 4 to 6), limited to a band and computed in blocks.

A snippet sees the `past` snippets before it, itself, the `future` ones after it and all
prototypes. Snippets are cut into blocks; a block sees itself, the tail of the one before and the
head of the next, so cost grows with T times the band, not with T squared:

    band past 2, future 1, blocks of 4       queries   keys
    snippets 0 1 2 3 | 4 5 6 7 | 8 9 . .     4 5 6 7   2 3  4 5 6 7  8  and the prototypes

Without a band (full attention), and in an exported graph, whose windows are hardly longer than the
band, the whole length is one block.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SHORTEST_BLOCK = 64  # as quick as 32 for a band of 32; a shorter band makes no tiny products

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
Activation = Literal["gelu", "relu"]


class Dropout(nn.Module):
    """Dropout by one random byte a number: `nn.Dropout` draws one after the other on a CPU.

    There it took a quarter of a training step. The share is rounded to 1/256, at most 255 of them,
    and what is kept is scaled by just that share.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.dropped = min(round(256 * share), 255)  # something is always kept

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; nothing is dropped in evaluation."""
        if not self.training or not self.dropped:
            return x
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None)  # all 64 bits
        bytes_ = words.view(torch.uint8)[: x.numel()].view(x.shape)
        # A comparison into bytes, and then those into numbers, takes three times as long.
        kept = torch.ge(bytes_, self.dropped, out=torch.empty_like(x))
        return x * kept.mul_(256 / (256 - self.dropped))


class Band:
    """How T snippets are cut into blocks for a band; ``past`` None is full attention."""

    def __init__(self, length: int, past: int | None, future: int) -> None:
        self.length = length
        self.past, self.future = past, future
        self.blocks, self.block = 1, length
        self.before = self.after = 0  # how many snippets around it a block sees
        # The exporter's T is no number: it must not be compared.
        if past is None or torch.compiler.is_exporting():
            return
        # At least as long as the band: no block sees further than its neighbours.
        blocks = length // max(past, future, _SHORTEST_BLOCK)
        if blocks > 1:
            self.blocks, self.block = blocks, -(-length // blocks)
            self.before, self.after = past, future

    def padded(self, x: Tensor) -> Tensor:
        """(B, T, W) -> (B, blocks * block, W), zeros behind the end."""
        if self.blocks == 1:
            return x
        return F.pad(x, (0, 0, 0, self.blocks * self.block - self.length))

    def around(self, x: Tensor, memory: Tensor, heads: int) -> Tensor:
        """What each block sees: (B, blocks * block, W), (C, W) -> (B * blocks, H, keys, W / H).

        Keys are those before the block (zeros where nothing is), its own, those after it, and
        the memory.
        """
        if self.blocks == 1:
            return by_heads(torch.cat([x, memory.expand(x.shape[0], -1, -1)], dim=1), heads)
        seen: Tensor = _Around.apply(x, memory, self, heads)
        return seen

    def bias(self, valid: Tensor, prototype_count: int) -> Tensor:
        """0 where a snippet sees a key and -inf where not, (B * blocks, 1, block, keys).

        ``valid`` is (B, T); keys are those of `around`.
        """
        # (B * blocks, 1, keys, 1)
        there = self.around(self.padded(valid[..., None]), valid.new_ones(prototype_count, 1), 1)
        query = torch.arange(self.block, device=valid.device)
        key = torch.arange(-self.before, self.block + self.after, device=valid.device)
        reached = F.pad(self._reaches(key - query[:, None]), (0, prototype_count), value=True)
        return torch.where(there.mT & reached, 0.0, -torch.inf)

    def _reaches(self, offset: Tensor) -> Tensor:
        if self.past is None:
            return torch.ones_like(offset, dtype=torch.bool)
        return (offset >= -self.past) & (offset <= self.future)


class _Around(torch.autograd.Function):
    """`Band.around` of several blocks, with one pass over memory each way: as slices, padded and
    joined, all that is between would be written too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: Tensor, band: Band, heads: int) -> Tensor:
        ctx.band = band
        own = slice(band.before, band.before + band.block)
        after = slice(own.stop, own.stop + band.after)
        x = x.unflatten(1, (band.blocks, band.block)).unflatten(-1, (heads, -1))
        x = x.transpose(2, 3)  # (B, blocks, H, block, W / H)
        seen = x.new_empty(*x.shape[:3], after.stop + len(memory), x.shape[-1])
        seen[:, 0, :, : band.before] = 0
        seen[:, 1:, :, : band.before] = x[:, :-1, :, band.block - band.before :]
        seen[..., own, :] = x
        seen[:, :-1, :, after] = x[:, 1:, :, : band.after]
        seen[:, -1, :, after] = 0
        seen[..., after.stop :, :] = by_heads(memory, heads)
        return seen.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        band: Band = ctx.band
        own = slice(band.before, band.before + band.block)
        after = slice(own.stop, own.stop + band.after)
        # (B, blocks, keys, H, W / H)
        gradient = gradient.unflatten(0, (-1, band.blocks)).transpose(2, 3)
        x = gradient[:, :, own].clone(memory_format=torch.contiguous_format)
        x[:, :-1, band.block - band.before :] += gradient[:, 1:, : band.before]
        x[:, 1:, : band.after] += gradient[:, :-1, after]
        memory = gradient[:, :, after.stop :].sum(dim=(0, 1))
        return x.flatten(1, 2).flatten(2), memory.flatten(1), None, None


def by_heads(x: Tensor, heads: int) -> Tensor:
    """(..., L, W) -> (..., H, L, W / H)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def reliability_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Eq. 6: softmax(Q K^T / sqrt(d)) V over snippets and prototypes, in blocks.

    ``query`` (N, H, block, d), ``key`` and ``value`` (N, H, keys, d), N = B * blocks; ``bias`` is
    `Band.bias`, of the same type -> (N, H, block, d).
    """
    query = query * query.shape[-1] ** -0.5
    if torch.is_grad_enabled() and not torch.compiler.is_exporting():
        mixed: Tensor = _Attention.apply(query, key, value, bias)
        return mixed
    return (query @ key.mT + bias).softmax(dim=-1) @ value


class _Attention(torch.autograd.Function):
    """`reliability_attention` of scaled queries, with a gradient of two passes over the weights.

    That of torch's softmax takes half as long again as the whole gradient here, and that of its
    scaled_dot_product_attention, with a bias on a CPU, seven times as long.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        # Products would copy what is not contiguous, here and in the gradient once more.
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        # Autocast would make softmax float32; inside, torch computes in float32 anyway.
        with torch.autocast(query.device.type, enabled=False):
            weights = (query @ key.mT).add_(bias).softmax(dim=-1)
            mixed = weights @ value
        ctx.save_for_backward(query, key, value, weights, mixed)
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, weights, mixed = ctx.saved_tensors
        gradient = gradient.contiguous()
        # dS = P * (dP - rowsum(dP * P)), and rowsum(dP * P) = rowsum(dO * O)
        scores = gradient @ value.mT
        scores.sub_((gradient * mixed).sum(dim=-1, keepdim=True)).mul_(weights)
        return scores @ key, scores.mT @ query, weights.mT @ gradient, None


class ReliabilityAwareBlock(nn.Module):
    """Reliability-aware attention block (RAB): attention, then FC-activation-FC, each with a
    residual and LayerNorm."""

    def __init__(
        self, width: int, heads: int, ffn_width: int, activation: Activation, dropout: float
    ) -> None:
        super().__init__()
        assert width % heads == 0, (width, heads)
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)  # f_q, eq. 4, f_k and f_v, eq. 5
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

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor, band: Band) -> Tensor:
        """Snippets (B, T, W), padded to blocks, and prototypes (C, W) -> (B, T, W).

        ``bias`` is `Band.bias`, the same for all blocks of the model.
        """
        B, T, W = x.shape  # recordings or windows, snippets, width
        query, key, value = self.query_key_value(x).chunk(3, dim=-1)
        # As a batch of one: exported as the same product as that of the snippets. Prototypes ask
        # for nothing.
        _, memory_key, memory_value = self.query_key_value(memory[None])[0].chunk(3, dim=-1)
        mixed = reliability_attention(
            by_heads(query.reshape(B * band.blocks, band.block, W), self.heads),
            band.around(key, memory_key, self.heads),
            band.around(value, memory_value, self.heads),
            bias,
        )
        return self.after_attention(x, mixed.transpose(1, 2).reshape(B, T, W))

    def after_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows eq. 6: its outcome (B, T, W) joins the snippets, and the feed-forward
        layer."""
        x = self.attention_norm(x + self.dropout(self.output(mixed)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
