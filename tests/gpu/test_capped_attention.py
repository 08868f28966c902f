"""Soft-caps and sinks compiled for a GPU: with every mask, in groups, in 16 bits and 32."""

from functools import partial

import pytest
import torch
from flashsvd_compile.kernels.attention import rank_space_attention
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.tiles import TileConfig

from tests.gpu import launched_attention
from tests.gpu.test_attention_kernel import DESCRIBED, DTYPES, MASKS, padding, random_operands
from tests.kernels.test_capped_attention import eager, to_float64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ALTERED = {"capped": (5.0, False), "sunk": (0.0, True), "both": (5.0, True)}


def altered_operands(altered, dtype, *, loud=3.0, **given):
    """Queries drawn large, so that caps and sinks matter; a bias of k, which counts."""
    softcap, has_sink = ALTERED[altered]
    latents, keywords = random_operands(dtype, **given)
    heads = keywords["num_heads"]
    if "k_factor" in keywords:
        width = keywords["k_factor"].shape[1]
        keywords["k_bias"] = torch.randn(heads, width, device="cuda").to(dtype)
    if has_sink:
        keywords["sink"] = (torch.randn(heads, device="cuda") * 3).to(dtype)
    return [latents[0] * loud, *latents[1:]], keywords | {"softcap": softcap}


assert_right = partial(launched_attention.assert_right, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "any", "added_hard"])
@pytest.mark.parametrize("altered", ALTERED)
def test_masks_and_groups(altered, mask, is_causal, groups, dtype):
    heads = 6 if groups > 1 else 2
    latents, keywords = altered_operands(
        altered, dtype, heads=heads, latent_heads=heads // groups, queries=150, keys=170,
        mask=MASKS[mask], is_causal=is_causal, ranks=(40, 24, 48),
    )  # fmt: skip
    assert_right(latents, keywords)
    if mask == "padding":
        output = rank_space_attention(AttentionOperands(*latents, **keywords))
        assert (output[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rank", [32, 64, 128])
@pytest.mark.parametrize("altered", ALTERED)
def test_described_latents(altered, rank, is_causal, dtype):
    operands = altered_operands(
        altered, dtype, queries=300, keys=500, is_causal=is_causal, ranks=(rank,) * 3
    )
    assert_right(*operands, tile=DESCRIBED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lifted", ["", "v", "qv", "kv"])
@pytest.mark.parametrize("altered", ALTERED)
def test_dense_operands(altered, lifted, dtype):
    """Queries and keys that a rotary embedding has turned are dense: Gemma-2 and gpt-oss."""
    operands = altered_operands(
        altered, dtype, lifted=lifted, heads=8, latent_heads=8, head_dims=(64, 64), keys=333,
        is_causal=True,
    )  # fmt: skip
    assert_right(*operands)


@pytest.mark.parametrize("tile", [TileConfig(64, 64, 4, 3), TileConfig(128, 32, 4, 4),
                                  TileConfig(128, 64, 8, 3)], ids=str)  # fmt: skip
@pytest.mark.parametrize("altered", ALTERED)
def test_tiles(altered, tile):
    operands = altered_operands(
        altered, torch.bfloat16, queries=300, keys=200, ranks=(40, 64, 37), is_causal=True,
        mask=padding,
    )  # fmt: skip
    assert_right(*operands, tile=tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loud", [0.01, 30.0])
@pytest.mark.parametrize("altered", ALTERED)
def test_at_the_ends_of_tanh(altered, loud, dtype):
    latents, keywords = altered_operands(altered, dtype, loud=loud, queries=200, keys=300)
    exact = eager(*to_float64(latents, keywords))
    output = rank_space_attention(AttentionOperands(*latents, **keywords))
    # Scores of hundreds round to tenths in 16 bits: both err by much, and not alike.
    budget = 3 * (eager(latents, keywords) - exact).norm()
    assert (output - exact).norm() <= budget + 4 * torch.finfo(dtype).eps * exact.norm()
