"""Queries that see no further than so many keys from their own place: windows, continued causality.

Kernel, library and lifted form, against scores of every pair and a mask of every pair.
"""

import pytest
import torch
from flashsvd_compile.kernels import attention_band
from flashsvd_compile.kernels.attention_library import rank_space_attention_library
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.attention_reference import lifted_attention

from tests.kernels.spelled_attention import IMPLEMENTATIONS as ALL_IMPLEMENTATIONS
from tests.kernels.spelled_attention import assert_right, assert_right_in_blocks
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
from tests.kernels.test_capped_attention import eager as masked_eager

QUERIES, KEYS = 45, 52


def shown(of, queries, keys):
    """Of every pair, by its places."""
    rows, columns = torch.arange(queries, device=DEVICE)[:, None], torch.arange(keys, device=DEVICE)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=DEVICE)
    if of.is_causal:
        seen &= columns - rows <= of.ahead
    if of.behind is not None:
        seen &= rows - columns <= of.behind
    return seen


def eager(latents, keywords):
    """With a mask of every pair."""
    of = AttentionOperands(*latents, **keywords)
    seen = shown(of, of.q.shape[2], of.k.shape[2])[None, None]
    mask = seen if of.mask is None else of.mask
    mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
    unbounded = {"is_causal": False, "ahead": 0, "behind": None, "mask": mask}
    return masked_eager(latents, keywords | unbounded)


def case(*, ahead=0, behind=None, softcap=0.0, queries=QUERIES, keys=KEYS, **given):
    latents, keywords = operands(queries=queries, keys=keys, **given)
    return latents, keywords | {"ahead": ahead, "behind": behind, "softcap": softcap}


CAUSAL = {"is_causal": True}
CASES = {
    "window": {**CAUSAL, "behind": 20},
    "window_of_one": {**CAUSAL, "behind": 0},
    "window_as_long_as_a_tile": {**CAUSAL, "behind": 15},
    "window_beyond_all": {**CAUSAL, "behind": 1000},
    "both_ways": {**CAUSAL, "ahead": 9, "behind": 9},
    "behind_only": {"behind": 11},
    "continued": {**CAUSAL, "ahead": KEYS - QUERIES},
    "continued_window": {**CAUSAL, "ahead": KEYS - QUERIES, "behind": 13 - (KEYS - QUERIES)},
    "ahead_of_all": {**CAUSAL, "ahead": 1000},
    "strictly_before": {**CAUSAL, "ahead": -1},
    "far_before": {**CAUSAL, "ahead": -20},
    "only_later_keys": {"behind": -30},
    "an_empty_band": {**CAUSAL, "ahead": -5, "behind": 3},
    "more_queries": {**CAUSAL, "behind": 5, "queries": 60, "keys": 20},
    "one_query": {**CAUSAL, "ahead": 40, "behind": -20, "queries": 1},
    "whole_tiles": {**CAUSAL, "behind": 17, "queries": 48, "keys": 64},
    "no_keys": {**CAUSAL, "behind": 4, "keys": 0},
    "padding": {**CAUSAL, "behind": 20, "mask": padding},
    "any_bool": {**CAUSAL, "behind": 30, "mask": any_bool},
    "any_bool_behind": {"behind": 12, "mask": any_bool},
    "added": {**CAUSAL, "behind": 25, "mask": lambda *of: added(float("-inf"), *of)},
    "added_soft": {**CAUSAL, "ahead": 3, "mask": lambda *of: added(SOFT, *of)},
    "capped": {**CAUSAL, "behind": 20, "softcap": 2.0, "mask": padding},
    "no_bias": {**CAUSAL, "behind": 20, "bias": False},
    "bfloat16": {**CAUSAL, "behind": 20, "dtype": torch.bfloat16, "ranks": (40, 24, 16)},
    "float16": {**CAUSAL, "behind": 20, "dtype": torch.float16, "mask": any_bool},
    "grouped": {**CAUSAL, "behind": 20, "heads": 4, "latent_heads": (4, 2, 2)},
    "full_ranks": {**CAUSAL, "behind": 33, "ranks": (16, 16, 16)},
}


def in_short_blocks(of):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_band, "BAND_QUERIES", 16)
        return rank_space_attention_library(of)


IMPLEMENTATIONS = ALL_IMPLEMENTATIONS | {"library_in_blocks": in_short_blocks}
KERNELS = ["kernel", "described"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("given", CASES)
def test_is_a_mask_of_every_pair(given, implementation):
    assert_right(eager, IMPLEMENTATIONS[implementation], *case(**CASES[given]))


@pytest.mark.parametrize("implementation", KERNELS)
def test_keys_that_no_query_sees_are_not_read(implementation):
    """32 queries that see from 40 to 55 keys ahead: NaN before and behind does not matter."""
    latents, keywords = case(queries=32, keys=128, behind=-40, ahead=55, is_causal=True)
    (q, k, v), expected = latents, eager(latents, keywords)
    for part in (k, v):
        part[:, :, :32] = torch.nan  # whole tiles of 16
        part[:, :, 96:] = torch.nan
    got = IMPLEMENTATIONS[implementation](AttentionOperands(q, k, v, **keywords))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plain", [rank_space_attention_library, lifted_attention])
def test_differentiable(plain, monkeypatch):
    monkeypatch.setattr(attention_band, "BAND_QUERIES", 2)
    small = {"head_dim": 6, "head_dim_v": 5, "ranks": (3, 4, 2), "batch": 1}
    latents, keywords = case(queries=5, keys=6, behind=1, ahead=1, is_causal=True, **small)
    names = ["q_factor", "q_bias", "k_factor", "v_factor", "v_bias"]
    assert_differentiable(plain, *to_float64(latents, keywords), names)


def test_in_blocks():
    groups = {"heads": 4, "latent_heads": (4, 2, 2)}
    assert_right_in_blocks(*case(is_causal=True, behind=7, ahead=2, **groups))


def test_ahead_needs_causality():
    latents, keywords = case(ahead=3)
    with pytest.raises(ValueError, match="ahead 3 counts only where is_causal"):
        _ = AttentionOperands(*latents, **keywords).shape
