"""The snippet model one step at a time: what is known of the past is kept, not computed again.

Attention looks at no more than a band, so the keys and values of the newest snippets are all that
a new one needs of the past. A step takes the n newest snippets of B streams and gives the outputs
of the n positions that have become final by them, which lie `delay` snippets back:

    arrivals       ... a-2  a-1 |  a   a+1  ...  a+n-1          the new snippets
    final                  a-delay  ...  a+n-1-delay            delay = blocks * future + 1

Each block is `future` behind the one before, and keeps its `reach` = past + future newest keys and
values, in any order: there is no positional encoding. The row with arrival index u stands at
u % `capacity`, so the host overwrites the oldest row in place, and nothing is shifted.

Streams do not see each other, and what is final depends on no later snippet: rows behind the last
real one of a stream may hold anything, and what comes of them is to be ignored. (What waits and the
tail are those of the last n rows: only a stream that has ended can have fewer real ones.)
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hrpro.export.bundle import StepLayout
from hrpro.training.attention import ReliabilityAwareBlock, by_heads
from hrpro.training.model import EMBEDDING_KERNEL, SnippetModel, SnippetOutput

TAIL = EMBEDDING_KERNEL - 1  # rows that the convolution keeps


class StepModel(nn.Module):
    """A `SnippetModel` whose attention has a band, with its past as an input.

    ``capacity`` rows of each block's keys and values are kept, and ``history`` flags of the past.
    Raises ValueError for a model with full attention, which needs all of it.
    """

    def __init__(self, model: SnippetModel) -> None:
        super().__init__()
        config = model.config
        if config.attention_past is None:
            raise ValueError("a model with full attention has no step: expected attention_past")
        self.model = model
        self.future = config.attention_future
        self.reach = config.attention_past + self.future
        self.capacity = max(1, self.reach)
        self.history = self.capacity + config.blocks * self.future
        self.delay = config.blocks * self.future + EMBEDDING_KERNEL // 2

    def empty_state(self, streams: int) -> list[Tensor]:
        """State before the first snippet, in the order of `state_names`; zeros.

        Keys and values (B, H, capacity, W / H) of each block, where there is a future the rows
        (B, future, W) of each block that wait for it, and the tail (B, 2, W) of the convolution.
        """
        width = self.model.width
        state = []
        for block in self._blocks():
            rows = (streams, block.heads, self.capacity, width // block.heads)
            state += [torch.zeros(rows), torch.zeros(rows)]
            if self.future:
                state.append(torch.zeros(streams, self.future, width))
        return [*state, torch.zeros(streams, TAIL, width)]

    def state_names(self) -> list[str]:
        """Of the parts of the state."""
        names = []
        for n in range(len(self.model.blocks)):
            names += [f"keys_{n}", f"values_{n}"]
            names += [f"waiting_{n}"] if self.future else []
        return [*names, "tail"]

    def layout(self) -> StepLayout:
        """Of the state of one stream, for the manifest."""
        shapes = [tuple(each.shape[1:]) for each in self.empty_state(1)]
        return StepLayout(
            history=self.history,
            capacity=self.capacity,
            state=dict(zip(self.state_names(), shapes, strict=True)),
            # What another stream adds: keys and values of the prototypes are computed once.
            snippet_flops=self._step_flops(2) - self._step_flops(1),
        )

    def _step_flops(self, streams: int) -> int:
        """What a step of one snippet of streams computes, in matrix products."""
        features = torch.zeros(streams, 1, self.model.feature_dim)
        valid = torch.ones(streams, self.history + 1, dtype=torch.bool)
        arrival = torch.zeros(streams, dtype=torch.int64)
        state = self.empty_state(streams)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self(features, valid, arrival, state, self.model.prototypes)
        return int(counter.get_total_flops())

    def forward(
        self,
        features: Tensor,
        valid: Tensor,
        arrival: Tensor,
        state: list[Tensor],
        prototypes: Tensor,
    ) -> tuple[SnippetOutput, list[Tensor]]:
        """Features (B, n, D) -> outputs of n positions, and what is new of the state.

        ``valid`` (B, history + n) says which snippets are there, the ``history`` before these n
        among them; ``arrival`` (B,) is the arrival index of the first of them, or that modulo
        ``capacity``. New keys and values are (B, H, n, W / H), to be written to the rows
        ``(arrival + i) % capacity``; the rest of the state takes the place of the old.
        """
        n = features.shape[1]
        x = self.model.normalised(features)  # (B, n, W)
        memory = self.model.normalised(prototypes[None])  # (1, C, W)
        age = (arrival[:, None] - 1 - torch.arange(self.capacity)) % self.capacity + 1
        step = torch.arange(n)
        behind = step[:, None] - step  # of two of the new rows, (n, n)
        near = (behind >= 0) & (behind <= self.reach)
        reached = age[:, None] <= self.reach - step[:, None]  # (B, n, capacity)
        parts, new = iter(state), []
        for level, block in enumerate(self._blocks()):
            newest = self.history - level * self.future  # of the flags: those of this block's rows
            there = valid[:, newest : newest + n]
            before = torch.gather(valid, 1, newest - age)
            seen = torch.cat([before[:, None] & reached, there[:, None] & near], dim=-1)
            keys, values, newest_rows = next(parts), next(parts), x
            waiting = []
            if self.future:
                joined = torch.cat([next(parts), x], dim=1)  # (B, future + n, W)
                x, waiting = joined[:, :n], [joined[:, n:]]
            x, key, value = _attend(block, newest_rows, x, keys, values, memory, seen)
            new += [key, value, *waiting]
        last = self.history - len(self.model.blocks) * self.future
        x = torch.where(valid[:, last : last + n, None], x, 0.0)
        x = torch.cat([next(parts), x], dim=1)  # (B, 2 + n, W)
        return self.model.outputs(self.model.embedding(x)), [*new, x[:, n:]]

    def _blocks(self) -> list[ReliabilityAwareBlock]:
        return cast("list[ReliabilityAwareBlock]", list(self.model.blocks))


def _attend(
    block: ReliabilityAwareBlock,
    rows: Tensor,
    asking: Tensor,
    keys: Tensor,
    values: Tensor,
    memory: Tensor,
    seen: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block for the rows that are ``asking``, and keys and values of the new ``rows``.

    ``seen`` (B, n, capacity + n) says which of the kept and of the new keys each of them sees;
    the prototypes ``memory`` (1, C, W) it sees always. Kept, new and constant ones are multiplied
    each for themselves: to join them would copy what is kept.
    """
    W = rows.shape[-1]
    weight, bias = block.query_key_value.weight, block.query_key_value.bias
    if asking is rows:  # all of one matrix, which a graph has once
        query, key, value = block.query_key_value(rows).chunk(3, dim=-1)
        known = block.query_key_value(memory).chunk(3, dim=-1)[1:]
    else:
        query = F.linear(asking, weight[:W], bias[:W])
        key, value = F.linear(rows, weight[W:], bias[W:]).chunk(2, dim=-1)
        known = F.linear(memory, weight[W:], bias[W:]).chunk(2, dim=-1)
    known_key, known_value = (by_heads(each[0], block.heads) for each in known)  # (H, C, W / H)
    query, key, value = (by_heads(each, block.heads) for each in (query, key, value))
    query = query * query.shape[-1] ** -0.5
    scores = torch.cat([query @ keys.mT, query @ key.mT], dim=-1)  # (B, H, n, capacity + n)
    scores = scores + torch.where(seen, 0.0, -torch.inf)[:, None]
    scores = torch.cat([scores, _with_all(query, known_key.mT)], dim=-1).softmax(dim=-1)
    capacity, n = keys.shape[2], key.shape[2]
    mixed = scores[..., :capacity] @ values
    mixed = mixed + scores[..., capacity : capacity + n] @ value
    mixed = mixed + _with_all(scores[..., capacity + n :], known_value)
    return block.after_attention(asking, mixed.transpose(1, 2).flatten(2)), key, value


def _with_all(rows: Tensor, constant: Tensor) -> Tensor:
    """(B, H, n, x) @ (H, x, y) -> (B, H, n, y): one product a head, in place of one a stream."""
    B, _, n, _ = rows.shape
    by_head = rows.transpose(0, 1).flatten(1, 2)  # (H, B n, x)
    return (by_head @ constant).unflatten(1, (B, n)).transpose(0, 1)
