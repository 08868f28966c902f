"""Who computes rank-space attention, and whether it is what operators one after another are."""

from functools import partial

import torch
from flashsvd_compile.kernels.attention import rank_space_attention
from flashsvd_compile.kernels.attention_blocks import BlockedAttention
from flashsvd_compile.kernels.attention_library import rank_space_attention_library
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.attention_reference import lifted_attention

from tests.kernels.test_attention import DESCRIBED, TILE, to_float64
from tests.rounding import assert_as_exact_as_eager


def launched(tile, of):
    """The kernel's result in memory that was NaN before."""
    shape = of.shape
    memory = of.q.new_full(
        (shape.batch, shape.queries, shape.num_heads, shape.head_dim_v), torch.nan
    )
    return rank_space_attention(of, tile=tile, out=memory.transpose(1, 2))


IMPLEMENTATIONS = {
    "kernel": partial(launched, TILE),
    "described": partial(launched, DESCRIBED),
    "library": rank_space_attention_library,
    "lifted": lifted_attention,
}


def assert_right(eager, implementation, latents, keywords, *, longest=96):
    """As near to float64 as ``eager``, whose longest sum has so many terms."""
    exact = eager(*to_float64(latents, keywords))
    got = implementation(AttentionOperands(*latents, **keywords))
    assert got.shape == exact.shape
    assert not got.isnan().any()
    bias = keywords.get("v_bias")
    assert_as_exact_as_eager(
        got,
        eager(latents, keywords),
        exact,
        bias=None if bias is None else bias[:, None],
        longest=longest,
    )


def assert_right_in_blocks(latents, keywords):
    """One row of the batch and two heads at a time."""
    of = AttentionOperands(*latents, **keywords)
    expected = lifted_attention(of)
    out = torch.full_like(expected, torch.nan)

    def attend(part, out, place):
        found = lifted_attention(part)
        batch, head = place
        out[batch : batch + found.shape[0], head : head + found.shape[1]] = found

    BlockedAttention(of, {}).run(out, attend, 1, 2)
    torch.testing.assert_close(out, expected)
