"""Tiles of sibling linears: what may be launched, what is preferred, what it costs on chip.

Imports no Triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from flashsvd_compile.kernels.shared_memory import Matmuls, most_of
from flashsvd_compile.kernels.tiles import TileConfig

# Siblings of one launch: each has arguments of its own in the kernel's signature. Attention has
# three, a gated feed-forward two, a block that runs both side by side five.
MAX_SIBLINGS = 8

# Programs that a launch should have at least, where tiles can be made smaller: the
# multiprocessors of an H100.
FILLING_PROGRAMS = 132

# Tiles of rows that share a weight's tile while it is in the second-level cache.
GROUP_M = 8

# Beyond the tiles themselves: barriers and small conversions.
SRAM_SLACK_BYTES = 256


@dataclass(frozen=True)
class MatmulTile(TileConfig):
    """``block_m`` × ``block_n`` of one output, ``block_k`` of the contraction at a time."""

    block_k: int = 64


# From large to small: the first that fits and fills the device is taken, else the smallest that
# fits. Reasoned, not measured: 64 rows are a warpgroup's on Hopper, and 16 the least a tensor core
# takes, where weights are read once and the rows hardly count.
TILES = (
    MatmulTile(128, 128, 8, 4, block_k=64),
    MatmulTile(128, 64, 4, 4, block_k=64),
    MatmulTile(64, 64, 4, 4, block_k=64),
    MatmulTile(64, 32, 4, 5, block_k=64),
    MatmulTile(64, 16, 4, 4, block_k=64),
    MatmulTile(32, 16, 4, 3, block_k=64),
)
FEW_ROWS = 16
TILES_FEW_ROWS = (
    MatmulTile(16, 64, 4, 4, block_k=128),
    MatmulTile(16, 32, 4, 5, block_k=128),
    MatmulTile(16, 16, 4, 5, block_k=256),
    MatmulTile(16, 16, 4, 3, block_k=128),
    MatmulTile(16, 16, 4, 2, block_k=64),
)
# Exact float32 multiplies on the ordinary cores, from registers.
TILES_32_BIT = (
    MatmulTile(64, 64, 4, 3, block_k=32),
    MatmulTile(32, 32, 4, 3, block_k=32),
    MatmulTile(16, 16, 4, 4, block_k=64),
    MatmulTile(16, 16, 4, 2, block_k=32),
)


@cache
def sram_bytes_of(tile: MatmulTile, element_bytes: int, generation: str = "") -> int:
    """Shared memory of one program: the tiles of x and of a weight, as often as they are ahead.

    The output's tile passes through it too, on its way to memory, after the last stage.
    ``generation`` of the device; where that is not known the most that it takes on any.
    """
    most = most_of(generation, lambda name: _sram_bytes_of(tile, element_bytes, name))
    return most + SRAM_SLACK_BYTES


def _sram_bytes_of(tile: MatmulTile, element_bytes: int, generation: str) -> int:
    matmuls = Matmuls(generation, element_bytes, tile.block_m, tile.num_warps)
    n, ahead = tile.block_n, max(1, matmuls.tiles_ahead(tile.num_stages))
    stages = ahead * (tile.block_m + n) * tile.block_k
    return max(stages, matmuls.scratch(n, matmuls.balanced(n))) * element_bytes


def programs_of(tile: MatmulTile, rows: int, widths: Sequence[int]) -> int:
    """How many programs a launch has."""
    return -(-rows // tile.block_m) * sum(-(-width // tile.block_n) for width in widths)


def default_tile(
    *,
    rows: int,
    widths: Sequence[int],
    element_bytes: int,
    sram_bytes: int,
    generation: str = "",
) -> MatmulTile | None:
    """The largest tile that fits the shared memory and fills the device; None if none fits.

    Where none fills it, the deepest of those with the most programs: each of them then waits for
    its loads alone.
    """
    fitting = [
        tile
        for tile in _preferred(rows, element_bytes)
        if sram_bytes_of(tile, element_bytes, generation) <= sram_bytes
    ]
    programs = {tile: programs_of(tile, rows, widths) for tile in fitting}
    filling = [tile for tile in fitting if programs[tile] >= FILLING_PROGRAMS]
    return filling[0] if filling else max(fitting, key=lambda tile: programs[tile], default=None)


def _preferred(rows: int, element_bytes: int) -> tuple[MatmulTile, ...]:
    if element_bytes == 4:
        return TILES_32_BIT
    return TILES_FEW_ROWS if rows <= FEW_ROWS else TILES
