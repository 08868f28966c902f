"""What of an attention call decides which tiles fit. Data only: imports no Triton."""

from dataclasses import dataclass, replace
from math import gcd

from flashsvd_compile.kernels.shared_memory import HOPPER

# tl.dot takes powers of two from 16 up.
MIN_EXTENT = 16

# The lifts walk head dims and rank_q in chunks of at most this many columns. That of the output,
# which stands where most registers are taken, would set how many programs share a multiprocessor.
MAX_LIFT_CHUNK = 64
MAX_OUTPUT_CHUNK = 32

# Queries whose scores library operators have in memory at a time, where there is a soft-cap or a
# sink: a matmul of so many rows is as fast as a longer one on a CPU's cores.
BLOCK_QUERIES = 128

# Queries that library operators attend with at a time where there is a window: as many as a tile of
# torch's attention on a CPU.
BAND_QUERIES = 256

# No tile has more keys.
MAX_TILE_KEYS = 256

# Rows of a tile in shared memory are swizzled over at most this many bytes.
SWIZZLE_BYTES = 128


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


def power_of_two_in(keys: int) -> int:
    """The largest power of two that divides ``keys``, as far as tiles of keys go."""
    return gcd(keys, MAX_TILE_KEYS)


@dataclass(frozen=True)
class AttentionExtents:
    """What of a call decides which tiles fit.

    ``q_lifted``, ``k_lifted`` and ``v_lifted``: whether those have a factor. ``mask``: as the
    kernel knows them, "none", "scanned", "rows" or "added", or "any" of these where that is not
    known yet; ``keys_multiple``: `power_of_two_in` the number of keys, None where that is not.
    ``generation`` of the device, as ``"sm_90"``; ``is_describable``: whether k and v may be read
    through tensor descriptors; ``is_capped``: whether there is a soft-cap; ``table_bytes``: of an
    entry of the tables that lifted queries are turned by, 0 where they are not; ``is_normed``:
    whether they are normalised before; ``is_widened``: whether the rank of an operand is not
    innermost in memory.
    """

    head_dim_qk: int
    head_dim_v: int
    rank_q: int
    rank_k: int
    rank_v: int
    q_lifted: bool
    v_lifted: bool
    element_bytes: int
    k_lifted: bool = True
    is_float16: bool = False
    mask: str = "none"
    is_causal: bool = False
    keys_multiple: int | None = None
    generation: str = ""
    is_describable: bool = True
    is_widened: bool = False
    is_capped: bool = False
    table_bytes: int = 0
    is_normed: bool = False

    @property
    def has_warpgroups(self) -> bool:
        """Whether matmuls of 64 rows find an operand in registers: those of Hopper do."""
        return self.generation == HOPPER

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


def widened(of: AttentionExtents) -> AttentionExtents:
    """The call as it runs where the rank of an operand is not innermost in memory."""
    width = SWIZZLE_BYTES // of.element_bytes
    return replace(
        of,
        rank_q=max(of.rank_q, width),
        rank_k=max(of.rank_k, width),
        rank_v=max(of.rank_v, width),
        is_widened=True,
    )
