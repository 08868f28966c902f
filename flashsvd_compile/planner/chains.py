"""Chains that belong to no larger site: streamed in one kernel, or as they are."""

from collections.abc import Mapping
from dataclasses import replace

from flashsvd_compile.analysis.axes import Size, volume
from flashsvd_compile.analysis.site_records import ChainEnds, ChainSite
from flashsvd_compile.kernels import chain_tiles
from flashsvd_compile.kernels.chain_tiles import ChainTile
from flashsvd_compile.options import Options
from flashsvd_compile.planner import cost
from flashsvd_compile.planner.chain_cost import (
    ChainShape,
    streamed_seconds,
    unfused_seconds,
)
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.plan import Plan, Rival, check_dtype, slower_rival, sram_limit
from flashsvd_compile.planner.tiling import only_tile
from flashsvd_compile.reason import Code, Reason, reason_at


def plan_chain(
    site: ChainSite, device: Device, options: Options, hints: Mapping[Size, int]
) -> Plan:
    """Streamed where that is legal and predicted to be the fastest, in 16 bits; or forced."""
    unfused = Plan(site, "unfused", _why_chain_stays(site))
    if options.chain == "unfused":
        unfused = replace(unfused, reason=reason_at(site.node, Code.FORCED, "chain='unfused'"))
    streamed = _streamed_chain(site, device, options, hints)
    if isinstance(streamed, Reason):
        reason = streamed if options.chain == "streamed" else unfused.reason
        return replace(unfused, reason=reason, rivals=(Rival("streamed", None, streamed),))
    shape = _shape(site, hints)
    separate = unfused_seconds(shape, device)
    together = streamed_seconds(shape, device, ChainTile(*streamed.tile))
    if options.chain == "streamed":
        streamed = replace(streamed, reason=reason_at(site.node, Code.FORCED, "chain='streamed'"))
    elif options.chain == "unfused" or separate <= together or site.dtype.itemsize != 2:
        rival = slower_rival(site, "streamed", together, separate)
        return replace(unfused, seconds=separate, rivals=(rival,))
    rival = slower_rival(site, "unfused", separate, together)
    return replace(streamed, seconds=together, rivals=(rival,))


def _shape(site: ChainSite, hints: Mapping[Size, int]) -> ChainShape:
    assert isinstance(site.ends, ChainEnds)
    rows = max(1, round(cost.at(volume(site.ends.entry.rows), hints)))
    return ChainShape(rows, site.in_width, site.rank, site.out_width, site.dtype.itemsize)


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
                tiling=only_tile(tile, used, sram))  # fmt: skip


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
