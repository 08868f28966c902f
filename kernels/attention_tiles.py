"""Which tiles of the attention kernel fit, and which to take. Data only: imports no Triton."""

from dataclasses import dataclass, replace

from flashsvd_compile.kernels.tile_tables import Candidates, candidates
from flashsvd_compile.kernels.tiles import TileConfig

# tl.dot takes powers of two from 16 up.
MIN_EXTENT = 16

# The lifts walk head dims and rank_q in chunks of at most this many columns. That of the output,
# which stands where most registers are taken, would set how many programs share a multiprocessor.
MAX_LIFT_CHUNK = 64
MAX_OUTPUT_CHUNK = 32

# Rows of a tile in shared memory are swizzled over at most this many bytes.
SWIZZLE_BYTES = 128

# Of a row's sum, four lanes of each of two warps that share it.
LANE_SUM_BYTES = 32

# Beyond the tiles themselves: barriers and small conversions.
SRAM_SLACK_BYTES = 1024

# A row of q̃ beyond this many bytes stays in shared memory on Hopper too (the same kernels).
MAX_REGISTER_ROW_BYTES = 1024

# An element of a mask, where its dtype is not known yet: float32, the widest there is.
MASK_BYTES = 4

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

# The same kernels: P_k, q̃ and a chunk of V_k beside each other are too much for 255 registers
# beyond the second padded rank, whatever the tile; beyond the first for tiles of more queries than
# these, but for Hopper, whose matmuls of 64 rows read P_k and V_k from shared memory.
MAX_RANK_K_PADDED = 256
EASY_RANK_K_PADDED = 128
EASY_QUERIES = 32
EASY_QUERIES_ELEMENTWISE = 16
WARPGROUP_ROWS = 64

# By which the planner and the launcher name this kernel's tables.
KERNEL = "attention"


def common_width(rank_q: int, rank_k: int, rank_v: int, element_bytes: int) -> int:
    """What each rank of one call is padded to at least, so that all tiles swizzle alike.

    Kernels whose tiles swizzle differently (ranks 16 and 64 in one) were miscompiled by ptxas
    12.8, which Triton 3.6 ships: the address of a matmul's operand came from a uniform register
    that was never written. None of those that swizzle alike was; ptxas of Triton 3.9 did neither.
    """
    widest = max(rank_padded(rank) for rank in (rank_q, rank_k, rank_v))
    return min(SWIZZLE_BYTES // element_bytes, widest)


def rank_padded(rank: int, width: int = MIN_EXTENT) -> int:
    """The rank that the kernel runs: a power of two, at least the call's `common_width`."""
    return max(width, 1 << (rank - 1).bit_length())


def lift_chunk(extent: int, width: int = MIN_EXTENT) -> int:
    """Columns of a head dim, or of rank_q, that the lifts hold at a time."""
    return min(MAX_LIFT_CHUNK, rank_padded(extent, width))


def output_chunk(extent: int, width: int, is_widened: bool) -> int:
    """Columns of the output that are lifted at a time.

    A factor whose rank is not innermost in memory (``is_widened``) swizzles over them.
    """
    chunk = lift_chunk(extent, width if is_widened else MIN_EXTENT)
    return chunk if is_widened else min(MAX_OUTPUT_CHUNK, chunk)


@dataclass(frozen=True)
class AttentionExtents:
    """What of a call decides which tiles fit.

    ``q_lifted`` and ``v_lifted``: whether those have a factor. ``mask_bytes``: of an element of a
    mask that differs between queries, else 0. ``is_causal`` matters for speed alone.
    ``generation`` of the device, as ``"sm_90"``; ``is_describable``: whether k and v may be read
    through tensor descriptors.
    """

    head_dim_qk: int
    head_dim_v: int
    rank_q: int
    rank_k: int
    rank_v: int
    q_lifted: bool
    v_lifted: bool
    element_bytes: int
    mask_bytes: int = 0
    is_causal: bool = False
    generation: str = ""
    is_describable: bool = True

    @property
    def has_warpgroups(self) -> bool:
        """Whether matmuls of 64 rows find an operand in registers: those of Hopper do."""
        return self.generation == "sm_90"

    @property
    def can_be_described(self) -> bool:
        """Whether tensor descriptors may read P_k and P_v, in tiles that their ranks fill.

        Others, padded on chip, took 15 to 60% longer than without descriptors (rank 40, H100 80GB
        HBM3, torch 2.11.0, triton 3.6.0, 2026-11-26).
        """
        fills = all(rank == rank_padded(rank, self.width) for rank in (self.rank_k, self.rank_v))
        return self.is_describable and fills

    @property
    def width(self) -> int:
        return common_width(self.rank_q, self.rank_k, self.rank_v, self.element_bytes)


def sram_bytes_of(tile: TileConfig, of: AttentionExtents) -> int:
    """Shared memory of one program: at least what the compiled kernel asks for.

    The largest of three phases, whose tiles share memory. Lifting the query: the first tile of
    P_k, a chunk of P_q, V_q and V_k, and one of the result or q̃. Streaming: P_k and P_v
    ``num_stages`` times, or, where no Hopper tensor core keeps q̃ and exponentials in registers,
    beside those; and the tile of a mask that differs between queries. Lifting the output: a chunk
    of V_v and the latent output. Where several warps share a row, the sums of their lanes. At
    least what 640 kernels took, compiled for sm_80, sm_86, sm_90 and sm_120 with triton 3.6.0,
    2026-11-26; 1.4 times it in the median.
    """
    width = of.width
    padded_k, padded_v = rank_padded(of.rank_k, width), rank_padded(of.rank_v, width)
    chunk_d, chunk_dv = lift_chunk(of.head_dim_qk, width), lift_chunk(of.head_dim_v, width)
    m, n, stages = tile.block_m, tile.block_n, tile.num_stages

    chunk_q = lift_chunk(of.rank_q, width) if of.q_lifted else 0
    converted = m * max(chunk_d, padded_k)
    key_values = n * (padded_k + padded_v)
    beside = m * (n + padded_k)
    output = padded_v * (chunk_dv + m) if of.v_lifted else 0
    if _is_whole_warpgroups(tile, of):
        loop = max(stages * key_values, max(stages - 1, 1) * key_values + beside)
        if padded_k * of.element_bytes > MAX_REGISTER_ROW_BYTES:
            loop = max(loop, stages * key_values + m * padded_k)
    else:  # operands that a matmul finds in registers there pass through shared memory here
        converted *= 2
        loop = stages * key_values + beside + m * LANE_SUM_BYTES // of.element_bytes
        output += 2 * m * chunk_dv
    lifting = (n + chunk_d) * padded_k + max((m + chunk_d) * chunk_q, converted)
    mask = m * n * of.mask_bytes * stages
    size = of.element_bytes
    return max(lifting * size, loop * size + mask, output * size) + SRAM_SLACK_BYTES


def _is_whole_warpgroups(tile: TileConfig, of: AttentionExtents) -> bool:
    """Whether Hopper's matmuls, of 64 rows by four warps, fill the tile."""
    fills = tile.block_m >= 16 * tile.num_warps >= 64
    return of.has_warpgroups and of.element_bytes == 2 and fills


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
        easy_queries = EASY_QUERIES_ELEMENTWISE
        query_limit = min(query_limit, MAX_QUERY_ACCUMULATORS_ELEMENTWISE)
    is_easy = padded_k <= EASY_RANK_K_PADDED or tile.block_m <= easy_queries
    is_easy = is_easy or (of.has_warpgroups and tile.block_m >= WARPGROUP_ROWS)
    if padded_k > MAX_RANK_K_PADDED or not is_easy:
        return False
    # Half of a cap is what the accumulators may take of it; the rest holds q̃ and addresses.
    limit = min(limit, tile.max_registers // 2 or limit)
    return (
        query_accumulators_of(tile, rank_k=of.rank_k, width=of.width) <= query_limit
        and accumulators_of(tile, rank_v=of.rank_v, width=of.width) <= limit
    )


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


def widened(of: AttentionExtents) -> AttentionExtents:
    """The call as it runs where the rank of an operand is not innermost in memory."""
    width = SWIZZLE_BYTES // of.element_bytes
    return replace(
        of,
        rank_q=max(of.rank_q, width),
        rank_k=max(of.rank_k, width),
        rank_v=max(of.rank_v, width),
    )
