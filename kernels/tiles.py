"""The choice of tile extents that a launcher is given. Data only: imports no Triton."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TileConfig:
    """Extents of one program's tile.

    ``block_m`` rows (queries or tokens); ``block_n`` columns streamed per step (keys, or
    intermediate features); ``num_warps`` and ``num_stages`` as Triton means them;
    ``max_registers`` a thread, 0 for as many as the compiler likes; ``is_described``: whether what
    is streamed comes through tensor descriptors.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = 0
    is_described: bool = False
