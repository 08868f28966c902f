"""Which tiles of the attention kernel fit, and which to take. Data only: imports no Triton."""

from collections.abc import Iterator

from flashsvd_compile.kernels.tiles import TileConfig

# tl.dot takes powers of two from 16 up.
MIN_EXTENT = 16

# The lifts walk head dims and rank_q in chunks of at most this many columns.
MAX_LIFT_CHUNK = 64

# Rows of a tile in shared memory are swizzled over at most this many bytes.
SWIZZLE_BYTES = 128

# Beyond the tiles themselves: barriers and small conversions. With it `sram_bytes_of` was at least
# what 356 kernels took, compiled for sm_80, sm_90 and sm_120 with triton 3.9.0, 2026-11-25.
SRAM_SLACK_BYTES = 1024

# A row of q̃ beyond this many bytes stays in shared memory on Hopper too (the same kernels).
MAX_REGISTER_ROW_BYTES = 1024

# A mask's element, where the caller does not say: float32, the widest that attention is given.
MASK_BYTES = 4

# Accumulators (32-bit registers of a thread) that leave room for q̃, probabilities and addresses
# among 255: half of them. Exact float32 keeps the operands of its products there as well.
MAX_ACCUMULATORS_16_BIT = 128
MAX_ACCUMULATORS_32_BIT = 72

# Fastest first, then ever smaller. H100 80GB HBM3, torch 2.11.0, triton 3.6.0, 2026-11-25, sweeps
# in bfloat16 from cold caches over 18 tiles; `python -m bench.attention --tiles` repeats them. At
# 512 keys the first of each list was the best of all: at rank 32 with a padding mask and without,
# at rank 40 without and at ranks 40 and 64 with one (there also at 2048 keys). A cap on registers
# pays where one more program then fits a multiprocessor.
NARROW_RANK = 32
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
    TileConfig(64, 64, 4, 3, max_registers=96),
    TileConfig(64, 64, 4, 3),
    TileConfig(128, 32, 4, 4),
    TileConfig(128, 64, 8, 3),
    TileConfig(128, 64, 4, 3),
    *_SMALLER,
)
TILES_WIDE = (
    TileConfig(128, 64, 8, 3),
    TileConfig(128, 64, 4, 3),
    TileConfig(64, 64, 4, 3),
    TileConfig(128, 32, 4, 4),
    *_SMALLER,
)
TILES_WIDE_MASKED = (
    TileConfig(64, 64, 4, 3, max_registers=128),
    TileConfig(128, 64, 8, 3, max_registers=128),
    TileConfig(128, 64, 4, 3),
    TileConfig(64, 64, 4, 3),
    TileConfig(128, 32, 4, 4),
    *_SMALLER,
)
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


def sram_bytes_of(
    tile: TileConfig,
    *,
    head_dim_qk: int,
    head_dim_v: int,
    rank_q: int,
    rank_k: int,
    rank_v: int,
    q_lifted: bool,
    v_lifted: bool,
    element_bytes: int,
    mask_bytes: int = 0,
) -> int:
    """Shared memory of one program: at least what the compiled kernel asks for.

    The largest of three phases, whose tiles share memory. Lifting the query: a chunk of P_q, of
    V_q and of the result; or a chunk of V_k and q̃. Streaming: P_k and P_v ``num_stages`` times,
    or, without Hopper's tensor cores, one stage less beside q̃ and probabilities; and the tile of
    a mask of ``mask_bytes`` an element that differs between queries. Lifting the output: a chunk
    of V_v and the latent output.
    """
    width = common_width(rank_q, rank_k, rank_v, element_bytes)
    padded_k, padded_v = rank_padded(rank_k, width), rank_padded(rank_v, width)
    chunk_d, chunk_dv = lift_chunk(head_dim_qk, width), lift_chunk(head_dim_v, width)
    m, n, stages = tile.block_m, tile.block_n, tile.num_stages

    lifting = chunk_d * padded_k + m * max(chunk_d, padded_k)
    if q_lifted:
        chunk_q = lift_chunk(rank_q, width)
        lifting = max(lifting, m * chunk_q + chunk_q * chunk_d + m * chunk_d)
    key_values = n * (padded_k + padded_v)
    loop = max(stages * key_values, max(stages - 1, 1) * key_values + m * (n + padded_k))
    if padded_k * element_bytes > MAX_REGISTER_ROW_BYTES:
        loop = max(loop, stages * key_values + m * padded_k)
    output = padded_v * (chunk_dv + m) if v_lifted else 0
    mask = m * n * max(mask_bytes, stages) if mask_bytes else 0
    phases = (lifting * element_bytes, loop * element_bytes + mask, output * element_bytes)
    return max(phases) + SRAM_SLACK_BYTES


def accumulators_of(tile: TileConfig, *, rank_v: int, width: int = MIN_EXTENT) -> int:
    """Registers of one thread that hold the latent output's tile and the scores."""
    return tile.block_m * (rank_padded(rank_v, width) + tile.block_n) // (32 * tile.num_warps)


def candidate_tiles(
    *,
    head_dim_qk: int,
    head_dim_v: int,
    rank_q: int,
    rank_k: int,
    rank_v: int,
    q_lifted: bool,
    v_lifted: bool,
    element_bytes: int,
    sram_bytes: int,
    mask_bytes: int = MASK_BYTES,
    has_mask: bool = False,
) -> Iterator[TileConfig]:
    """The tiles that fit ``sram_bytes`` of shared memory a block and the registers, best first."""
    width = common_width(rank_q, rank_k, rank_v, element_bytes)
    limit = MAX_ACCUMULATORS_32_BIT if element_bytes == 4 else MAX_ACCUMULATORS_16_BIT
    for tile in _preferred(rank_padded(max(rank_k, rank_v)), element_bytes, has_mask):
        sram = sram_bytes_of(
            tile,
            head_dim_qk=head_dim_qk,
            head_dim_v=head_dim_v,
            rank_q=rank_q,
            rank_k=rank_k,
            rank_v=rank_v,
            q_lifted=q_lifted,
            v_lifted=v_lifted,
            element_bytes=element_bytes,
            mask_bytes=mask_bytes,
        )
        registers = accumulators_of(tile, rank_v=rank_v, width=width)
        # Half of a cap is what the accumulators may take of it; the rest holds q̃ and addresses.
        allowed = min(limit, tile.max_registers // 2 or limit)
        if sram <= sram_bytes and registers <= allowed:
            yield tile


def default_tile(
    *,
    head_dim_qk: int,
    head_dim_v: int,
    rank_q: int,
    rank_k: int,
    rank_v: int,
    q_lifted: bool,
    v_lifted: bool,
    element_bytes: int,
    sram_bytes: int,
    mask_bytes: int = MASK_BYTES,
    has_mask: bool = False,
) -> TileConfig | None:
    """The first of `candidate_tiles`, or None where none fits."""
    tiles = candidate_tiles(
        head_dim_qk=head_dim_qk,
        head_dim_v=head_dim_v,
        rank_q=rank_q,
        rank_k=rank_k,
        rank_v=rank_v,
        q_lifted=q_lifted,
        v_lifted=v_lifted,
        element_bytes=element_bytes,
        sram_bytes=sram_bytes,
        mask_bytes=mask_bytes,
        has_mask=has_mask,
    )
    return next(tiles, None)


def _preferred(rank: int, element_bytes: int, has_mask: bool) -> tuple[TileConfig, ...]:
    if element_bytes == 4:
        return TILES_32_BIT
    if rank <= NARROW_RANK:
        return TILES_NARROW
    return TILES_WIDE_MASKED if has_mask else TILES_WIDE
