"""Seconds of library operators: what bounds them, and how near to the bound they come."""

import math

from flashsvd_compile.planner.device import Device

# Rows and columns of what one multiprocessor makes of a library matmul's result at a time.
GEMM_TILE = 128

# Bounds that are close together cost more than the larger of them: work does not overlap in full.
_SHARPNESS = 4


def bound(*seconds: float) -> float:
    """The largest, or a little more where others come close."""
    most = max(seconds)
    if most <= 0:
        return 0.0
    return most * sum((one / most) ** _SHARPNESS for one in seconds) ** (1 / _SHARPNESS)


def utilisation(tiles: int, device: Device) -> float:
    """The share of a matmul's rate that ``tiles`` of its result leave."""
    if device.type != "cuda" or not device.multiprocessors:
        return 1.0
    if tiles < device.multiprocessors:
        return float((tiles / device.multiprocessors) ** device.efficiency.few_tiles)
    waves = math.ceil(tiles / device.multiprocessors)
    # The last wave is not full; libraries split its work in part.
    return (1 + tiles / (waves * device.multiprocessors)) / 2


def matmul(device: Device, rows: float, columns: int, depth: int, element_bytes: int) -> float:
    """[rows, depth] · [depth, columns]."""
    rate = macs_per_s(device, element_bytes) * device.efficiency.matmul
    tiles = math.ceil(rows / GEMM_TILE) * math.ceil(columns / GEMM_TILE)
    elements = rows * depth + depth * columns + rows * columns
    return device.efficiency.launch_s + bound(
        rows * columns * depth / (rate * utilisation(tiles, device)),
        traffic(device, elements * element_bytes),
        depth * device.efficiency.matmul_step_s,
    )


def elementwise(device: Device, bytes_: float) -> float:
    """A pass that reads and writes ``bytes_``."""
    return device.efficiency.launch_s + traffic(device, bytes_)


def traffic(device: Device, bytes_: float) -> float:
    return bytes_ / (device.bytes_per_s * device.efficiency.memory)


def macs_per_s(device: Device, element_bytes: int) -> float:
    return device.macs_per_s[2 if element_bytes <= 2 else 4]
