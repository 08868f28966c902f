"""Plans: the cheapest legal lowering, by numbers that can be checked by hand."""

from dataclasses import replace

import pytest
import sympy
import torch
import torch.nn.functional as F

from flashsvd_compile.analysis.sites import find_sites
from flashsvd_compile.analysis.sweep import sweep
from flashsvd_compile.normalize import normalize
from flashsvd_compile.options import Options
from flashsvd_compile.planner.cost import size_hints
from flashsvd_compile.planner.device import Device, device_for
from flashsvd_compile.planner.plan import plan_site
from flashsvd_compile.reason import Code

HOPPER = Device("h100", "cuda", 227 * 1024, {2: 2e14, 4: 1.9e13}, 3.6e12, 3e12, 4e-6, "sm_90")
CPU = device_for(torch.device("cpu"))


def sites_of(fn, *inputs):
    """The sites of a traced function, and the hints of its symbols."""
    found = []

    def backend(gm, example_inputs):
        module = normalize(gm, example_inputs)
        sites, _ = find_sites(sweep(module.graph), module.graph)
        found.append((sites, size_hints([n.meta.get("val") for n in module.graph.nodes])))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend)(*inputs)
    return found[0]


def attention_inputs(rank, batch=2, heads=4, length=64, head_dim=64, dtype=torch.bfloat16):
    latents = [torch.randn(batch, heads, length, rank, dtype=dtype) for _ in range(3)]
    factors = [torch.randn(heads, rank, head_dim, dtype=dtype) for _ in range(3)]
    return *latents, *factors


def attention(pq, pk, pv, vq, vk, vv):
    return F.scaled_dot_product_attention(pq @ vq, pk @ vk, pv @ vv)


def feed_forward(p, up, down):
    return F.gelu(p @ up) @ down


def feed_forward_inputs(rank, rows=8192, width=3072, dtype=torch.bfloat16):
    shapes = (rows, rank), (rank, width), (width, rank)
    return tuple(torch.randn(*shape, dtype=dtype) for shape in shapes)


def plan_of(fn, inputs, device=HOPPER, options=None):
    sites, hints = sites_of(fn, *inputs)
    (site,) = [s for s in sites if s.kind != "chain"]
    return plan_site(site, device, Options.parse(options), hints)


@pytest.mark.parametrize("rank", [16, 32, 40])
def test_attention_at_a_small_rank_runs_in_rank_space_and_holds_nothing_wide(rank):
    plan = plan_of(attention, attention_inputs(rank, batch=32, heads=12, length=512))
    assert plan.lowering == "rank_space"
    assert plan.transient_bytes == 0
    assert plan.unfused_bytes == 3 * 32 * 12 * 512 * 64 * 2
    assert plan.reason.code is Code.PLANNED
    assert 0 < plan.sram_bytes <= HOPPER.sram_bytes


def shared_latent_attention(x, vq, vk, vv):
    heads = (F.linear(x, v).unflatten(-1, (4, 16)).transpose(1, 2) for v in (vq, vk, vv))
    return F.scaled_dot_product_attention(*heads)


def test_a_latent_far_wider_than_a_head_is_lifted_before():
    """One latent of rank 48 for 4 heads of 16: keys at width 48 would cost three times."""
    x = torch.randn(4, 4096, 48, dtype=torch.bfloat16)
    factors = [torch.randn(64, 48, dtype=torch.bfloat16) for _ in range(3)]
    plan = plan_of(shared_latent_attention, (x, *factors))
    assert plan.lowering == "unfused" or plan.site.key.factor is None


def test_forced_lowerings_are_taken_and_say_so():
    inputs = attention_inputs(32)
    assert plan_of(attention, inputs, options={"attention": "unfused"}).lowering == "unfused"
    assert plan_of(attention, inputs, options={"attention": "rank_space"}).lowering == "rank_space"
    for name in ("streamed", "row_blocks", "unfused"):
        plan = plan_of(feed_forward, feed_forward_inputs(64), options={"feed_forward": name})
        assert (plan.lowering, plan.reason.code) == (name, Code.FORCED)


def test_streaming_is_refused_on_a_cpu_with_the_reason():
    plan = plan_of(feed_forward, feed_forward_inputs(64), CPU, {"feed_forward": "streamed"})
    assert plan.lowering == "unfused"
    assert plan.reason.code is Code.UNSUPPORTED_DEVICE


def test_without_room_on_chip_nothing_is_launched():
    tiny = replace(HOPPER, sram_bytes=1024)
    plan = plan_of(attention, attention_inputs(32), tiny)
    assert (plan.lowering, plan.reason.code) == ("unfused", Code.SRAM)
    plan = plan_of(feed_forward, feed_forward_inputs(64), tiny, {"feed_forward": "streamed"})
    assert (plan.lowering, plan.reason.code) == ("unfused", Code.SRAM)


@pytest.mark.parametrize("budget", ["48KiB", "64KiB", "99KiB", "164KiB", "227KiB"])
def test_tiles_keep_an_sram_budget(budget):
    limit = int(budget.removesuffix("KiB")) * 1024
    options = {"sram_budget": budget, "attention": "rank_space", "feed_forward": "streamed"}
    for fn, inputs in (
        (attention, attention_inputs(37)),
        (feed_forward, feed_forward_inputs(100)),
    ):
        plan = plan_of(fn, inputs, options=options)
        assert plan.lowering in ("rank_space", "streamed")
        assert 0 < plan.sram_bytes <= limit


@pytest.mark.parametrize("generation", ["sm_86", "sm_90"])
def test_ranks_that_no_registers_hold_are_lifted_before(generation):
    inputs = attention_inputs(257, head_dim=512)
    gpu = replace(HOPPER, generation=generation)
    plan = plan_of(attention, inputs, gpu, {"attention": "rank_space"})
    assert plan.lowering == "unfused" or plan.site.key.factor is None


def test_float64_has_no_kernel():
    inputs = attention_inputs(16, dtype=torch.float64)
    plan = plan_of(attention, inputs, options={"attention": "rank_space"})
    assert (plan.lowering, plan.reason.code) == ("unfused", Code.DTYPE)
    inputs = feed_forward_inputs(64, rows=64, dtype=torch.float64)
    plan = plan_of(feed_forward, inputs, options={"feed_forward": "streamed"})
    assert (plan.lowering, plan.reason.code) == ("unfused", Code.DTYPE)


def test_plans_say_where_tiles_come_from():
    plan = plan_of(attention, attention_inputs(32))
    assert (plan.tiling.source, plan.tiling.is_measured) == ("table sm_90", True)
    assert plan.tile == plan.tiling.candidates[0][0] == plan.tiling.timed[0]
    other = plan_of(attention, attention_inputs(32), replace(HOPPER, generation="sm_86"))
    assert (other.tiling.source, other.tiling.is_measured) == ("portable list", False)
    assert plan_of(attention, attention_inputs(32), CPU).tiling is None


def test_large_ranks_leave_the_feed_forward_to_library_matmuls():
    assert plan_of(feed_forward, feed_forward_inputs(64)).lowering == "streamed"
    assert plan_of(feed_forward, feed_forward_inputs(1024)).lowering == "unfused"


def test_on_a_cpu_row_blocks_run_what_does_not_stay_in_cache():
    large = plan_of(feed_forward, feed_forward_inputs(64, dtype=torch.float32), CPU)
    assert large.lowering == "row_blocks"
    assert large.transient_bytes * 4 <= large.unfused_bytes
    small = plan_of(feed_forward, feed_forward_inputs(64, rows=16, dtype=torch.float32), CPU)
    assert small.lowering == "unfused"


def test_bytes_stay_formulas_of_dynamic_sizes():
    inputs = feed_forward_inputs(64, dtype=torch.float32)
    torch._dynamo.mark_dynamic(inputs[0], 0)
    plan = plan_of(feed_forward, inputs, CPU)
    (tokens,) = plan.unfused_bytes.free_symbols
    assert plan.unfused_bytes == tokens * 3072 * 4 * 2
    assert sympy.simplify(plan.transient_bytes.subs(tokens, 1)) == 3072 * 4
