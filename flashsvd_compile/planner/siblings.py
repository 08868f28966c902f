"""Whether down-projections that read the same activations run as one launch."""

from collections.abc import Mapping

import torch

from flashsvd_compile.analysis.axes import Size
from flashsvd_compile.analysis.site_records import SiblingsSite
from flashsvd_compile.kernels.siblings_tiles import (
    MERGED_FASTEST_UP_TO_ROWS,
    default_tile,
    sram_bytes_of,
)
from flashsvd_compile.options import Options
from flashsvd_compile.planner.cost import UNKNOWN_SIZE
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.plan import Plan, sram_limit
from flashsvd_compile.planner.tiling import only_tile
from flashsvd_compile.reason import Code, Reason, reason_at

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def plan_siblings(
    site: SiblingsSite, device: Device, options: Options, hints: Mapping[Size, int]
) -> Plan:
    """``merged`` or ``unfused``; ``hints`` are example values of symbolic sizes.

    Elsewhere than on CUDA one launch is as many library matmuls, and only taken by force.
    """
    rows = int(site.rows.subs({s: hints.get(s, UNKNOWN_SIZE) for s in site.rows.free_symbols}))
    if options.siblings == "unfused":
        return Plan(site, "unfused", reason_at(site.node, Code.FORCED, "siblings='unfused'"))
    if site.dtype not in _DTYPES:
        observed, required = str(site.dtype), "float32, float16 or bfloat16"
        return Plan(site, "unfused", reason_at(site.node, Code.DTYPE, observed, required))
    if options.siblings == "auto" and (lost := _check_profit(site, device, rows)) is not None:
        return Plan(site, "unfused", lost)
    count = len(site.members)
    reason = reason_at(site.node, Code.PLANNED, f"{count} products in one launch")
    if options.siblings == "merged":
        reason = reason_at(site.node, Code.FORCED, f"siblings='merged' of {count} products")
    if device.type != "cuda":
        return Plan(site, "merged", reason)
    element = site.dtype.itemsize
    sram = sram_limit(device, options)
    tile = default_tile(
        rows=rows, widths=site.widths, element_bytes=element, sram_bytes=sram,
        generation=device.generation,
    )  # fmt: skip
    if tile is None:
        return Plan(site, "unfused", reason_at(site.node, Code.SRAM, "no tile", f"{sram} bytes"))
    used = sram_bytes_of(tile, element, device.generation)
    return Plan(site, "merged", reason, tiling=only_tile(tile, used, sram))


def _check_profit(site: SiblingsSite, device: Device, rows: int) -> Reason | None:
    if device.type != "cuda":
        return reason_at(site.node, Code.UNSUPPORTED_DEVICE, device.type, "cuda")
    if site.dtype.itemsize == 4:
        observed, required = "float32 on a GPU", "bfloat16 or float16"
        return reason_at(site.node, Code.NOT_PROFITABLE, observed, required)
    if rows > MERGED_FASTEST_UP_TO_ROWS:
        required = f"at most {MERGED_FASTEST_UP_TO_ROWS}"
        return reason_at(site.node, Code.NOT_PROFITABLE, f"{rows} rows", required)
    return None
