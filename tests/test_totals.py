"""FLOPs by hand on odd sizes, totals of a model, and what was measured beside what was planned."""

import json

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
    for part in ("KiB", "MFLOP of", "0 bytes of 576 KiB", "µs", "unfused: "):
        assert part in line


def test_a_site_tells_its_seconds_and_the_runner_up():
    told = fsc.explain(*on_meta(Attention(), *attention_inputs("sdpa", 8, 512, 512)), device="h100")
    plan = next(s for s in told.sites if s.kind == "attention").to_dict()["plan"]
    (rival,) = plan["rivals"]
    assert (plan["lowering"], rival["lowering"]) == ("rank_space", "unfused")
    assert 0 < plan["seconds"] < rival["seconds"]
    assert "times as long" in rival["reason"]["observed"]


# ---- all sites ----------------------------------------------------------------------------------


class Model(nn.Module):
    """Its first chains read the same x: they are siblings, too."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = low_rank(HIDDEN, 44, 3), low_rank(HIDDEN, 44, 4)
        self.mlp = Gated()

    def forward(self, x):
        return x + self.mlp(x), self.left(x) * self.right(x)


def test_no_product_counts_twice():
    told = fsc.explain(Model(), hidden_states(), options=OPTIONS)
    assert sorted(s.kind for s in told.sites) == ["chain"] * 3 + ["feed_forward", "siblings"]
    feed_forward = 44 * (4 + 5 + 6) + HIDDEN * (4 + 5 + 6)
    chains = (HIDDEN + 44) * (3 + 4)
    assert told.totals.flops == told.totals.unfused_flops == 2 * TOKENS * (feed_forward + chains)
    assert (told.totals.sites, told.totals.rewritten) == (5, 1)


def test_totals_of_a_model():
    x = hidden_states(4, 128)
    told = fsc.explain(Attention(), x, x, options={"attention": "rank_space"})
    totals = told.totals
    assert totals.flops < totals.unfused_flops
    assert totals.transient_bytes == told.peaks[0].transient_bytes
    assert totals.total_bytes == told.peaks[0].total_bytes
    untouched = fsc.explain(Attention(), x, x, options={"attention": "unfused"})
    assert totals.untouched_transient_bytes == untouched.totals.transient_bytes
    assert totals.untouched_total_bytes == untouched.totals.total_bytes
    assert totals.measured is None
    assert "measured" not in str(totals)
    assert str(totals) in str(told)


def test_totals_of_several_graphs():
    model, x = Model(), hidden_states()

    def broken(x):
        y, z = model(x)
        torch._dynamo.graph_break()
        return model(y)[0], z

    one = fsc.explain(model, x, options=OPTIONS).totals
    both = fsc.explain(broken, x, options=OPTIONS).totals
    assert both.flops < 2 * one.flops  # nobody reads the second product of chains
    assert both.rewritten == 2


def test_debug_dir_has_totals(tmp_path):
    options = {**OPTIONS, "debug_dir": tmp_path}
    model, x = Model(), hidden_states()
    torch.compile(model, backend="flashsvd", options=options)(x)
    record = json.loads((tmp_path / "graph_0" / "sites.json").read_text())
    totals = fsc.explain(model, x, options=OPTIONS).totals
    assert record["totals"] == totals.to_dict()
    assert str(totals) in (tmp_path / "graph_0" / "report.txt").read_text()


# ---- measured -----------------------------------------------------------------------------------


def test_measured_on_a_cpu():
    model = nn.Sequential(Gated(), Gated())
    told = fsc.explain(model, hidden_states(4, 512), options=OPTIONS, measure=True)
    measured = told.totals.measured
    assert told.totals.transient_bytes < told.totals.untouched_transient_bytes
    assert measured.device == "cpu"
    assert measured.compiled.peak.total_bytes == pytest.approx(told.totals.total_bytes, rel=0.05)
    assert measured.compiled.peak.total_bytes < measured.eager.peak.total_bytes
    assert min(measured.eager.milliseconds, measured.compiled.milliseconds) > 0
    assert json.loads(json.dumps(told.to_dict()))["totals"]["measured"]["device"] == "cpu"
    text = str(told)
    for part in ("measured, eager", "measured, compiled", "milliseconds of a call"):
        assert part in text


def test_measuring_goes_through_the_backend_with_its_options(tmp_path):
    options = {**OPTIONS, "debug_dir": str(tmp_path)}
    fsc.explain(Gated(), hidden_states(), options=options, measure=True)
    assert [path.name for path in tmp_path.iterdir()] == ["graph_0"]


def test_measuring_leaves_later_compiles_as_they_were():
    model, compiles = Gated(), []

    def count(gm, example_inputs):
        compiles.append(gm)
        return gm.forward

    run = torch.compile(model, backend=count)
    run(hidden_states())
    fsc.explain(model, hidden_states(3), options=OPTIONS, measure=True)
    run(hidden_states())
    assert len(compiles) == 1


@pytest.mark.parametrize("device", ["h100", "A10"])
def test_a_device_by_name_is_not_measured(device):
    with pytest.raises(ValueError, match=rf"on cpu, .* not device='{device}': leave one"):
        fsc.explain(Gated(), hidden_states(), device=device, measure=True)


@pytest.mark.parametrize("device", [None, "h100"])
def test_tensors_without_values_are_not_measured(device):
    with pytest.raises(ValueError, match=r"measure=True runs the model, .* meta hold no values"):
        fsc.explain(*on_meta(Gated(), hidden_states()), device=device, measure=True)


def test_the_own_device_may_be_named():
    told = fsc.explain(Gated(), hidden_states(), options=OPTIONS, device="cpu", measure=True)
    assert told.totals.measured is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measured_on_a_gpu():
    mlp = nn.Sequential(*low_rank(64, 512, 16), nn.GELU(), *low_rank(512, 64, 16))
    x = torch.randn(32, 512, 64, dtype=torch.bfloat16, device="cuda")
    told = fsc.explain(mlp.bfloat16().cuda(), x, measure=True)
    measured = told.totals.measured
    assert measured.device.startswith("cuda")
    assert measured.compiled.peak.is_least
    assert measured.compiled.peak.total_bytes == pytest.approx(told.totals.total_bytes, rel=0.1)
    assert min(measured.eager.milliseconds, measured.compiled.milliseconds) > 0
