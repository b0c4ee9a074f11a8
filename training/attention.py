"""Reliability-aware attention (paper, eq. 4 to 6), limited to a band and computed in blocks.

A snippet sees the `past` snippets before it, itself, the `future` ones after it and all
prototypes. Snippets are cut into blocks that are as long as the band reaches; a block sees itself,
the one before and the head of the next, so cost grows with T times the band, not with T squared:

    band past 4, future 1, blocks of 4       queries   keys
    snippets 0 1 2 3 | 4 5 6 7 | 8 9 . .     4 5 6 7   0 1 2 3  4 5 6 7  8  and the prototypes

Without a band (full attention), and in an exported graph, whose windows are hardly longer than the
band, the whole length is one block.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SHORTEST_BLOCK = 16

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
        return x * (bytes_ >= self.dropped).to(x.dtype).mul_(256 / (256 - self.dropped))


class Band:
    """How T snippets are cut into blocks for a band; ``past`` None is full attention.

    Blocks of all recordings of a batch stand one after the other, (B * blocks, block, ...): the
    one before is a view of the same numbers, and where it is of another recording it is not seen.
    """

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

    def bias(self, valid: Tensor, prototype_count: int) -> Tensor:
        """0 where a snippet sees a key and -inf where not, (B * blocks, 1, block, keys).

        ``valid`` is (B, T). Keys are those of the own block, of the one before, the head of the
        next, and the prototypes.
        """
        B = valid.shape[0]
        there = self.padded(valid[..., None])[..., 0].reshape(B * self.blocks, self.block)
        index = torch.arange(self.block, device=valid.device)
        offset = index - index[:, None]  # key position minus query position
        seen = [self._reaches(offset) & there[:, None]]
        if self.blocks > 1:
            number = torch.arange(B * self.blocks, device=valid.device) % self.blocks
            before = there.roll(1, 0) & (number > 0)[:, None]
            after = there.roll(-1, 0) & (number < self.blocks - 1)[:, None]
            head = self.future
            seen.append(self._reaches(offset - self.block) & before[:, None])
            seen.append(self._reaches(offset + self.block)[:, :head] & after[:, None, :head])
        seen.append(seen[0].new_ones(there.shape[0], self.block, prototype_count))
        visible = torch.cat(seen, dim=-1)[:, None]
        return torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, -torch.inf)

    def _reaches(self, offset: Tensor) -> Tensor:
        if self.past is None:
            return torch.ones_like(offset, dtype=torch.bool)
        return (offset >= -self.past) & (offset <= self.future)


class Attended(NamedTuple):
    """What queries attend to: (N, H, block, d) of snippets, (H, C, d) of prototypes."""

    snippets: Tensor
    prototypes: Tensor


def reliability_attention(
    query: Tensor, key: Attended, value: Attended, bias: Tensor, band: Band
) -> Tensor:
    """Eq. 6: softmax(Q K^T / sqrt(d)) V over snippets and prototypes, in blocks.

    ``query`` (N, H, block, d), N = B * blocks; ``bias`` is `Band.bias` -> (N, H, block, d).
    """
    query = query * query.shape[-1] ** -0.5
    L, head = band.block, band.future
    scores = [query @ key.snippets.mT]
    if band.blocks > 1:
        # Shifted by one block; the missing first and last one are invisible.
        before = query[1:] @ key.snippets[:-1].mT
        after = query[:-1] @ key.snippets[1:, :, :head].mT
        scores += [F.pad(before, (0, 0, 0, 0, 0, 0, 1, 0)), F.pad(after, (0, 0, 0, 0, 0, 0, 0, 1))]
    scores.append(query @ key.prototypes.mT)
    weight = (torch.cat(scores, dim=-1) + bias).softmax(dim=-1)
    first = weight.shape[-1] - key.prototypes.shape[-2]  # key that is a prototype
    mixed = weight[..., :L] @ value.snippets + weight[..., first:] @ value.prototypes
    if band.blocks > 1:
        before = weight[1:, ..., L : 2 * L] @ value.snippets[:-1]
        after = weight[:-1, ..., 2 * L : first] @ value.snippets[1:, :, :head]
        mixed = mixed + F.pad(before, (0, 0, 0, 0, 0, 0, 1, 0))
        mixed = mixed + F.pad(after, (0, 0, 0, 0, 0, 0, 0, 1))
    return mixed


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
        query, key, value = (
            self._split(each, band) for each in self.query_key_value(x).chunk(3, dim=-1)
        )
        _, memory_key, memory_value = (  # prototypes ask for nothing
            each.unflatten(-1, (self.heads, -1)).transpose(0, 1)  # (H, C, W / H)
            # As a batch of one: exported as the same product as that of the snippets.
            for each in self.query_key_value(memory[None])[0].chunk(3, dim=-1)
        )
        mixed = reliability_attention(
            query, Attended(key, memory_key), Attended(value, memory_value), bias, band
        )
        mixed = mixed.transpose(1, 2).reshape(B, T, W)
        x = self.attention_norm(x + self.dropout(self.output(mixed)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))

    def _split(self, x: Tensor, band: Band) -> Tensor:
        """(B, T, W) -> (B * blocks, H, block, W / H)."""
        x = x.reshape(x.shape[0] * band.blocks, band.block, self.heads, -1)
        return x.transpose(1, 2)
