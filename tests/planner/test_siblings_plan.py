"""Whether siblings run as one launch: what is refused, what is forced, what tiles they get."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flashsvd_compile.analysis.siblings import find_siblings
from flashsvd_compile.analysis.sweep import sweep
from flashsvd_compile.normalize import normalize
from flashsvd_compile.options import Options
from flashsvd_compile.planner.cost import size_hints
from flashsvd_compile.planner.device import device_for
from flashsvd_compile.planner.named_devices import device_named
from flashsvd_compile.planner.siblings import plan_siblings
from flashsvd_compile.reason import Code

HOPPER = device_named("h100")
CPU = device_for(torch.device("cpu"))


def plan_of(
    rows, device=HOPPER, dtype=torch.bfloat16, dynamic=False, depth=256, width=40, **options
):
    """The plan of three products depth → width of ``rows`` rows."""
    found = []

    def backend(gm, example_inputs):
        module = normalize(gm, example_inputs)
        (site,), _ = find_siblings(sweep(module.graph), module.graph)
        hints = size_hints([n.meta.get("val") for n in module.graph.nodes])
        found.append(plan_siblings(site, device, Options.parse(options), hints))
        return gm.forward

    def three(x, u, v, w):
        return F.linear(x, u), F.linear(x, v), F.linear(x, w)

    torch._dynamo.reset()
    sizes = (rows, width, width, width)
    x, *weights = (torch.empty(n, depth, dtype=dtype, device="meta") for n in sizes)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        torch.compile(three, backend=backend)(x, *weights)
    return found[0]


@pytest.mark.parametrize(("rows", "block_m"), [(2, 16), (100, 32), (4096, 64)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_forced(rows, block_m, dynamic):
    plan = plan_of(rows, siblings="merged", dynamic=dynamic)
    assert (plan.lowering, plan.reason.code) == ("merged", Code.FORCED)
    assert "3 products" in plan.reason.observed
    assert plan.tile[0] == block_m
    assert 0 < plan.sram_bytes <= HOPPER.sram_bytes


def test_auto_merges_what_launches_bound():
    few, exact = plan_of(64), plan_of(64, dtype=torch.float32)
    many = plan_of(16384, depth=4096, width=1024)
    assert (few.lowering, few.reason.code) == ("merged", Code.PLANNED)
    assert few.seconds < few.rivals[0].seconds
    assert few.rivals[0].lowering == "unfused"
    assert (many.lowering, many.reason.code) == ("unfused", Code.NOT_PROFITABLE)
    assert "times as long" in str(many.reason)
    assert (exact.lowering, exact.reason.code) == ("unfused", Code.NOT_PROFITABLE)


def test_on_a_cpu_siblings_are_left_alone_unless_forced():
    assert plan_of(8, CPU).reason.code is Code.UNSUPPORTED_DEVICE
    forced = plan_of(8, CPU, siblings="merged")
    assert (forced.lowering, forced.tile) == ("merged", ())


def test_unfused():
    plan = plan_of(8, siblings="unfused")
    assert (plan.lowering, plan.reason.code) == ("unfused", Code.FORCED)


def test_double_precision_is_refused():
    plan = plan_of(8, dtype=torch.float64, siblings="merged")
    assert (plan.lowering, plan.reason.code) == ("unfused", Code.DTYPE)


def test_a_budget_is_kept():
    plan = plan_of(4096, siblings="merged", sram_budget="48KiB")
    assert plan.sram_bytes <= 48 * 1024
    plan = plan_of(4096, replace(HOPPER, sram_bytes=1024), siblings="merged")
    assert (plan.lowering, plan.reason.code) == ("unfused", Code.SRAM)
