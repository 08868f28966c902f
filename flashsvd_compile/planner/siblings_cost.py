"""Seconds of products that read the same activations: each by itself, and as one launch."""

from collections.abc import Sequence
from dataclasses import dataclass

from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.roofline import bound, macs_per_s, matmul, traffic


@dataclass(frozen=True)
class SiblingsShape:
    """[rows, depth] · [depth, width], for each of ``widths``."""

    rows: float
    depth: int
    widths: Sequence[int]
    element_bytes: int


def separate_seconds(of: SiblingsShape, device: Device) -> float:
    return sum(matmul(device, of.rows, width, of.depth, of.element_bytes) for width in of.widths)


def merged_seconds(of: SiblingsShape, device: Device) -> float:
    reached, width = device.efficiency, sum(of.widths)
    rate = macs_per_s(device, of.element_bytes) * reached.matmul * reached.merged
    moved = (of.rows * (of.depth + width) + of.depth * width) * of.element_bytes
    return reached.launch_s + bound(
        of.rows * of.depth * width / rate,
        traffic(device, moved),
        of.depth * reached.merged_step_s,
    )
