"""The work that a bench counts, against a count by hand or by torch's own counter."""

from dataclasses import replace

import pytest
import torch
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.siblings_operands import separate_linears
from torch.utils.flop_counter import FlopCounterMode

from bench import attention, feed_forward, siblings

SHAPE = attention.Shape(2, 3, 7, 8, (4, 5, 6), dtype="float32")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_pairs_that_are_seen(is_causal, padded):
    shape = replace(SHAPE, is_causal=is_causal, padded=padded)
    _, keywords = attention.operands(shape, "cpu")
    mask = keywords.get("mask")
    seen = torch.ones(shape.batch, 1, shape.rows, shape.rows, dtype=torch.bool)
    seen = seen if mask is None else seen & mask
    seen = seen.tril() if is_causal else seen
    assert attention.visible_keys(shape, mask) == seen.sum()


def test_work_of_attention():
    latents, keywords = attention.operands(SHAPE, "cpu")
    of = AttentionOperands(*latents, **keywords)
    with FlopCounterMode(display=False) as counted:
        lifted = (of.q @ of.q_factor.mT) @ of.k_factor
        (((lifted @ of.k.mT) @ of.v) @ of.v_factor.mT)
    work = attention.work_of(of, attention.visible_keys(SHAPE, None))
    assert work.matmul_flops == counted.get_total_flops()
    assert work.exponentials == 2 * 3 * 7 * 7
    rows = 2 * 3 * 7
    factors = 3 * 8 * (4 + 5 + 6) + 2 * 3 * 8
    assert work.memory_bytes == 4 * (rows * (4 + 5 + 6) + factors + rows * 8)


@pytest.mark.parametrize("kind", ["latent", "chain"])
@pytest.mark.parametrize("gated", [False, True])
def test_work_of_a_feed_forward(kind, gated):
    activation = "silu" if gated else "gelu"
    shape = feed_forward.Shape("any", kind, 20, 12, 24, 4, activation, gated, dtype="float32")
    problem = feed_forward.build(shape, "cpu")
    with FlopCounterMode(display=False) as counted:
        output = problem.contestants["unfused eager"](*problem.inputs)
    work = feed_forward.work_of(shape, problem)
    assert work.matmul_flops == counted.get_total_flops()
    assert work.exponentials == 20 * 24
    given = (*problem.inputs, *problem.weights.values(), output)
    assert work.memory_bytes == sum(x.nbytes for x in given)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_work_of_siblings(is_transposed):
    shape = siblings.Shape(20, 12, (3, 5), is_transposed)
    of = siblings.operands_of(shape, "cpu", torch.float32)
    with FlopCounterMode(display=False) as counted:
        outputs = separate_linears(of)
    work = siblings.work_of(shape, torch.float32)
    assert work.matmul_flops == counted.get_total_flops()
    assert work.memory_bytes == sum(x.nbytes for x in (of.x, *of.weights, *outputs))
    calls = siblings.contestants(of)
    del calls["merged"], calls["separate Inductor"]
    siblings.check(of, calls)
    with pytest.raises(AssertionError, match="wrong: error"):
        siblings.check(of, calls | {"wrong": lambda: outputs[::-1]})
