"""Attention within a band: by hand, in blocks against the whole matrix, and dropout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hrpro.training.attention import Band, Dropout, ReliabilityAwareBlock, reliability_attention


def test_attention_by_hand() -> None:
    # d = 4: weights are softmax(q k / 2). The first of two snippets sees itself and the prototype.
    query = torch.tensor([[2.0, 0, 0, 0], [0.0, 0, 0, 0]])[None, None]
    key = torch.tensor([[1.0, 0, 0, 0], [9.0, 0, 0, 0], [0, 1.0, 0, 0]])[None, None]
    value = torch.tensor([[1.0, 0, 0, 0], [4.0, 5, 5, 5], [0, 2.0, 0, 0]])[None, None]
    bias = Band(2, 1, 0).bias(torch.ones(1, 2, dtype=torch.bool), 1)
    assert bias.tolist() == [[[[0, -math.inf, 0], [0, 0, 0]]]]
    mixed = reliability_attention(query, key, value, bias)[0, 0]
    first = math.e / (math.e + 1)  # exp(2 * 1 / 2) against exp(0)
    assert mixed[0].tolist() == pytest.approx([first, 2 * (1 - first), 0, 0])
    # The second one sees all alike: the mean of the three.
    assert mixed[1].tolist() == pytest.approx([5 / 3, 7 / 3, 5 / 3, 5 / 3])


def set_weights(layer: nn.Module, weight: list[list[float]]) -> None:
    assert isinstance(layer, nn.Linear)
    layer.weight.copy_(torch.tensor(weight))
    layer.bias.zero_()


def test_a_block_by_hand() -> None:
    """Eq. 4 to 6: queries are of the snippets, keys and values of snippets and prototypes."""
    block = ReliabilityAwareBlock(2, 1, 1, "relu", dropout=0.5).eval()
    block.attention_norm = block.feed_forward_norm = nn.Identity()  # type: ignore[assignment]
    unit = math.log(2) * math.sqrt(2)  # sqrt(d) goes out: logits are multiples of ln 2
    with torch.no_grad():
        # f_q times unit, f_k(a, b) = (a, 2 b), f_v(a, b) = (3 b, a)
        set_weights(block.query_key_value, [[unit, 0], [0, unit], [1, 0], [0, 2], [0, 3], [1, 0]])
        set_weights(block.output, [[1, 0], [0, 2]])
        set_weights(block.feed_forward[0], [[1, -1]])
        set_weights(block.feed_forward[3], [[0], [0.5]])
    snippets, prototype = torch.tensor([[[1.0, 0], [0, 1.0]]]), torch.tensor([[1.0, 1.0]])
    band = Band(2, None, 0)
    bias = band.bias(torch.ones(1, 2, dtype=torch.bool), 1)
    # Keys (1, 0), (0, 2) and (1, 2); values (0, 1), (3, 0) and (3, 1).
    # Snippet (1, 0): logits 1, 0, 1 times ln 2, weights (2, 1, 2) / 5:
    #   mixed (2 (0, 1) + (3, 0) + 2 (3, 1)) / 5 = (9, 4) / 5, out (1.8, 1.6), with x (2.8, 1.6)
    #   feed-forward 0.5 * relu(2.8 - 1.6) = 0.6 to the second: (2.8, 2.2)
    # Snippet (0, 1): logits 0, 2, 2 times ln 2, weights (1, 4, 4) / 9:
    #   mixed ((0, 1) + 4 (3, 0) + 4 (3, 1)) / 9 = (24, 5) / 9, out (24, 10) / 9,
    #   with x (24, 19) / 9
    #   feed-forward 0.5 * relu(5 / 9) = 2.5 / 9: (24, 21.5) / 9
    with torch.no_grad():
        got = block(snippets, prototype, bias, band)[0]
    assert got[0].tolist() == pytest.approx([2.8, 2.2])
    assert got[1].tolist() == pytest.approx([24 / 9, 21.5 / 9])


def dense(
    block: ReliabilityAwareBlock, x: Tensor, memory: Tensor, valid: Tensor, band: Band
) -> Tensor:
    """The block over the whole T x (T + C) matrix, written out."""
    B, T, W = x.shape
    index = torch.arange(T)
    offset = index - index[:, None]
    seen = (offset >= -band.past) & (offset <= band.future) & valid[:, None]
    seen = torch.cat([seen, torch.ones(B, T, len(memory), dtype=torch.bool)], dim=-1)
    projected = block.query_key_value(torch.cat([x, memory.expand(B, -1, -1)], dim=1))
    heads = (*projected.shape[:2], 3 * block.heads, W // block.heads)
    query, key, value = projected.view(heads).transpose(1, 2).chunk(3, dim=1)
    query = query[:, :, :T]
    weight = (query @ key.transpose(-1, -2) / math.sqrt(W // block.heads)).masked_fill(
        ~seen[:, None], -torch.inf
    )
    mixed = (weight.softmax(-1) @ value).transpose(1, 2).reshape(B, T, W)
    x = block.attention_norm(x + block.output(mixed))
    return block.feed_forward_norm(x + block.feed_forward(x))


def test_what_a_block_sees() -> None:
    """Two recordings of two blocks: nothing of the one is seen in the other."""
    band = Band(191, 2, 1)
    assert (band.blocks, band.block) == (2, 96)
    recordings = torch.stack([torch.arange(1.0, 192), torch.arange(1001.0, 1192)])
    seen = band.around(band.padded(recordings[..., None]), torch.tensor([[-7.0]]), 1)[:, 0, :, 0]
    for number, first in enumerate((1, 1001)):
        before, after = seen[2 * number : 2 * number + 2].tolist()
        assert before == [0, 0, *range(first, first + 97), -7]
        assert after == [*range(first + 94, first + 191), 0, 0, -7]  # one of padding, none behind


@pytest.mark.parametrize(
    ("length", "past", "future", "blocks"),
    [
        (1, 8, 0, 1),
        (127, 8, 0, 1),  # there is no shorter block than 64
        (128, 8, 0, 2),  # no padding
        (129, 8, 0, 2),  # the last block is padded by one
        (211, 3, 2, 3),
        (260, 0, 0, 4),  # nothing but the snippet itself
        (200, 100, 100, 2),  # the longest reach of a block
        (201, 70, 1, 2),
        (170, 2, 80, 2),
    ],
)
@pytest.mark.parametrize("heads", [1, 2])
def test_blocks_give_what_the_whole_matrix_gives(
    length: int, past: int, future: int, blocks: int, heads: int
) -> None:
    torch.manual_seed(0)
    B, W, C = 3, 8, 2
    block = ReliabilityAwareBlock(W, heads, 12, "relu", dropout=0.0).double()
    x = torch.randn(B, length, W, dtype=torch.double, requires_grad=True)
    memory = torch.randn(C, W, dtype=torch.double, requires_grad=True)
    valid = torch.rand(B, length) > 0.2
    valid[1, length // 2 :] = False  # a recording that ends early
    band = Band(length, past, future)
    assert band.blocks == blocks
    got = block(band.padded(x), memory, band.bias(valid, C), band)[:, :length]
    expected = dense(block, x, memory, valid, band)
    torch.testing.assert_close(got, expected)
    learnt = [x, memory, *block.parameters()]
    towards = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad(got, learnt, towards), torch.autograd.grad(expected, learnt, towards)
    )


def test_without_a_band_the_length_is_one_block() -> None:
    band = Band(500, None, 0)
    assert (band.blocks, band.block) == (1, 500)
    assert not band.bias(torch.ones(1, 500, dtype=torch.bool), 3).any()


@pytest.mark.parametrize("share", [0.9979, 0.9981, 0.9999])
def test_dropout_always_keeps_something(share: float) -> None:
    # 256 * 0.9979 = 255.46 rounds to 255, 256 * 0.9981 = 255.51 to 256, which would leave nothing.
    torch.manual_seed(0)
    dropped = Dropout(share)(torch.ones(100_000))
    assert dropped.unique().tolist() == [0.0, 256.0]
    # One in 256: 390 +- 20 of 100000
    assert 300 < int((dropped > 0).sum()) < 480


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    torch.manual_seed(0)
    dropout = Dropout(0.3)
    x = torch.ones(1001, 997)
    dropped = dropout(x)
    share = 77 / 256  # 0.3 in bytes
    assert (dropped == 0).double().mean().item() == pytest.approx(share, abs=2e-3)
    assert dropped.double().mean().item() == pytest.approx(1, abs=3e-3)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / (1 - share)])
    # Independent draws: neighbours are dropped together no more often than by chance.
    both = ((dropped[:, 1:] == 0) & (dropped[:, :-1] == 0)).double().mean().item()
    assert both == pytest.approx(share**2, abs=2e-3)
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    # The same seed, the same draws.
    torch.manual_seed(0)
    assert torch.equal(dropout.train()(x), dropped)
