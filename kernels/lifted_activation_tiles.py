"""Which tiles a kernel that lifts and activates at once may have. Data only: imports no Triton."""

from collections.abc import Sequence

from flashsvd_compile.kernels.tiles import TileConfig

# Ranks of one step: 128 bytes of 16-bit elements, the widest row that a matmul's operand is
# swizzled over.
BLOCK_K = 64

# Beyond the tiles: barriers. 32 is the most seen in 16 kernels compiled for sm_90 with triton
# 3.6.0, 2026-11-26.
SRAM_SLACK_BYTES = 64

# H100 80GB HBM3, torch 2.11.0, triton 3.6.0, bfloat16, 2026-11-26, the intermediate alone, the best
# of nine tiles each: with a SiLU gate of rank 1024, 4224 × 11008, one kernel 0.339 ms, library
# matmuls and one pass 0.366; of rank 384, 16384 × 3072, 0.194 and 0.245; GELU 0.331 and 0.386 (8448
# rows), 0.099 and 0.140. At rank 1496 libraries win, 0.440 against 0.531.
GENERATION = "sm_90"
FASTEST_UP_TO_RANK = 1024
NARROW_RANK = 384
TILE_NARROW = TileConfig(128, 128, 4, 3)
TILE_WIDE = TileConfig(128, 256, 8, 4)


def sram_bytes_of(tile: TileConfig) -> int:
    """Shared memory of one program, at least what the compiled kernel asks for."""
    stage = (tile.block_m + tile.block_n) * BLOCK_K * 2
    stored = tile.block_m * tile.block_n * 2  # h, on its way from the matmul's layout to memory
    return max(tile.num_stages * stage, stored) + SRAM_SLACK_BYTES


def default_tile(
    ranks: Sequence[int], *, element_bytes: int, generation: str, sram_bytes: int
) -> TileConfig | None:
    """The fastest tile that fits, or None where library matmuls are faster (or were never beaten).

    ``ranks`` of up and gate; ``generation`` of the device, as ``"sm_90"``.
    """
    if generation != GENERATION or element_bytes != 2 or max(ranks) > FASTEST_UP_TO_RANK:
        return None
    wanted = [TILE_NARROW] if max(ranks) <= NARROW_RANK else [TILE_WIDE, TILE_NARROW]
    return next((tile for tile in wanted if sram_bytes_of(tile) <= sram_bytes), None)
