"""Soft-caps and sinks in the kernel, the library and the lifted form, against plain expressions."""

import itertools
from functools import partial

import pytest
import torch
from flashsvd_compile.kernels import attention_scores
from flashsvd_compile.kernels.attention import rank_space_attention
from flashsvd_compile.kernels.attention_library import rank_space_attention_library
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.attention_recomputed import recomputed_attention
from flashsvd_compile.kernels.attention_reference import lift, lifted_attention

from tests.kernels import spelled_attention
from tests.kernels.spelled_attention import IMPLEMENTATIONS
from tests.kernels.test_attention import (
    DEVICE,
    SOFT,
    TILE,
    added,
    any_bool,
    assert_differentiable,
    operands,
    padding,
    to_float64,
)

CAP = 2.0


def eager(latents, keywords):
    """As models spell it: q, k and v lifted with their biases, one operator after another."""
    of = AttentionOperands(*latents, **keywords)
    heads = of.num_heads
    q = lift(of.q, of.q_factor, of.q_bias, heads)
    k = lift(of.k, of.k_factor, of.k_bias, heads)
    v = lift(of.v, of.v_factor, of.v_bias, heads)
    scores = q @ k.mT * of.scale
    if of.softcap:
        scores = torch.tanh(scores / of.softcap) * of.softcap
    mask = of.mask
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = scores + mask.to(scores.dtype)
    if of.is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    if of.sink is not None:
        column = of.sink.repeat_interleave(heads // of.sink.shape[0])[None, :, None, None]
        column = column.to(scores.dtype).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
        weights = (scores - scores.amax(-1, keepdim=True)).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.where(blind, 0.0, weights) @ v


def case(*, softcap=CAP, sink=None, loud=3, **given):
    latents, keywords = operands(**given)
    generator = torch.Generator().manual_seed(1)
    heads, dtype = keywords["num_heads"], latents[0].dtype
    if keywords.get("k_factor") is not None:
        bias = torch.randn(heads, keywords["k_factor"].shape[1], generator=generator)
        keywords["k_bias"] = bias.to(DEVICE, dtype)
    if sink is not None:
        keywords["sink"] = (torch.randn(heads, generator=generator) * 2 + sink).to(DEVICE, dtype)
    return (latents[0] * loud, *latents[1:]), keywords | {"softcap": softcap}


assert_right = partial(spelled_attention.assert_right, eager, longest=64)

ALTERED = {"capped": {}, "sunk": {"softcap": 0.0, "sink": 0.0}, "both": {"sink": 0.0}}

CASES = {
    "plain": {},
    "ranks_8_15_37": {"ranks": (8, 15, 37)},
    "no_bias": {"bias": False},
    "dense_q": {"lifted": "kv"},
    "dense_k": {"lifted": "qv", "head_dim": 48},
    "only_v_lifted": {"lifted": "v"},
    "grouped_latents": {"heads": 4, "latent_heads": (4, 2, 2)},
    "shared_latents": {"heads": 4, "latent_heads": (1, 1, 1), "factor_heads": 4},
    "whole_tiles": {"queries": 32, "keys": 32},
    "no_keys": {"keys": 0},
    "no_queries": {"queries": 0},
    "causal": {"is_causal": True},
    "padding": {"mask": padding},
    "any_bool_causal": {"mask": any_bool, "is_causal": True},
    "added_hard": {"mask": partial(added, float("-inf"))},
    "added_soft": {"mask": partial(added, SOFT)},
    "added_soft_causal": {"mask": partial(added, SOFT), "is_causal": True},
    "bfloat16": {"dtype": torch.bfloat16, "ranks": (40, 24, 16), "mask": padding},
    "float16": {"dtype": torch.float16, "mask": any_bool, "is_causal": True},
    "float16_unmasked": {"dtype": torch.float16},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("altered", ALTERED)
@pytest.mark.parametrize("given", CASES)
def test_is_what_models_spell(given, altered, implementation):
    assert_right(IMPLEMENTATIONS[implementation], *case(**CASES[given], **ALTERED[altered]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("softcap", "sink", "loud"),
    [(0.01, None, 3), (50.0, None, 30), (1000.0, None, 1), (0.0, 60.0, 1), (0.0, -60.0, 1),
     (50.0, 40.0, 30), (30.0, -40.0, 30)],
)  # fmt: skip
def test_at_the_ends(softcap, sink, loud, dtype, implementation):
    """Scores far beyond the cap and far within it; sinks that take all and that take nothing."""
    latents, keywords = case(softcap=softcap, sink=sink, loud=loud, dtype=dtype)
    exact = eager(*to_float64(latents, keywords))
    error = (eager(latents, keywords) - exact).norm()
    got = IMPLEMENTATIONS[implementation](AttentionOperands(*latents, **keywords))
    # Scores of tens carry their rounding into the exponent: both err by much, and not alike.
    budget = 2 * error + 4 * torch.finfo(dtype).eps * exact.norm()
    budget += torch.finfo(dtype).tiny * exact.numel() ** 0.5
    assert (got - exact).norm() <= budget


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", [padding, any_bool, partial(added, float("-inf"))])
@pytest.mark.parametrize("altered", ALTERED)
def test_a_query_without_keys_gives_exactly_zero(altered, mask, implementation):
    latents, keywords = case(mask=mask, **ALTERED[altered])
    seen = keywords["mask"]
    seen = seen if seen.dtype == torch.bool else seen > float("-inf")
    blind = ~seen.expand(2, 2, 19, 37).any(-1)
    assert blind.any()
    output = IMPLEMENTATIONS[implementation](AttentionOperands(*latents, **keywords))
    assert (output[blind] == 0).all()
    assert (output[~blind] != 0).any(-1).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_sink_of_minus_infinity_is_none(implementation):
    latents, keywords = case(softcap=0.0, sink=0.0, mask=any_bool)
    keywords["sink"] = torch.full_like(keywords["sink"], float("-inf"))
    got = IMPLEMENTATIONS[implementation](AttentionOperands(*latents, **keywords))
    want = lifted_attention(AttentionOperands(*latents, **(keywords | {"sink": None})))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("altered", ALTERED)
def test_a_query_that_is_not_a_number_spoils_its_own_row_only(altered):
    (q, k, v), keywords = case(**ALTERED[altered])
    clean = rank_space_attention(AttentionOperands(q, k, v, **keywords), tile=TILE)
    q = q.clone()
    q[0, 0, 3] = float("nan")
    spoilt = rank_space_attention(AttentionOperands(q, k, v, **keywords), tile=TILE)
    assert spoilt[0, 0, 3].isnan().all()
    spoilt[0, 0, 3] = clean[0, 0, 3]
    torch.testing.assert_close(spoilt, clean, rtol=0, atol=1e-6)


def test_sinks_of_groups_and_in_another_dtype():
    latents, keywords = case(softcap=0.0, heads=4, latent_heads=(4, 2, 2), dtype=torch.bfloat16)
    keywords["sink"] = torch.tensor([0.3, -1.7], device=DEVICE)
    for implementation in IMPLEMENTATIONS.values():
        assert_right(implementation, latents, keywords)


@pytest.mark.parametrize(
    ("mask", "is_causal"),
    list(itertools.product((None, padding, any_bool), (False, True))),
)
def test_blocks_of_queries_are_all_at_once(mask, is_causal, monkeypatch):
    latents, keywords = case(sink=0.0, mask=mask, is_causal=is_causal)
    of = AttentionOperands(*latents, **keywords)
    with torch.no_grad():
        whole = rank_space_attention_library(of)
        monkeypatch.setattr(attention_scores, "BLOCK_QUERIES", 7)
        torch.testing.assert_close(rank_space_attention_library(of), whole)


@pytest.mark.parametrize("altered", ALTERED)
@pytest.mark.parametrize(
    "implementation", [rank_space_attention_library, lifted_attention, recomputed_attention]
)
def test_differentiable(implementation, altered):
    small = {"head_dim": 5, "head_dim_v": 6, "ranks": (3, 4, 2), "batch": 1}
    latents, keywords = to_float64(
        *case(queries=3, keys=4, mask=any_bool, **small, **ALTERED[altered])
    )
    names = ["q_factor", "q_bias", "k_factor", "v_factor", "v_bias", "k_bias"]
    names += ["sink"] if "sink" in keywords else []
    assert_differentiable(implementation, latents, keywords, names)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"sink": torch.zeros(3)}, r"sink must be \[heads\], a divisor of num_heads 2"),
        ({"sink": torch.zeros(2, 1)}, r"sink must be \[heads\]"),
        ({"sink": torch.zeros(2).int()}, "sink must be floating"),
        ({"softcap": -1.0}, "softcap must be 0"),
        ({"softcap": float("nan")}, "softcap must be 0"),
        ({"k_bias": torch.zeros(2, 31)}, r"k_bias must be \[heads, 32\]"),
    ],
)
def test_operands_that_do_not_fit_are_named(broken, message):
    latents, keywords = operands()
    broken = {n: x.to(DEVICE) if torch.is_tensor(x) else x for n, x in broken.items()}
    with pytest.raises(ValueError, match=message):
        rank_space_attention(AttentionOperands(*latents, **(keywords | broken)))
