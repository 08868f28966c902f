"""Which tiles of the attention kernel fit, and which to take. Data only: imports no Triton."""

from flashsvd_compile.kernels.attention_extents import (
    MIN_EXTENT,
    AttentionExtents,
    rank_padded,
)
from flashsvd_compile.kernels.attention_sram import sram_bytes_of
from flashsvd_compile.kernels.shared_memory import WARPGROUP_ROWS
from flashsvd_compile.kernels.tile_tables import Candidates, candidates
from flashsvd_compile.kernels.tiles import TileConfig

# Accumulators (32-bit registers of a thread) of the scores and the latent output, and of q̃: what
# leaves room for the other operands among 255. Of 600 kernels compiled for sm_86 and sm_90 with
# triton 3.9.0, 2026-11-26 (ranks from 16 to 512, even and odd, with and without an added mask),
# those within these limits and the rules below spill 72 registers at most, nearly all none; beyond,
# up to 900. Exact float32 keeps the operands of its products in registers as well. Keys whose rows
# do not begin at multiples of 4 bytes (an odd rank in 16 bits) are loaded element by element, whose
# addresses take registers.
MAX_ACCUMULATORS_16_BIT = 128
MAX_ACCUMULATORS_32_BIT = 12
MAX_QUERY_ACCUMULATORS_16_BIT = 128
MAX_QUERY_ACCUMULATORS_ELEMENTWISE = 64
MAX_QUERY_ACCUMULATORS_32_BIT = 8
COPIED_BYTES = 4

# Such keys beside a mask: the addresses of both and the scores live at once. Compiled with triton
# 3.6.0 for sm_80, sm_89, sm_90 and sm_120 on 2026-11-27, 96 kernels within this spilled 320 bytes
# at most, 58 of them none; 50 from 160 on up to 1056 bytes, without a mask 16 at most.
MAX_MASKED_ELEMENTWISE = 140

# The same kernels: P_k, q̃ and a chunk of V_k beside each other are too much for 255 registers
# beyond the second padded rank, whatever the tile; beyond the first for tiles of more queries than
# these, but for Hopper, whose matmuls of 64 rows read P_k and V_k from shared memory.
MAX_RANK_K_PADDED = 256
EASY_RANK_K_PADDED = 128
EASY_QUERIES = 32
EASY_QUERIES_ELEMENTWISE = 16

# By which the planner and the launcher name this kernel's tables.
KERNEL = "attention"


def accumulators_of(tile: TileConfig, *, rank_v: int, width: int = MIN_EXTENT) -> int:
    """Registers of one thread that hold the latent output's tile and the scores."""
    return tile.block_m * (rank_padded(rank_v, width) + tile.block_n) // (32 * tile.num_warps)


def query_accumulators_of(tile: TileConfig, *, rank_k: int, width: int = MIN_EXTENT) -> int:
    """Registers of one thread that hold q̃ while it is computed."""
    return tile.block_m * rank_padded(rank_k, width) // (32 * tile.num_warps)


def fits_registers(tile: TileConfig, of: AttentionExtents) -> bool:
    """Whether no more than a few registers are spilled to local memory."""
    padded_k = rank_padded(of.rank_k, of.width)
    if of.element_bytes == 4:
        limit, query_limit = MAX_ACCUMULATORS_32_BIT, MAX_QUERY_ACCUMULATORS_32_BIT
    else:
        limit, query_limit = MAX_ACCUMULATORS_16_BIT, MAX_QUERY_ACCUMULATORS_16_BIT
    easy_queries = EASY_QUERIES
    if of.rank_k * of.element_bytes % COPIED_BYTES:
        if of.mask != "none" and _masked_elementwise(tile, of) > MAX_MASKED_ELEMENTWISE:
            return False
        easy_queries = EASY_QUERIES_ELEMENTWISE
        query_limit = min(query_limit, MAX_QUERY_ACCUMULATORS_ELEMENTWISE)
    is_easy = padded_k <= EASY_RANK_K_PADDED or tile.block_m <= easy_queries
    is_easy = is_easy or (of.has_warpgroups and tile.block_m >= WARPGROUP_ROWS)
    if padded_k > MAX_RANK_K_PADDED or not is_easy:
        return False
    # Half of a cap is what the accumulators may take of it; the rest holds q̃ and addresses.
    limit = min(limit, tile.max_registers // 2 or limit)
    queries = _tiles_of_queries(of) * query_accumulators_of(tile, rank_k=of.rank_k, width=of.width)
    return (
        queries <= query_limit and accumulators_of(tile, rank_v=of.rank_v, width=of.width) <= limit
    )


def _tiles_of_queries(of: AttentionExtents) -> int:
    """How many tiles as large as q̃ registers hold at once, before keys are read.

    Of a query that is turned its columns' partners are lifted beside it. Tables in float32 are a
    third one: on sm_80 and sm_86 tiles that fill 128 accumulators with two spilled 424 to 584 bytes
    by them, on sm_90 up to 256, in 16 bits none to 136 (compiled with triton 3.9.0, 2026-11-28).
    """
    if not of.table_bytes:
        return 1
    return 2 if of.table_bytes <= 2 or of.has_warpgroups else 3


def _masked_elementwise(tile: TileConfig, of: AttentionExtents) -> int:
    """Registers of one thread that hold a tile of keys or its addresses, and accumulators twice."""
    keys = tile.block_n * rank_padded(of.rank_k, of.width) // (32 * tile.num_warps)
    return keys + 2 * accumulators_of(tile, rank_v=of.rank_v, width=of.width)


def traits_of(of: AttentionExtents) -> dict[str, int | bool]:
    """What the tables distinguish calls by."""
    rank = rank_padded(max(of.rank_k, of.rank_v), of.width)
    return {
        "element_bytes": of.element_bytes,
        "rank": rank,
        "is_causal": of.is_causal,
        "ranks_fill": of.rank_k == of.rank_v == rank,
    }


def candidate_tiles(of: AttentionExtents, sram_bytes: int) -> Candidates[TileConfig]:
    """The tiles that fit ``sram_bytes`` of shared memory a block and the registers, best first."""
    return candidates(
        KERNEL, of.generation, traits_of(of), lambda tile: can_run(tile, of, sram_bytes)
    )


def default_tile(of: AttentionExtents, sram_bytes: int) -> TileConfig | None:
    """The first of `candidate_tiles`, or None where none fits."""
    return candidate_tiles(of, sram_bytes).first


def can_run(tile: TileConfig, of: AttentionExtents, sram_bytes: int) -> bool:
    """Whether it fits ``sram_bytes`` of shared memory a block and the registers, and reads latents
    as they may be read."""
    fits = fits_registers(tile, of) and sram_bytes_of(tile, of) <= sram_bytes
    return fits and tile.is_described <= of.can_be_described


def last_resort(of: AttentionExtents, sram_bytes: int) -> TileConfig | None:
    """The tile of fewest accumulators that fits ``sram_bytes``; what registers cannot hold is
    spilled. None where none fits."""
    fitting = candidates(
        KERNEL,
        of.generation,
        traits_of(of),
        lambda tile: sram_bytes_of(tile, of) <= sram_bytes and not tile.is_described,
    ).tiles
    return min(
        fitting,
        key=lambda tile: accumulators_of(tile, rank_v=max(of.rank_v, of.rank_k), width=of.width),
        default=None,
    )
