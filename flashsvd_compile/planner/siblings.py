"""Whether down-projections that read the same activations run as one launch."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from flashsvd_compile.analysis.axes import Size, shape_of
from flashsvd_compile.analysis.calls import value
from flashsvd_compile.analysis.site_records import SiblingsSite
from flashsvd_compile.kernels.siblings_tiles import default_tile, sram_bytes_of
from flashsvd_compile.options import Options
from flashsvd_compile.planner.cost import at
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.plan import Plan, Rival, slower_rival, sram_limit
from flashsvd_compile.planner.siblings_cost import (
    SiblingsShape,
    merged_seconds,
    separate_seconds,
)
from flashsvd_compile.planner.tiling import only_tile
from flashsvd_compile.reason import Code, Reason, reason_at

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def plan_siblings(
    site: SiblingsSite, device: Device, options: Options, hints: Mapping[Size, int]
) -> Plan:
    """``merged`` or ``unfused``; ``hints`` are example values of symbolic sizes.

    Elsewhere than on CUDA one launch is as many library matmuls, and only taken by force.
    """
    if site.dtype not in _DTYPES:
        observed, required = str(site.dtype), "float32, float16 or bfloat16"
        return Plan(site, "unfused", reason_at(site.node, Code.DTYPE, observed, required))
    rows = max(1, round(at(site.rows, hints)))
    depth = round(at(shape_of(value(site.members[0].x))[-1], hints))
    shape = SiblingsShape(rows, depth, site.widths, site.dtype.itemsize)
    separate, together = separate_seconds(shape, device), merged_seconds(shape, device)
    loses = slower_rival(site, "merged", together, separate)
    stays = Plan(site, "unfused", loses.reason, seconds=separate, rivals=(loses,))
    if options.siblings == "unfused":
        return replace(stays, reason=reason_at(site.node, Code.FORCED, "siblings='unfused'"))
    if options.siblings == "auto":
        if device.type != "cuda":
            why = reason_at(site.node, Code.UNSUPPORTED_DEVICE, device.type, "cuda")
            return replace(stays, reason=why, rivals=(Rival("merged", None, why),))
        if site.dtype.itemsize == 4:
            return replace(stays, reason=_not_measured(site))
        if separate <= together:
            return stays
    count = len(site.members)
    reason = reason_at(site.node, Code.PLANNED, f"{count} products in one launch")
    if options.siblings == "merged":
        reason = reason_at(site.node, Code.FORCED, f"siblings='merged' of {count} products")
    rival = slower_rival(site, "unfused", separate, together)
    merged = Plan(site, "merged", reason, seconds=together, rivals=(rival,))
    if device.type != "cuda":
        return merged
    element = site.dtype.itemsize
    sram = sram_limit(device, options)
    tile = default_tile(
        rows=rows, widths=site.widths, element_bytes=element, sram_bytes=sram,
        generation=device.generation,
    )  # fmt: skip
    if tile is None:
        none_fits = reason_at(site.node, Code.SRAM, "no tile", f"{sram} bytes")
        return replace(stays, reason=none_fits, rivals=(Rival("merged", None, none_fits),))
    used = sram_bytes_of(tile, element, device.generation)
    return replace(merged, tiling=only_tile(tile, used, sram))


def _not_measured(site: SiblingsSite) -> Reason:
    """Merging was measured in 16 bits; elsewhere library matmuls stay."""
    observed, required = "float32 on a GPU", "bfloat16 or float16"
    return reason_at(site.node, Code.NOT_PROFITABLE, observed, required)
