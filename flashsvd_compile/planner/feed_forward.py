"""Feed-forward sites: streamed, streamed whole, in blocks of rows, or as they are."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy

from flashsvd_compile.analysis.axes import Size, same, size_of, volume
from flashsvd_compile.analysis.calls import value
from flashsvd_compile.analysis.site_records import Arm, FeedForwardSite, Outer
from flashsvd_compile.kernels import (
    feed_forward_blocks,
    feed_forward_tiles,
    feed_forward_whole_tiles,
    lifted_activation_tiles,
)
from flashsvd_compile.kernels.feed_forward_whole_tiles import WholeTile
from flashsvd_compile.kernels.tiles import TileConfig
from flashsvd_compile.options import Options
from flashsvd_compile.planner import cost
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.feed_forward_cost import (
    FeedForwardShape,
    row_blocks_seconds,
    streamed_seconds,
    streamed_whole_seconds,
    unfused_seconds,
)
from flashsvd_compile.planner.plan import Plan, Rival, check_dtype, lost, slower_rival, sram_limit
from flashsvd_compile.planner.tiling import only_tile, tiling_of
from flashsvd_compile.reason import Code, Reason, reason_at


def plan_feed_forward(
    site: FeedForwardSite, device: Device, options: Options, hints: Mapping[Size, int]
) -> Plan:
    """The fastest legal lowering, as predicted, or the one that is forced."""
    base = cost.feed_forward_bytes(site)
    ways: dict[str, Plan | Reason] = {
        "unfused": Plan(site, "unfused", lost(site, "streamed and row_blocks"), base),
        "streamed": _streamed(site, device, options),
        "streamed_whole": _streamed_whole(site, device, options),
        "row_blocks": _row_blocks(site, device, options),
    }
    seconds = {
        name: feed_forward_seconds(way, device, hints)
        for name, way in ways.items()
        if isinstance(way, Plan)
    }
    forced = options.feed_forward
    name = forced
    if forced == "auto":
        name = "unfused" if _is_exact(site, device) else min(seconds, key=lambda n: seconds[n])
    plan = ways[name]
    if isinstance(plan, Reason):
        unfused = ways["unfused"]
        assert isinstance(unfused, Plan)
        name, plan = "unfused", replace(unfused, reason=plan)
    elif forced != "auto":
        plan = replace(plan, reason=reason_at(site.node, Code.FORCED, f"feed_forward={forced!r}"))
    rivals = [
        Rival(other, None, way)
        if isinstance(way, Reason)
        else slower_rival(site, other, seconds[other], seconds[name])
        for other, way in ways.items()
        if other != name
    ]
    return replace(
        plan,
        unfused_bytes=base,
        seconds=seconds[name],
        rivals=tuple(sorted(rivals, key=lambda r: r.seconds if r.seconds else math.inf)),
    )


def _is_exact(site: FeedForwardSite, device: Device) -> bool:
    """float32 on a GPU has no tensor cores, unless TF32 is allowed: within 2% nothing was gained
    by blocks of rows (same measurements as the efficiencies), much lost by streaming."""
    return device.type == "cuda" and site.dtype.itemsize == 4


def _shape(site: FeedForwardSite, hints: Mapping[Size, int]) -> FeedForwardShape:
    arms = [site.up] if site.gate is None else [site.up, site.gate]
    outer = site.outer
    hidden_sizes = None
    if isinstance(outer, Outer):
        x, y = (cost.at(volume(dim), hints) for dim in (outer.up.hidden, outer.exit.width))
        hidden_sizes = round(x), round(y)
    return FeedForwardShape(
        rows=max(1.0, cost.at(volume(site.tokens), hints)),
        width=int(volume(site.width)),
        lift_ranks=tuple(arm.rank_size for arm in arms),
        rank_down=int(volume(site.out)),
        element_bytes=site.dtype.itemsize,
        hidden_sizes=hidden_sizes,
    )


def feed_forward_seconds(plan: Plan, device: Device, hints: Mapping[Size, int]) -> float:
    """What ``plan`` takes, as predicted; with outer factors where a lowering could take them in."""
    assert isinstance(plan.site, FeedForwardSite)
    of = _shape(plan.site, hints)
    if plan.lowering == "unfused":
        return unfused_seconds(of, device)
    if plan.lowering == "row_blocks":
        tile = TileConfig(*plan.tile) if plan.tile else None
        return row_blocks_seconds(of, device, plan.block_rows, tile)
    if plan.lowering == "streamed":
        return streamed_seconds(of, device, TileConfig(*plan.tile))
    return streamed_whole_seconds(of, device, WholeTile(*plan.tile))


def _streamed(site: FeedForwardSite, device: Device, options: Options) -> Plan | Reason:
    if device.type != "cuda":
        return reason_at(site.node, Code.UNSUPPORTED_DEVICE, device.type, "cuda")
    if (problem := check_dtype(site)) is not None:
        return problem
    shape: dict[str, Any] = {
        "rank_up": site.up.rank_size,
        "rank_gate": site.gate.rank_size if site.gate else None,
        "rank_down": int(volume(site.out)),
        "intermediate_size": int(volume(site.width)),
        "element_bytes": site.dtype.itemsize,
        "generation": device.generation,
    }
    sram = sram_limit(device, options)
    found = feed_forward_tiles.candidate_tiles(**shape, sram_bytes=sram)
    tiling = tiling_of(found, lambda tile: feed_forward_tiles.sram_bytes_of(tile, **shape), sram)
    if tiling is None:
        ranks = f"ranks {shape['rank_up']} in, {shape['rank_down']} out"
        return reason_at(site.node, Code.SRAM, f"no tile for {ranks}", f"{sram} bytes")
    reason = reason_at(site.node, Code.PLANNED, "the intermediate stays on chip")
    return Plan(site, "streamed", reason, tiling=tiling)


def _streamed_whole(site: FeedForwardSite, device: Device, options: Options) -> Plan | Reason:
    if device.type != "cuda":
        return reason_at(site.node, Code.UNSUPPORTED_DEVICE, device.type, "cuda")
    if isinstance(site.outer, Reason):
        return site.outer
    if (problem := check_dtype(site)) is not None:
        return problem
    extents = feed_forward_whole_tiles.WholeExtents(
        rank_up=site.up.rank_size,
        rank_gate=site.gate.rank_size if site.gate else None,
        rank_down=int(volume(site.out)),
        intermediate_size=int(volume(site.width)),
        gate_from=site.gate_from,
        element_bytes=site.dtype.itemsize,
        generation=device.generation,
    )
    sram = sram_limit(device, options)
    tile = feed_forward_whole_tiles.default_tile(extents, sram)
    if tile is None:
        ranks = f"ranks {extents.rank_up} in, {extents.rank_down} out"
        return reason_at(site.node, Code.SRAM, f"no tile for {ranks}", f"{sram} bytes")
    reason = reason_at(site.node, Code.PLANNED, "neither latents nor the intermediate leave chip")
    used = feed_forward_whole_tiles.sram_bytes_of(tile, extents)
    return Plan(site, "streamed_whole", reason, tiling=only_tile(tile, used, sram))


def _row_blocks(site: FeedForwardSite, device: Device, options: Options) -> Plan:
    arms = [site.up] if site.gate is None else [site.up, site.gate]
    ranks = [arm.rank_size for arm in arms]
    sram = sram_limit(device, options)
    tile = None
    if all(map(_is_rank_innermost, arms)):  # as the kernel's descriptors read factors
        tile = lifted_activation_tiles.default_tile(
            ranks,
            width=int(volume(site.width)),
            element_bytes=site.dtype.itemsize,
            generation=device.generation,
            sram_bytes=sram,
        )
    rows = feed_forward_blocks.default_block_rows(
        rank_down=int(volume(site.out)),
        multiprocessors=device.multiprocessors,
        at_once=tile is not None,
    )
    reason = reason_at(site.node, Code.PLANNED, f"blocks of {rows} rows")
    tiling = None
    if tile is not None:
        tiling = only_tile(tile, lifted_activation_tiles.sram_bytes_of(tile, ranks), sram)
    return in_blocks_of(rows, Plan(site, "row_blocks", reason, tiling=tiling), device)


def _is_rank_innermost(arm: Arm) -> bool:
    """Whether a step along the rank is a step in memory, in the factor as it lies there or will
    when it is cast: a view of another kind would have to be copied first."""
    factor, last = arm.factor, arm.rank[-1:]
    if factor is None or len(factor.nodes) != 1 or not last:
        return False
    strides = value(factor.node).stride()
    return any(
        same(size_of(stride), sympy.S.One)
        for dim, stride in zip(factor.dims, strides, strict=True)
        if dim[-1:] == last
    )


def in_blocks_of(rows: int, plan: Plan, device: Device) -> Plan:
    """A plan of ``row_blocks`` with as many rows a block."""
    site = plan.site
    assert isinstance(site, FeedForwardSite)
    arms = [site.up] if site.gate is None else [site.up, site.gate]
    by_row, always = feed_forward_blocks.held_elements(
        lift_ranks=[arm.rank_size for arm in arms],
        rank_down=int(volume(site.out)),
        width=int(volume(site.width)),
        element_bytes=site.dtype.itemsize,
        on_gpu=device.type == "cuda",
        at_once=plan.tiling is not None,
    )
    held = sympy.Min(rows, volume(site.tokens)) * by_row + always
    return replace(plan, block_rows=rows, transient_bytes=held * site.dtype.itemsize)
