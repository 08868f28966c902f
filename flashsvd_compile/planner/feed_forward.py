"""Feed-forward sites: streamed, streamed whole, in blocks of rows, or as they are."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy

from flashsvd_compile.analysis.axes import Size, volume
from flashsvd_compile.analysis.site_records import FeedForwardSite
from flashsvd_compile.kernels import (
    feed_forward_blocks,
    feed_forward_tiles,
    feed_forward_whole_tiles,
    lifted_activation_tiles,
)
from flashsvd_compile.options import Options
from flashsvd_compile.planner import cost
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.plan import Plan, check_dtype, lost, sram_limit
from flashsvd_compile.planner.tiling import only_tile, tiling_of
from flashsvd_compile.reason import Code, Reason, reason_at


def plan_feed_forward(
    site: FeedForwardSite, device: Device, options: Options, hints: Mapping[Size, int]
) -> Plan:
    base = cost.feed_forward_bytes(site)
    unfused = Plan(site, "unfused", lost(site, "streamed and row_blocks"), base, base)
    streamed = _streamed(site, device, options)
    row_blocks = _row_blocks(site, device, options)
    whole = _streamed_whole(site, device, options)
    legal = {"row_blocks": row_blocks, "unfused": unfused}
    for name, found in (("streamed", streamed), ("streamed_whole", whole)):
        if isinstance(found, Plan):
            legal[name] = found
    if (forced := options.feed_forward) == "auto":
        tiles = {name: plan.tile for name, plan in legal.items()}
        fastest = cost.cheapest_feed_forward(site, device, hints, tiles, row_blocks.block_rows)
        plan = legal[fastest]
        reason = plan.reason
    elif forced in legal:
        plan, reason = legal[forced], reason_at(site.node, Code.FORCED, f"feed_forward={forced!r}")
    else:
        problem = whole if forced == "streamed_whole" else streamed
        assert isinstance(problem, Reason)
        plan, reason = unfused, problem
    return replace(plan, reason=reason, unfused_bytes=base)


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
    width, element = int(volume(site.width)), site.dtype.itemsize
    arms = [site.up] if site.gate is None else [site.up, site.gate]
    ranks = [arm.rank_size for arm in arms]
    tile = lifted_activation_tiles.default_tile(
        ranks,
        element_bytes=element,
        generation=device.generation,
        sram_bytes=(sram := sram_limit(device, options)),
    )
    rows = feed_forward_blocks.default_block_rows(
        rank_down=int(volume(site.out)),
        multiprocessors=device.multiprocessors,
        at_once=tile is not None,
    )
    buffers = len(arms) if tile is None else 1
    held = sympy.Min(rows, volume(site.tokens)) * width * element * buffers
    reason = reason_at(site.node, Code.PLANNED, f"blocks of {rows} rows")
    tiling = None
    if tile is not None:
        tiling = only_tile(tile, lifted_activation_tiles.sram_bytes_of(tile, ranks), sram)
    return Plan(site, "row_blocks", reason, held, tiling=tiling, block_rows=rows)
