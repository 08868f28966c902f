"""Which tiles a streamed chain may have, and what they cost on chip. Imports no Triton.

A program makes the latent of BLOCK_M rows and lifts it to some of the output columns. Many rows
make programs enough, each of all columns. Few rows do not: there the columns are shared out among
as many programs as the device has multiprocessors, and each makes the latent anew. That costs
K · rank elements of U once more a program, from the second-level cache, and saves a launch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from flashsvd_compile.kernels.feed_forward_tiles import (
    MAX_RESIDENT_RANK,
    SRAM_SLACK_BYTES,
    rank_padded,
)
from flashsvd_compile.kernels.outer_sram import (
    entry_buffers,
    entry_warps,
    exit_buffers,
    latent_from,
)
from flashsvd_compile.kernels.shared_memory import Buffer, Matmuls, most_of, packed_bytes
from flashsvd_compile.kernels.tiles import TileConfig


@dataclass(frozen=True)
class ChainTile(TileConfig):
    """``block_n`` output columns and ``block_k`` columns of x per step; ``columns`` of y are one
    program's, a multiple of ``block_n``."""

    block_k: int = 64
    columns: int = 64


# A latent is never in memory, so none is too long for a tile.
MAX_RANK = MAX_RESIDENT_RANK

# As of the streamed feed-forward, whose accumulators are as many.
MAX_REGISTERS_16_BIT = 192
MAX_REGISTERS_32_BIT = 72

# By the number of rows, fastest first, then ever smaller: the first that fits is taken. H100 80GB
# HBM3, torch 2.11.0, triton 3.6.0, bfloat16, 2026-11-26, `python -m bench.outer_tiles chain` (768
# columns in and out, ranks 64 and 240; 1, 16, 256, 4096 and 65536 rows; 8 to 48 tiles each): what
# is taken was the best or within 3% of it.
_FEW_ROWS = (
    ChainTile(16, 64, 4, 4, block_k=128),
    ChainTile(16, 64, 4, 4, block_k=64),
    ChainTile(16, 64, 4, 3, block_k=64),
    ChainTile(16, 32, 4, 2, block_k=64),
    ChainTile(16, 16, 4, 2, block_k=32),
    ChainTile(16, 16, 4, 1, block_k=16),
)
_MORE_ROWS = (
    ChainTile(64, 64, 4, 4, block_k=64),
    ChainTile(64, 64, 4, 3, block_k=64),
    ChainTile(64, 64, 4, 2, block_k=64),
    ChainTile(64, 32, 4, 2, block_k=32),
    ChainTile(32, 32, 4, 2, block_k=32),
)
_MANY_ROWS = (ChainTile(128, 64, 8, 4, block_k=64),)
FEW_ROWS = 64
MANY_ROWS = 16384


@cache
def sram_bytes_of(tile: ChainTile, *, rank: int, element_bytes: int, generation: str = "") -> int:
    """Shared memory of one program: what the compiled kernel asks for, or a little more.

    The two loops follow one another and share it. ``generation`` of the device; where that is not
    known the most that it takes on any.
    """
    most = most_of(generation, lambda name: _sram_bytes_of(tile, rank, element_bytes, name))
    return most + SRAM_SLACK_BYTES


def _sram_bytes_of(tile: ChainTile, rank: int, element_bytes: int, generation: str) -> int:
    m, n, padded = tile.block_m, tile.block_n, rank_padded(rank)
    matmuls = Matmuls(generation, element_bytes, m, tile.num_warps)
    buffers = [
        *entry_buffers(matmuls, (padded,), tile.block_k, tile.num_stages, at=0),
        *exit_buffers(matmuls, rank, padded, n, tile.num_stages, at=2, steps=tile.columns // n),
    ]
    if not matmuls.hand_over(entry_warps(matmuls, (padded,)), matmuls.balanced(n)):
        begin = latent_from(matmuls, tile.num_stages, 0)
        buffers.append(Buffer(m * padded * element_bytes, begin, 4))  # the latent
    return packed_bytes(buffers)


def registers_of(tile: ChainTile, *, rank: int, element_bytes: int) -> int:
    """32-bit registers of one thread that hold tiles, in the loop that holds most."""
    padded = rank_padded(rank)
    widest = max(padded, padded * element_bytes / 4 + tile.block_n)
    return int(tile.block_m * widest) // (32 * tile.num_warps)


def default_tile(
    *,
    rows: int,
    rank: int,
    out_size: int,
    element_bytes: int,
    sram_bytes: int,
    multiprocessors: int,
    generation: str = "",
) -> ChainTile | None:
    """The preferred tile that fits, its columns shared out for ``rows``; or None."""
    if rank > MAX_RANK:
        return None
    for preferred in tiles_for(rows):
        tile = shared_out(preferred, rows, out_size, multiprocessors)
        limit = MAX_REGISTERS_16_BIT if element_bytes == 2 else MAX_REGISTERS_32_BIT
        registers = registers_of(tile, rank=rank, element_bytes=element_bytes)
        sram = sram_bytes_of(tile, rank=rank, element_bytes=element_bytes, generation=generation)
        oversized = tile.block_n > rank_padded(out_size)
        if not oversized and registers <= limit and sram <= sram_bytes:
            return tile
    return None


def shared_out(tile: ChainTile, rows: int, out_size: int, multiprocessors: int) -> ChainTile:
    """``tile`` with as few columns a program as keep all programs to one for a multiprocessor."""
    row_tiles = max(1, -(-rows // tile.block_m))
    steps = -(-out_size // tile.block_n)
    column_programs = max(1, min(steps, multiprocessors // row_tiles))
    return replace(tile, columns=tile.block_n * -(-steps // column_programs))


def tiles_for(rows: int) -> Iterator[ChainTile]:
    """In the order of preference; their columns are not shared out yet."""
    if rows >= MANY_ROWS:
        yield from _MANY_ROWS
    if rows > FEW_ROWS:
        yield from _MORE_ROWS
    yield from _FEW_ROWS
