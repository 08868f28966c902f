"""Seconds of a low-rank feed-forward by each lowering, with or without its outer factors."""

import math
from dataclasses import dataclass

from flashsvd_compile.kernels.feed_forward_blocks import CPU_FASTEST_FROM_BLOCKS, padded_rank
from flashsvd_compile.kernels.feed_forward_tiles import MAX_RESIDENT_RANK, rank_padded
from flashsvd_compile.kernels.feed_forward_whole_tiles import WholeTile
from flashsvd_compile.kernels.shared_memory import WARPGROUP_ROWS
from flashsvd_compile.kernels.tiles import TileConfig
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.efficiency import LoopEfficiency
from flashsvd_compile.planner.roofline import (
    bound,
    elementwise,
    macs_per_s,
    matmul,
    traffic,
    utilisation,
)

# Ranks that are a multiple of this are loaded without a mask.
ALIGNED_RANKS = 16

# Programs of one multiprocessor that wait at the same time.
RESIDENT_PROGRAMS = 4


@dataclass(frozen=True)
class FeedForwardShape:
    """``hidden_sizes``: columns of x and of y where the outer factors belong to what is compared,
    else None; ``lift_ranks``: of up, and of the gate where there is one."""

    rows: float
    width: int
    lift_ranks: tuple[int, ...]
    rank_down: int
    element_bytes: int
    hidden_sizes: tuple[int, int] | None = None

    @property
    def is_gated(self) -> bool:
        return len(self.lift_ranks) > 1

    @property
    def ranks(self) -> tuple[int, ...]:
        return (*self.lift_ranks, self.rank_down)

    @property
    def padded_ranks(self) -> int:
        return sum(map(rank_padded, self.ranks))

    @property
    def passes(self) -> int:
        """How often an intermediate is read or written to activate it."""
        return 1 + len(self.lift_ranks)


def unfused_seconds(of: FeedForwardShape, device: Device) -> float:
    """Library matmuls, and one pass that activates."""
    return _outer(of, device) + _by_library(of, device, of.rows)


def row_blocks_seconds(
    of: FeedForwardShape, device: Device, block_rows: int, tile: TileConfig | None
) -> float:
    """``tile`` of the kernel that lifts and activates; None where library matmuls lift."""
    rows = min(of.rows, block_rows)
    count = math.ceil(of.rows / rows)
    if tile is None:
        block = _by_library(of, device, rows)
    else:
        block = _lifted(of, device, rows, tile)
        block += matmul(device, rows, of.rank_down, of.width, of.element_bytes)
    padding = _padding(of, device, of.width) + count * _padding(of, device, rows)
    return _outer(of, device) + device.efficiency.operator_s + padding + count * block


def streamed_seconds(of: FeedForwardShape, device: Device, tile: TileConfig) -> float:
    loop = _loop(of, device, tile, device.efficiency.streamed)
    return _outer(of, device) + device.efficiency.launch_s + loop


def streamed_whole_seconds(of: FeedForwardShape, device: Device, tile: WholeTile) -> float:
    """Only where the outer factors belong to what is compared."""
    assert of.hidden_sizes is not None
    reached = device.efficiency
    macs_s = tile.block_m * tile.block_k * of.padded_ranks * _mac_s(of, device)
    step = bound(
        reached.outer_step_s + reached.outer_macs * macs_s,
        _waves(of, device, tile) * reached.outer_shared_macs * macs_s,
    )
    outer = math.ceil(sum(of.hidden_sizes) / 2 / tile.block_k) * step
    return reached.launch_s + outer + _loop(of, device, tile, reached.whole)


def _outer(of: FeedForwardShape, device: Device) -> float:
    """Library matmuls from x to the latents, and from the latent to y."""
    if of.hidden_sizes is None:
        return 0.0
    hidden, out = of.hidden_sizes
    entries = sum(matmul(device, of.rows, r, hidden, of.element_bytes) for r in of.lift_ranks)
    return entries + matmul(device, of.rows, out, of.rank_down, of.element_bytes)


def _by_library(of: FeedForwardShape, device: Device, rows: float) -> float:
    lifts = sum(matmul(device, rows, of.width, r, of.element_bytes) for r in of.lift_ranks)
    activated = rows * of.width * of.element_bytes * of.passes
    if device.type != "cuda" and of.rows >= CPU_FASTEST_FROM_BLOCKS * rows:
        activated = 0  # blocks stay in the last cache
    down = matmul(device, rows, of.rank_down, of.width, of.element_bytes)
    return lifts + elementwise(device, activated) + down


def _padding(of: FeedForwardShape, device: Device, rows: float) -> float:
    """Copying ``rows`` rows of every latent or factor whose rank library matmuls are slow at."""
    on_gpu = device.type == "cuda"
    padded = [padded_rank(rank, of.element_bytes, on_gpu) for rank in of.ranks]
    return sum(
        elementwise(device, rows * (rank + wide) * of.element_bytes)
        for rank, wide in zip(of.ranks, padded, strict=True)
        if rank != wide
    )


def _lifted(of: FeedForwardShape, device: Device, rows: float, tile: TileConfig) -> float:
    reached = device.efficiency
    lift, element_s = reached.lift, reached.activated_s
    if of.is_gated:
        lift, element_s = reached.lift_gated, reached.gated_s
    macs = rows * of.width * sum(of.lift_ranks)
    rate = macs_per_s(device, of.element_bytes) * reached.matmul * lift
    tiles = math.ceil(rows / tile.block_m) * math.ceil(of.width / tile.block_n)
    moved = rows * (of.width + sum(of.lift_ranks)) * of.element_bytes
    at_work = (macs / rate + rows * of.width * element_s) / utilisation(tiles, device)
    return reached.launch_s + bound(
        at_work, traffic(device, moved), sum(of.lift_ranks) * reached.lift_step_s
    )


def _loop(of: FeedForwardShape, device: Device, tile: TileConfig, reached: LoopEfficiency) -> float:
    """All programs' walk over the intermediate axis."""
    factor = tile.block_n * of.padded_ranks
    macs_s = tile.block_m * factor * _mac_s(of, device)
    if tile.block_m < WARPGROUP_ROWS:
        macs_s *= reached.few_rows
    if max(of.ranks) > MAX_RESIDENT_RANK:
        macs_s *= device.efficiency.many_ranks
    unaligned = factor if any(rank % ALIGNED_RANKS for rank in of.ranks) else 0
    waves = _waves(of, device, tile)
    alone = reached.step_s + reached.gate_s * of.is_gated
    alone += reached.macs * macs_s + reached.unaligned_s * unaligned
    shared = reached.shared_elements_s * tile.block_m * tile.block_n
    shared += reached.shared_macs * macs_s + reached.shared_unaligned_s * unaligned
    step = bound(alone * math.ceil(waves / RESIDENT_PROGRAMS), waves * shared)
    return math.ceil(of.width / tile.block_n) * step


def _waves(of: FeedForwardShape, device: Device, tile: TileConfig) -> float:
    """Programs for each multiprocessor."""
    return math.ceil(of.rows / tile.block_m) / max(1, device.multiprocessors)


def _mac_s(of: FeedForwardShape, device: Device) -> float:
    """Of one multiprocessor at its full rate."""
    return max(1, device.multiprocessors) / macs_per_s(device, of.element_bytes)
