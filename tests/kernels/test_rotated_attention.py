"""RoPE between the lift of q and dense keys: kernel, library and lifted form, against models' own
spellings."""

import pytest
import torch
from flashsvd_compile.kernels.attention_library import rank_space_attention_library
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.attention_reference import lift, lifted_attention
from flashsvd_compile.kernels.rotation import rotated

from tests.kernels.spelled_attention import (
    IMPLEMENTATIONS,
    assert_right,
    assert_right_in_blocks,
)
from tests.kernels.test_attention import (
    DEVICE,
    SOFT,
    added,
    any_bool,
    assert_differentiable,
    operands,
    padding,
    to_float64,
)


def turned(x, cos, sin, rotary_dim, pair):
    """As models spell it: with x at full width, one rounding an operator."""
    turning, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    dtype = torch.promote_types(x.dtype, cos.dtype)
    turning = turning.to(dtype)
    cos, sin = cos[:, None], sin[:, None]
    if pair == rotary_dim // 2:  # halves, as Llama
        first, second = turning.chunk(2, -1)
        swapped = torch.cat((-second, first), -1)
    elif pair == 1:  # neighbours, as Cohere
        swapped = torch.stack((-turning[..., 1::2], turning[..., ::2]), -1).flatten(-2)
    else:
        raise AssertionError
    if cos.shape[-1] != rotary_dim:
        cos, sin = (
            t.repeat_interleave(2, -1) if pair == 1 else torch.cat((t, t), -1) for t in (cos, sin)
        )
    turning = turning * cos + swapped * sin
    return torch.cat((turning.to(x.dtype), rest), -1)


def eager(latents, keywords):
    """q, k and v at full width, one operator after another."""
    of = AttentionOperands(*latents, **keywords)
    heads = of.num_heads
    q = lift(of.q, of.q_factor, of.q_bias, heads)
    if of.q_norm_eps:
        wide = q.to(torch.promote_types(q.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + of.q_norm_eps)
        q = wide.to(q.dtype)
        q = q if of.q_norm is None else of.q_norm * q
    q = turned(q, of.cos, of.sin, of.rotary_dim, of.rotary_pair)
    k = lift(of.k, None, None, heads)
    v = lift(of.v, of.v_factor, of.v_bias, heads)
    scores = q @ k.mT * of.scale
    if of.softcap:
        scores = torch.tanh(scores / of.softcap) * of.softcap
    if of.mask is not None and of.mask.dtype == torch.bool:
        scores = scores.masked_fill(~of.mask, float("-inf"))
    elif of.mask is not None:
        scores = scores + of.mask.to(scores.dtype)
    if of.is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    return torch.where(blind, 0.0, scores.softmax(-1)) @ v


def case(
    *, rotary_dim=None, neighbours=False, half=False, of_batch=True, at_once=False,
    tables=None, softcap=0.0, lifted="qv", norm=None, **given,
):  # fmt: skip
    """As `operands`, with tables whose two angles of a pair differ, unless they are ``half``."""
    latents, keywords = operands(lifted=lifted, **given)
    q, width = latents[0], keywords["q_factor"].shape[1]
    rotary_dim = rotary_dim or width
    entries = rotary_dim // 2 if half else rotary_dim
    rows = (q.shape[0] if of_batch else 1, 1 if at_once else q.shape[2], entries)
    generator = torch.Generator().manual_seed(2)
    for name in ("cos", "sin"):
        table = torch.randn(rows, generator=generator)
        keywords[name] = table.to(DEVICE, tables or q.dtype)
    if norm is not None:
        keywords["q_norm_eps"] = 1e-2
    if norm == "weighed":
        keywords["q_norm"] = torch.randn(width, generator=generator).to(DEVICE, q.dtype)
    pair = 1 if neighbours else rotary_dim // 2
    return latents, keywords | {
        "rotary_dim": rotary_dim, "rotary_pair": pair, "softcap": softcap,
    }  # fmt: skip


CASES = {
    "halves": {},
    "neighbours": {"neighbours": True},
    "half_tables": {"half": True},
    "half_tables_of_neighbours": {"half": True, "neighbours": True},
    "partial": {"rotary_dim": 8},
    "partial_neighbours": {"rotary_dim": 12, "neighbours": True},
    "odd_head_dim": {"head_dim": 39, "rotary_dim": 26, "ranks": (7, 7, 15)},
    "head_dim_40": {"head_dim": 40, "head_dim_v": 80, "ranks": (24, 24, 40)},
    "wide_latent": {"ranks": (96, 16, 37)},
    "tables_for_all_of_the_batch": {"of_batch": False},
    "one_position": {"at_once": True, "of_batch": False},
    "float32_tables": {"dtype": torch.bfloat16, "tables": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16, "ranks": (40, 24, 16), "mask": padding},
    "float16": {"dtype": torch.float16, "mask": any_bool, "is_causal": True},
    "no_bias": {"bias": False},
    "dense_v": {"lifted": "q"},
    "grouped": {"heads": 4, "latent_heads": (4, 2, 2)},
    "shared_latent": {"heads": 4, "latent_heads": (1, 2, 1), "factor_heads": 4},
    "whole_tiles": {"queries": 32, "keys": 32},
    "one_query": {"queries": 1},
    "no_keys": {"keys": 0},
    "no_queries": {"queries": 0},
    "causal": {"is_causal": True},
    "padding": {"mask": padding},
    "any_bool_causal": {"mask": any_bool, "is_causal": True},
    "added": {"mask": lambda *of: added(float("-inf"), *of)},
    "added_soft_causal": {"mask": lambda *of: added(SOFT, *of), "is_causal": True},
    "capped": {"softcap": 2.0, "mask": padding},
    "normalised": {"norm": "plain"},
    "normalised_and_weighed": {"norm": "weighed", "is_causal": True},
    "normalised_head_dim_40": {"norm": "weighed", "head_dim": 40, "rotary_dim": 24, "bias": False},
    "normalised_neighbours": {"norm": "weighed", "neighbours": True, "dtype": torch.bfloat16},
    "normalised_float16": {"norm": "weighed", "dtype": torch.float16, "mask": padding},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("given", CASES)
def test_is_what_models_spell(given, implementation):
    assert_right(eager, IMPLEMENTATIONS[implementation], *case(**CASES[given]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pairs_within_runs(implementation):
    """Pairs 4 apart in runs of 8: no model's, but as good as any."""
    latents, keywords = case(head_dim=32, rotary_dim=24)
    keywords["rotary_pair"] = 4
    got = IMPLEMENTATIONS[implementation](AttentionOperands(*latents, **keywords))
    q = lift(latents[0], keywords["q_factor"], keywords["q_bias"], 2)
    order = torch.arange(24).view(3, 2, 4).transpose(1, 2).flatten()  # as neighbours
    q = torch.cat((q[..., order], q[..., 24:]), -1)
    q = turned(q, keywords["cos"][..., order], keywords["sin"][..., order], 24, 1)
    back = torch.cat((order.argsort(), torch.arange(24, 32)))
    scores = q[..., back] @ latents[1].mT * keywords["scale"]
    expected = scores.softmax(-1) @ lift(latents[2], keywords["v_factor"], keywords["v_bias"], 2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_strides_of_tables_are_free():
    latents, keywords = case(half=True)
    expected = lifted_attention(AttentionOperands(*latents, **keywords))
    both = torch.stack((keywords["cos"], keywords["sin"]), -1)  # as real and imaginary parts
    keywords["cos"], keywords["sin"] = both.unbind(-1)
    got = IMPLEMENTATIONS["kernel"](AttentionOperands(*latents, **keywords))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 4])
@pytest.mark.parametrize("norm", [None, "weighed"])
@pytest.mark.parametrize("plain", [rank_space_attention_library, lifted_attention])
def test_differentiable(plain, norm, rotary_dim, half):
    small = {"head_dim": 6, "head_dim_v": 5, "ranks": (3, 4, 2), "batch": 1}
    latents, keywords = case(
        rotary_dim=rotary_dim, half=half, norm=norm, queries=3, keys=4, **small
    )
    names = ["q_factor", "q_bias", "v_factor", "v_bias", "cos", "sin"] + ["q_norm"] * bool(norm)
    assert_differentiable(plain, *to_float64(latents, keywords), names)


@pytest.mark.parametrize("of_batch", [False, True])
def test_in_blocks(of_batch):
    groups = {"heads": 4, "latent_heads": (4, 2, 2), "factor_heads": 4}
    assert_right_in_blocks(*case(of_batch=of_batch, **groups))


BROKEN = {
    "no_sin": ({"sin": None}, "or none of them"),
    "no_pair": ({"rotary_pair": 0}, "a multiple of 2"),
    "odd_pairs": ({"rotary_pair": 5}, "a multiple of 2"),
    "too_wide": ({"rotary_dim": 64}, "at most 32"),
    "of_another_length": ({"cos": torch.zeros(2, 3, 32)}, "cos must be"),
    "of_another_batch": ({"sin": torch.zeros(3, 19, 32)}, "sin must be"),
    "of_unlike_widths": ({"sin": torch.zeros(2, 19, 16)}, "sin must be"),
    "of_integers": ({"cos": torch.zeros(2, 19, 32, dtype=torch.int64)}, "must be floating"),
    "norm_of_no_eps": ({"q_norm": torch.zeros(32)}, "a positive q_norm_eps"),
    "norm_of_another_width": ({"q_norm": torch.zeros(16), "q_norm_eps": 1e-6}, "q_norm must be"),
    "norm_of_what_does_not_turn": (
        {"cos": None, "sin": None, "rotary_dim": 0, "rotary_pair": 0, "q_norm_eps": 1e-6},
        "only queries that turn",
    ),
    "dense_q": ({"q_factor": None, "q": torch.zeros(2, 2, 19, 32)}, "only lifted queries"),
    "lifted_k": ({"k_factor": torch.zeros(2, 32, 32)}, "only lifted queries"),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("broken", BROKEN)
def test_operands_that_do_not_fit_are_named(implementation, broken):
    change, message = BROKEN[broken]
    latents, keywords = case()
    operands = {**dict(zip("qkv", latents, strict=True)), **keywords, **change}
    operands = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in operands.items()}
    with pytest.raises(ValueError, match=message):
        IMPLEMENTATIONS[implementation](AttentionOperands(**operands))


def test_what_does_not_turn_is_as_it_was():
    x = torch.randn(2, 3, 5, 16)
    table = torch.randn(2, 5, 8)
    assert torch.equal(rotated(x, table, table, 8, 4)[..., 8:], x[..., 8:])
