"""Chains that belong to no larger site: streamed in one kernel, or as they are."""

from collections.abc import Mapping
from dataclasses import replace

from flashsvd_compile.analysis.axes import Size, volume
from flashsvd_compile.analysis.site_records import ChainEnds, ChainSite
from flashsvd_compile.kernels import chain_tiles
from flashsvd_compile.options import Options
from flashsvd_compile.planner import cost, roofline
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.plan import Plan, Rival, check_dtype, lost, sram_limit
from flashsvd_compile.planner.tiling import only_tile
from flashsvd_compile.reason import Code, Reason, reason_at


def plan_chain(
    site: ChainSite, device: Device, options: Options, hints: Mapping[Size, int]
) -> Plan:
    """``auto`` streams where that was measured to be fastest, in 16 bits."""
    unfused = Plan(site, "unfused", _why_chain_stays(site))
    if isinstance(site.ends, ChainEnds):
        unfused = replace(unfused, seconds=_unfused_seconds(site, site.ends, device, hints))
    streamed = _streamed_chain(site, device, options, hints)
    if options.chain == "unfused":
        unfused = replace(unfused, reason=reason_at(site.node, Code.FORCED, "chain='unfused'"))
    if isinstance(streamed, Reason):
        reason = streamed if options.chain == "streamed" else unfused.reason
        return replace(unfused, reason=reason, rivals=(Rival("streamed", None, streamed),))
    is_fastest = chain_tiles.is_streamed_fastest(
        rank=site.rank, widest=max(site.in_width, site.out_width)
    )
    if options.chain == "streamed":
        streamed = replace(streamed, reason=reason_at(site.node, Code.FORCED, "chain='streamed'"))
    elif options.chain == "unfused" or not is_fastest or site.dtype.itemsize != 2:
        return replace(unfused, rivals=(_rival(streamed),))
    return replace(streamed, rivals=(_rival(unfused),))


def _rival(plan: Plan) -> Rival:
    return Rival(plan.lowering, plan.seconds, lost(plan.site, f"{plan.lowering}, as measured,"))


def _unfused_seconds(
    site: ChainSite, ends: ChainEnds, device: Device, hints: Mapping[Size, int]
) -> float:
    rows, element = cost.at(volume(ends.entry.rows), hints), site.dtype.itemsize
    down = roofline.matmul(device, rows, site.rank, site.in_width, element)
    return down + roofline.matmul(device, rows, site.out_width, site.rank, element)


def _streamed_seconds(
    site: ChainSite, ends: ChainEnds, device: Device, hints: Mapping[Size, int]
) -> float:
    """Bounded by the products or by what it reads and writes."""
    rows, element = cost.at(volume(ends.entry.rows), hints), site.dtype.itemsize
    widths = site.in_width + site.out_width
    macs_per_s = roofline.macs_per_s(device, element) * device.efficiency.matmul
    moved = (rows + site.rank) * widths * element
    return device.efficiency.launch_s + roofline.bound(
        rows * site.rank * widths / macs_per_s, roofline.traffic(device, moved)
    )


def _streamed_chain(
    site: ChainSite, device: Device, options: Options, hints: Mapping[Size, int]
) -> Plan | Reason:
    if device.type != "cuda":
        return reason_at(site.node, Code.UNSUPPORTED_DEVICE, device.type, "cuda")
    if not isinstance(site.ends, ChainEnds):
        return site.ends
    if (problem := check_dtype(site)) is not None:
        return problem
    if (why := _why_chain_stays(site)).code is Code.RANK_TOO_LARGE:
        return why
    rows, element = volume(site.ends.entry.rows), site.dtype.itemsize
    sram = sram_limit(device, options)
    tile = chain_tiles.default_tile(
        rows=round(cost.at(rows, hints)),
        rank=site.rank,
        out_size=site.out_width,
        element_bytes=element,
        sram_bytes=sram,
        multiprocessors=device.multiprocessors,
        generation=device.generation,
    )
    if tile is None:
        return reason_at(site.node, Code.SRAM, f"no tile for rank {site.rank}", f"{sram} bytes")
    reason = reason_at(site.node, Code.PLANNED, "the latent stays on chip")
    used = chain_tiles.sram_bytes_of(
        tile, rank=site.rank, element_bytes=element, generation=device.generation
    )
    return Plan(site, "streamed", reason, unfused_bytes=rows * site.rank * element,
                tiling=only_tile(tile, used, sram),
                seconds=_streamed_seconds(site, site.ends, device, hints))  # fmt: skip


def _why_chain_stays(site: ChainSite) -> Reason:
    """Beyond rank mn / (m + n) two factors of an m × n matrix do more work than the matrix."""
    m, n = site.in_width, site.out_width
    if site.rank * (m + n) >= m * n:
        observed = f"rank {site.rank} of a {m} × {n} matrix, whose factors cost more than it does"
        least = -(-m * n // (m + n))
        required = f"a rank under {least}, or the matrix itself: flashsvd_compile.merge_"
        return reason_at(site.node, Code.RANK_TOO_LARGE, observed, required)
    observed = "library matmuls keep the latent small"
    return reason_at(site.node, Code.NO_FUSED_LOWERING, observed)
