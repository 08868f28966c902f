"""Other ways to run a planned site that hold less: what a memory budget chooses among.

Each takes longer than the plan by an estimate that only has to put them in order.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from flashsvd_compile.analysis.axes import Size, volume
from flashsvd_compile.analysis.facts import Facts
from flashsvd_compile.analysis.outer_factors import attention_entries
from flashsvd_compile.analysis.site_records import (
    Arm,
    AttentionBlocks,
    AttentionSite,
    FeedForwardSite,
)
from flashsvd_compile.options import Options
from flashsvd_compile.planner import cost
from flashsvd_compile.planner.attention import plan_attention
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.feed_forward import (
    feed_forward_seconds,
    in_blocks_of,
    plan_feed_forward,
)
from flashsvd_compile.planner.plan import Plan
from flashsvd_compile.reason import Code, reason_at

# Fewer rows leave a GEMM or the multiprocessors idle: measured at 1024, where row blocks of rank
# 1024 took 1.22 times as long as unfused (kernels/feed_forward_blocks.py).
LEAST_BLOCK_ROWS = 256


@dataclass(frozen=True)
class Alternative:
    """A plan, and the seconds that it is estimated to take beyond the first."""

    plan: Plan
    seconds: float


def alternatives(
    plan: Plan, facts: Facts, device: Device, options: Options, sizes: Mapping[Size, int]
) -> list[Alternative]:
    """``plan`` and others for its site, the fastest first; ``sizes``: of the graph's symbols."""
    found = [Alternative(plan, 0.0)]
    if isinstance(plan.site, AttentionSite) and options.attention != "unfused":
        found += _attention(plan, facts, device, options, sizes)
    elif isinstance(plan.site, FeedForwardSite) and options.feed_forward == "auto":
        found += _feed_forward(plan, device, options, sizes)
    return sorted(found, key=lambda one: one.seconds)


def _attention(
    plan: Plan, facts: Facts, device: Device, options: Options, sizes: Mapping[Size, int]
) -> Iterator[Alternative]:
    found, lost = plan.site, 0.0
    assert isinstance(found, AttentionSite)
    if plan.lowering == "unfused":
        unfused_seconds = plan.seconds or 0.0
        plan = plan_attention(found, device, replace(options, attention="rank_space"), sizes)
        if plan.lowering == "unfused":
            return
        lost = max(0.0, (plan.seconds or 0.0) - unfused_seconds)
        yield Alternative(_told(plan, "latents take less memory"), lost)
    site = plan.site
    assert isinstance(site, AttentionSite)
    if not (entries := attention_entries(facts, site)):
        return
    batch, heads = round(cost.at(volume(site.batch), sizes)), site.num_heads
    group = math.lcm(*(_group(arm, heads) for arm in site.arms.values()))
    launches = (1 + len(entries)) * device.launch_s
    for rows, own in (
        *((rows, heads) for rows in _halves(batch, 1)),
        *((1, own) for own in _halves(heads, group) if own % group == 0),
    ):
        blocks = AttentionBlocks(rows, own, entries)
        count = math.ceil(batch / rows) * math.ceil(heads / own)
        told = f"blocks of {rows} of the batch" + (f" and {own} heads" if own < heads else "")
        seconds = None if plan.seconds is None else plan.seconds + count * launches
        planned = replace(_told(plan, told), blocks=blocks, seconds=seconds)
        yield Alternative(planned, lost + count * launches)


def _feed_forward(
    plan: Plan, device: Device, options: Options, sizes: Mapping[Size, int]
) -> Iterator[Alternative]:
    site = plan.site
    assert isinstance(site, FeedForwardSite)
    fastest = feed_forward_seconds(plan, device, sizes)

    def alternative(planned: Plan, why: str) -> Alternative:
        seconds = feed_forward_seconds(planned, device, sizes)
        told = replace(_told(planned, why), seconds=seconds)
        return Alternative(told, max(0.0, seconds - fastest))

    for name in ("streamed", "streamed_whole", "row_blocks"):
        other = plan_feed_forward(site, device, replace(options, feed_forward=name), sizes)
        if other.lowering != name:
            continue
        if name != "row_blocks":
            if plan.lowering != name:
                yield alternative(other, f"{name} holds less")
            continue
        for rows in (other.block_rows, *_halves(other.block_rows, LEAST_BLOCK_ROWS)):
            if (plan.lowering, plan.block_rows) != (name, rows):
                yield alternative(in_blocks_of(rows, other, device), f"blocks of {rows} rows")


def _group(arm: Arm, heads: int) -> int:
    """Heads that have to stay together, as they read the same head of the arm; one read by all
    binds none."""
    return heads // arm.own_heads if arm.own_heads > 1 else 1


def _halves(extent: int, least: int) -> Iterator[int]:
    """Half of ``extent``, a quarter, …, rounded up, down to ``least``."""
    while extent > least:
        extent = max(least, -(-extent // 2))
        yield extent


def _told(plan: Plan, why: str) -> Plan:
    return replace(plan, reason=reason_at(plan.site.node, Code.MEMORY_BUDGET, why))
