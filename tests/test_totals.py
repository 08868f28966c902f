"""FLOPs by hand on odd sizes."""

import pytest
import sympy
import torch
from torch import nn

import flashsvd_compile as fsc
from tests.spelled import (
    BATCH,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KEYS,
    OPTIONS,
    QUERIES,
    Attention,
    attention_inputs,
    hidden_states,
    low_rank,
)

pytestmark = pytest.mark.usefixtures("fresh_inference")

TOKENS = BATCH * QUERIES


def on_meta(model, *args):
    return model.bfloat16().to("meta"), *(x.bfloat16().to("meta") for x in args)


def site(kind, *call, **kwargs):
    return next(s for s in fsc.explain(*call, **kwargs).sites if s.kind == kind)


# ---- one site -----------------------------------------------------------------------------------

PAIRS = BATCH * HEADS * QUERIES * KEYS
AT_QUERIES, AT_KEYS = BATCH * HEADS * QUERIES * HEAD_DIM, BATCH * HEADS * KEYS * HEAD_DIM


def attention(ranks, **options):
    return site("attention", Attention(ranks=ranks), *attention_inputs("sdpa"), options=options)


@pytest.mark.parametrize("ranks", [(3, 5, 7), (6, 2, 1)], ids=str)
def test_attention_in_rank_space(ranks):
    q, k, v = ranks
    found = attention(ranks, attention="rank_space")
    unfused = AT_QUERIES * q + AT_KEYS * (k + v) + PAIRS * 2 * HEAD_DIM
    planned = AT_QUERIES * (q + k) + PAIRS * (k + v) + AT_QUERIES * v
    assert found.numbers["flops"] == 2 * planned
    assert found.numbers["unfused_flops"] == 2 * unfused


def test_attention_that_stays_does_what_it_did():
    found = attention((3, 5, 7), attention="unfused").numbers
    assert found["flops"] == found["unfused_flops"] > 0
    assert found["transient_bytes"] == found["unfused_bytes"] > 0


def test_an_arm_that_is_lifted_before_is_counted_in_both():
    rows, keys = 255, 257
    model, options = Attention(ranks=(3, 5, 23)), {"attention": "rank_space"}
    found = site("attention", model, *attention_inputs("sdpa", 1, rows, keys), options=options)
    assert found.to_dict()["plan"]["ranks"] == {"q": "3", "k": "5", "v": "dense"}
    queries, pairs, lifted = rows * HEADS * HEAD_DIM, HEADS * rows * keys, keys * HEADS * HEAD_DIM
    planned = queries * (3 + 5) + pairs * (5 + HEAD_DIM) + lifted * 23
    unfused = queries * 3 + lifted * 5 + pairs * 2 * HEAD_DIM + lifted * 23
    assert found.numbers["flops"] == 2 * planned
    assert found.numbers["unfused_flops"] == 2 * unfused


def test_attention_in_blocks_makes_its_latents():
    model, call = Attention(ranks=(3, 5, 7)), attention_inputs("sdpa", 16, 64, 64)
    (peak,) = fsc.explain(model, *call, options=OPTIONS).peaks
    budget = {"memory_budget": int(0.7 * peak.transient_bytes)}
    whole, blocks = (
        site("attention", model, *call, options=options) for options in (OPTIONS, OPTIONS | budget)
    )
    assert blocks.plan.blocks is not None
    entries = 2 * 16 * 64 * HIDDEN * sum((3, 5, 7))
    for name in ("flops", "unfused_flops"):
        assert blocks.numbers[name] == whole.numbers[name] + entries


class Gated(nn.Module):
    """30 → 4, 5 → 44 → 6 → 30."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = low_rank(HIDDEN, 44, 4), low_rank(HIDDEN, 44, 5)
        self.down = low_rank(44, HIDDEN, 6)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def test_feed_forward():
    found = site("feed_forward", Gated(), hidden_states(), options=OPTIONS)
    assert found.lowering == "row_blocks"
    assert found.numbers["flops"] == 2 * TOKENS * 44 * (4 + 5 + 6)
    assert found.numbers["unfused_flops"] == found.numbers["flops"]


def test_a_whole_feed_forward_has_its_outer_factors():
    told = on_meta(Gated(), hidden_states())
    options = {"feed_forward": "streamed_whole"}
    found = site("feed_forward", *told, options=options, device="h100")
    assert found.lowering == "streamed_whole"
    assert found.numbers["flops"] == 2 * TOKENS * (44 * (4 + 5 + 6) + HIDDEN * (4 + 5 + 6))


@pytest.mark.parametrize("lowering", ["streamed", "unfused"])
def test_chain(lowering):
    told = on_meta(low_rank(HIDDEN, 44, 3), hidden_states())
    found = site("chain", *told, options={"chain": lowering}, device="h100")
    assert found.lowering == lowering
    assert found.numbers["flops"] == 2 * TOKENS * 3 * (HIDDEN + 44)


def test_formulas_are_of_symbols_and_numbers_at_the_example():
    x = hidden_states(3, 11)
    torch._dynamo.mark_dynamic(x, 1)
    plan = site("feed_forward", Gated(), x, options=OPTIONS).to_dict()["plan"]
    (symbol,) = map(str, sympy.sympify(plan["flops"]).free_symbols)
    assert symbol in plan["unfused_bytes"]
    assert plan["at_sizes"]["flops"] == 2 * 33 * 44 * 15
    assert plan["at_sizes"]["unfused_bytes"] == 33 * 44 * 4 * 3


def test_the_table_has_units():
    told = fsc.explain(*on_meta(Attention(), *attention_inputs("sdpa", 8, 512, 512)), device="h100")
    (line,) = [line for line in str(told).splitlines() if line.startswith("attention")]
    for part in ("KiB", "MFLOP of", "0 bytes of 576 KiB"):
        assert part in line
