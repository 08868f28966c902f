"""Seconds of a chain x · u · v: as library matmuls, and streamed in one kernel."""

import math
from dataclasses import dataclass

from flashsvd_compile.kernels.chain_tiles import ChainTile
from flashsvd_compile.kernels.feed_forward_tiles import rank_padded
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.roofline import bound, macs_per_s, matmul, traffic


@dataclass(frozen=True)
class ChainShape:
    rows: float
    in_width: int
    rank: int
    out_width: int
    element_bytes: int


def unfused_seconds(of: ChainShape, device: Device) -> float:
    down = matmul(device, of.rows, of.rank, of.in_width, of.element_bytes)
    return down + matmul(device, of.rows, of.out_width, of.rank, of.element_bytes)


def streamed_seconds(of: ChainShape, device: Device, tile: ChainTile) -> float:
    """A program walks x and then its columns of y, as many steps as those take."""
    reached, padded = device.efficiency, rank_padded(of.rank)
    steps = math.ceil(of.in_width / tile.block_k) + math.ceil(tile.columns / tile.block_n)
    step = tile.block_k * (reached.chain_factor_s * padded + reached.chain_rows_s * tile.block_m)
    programs = math.ceil(of.rows / tile.block_m) * math.ceil(of.out_width / tile.columns)
    macs = programs * steps * tile.block_m * tile.block_k * padded
    widths = of.in_width + of.out_width
    return reached.launch_s + bound(
        steps * step,
        macs * reached.chain_macs / macs_per_s(device, of.element_bytes),
        traffic(device, (of.rows + of.rank) * widths * of.element_bytes),
    )
