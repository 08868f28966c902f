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

# At most 112 registers a thread, whatever the activation, or 122 where ranks take one step (triton
# 3.9.0 for sm_90, 2026-11-28), and 97 KiB: two programs share a multiprocessor, and one's matmuls
# hide the other's stores.
#
# H200, torch 2.11.0, triton 3.6.0, bfloat16, 2026-11-28, the intermediate alone, with a SiLU gate:
# rank 1024, 8448 × 11008, 0.656 ms (128 × 256 with 8 warps 0.728, 128 × 128 with 4 warps 0.682, two
# library matmuls alone 0.564); rank 640, 8448 × 3072, 0.128 (0.140, 0.134, 0.106); rank 384, 16384
# rows, 0.174 (0.207, 0.184, 0.135). At rank 1496, 8192 × 14336, libraries win: 0.994 and a pass,
# against 1.62. H100 80GB HBM3, 2026-11-26, two matmuls and the pass against the kernel as it was
# then: rank 384 0.245 to 0.194, rank 1024 0.366 to 0.339.
GENERATION = "sm_90"
FASTEST_UP_TO_RANK = 1024
TILE = TileConfig(128, 128, 8, 3)

# Triton stores 16 bytes at once where it knows the width to be a multiple of 16. Elsewhere the
# kernel takes twice the registers.
WIDTH_MULTIPLE = 16

# Rows of tiles that run side by side, so that they find the factors in the second-level cache. Same
# H200: 16 rows take 0.98 times what 8 take at rank 1024, 0.99 at 640, 1.02 at 384.
NARROW_RANK = 384
GROUP_ROWS_NARROW, GROUP_ROWS = 8, 16


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
    ranks: Sequence[int], *, width: int, element_bytes: int, generation: str, sram_bytes: int
) -> TileConfig | None:
    """The fastest tile, or None where it does not fit or library matmuls are faster (or were never
    beaten).

    ``ranks`` of up and gate; ``width`` of the intermediate; ``generation`` of the device, as
    ``"sm_90"``.
    """
    if (
        generation != GENERATION
        or element_bytes != ELEMENT_BYTES
        or max(ranks) > FASTEST_UP_TO_RANK
        or width % WIDTH_MULTIPLE != 0
    ):
        return None
    return TILE if sram_bytes_of(TILE, ranks) <= sram_bytes else None


def group_rows(ranks: Sequence[int]) -> int:
    """Of tiles that run side by side; ``ranks`` of up and gate."""
    return GROUP_ROWS_NARROW if max(ranks) <= NARROW_RANK else GROUP_ROWS
