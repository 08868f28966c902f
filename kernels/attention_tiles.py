"""Which tiles of the attention kernel fit, and which to take. Data only: imports no Triton."""

from collections.abc import Iterator
from dataclasses import dataclass

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

# Accumulators (32-bit registers of a thread) that leave room for q̃, probabilities and addresses
# among 255: half of them. Exact float32 keeps the operands of its products there as well.
MAX_ACCUMULATORS_16_BIT = 128
MAX_ACCUMULATORS_32_BIT = 72

# Fastest first, then ever smaller, by the larger of the padded ranks of k and v. H100 80GB HBM3,
# torch 2.11.0, triton 3.6.0, 2026-11-26, sweeps in bfloat16 from cold caches;
# `python -m bench.attention --tiles` repeats them. Of 17 tiles the first of each list was the best
# or within 2% of it: at ranks 32, 40 and 64 with 512 keys, a padding mask and without, at rank 32
# with 2048, and at ranks 64 and 128 with 4096 (causal: within 6%). A cap on registers pays where
# one more program then fits a multiprocessor.
NARROW_RANK = 32
WIDE_RANK = 64
_SMALLER = (
    TileConfig(64, 64, 8, 3),
    TileConfig(64, 32, 4, 3),
    TileConfig(64, 32, 4, 2),
    TileConfig(64, 32, 8, 2),
    TileConfig(32, 32, 4, 2),
    TileConfig(32, 32, 8, 2),
    TileConfig(16, 32, 4, 2),
    TileConfig(16, 16, 4, 2),
    TileConfig(16, 16, 4, 1),
)
TILES_NARROW = (
    TileConfig(128, 32, 4, 4, max_registers=128),
    TileConfig(64, 32, 4, 4),
    TileConfig(64, 64, 4, 3),
    *_SMALLER,
)
TILES_WIDE = (
    TileConfig(64, 64, 4, 3, is_described=True),
    TileConfig(128, 32, 8, 4),
    TileConfig(128, 32, 4, 4),
    TileConfig(64, 32, 4, 4),
    TileConfig(64, 64, 4, 3),
    *_SMALLER,
)
TILES_WIDEST = (
    TileConfig(64, 64, 4, 3, is_described=True),
    TileConfig(64, 64, 4, 3),
    TileConfig(128, 64, 8, 3),
    TileConfig(64, 32, 4, 4),
    *_SMALLER,
)
# Under a causal mask the tiles of queries differ in length, and more, shorter programs fill the
# device better: by 2 to 12% at ranks 16 and 64 with 1024 to 16384 keys (same H100, versions and
# day, 11 tiles), within 1% at rank 32 with 4096. At rank 40 with 4096 keys, where latents do not
# fill their padded tile, it cost 7%: there the list of all keys stays.
TILES_NARROW_CAUSAL = (TileConfig(64, 64, 4, 3), *TILES_NARROW)
TILES_WIDE_CAUSAL = (TILES_WIDE[0], TileConfig(64, 32, 4, 3), *TILES_WIDE[1:])
# Exact float32 has no tensor core to feed; what fits its registers was sought, not measured.
TILES_32_BIT = (
    TileConfig(64, 32, 4, 2),
    TileConfig(64, 32, 8, 2),
    TileConfig(32, 32, 4, 2),
    TileConfig(32, 32, 8, 2),
    TileConfig(16, 32, 8, 2),
    TileConfig(16, 16, 4, 2),
    TileConfig(16, 16, 4, 1),
)


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
    ``has_warpgroups``: whether the device is a Hopper, whose matmuls of 64 rows find an operand in
    registers that others read from shared memory. ``is_describable``: whether k and v may be read
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
    has_warpgroups: bool = False
    is_describable: bool = True

    @property
    def can_be_described(self) -> bool:
        """Whether tensor descriptors may read P_k and P_v, in tiles that their ranks fill.

        Others, padded on chip, took 15 to 60% longer than without descriptors (rank 40, same H100,
        versions and day).
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


def candidate_tiles(of: AttentionExtents, sram_bytes: int) -> Iterator[TileConfig]:
    """The tiles that fit ``sram_bytes`` of shared memory a block and the registers, best first."""
    limit = MAX_ACCUMULATORS_32_BIT if of.element_bytes == 4 else MAX_ACCUMULATORS_16_BIT
    for tile in _preferred(of):
        registers = accumulators_of(tile, rank_v=of.rank_v, width=of.width)
        # Half of a cap is what the accumulators may take of it; the rest holds q̃ and addresses.
        allowed = min(limit, tile.max_registers // 2 or limit)
        if tile.is_described and not (of.can_be_described and of.has_warpgroups):
            continue
        if sram_bytes_of(tile, of) <= sram_bytes and registers <= allowed:
            yield tile


def default_tile(of: AttentionExtents, sram_bytes: int) -> TileConfig | None:
    """The first of `candidate_tiles`, or None where none fits."""
    return next(candidate_tiles(of, sram_bytes), None)


def _preferred(of: AttentionExtents) -> tuple[TileConfig, ...]:
    if of.element_bytes == 4:
        return TILES_32_BIT
    rank = rank_padded(max(of.rank_k, of.rank_v), of.width)
    if rank <= NARROW_RANK:
        return TILES_NARROW_CAUSAL if of.is_causal else TILES_NARROW
    if rank > WIDE_RANK:
        return TILES_WIDEST
    fills = of.rank_k == of.rank_v == rank
    return TILES_WIDE_CAUSAL if of.is_causal and fills else TILES_WIDE
