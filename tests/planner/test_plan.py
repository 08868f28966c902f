"""Plans: the cheapest legal lowering, by numbers that can be checked by hand."""

from dataclasses import replace

import pytest
import sympy
import torch
import torch.nn.functional as F
from flashsvd_compile.kernels.chain_tiles import ChainTile

from flashsvd_compile.analysis.shared_lift_records import ProductShape
from flashsvd_compile.analysis.sites import find_sites
from flashsvd_compile.analysis.sweep import sweep
from flashsvd_compile.normalize import normalize
from flashsvd_compile.options import Options
from flashsvd_compile.planner.cost import lift_cost, shared_lift_cost, size_hints
from flashsvd_compile.planner.device import device_for
from flashsvd_compile.planner.named_devices import device_named
from flashsvd_compile.planner.sites import drop_taken, plan_site
from flashsvd_compile.reason import Code

HOPPER = device_named("h100")
CPU = device_for(torch.device("cpu"))


def sites_of(fn, *inputs):
    """The sites of a traced function, and the hints of its symbols."""
    found = []

    def backend(gm, example_inputs):
        module = normalize(gm, example_inputs)
        sites, _ = find_sites(sweep(module.graph), module.graph)
        found.append((sites, size_hints([n.meta.get("val") for n in module.graph.nodes])))
        return lambda *_: (None,)  # planned for large sizes, and not run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend)(*inputs)
    return found[0]


def attention_inputs(rank, batch=2, heads=4, length=64, head_dim=64, dtype=torch.bfloat16):
    latents = [
        torch.empty(batch, heads, length, rank, dtype=dtype, device="meta") for _ in range(3)
    ]
    factors = [torch.empty(heads, rank, head_dim, dtype=dtype, device="meta") for _ in range(3)]
    return *latents, *factors


def attention(pq, pk, pv, vq, vk, vv):
    return F.scaled_dot_product_attention(pq @ vq, pk @ vk, pv @ vv)


def feed_forward(p, up, down):
    return F.gelu(p @ up) @ down


def feed_forward_inputs(rank, rows=8192, width=3072, dtype=torch.bfloat16):
    shapes = (rows, rank), (rank, width), (width, rank)
    return tuple(torch.empty(*shape, dtype=dtype, device="meta") for shape in shapes)


def whole_feed_forward(x, u1, v1, u2, v2):
    return F.gelu(x @ u1 @ v1) @ u2 @ v2


def whole_feed_forward_inputs(rank, rows=8192, hidden=768, width=3072):
    shapes = (rows, hidden), (hidden, rank), (rank, width), (width, rank), (rank, hidden)
    return tuple(torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in shapes)


def chain(x, u, v):
    return x @ u @ v


def chain_plan(rows, rank, width=768, options=None, device=HOPPER):
    shapes = (rows, width), (width, rank), (rank, width)
    inputs = [torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    sites, hints = sites_of(chain, *inputs)
    (site,) = sites
    return plan_site(site, device, Options.parse(options), hints)


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


def attention_of_one_lift(p, factor):
    """q, k and v of each of 16 heads side by side; what is done to q and k keeps no latent."""
    q, k, v = (p @ factor).unflatten(-1, (16, -1)).transpose(1, 2).chunk(3, -1)
    return F.scaled_dot_product_attention(q.cos(), k.cos(), v)


def plan_of_one_lift(head_dim, rank, length=2048, device=HOPPER):
    shapes = (8, length, rank), (rank, 16 * 3 * head_dim)
    inputs = [torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    sites, hints = sites_of(attention_of_one_lift, *inputs)
    (site,) = [s for s in sites if s.kind == "attention"]
    (shared,) = site.shared
    spared = shared_lift_cost(shared, site, device, hints)
    return plan_site(site, device, Options.parse(None), hints), shared, spared


def test_of_a_lift_that_others_read_only_a_part_is_spared():
    plan, shared, spared = plan_of_one_lift(head_dim=128, rank=64)
    assert (plan.lowering, plan.reason.code) == ("rank_space", Code.PLANNED)
    (left,) = shared.remainders
    tokens = 8 * 2048
    assert shared.whole == ProductShape(1, tokens, 16 * 3 * 128, 64)
    assert left.shape == ProductShape(16, tokens, 2 * 128, 64)
    assert 0 < spared < lift_cost(plan.site.value, plan.site, HOPPER, {})


def test_heads_that_a_gpu_pads_are_lifted_with_all_others():
    """Of 24 wide heads q and k are 48 columns, which run as 128: more than 3 · 24 of all heads."""
    plan, _, spared = plan_of_one_lift(head_dim=24, rank=64, length=64)
    (rival,) = plan.rivals
    assert (plan.lowering, rival.lowering) == ("unfused", "rank_space")
    assert spared < 0
    assert rival.seconds + spared < plan.seconds  # what is left has decided
    assert plan_of_one_lift(head_dim=24, rank=64, length=64, device=CPU)[2] > 0


def shared_latent_attention(x, vq, vk, vv):
    heads = (F.linear(x, v).unflatten(-1, (4, 16)).transpose(1, 2) for v in (vq, vk, vv))
    return F.scaled_dot_product_attention(*heads)


def test_a_latent_far_wider_than_a_head_is_lifted_before():
    """One latent of rank 48 for 4 heads of 16: keys at width 48 would cost three times."""
    x = torch.empty(4, 4096, 48, dtype=torch.bfloat16, device="meta")
    factors = [torch.empty(64, 48, dtype=torch.bfloat16, device="meta") for _ in range(3)]
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
    plans = {rank: plan_of(feed_forward, feed_forward_inputs(rank)) for rank in (64, 1024)}
    assert plans[64].lowering == "streamed"
    assert plans[1024].lowering != "streamed"
    without_tile = replace(HOPPER, generation="sm_80")
    assert plan_of(feed_forward, feed_forward_inputs(1024), without_tile).lowering == "unfused"


@pytest.mark.parametrize(
    ("rank", "rows", "is_streamed"),
    [(64, 256, False), (64, 8192, True), (240, 4096, False), (240, 16384, True)],
)
def test_streaming_waits_for_rows_that_fill_the_multiprocessors(rank, rows, is_streamed):
    plan = plan_of(feed_forward, feed_forward_inputs(rank, rows=rows))
    assert (plan.lowering == "streamed") == is_streamed


def test_a_plan_tells_what_it_takes_and_why_others_lost():
    plan = plan_of(feed_forward, feed_forward_inputs(64, rows=16384))
    assert plan.lowering == "streamed"
    runner_up, *others = plan.rivals
    assert {r.lowering for r in plan.rivals} == {"row_blocks", "unfused", "streamed_whole"}
    assert plan.seconds < runner_up.seconds
    assert runner_up.reason.code is Code.NOT_PROFITABLE
    assert "times as long" in str(runner_up.reason)
    assert others[-1].lowering == "streamed_whole"  # its latent is an input
    assert (others[-1].seconds, others[-1].reason.code) == (None, Code.NO_LOW_RANK_OPERAND)


def test_a_slower_memory_makes_streaming_pay_earlier():
    """What streaming saves is traffic."""
    inputs = feed_forward_inputs(240, rows=8192)
    assert plan_of(feed_forward, inputs).lowering != "streamed"
    slower = replace(HOPPER, bytes_per_s=HOPPER.bytes_per_s / 4)
    assert plan_of(feed_forward, inputs, slower).lowering == "streamed"


def test_between_streaming_and_library_matmuls_one_kernel_lifts_row_blocks():
    def plan(rank, rows, options=None, device=HOPPER):
        p, up, down = feed_forward_inputs(rank, rows=rows)
        return plan_of(
            lambda p, up, down: F.gelu(F.linear(p, up)) @ down, (p, up.mT.contiguous(), down),
            device, options,
        )  # fmt: skip

    found = plan(384, 16384)
    assert found.lowering == "row_blocks"
    assert found.tile
    assert 0 < found.sram_bytes <= HOPPER.sram_bytes
    assert found.transient_bytes * 2 <= found.unfused_bytes
    assert plan(384, 256).lowering == "unfused"
    assert plan(384, 16384, device=replace(HOPPER, generation="sm_80")).lowering == "unfused"
    assert plan(384, 16384, {"sram_budget": "48KiB"}).lowering == "unfused"


def test_a_factor_whose_rank_is_not_innermost_is_not_lifted_by_that_kernel():
    """It reads by descriptors, and the launcher would fall back to two buffers."""
    inputs, forced = feed_forward_inputs(384, rows=16384), {"feed_forward": "row_blocks"}
    found = plan_of(feed_forward, inputs, HOPPER, forced)
    assert found.lowering == "row_blocks"
    assert not found.tile
    assert plan_of(feed_forward, inputs, HOPPER).lowering == "unfused"


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


# ---- outer factors ------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["48KiB", "64KiB", "99KiB", "164KiB", "227KiB"])
@pytest.mark.parametrize("rank", [16, 64, 96, 240])
def test_a_feed_forward_is_streamed_whole_where_a_tile_fits(rank, budget):
    options = {"feed_forward": "streamed_whole", "sram_budget": budget}
    plan = plan_of(whole_feed_forward, whole_feed_forward_inputs(rank), options=options)
    assert (plan.lowering, plan.reason.code) == ("streamed_whole", Code.FORCED)
    assert 0 < plan.sram_bytes <= int(budget.removesuffix("KiB")) * 1024
    assert plan.transient_bytes == 0
    assert plan.node is plan.site.outer.exit.node
    assert plan.site.region < plan.region


def test_streamed_whole_is_refused_with_the_reason():
    options = {"feed_forward": "streamed_whole"}
    inputs = whole_feed_forward_inputs(64)
    assert plan_of(whole_feed_forward, inputs, CPU, options).reason.code is Code.UNSUPPORTED_DEVICE
    large = plan_of(whole_feed_forward, whole_feed_forward_inputs(300), options=options)
    assert (large.lowering, large.reason.code) == ("unfused", Code.SRAM)
    latent_in = plan_of(feed_forward, feed_forward_inputs(64), options=options)
    assert (latent_in.lowering, latent_in.reason.code) == ("unfused", Code.NO_LOW_RANK_OPERAND)


def test_the_chain_of_a_feed_forward_streamed_whole_is_no_site_any_more():
    sites, hints = sites_of(whole_feed_forward, *whole_feed_forward_inputs(64))
    assert [site.kind for site in sites] == ["feed_forward", "chain"]
    for name, kinds in (
        ("streamed_whole", ["feed_forward"]),
        ("streamed", ["feed_forward", "chain"]),
    ):
        options = Options.parse({"feed_forward": name})
        plans = drop_taken([plan_site(site, HOPPER, options, hints) for site in sites])
        assert [plan.site.kind for plan in plans] == kinds


@pytest.mark.parametrize(
    ("rows", "programs"), [(1, 12), (16, 12), (128, 24), (1024, 96), (4096, 128), (65536, 512)]
)
def test_few_rows_share_out_the_columns_of_a_chain(rows, programs):
    plan = chain_plan(rows, 64, options={"chain": "streamed"})
    assert (plan.lowering, plan.reason.code) == ("streamed", Code.FORCED)
    tile = ChainTile(*plan.tile)
    assert -(-rows // tile.block_m) * -(-768 // tile.columns) == programs


def test_a_chain_is_streamed_where_that_was_measured_to_be_faster():
    assert chain_plan(1, 64).lowering == "streamed"
    assert chain_plan(65536, 40).lowering == "streamed"
    assert chain_plan(16, 240).lowering == "unfused"
    assert chain_plan(16, 64, 4096).lowering == "unfused"


def test_a_chain_is_left_alone_where_it_cannot_or_shall_not_be_streamed():
    assert chain_plan(16, 64, options={"chain": "unfused"}).reason.code is Code.FORCED
    on_cpu = chain_plan(16, 64, options={"chain": "streamed"}, device=CPU)
    assert (on_cpu.lowering, on_cpu.reason.code) == ("unfused", Code.UNSUPPORTED_DEVICE)
    large = chain_plan(16, 1024, 4096, options={"chain": "streamed"})
    assert (large.lowering, large.reason.code) == ("unfused", Code.SRAM)
