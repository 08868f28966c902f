"""Which tiles a kernel that lifts and activates at once may have. Data only: imports no Triton."""

from collections.abc import Sequence

from flashsvd_compile.kernels.shared_memory import Matmuls
from flashsvd_compile.kernels.tiles import TileConfig

# Ranks of one step: 128 bytes of 16-bit elements, the widest row that a matmul's operand is
# swizzled over.
BLOCK_K = 64

# The kernel runs 16-bit operands.
ELEMENT_BYTES = 2

# Beyond the tiles: barriers, a bias. 512 is the most seen in 160 kernels compiled for sm_90 with
# triton 3.6.0, 2026-11-27.
SRAM_SLACK_BYTES = 512

# H100 80GB HBM3, torch 2.11.0, triton 3.6.0, bfloat16, 2026-11-26, the intermediate alone, the best
# of nine tiles each: with a SiLU gate of rank 1024, 4224 × 11008, one kernel 0.339 ms, library
# matmuls and one pass 0.366; of rank 384, 16384 × 3072, 0.194 and 0.245; GELU 0.331 and 0.386 (8448
# rows), 0.099 and 0.140. At rank 1496 libraries win, 0.440 against 0.531.
GENERATION = "sm_90"
FASTEST_UP_TO_RANK = 1024
NARROW_RANK = 384
TILE_NARROW = TileConfig(128, 128, 4, 3)
TILE_WIDE = TileConfig(128, 256, 8, 4)


def sram_bytes_of(tile: TileConfig, ranks: Sequence[int]) -> int:
    """Shared memory of one program: what the compiled kernel asks for, or a little more.

    ``ranks`` of up and gate: of one step none is read ahead of another.
    """
    matmuls = Matmuls(GENERATION, ELEMENT_BYTES, tile.block_m, tile.num_warps)
    stages = tile.num_stages if max(ranks) > BLOCK_K else 1
    stage = (tile.block_m + tile.block_n) * BLOCK_K
    # h, on its way from the matmul's layout to memory
    stored = matmuls.scratch(tile.block_n, (tile.num_warps, 1))
    return max(stages * stage, stored) * ELEMENT_BYTES + SRAM_SLACK_BYTES


def default_tile(
    ranks: Sequence[int], *, element_bytes: int, generation: str, sram_bytes: int
) -> TileConfig | None:
    """The fastest tile that fits, or None where library matmuls are faster (or were never beaten).

    ``ranks`` of up and gate; ``generation`` of the device, as ``"sm_90"``.
    """
    if (
        generation != GENERATION
        or element_bytes != ELEMENT_BYTES
        or max(ranks) > FASTEST_UP_TO_RANK
    ):
        return None
    wanted = [TILE_NARROW] if max(ranks) <= NARROW_RANK else [TILE_WIDE, TILE_NARROW]
    return next((tile for tile in wanted if sram_bytes_of(tile, ranks) <= sram_bytes), None)
