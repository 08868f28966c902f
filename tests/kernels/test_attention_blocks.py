"""Attention in blocks of batch and heads is attention all at once, wherever latents come from."""

import pytest
import torch
from flashsvd_compile.kernels.attention import rank_space_attention
from flashsvd_compile.kernels.attention_blocks import (
    BlockedAttention,
    LatentSource,
    blocked_attention,
)
from flashsvd_compile.kernels.attention_library import rank_space_attention_library
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.tiles import TileConfig

HEADS, HEAD_DIM, HIDDEN = 4, 16, 24
TILE = TileConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)


def on_library(of, out, place):
    found = rank_space_attention_library(of)
    out[place[0] : place[0] + found.shape[0], place[1] : place[1] + found.shape[1]] = found


def on_triton(of, out, place):
    rank_space_attention(of, tile=TILE, out=out, place=place)


def case(kv_heads=HEADS, mask=None, bias=False, is_causal=False, batch=3, rows=9, rank=5):
    """The operands with all latents, and what makes those of k and v."""
    torch.manual_seed(0)
    x = torch.randn(batch, rows, HIDDEN)
    heads = {"q": HEADS, "k": kv_heads, "v": kv_heads}
    sources = {
        name: LatentSource(
            x, torch.randn(n * rank, HIDDEN) / 5, torch.randn(n * rank) if bias else None, n
        )
        for name, n in heads.items()
    }
    latents = {
        name: source.block(slice(0, batch), slice(0, source.heads))
        for name, source in sources.items()
    }
    of = AttentionOperands(
        **latents,
        num_heads=HEADS,
        scale=0.3,
        q_factor=torch.randn(HEADS, HEAD_DIM, rank),
        k_factor=torch.randn(kv_heads, HEAD_DIM, rank),
        v_factor=torch.randn(kv_heads, HEAD_DIM, rank),
        v_bias=torch.randn(1, HEAD_DIM),
        mask=None if mask is None else torch.rand(mask) > 0.3,
        is_causal=is_causal,
    )
    return of, {name: sources[name] for name in ("k", "v")}


CASES = {
    "plain": {},
    "bias": {"bias": True},
    "grouped": {"kv_heads": 2},
    "one_kv_head": {"kv_heads": 1},
    "padding": {"mask": (3, 1, 1, 9)},
    "mask_of_each": {"mask": (3, HEADS, 9, 9)},
    "shared_mask": {"mask": (1, 1, 9, 9)},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize("blocks", [(1, HEADS), (2, HEADS), (2, 2), (5, 9)], ids=str)
@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
@pytest.mark.parametrize("attend", [on_library, on_triton])
def test_blocks(given, blocks, attend):
    of, sources = case(**given)
    expected = rank_space_attention_library(of)
    out = torch.full_like(expected, torch.nan)
    BlockedAttention(of, sources).run(out, attend, *blocks)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_output_is_laid_out_by_rows():
    of, sources = case()
    out = blocked_attention(
        BlockedAttention(of, sources), on_library, queries=of.q, block_batch=2, block_heads=HEADS
    )
    assert out.shape == (3, HEADS, 9, HEAD_DIM)
    assert out.transpose(1, 2).is_contiguous()


def test_blocks_that_cut_a_group_are_refused():
    of, sources = case(kv_heads=2)
    with pytest.raises(ValueError, match="heads 0 to 3 cut a group of 2"):
        BlockedAttention(of, sources).run(torch.empty(3, HEADS, 9, HEAD_DIM), on_library, 1, 3)


@pytest.mark.parametrize("blocks", [(0, 1), (1, 0), (-1, 2)])
def test_blocks_of_nothing_are_refused(blocks):
    of, sources = case()
    with pytest.raises(ValueError, match="at least 1"):
        BlockedAttention(of, sources).run(torch.empty(3, HEADS, 9, HEAD_DIM), on_library, *blocks)
