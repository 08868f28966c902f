"""Shared memory of an attention program: what its tiles take, phase by phase. No Triton.

Notation as in ``attention_kernel.py``. A matmul's operand that was computed stays in registers
where the warps that made it have the same whole rows as those that multiply it; else it passes
through shared memory. Which warps have which part of a result Triton decides matmul by matmul: see
`shared_memory.Matmuls`, `_Layout`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, cached_property
from itertools import product

from flashsvd_compile.kernels.attention_extents import (
    MAX_TILE_KEYS,
    AttentionExtents,
    lift_chunk,
    output_chunk,
    rank_padded,
)
from flashsvd_compile.kernels.shared_memory import (
    HOPPER,
    THREADS,
    WARP_COLUMNS,
    WARP_ROWS,
    Buffer,
    Matmuls,
    Warps,
    own_rows,
    packed_bytes,
)
from flashsvd_compile.kernels.tiles import TileConfig

# Beyond the tiles: barriers, what a scanned mask reduces, conversions of vectors.
SRAM_SLACK_BYTES = 256

# Where a tile that is read through a descriptor begins.
DESCRIBED_ALIGNMENT = 1024

# Tables that a query is turned by pass through shared memory to change their layout. Those in 16
# bits take less than the lift before did, and so do narrow ones (compiled with triton 3.9.0 for
# sm_80 and sm_90, 2026-11-28).
WIDE_TABLE_BYTES = 4
NARROW_TABLE = 64

# Four lanes of a row hold its sums, in float32.
LANES_BYTES = 4 * 4

# An added mask is float32, or narrower.
ADDED_BYTES = 4

# What "any" mask may turn out to be, and generations that differ.
MASKS = ("scanned", "rows", "added")
GENERATIONS = ("sm_80", HOPPER)

# Moments of a program. The lift of the query: the first tile of P_k, a chunk of V_k, in it chunks
# of P_q and V_q and their product; q̃. The pass over the first tile, or over all keys for their
# maxima; the loop over keys; the output's lift; the second attempt.
_FIRST, _KEY_FACTOR, _QUERIES, _QUERY_FACTOR, _LIFTED, _LIFTED_END = 1, 2, 3, 4, 6, 9
_QUERY, _QUERY_READ, _MAXIMA, _REFERENCE, _REFERENCE_END = 10, 11, 11, 13, 15
_LOOP, _LOOP_MASK, _LOOP_KEYS, _WEIGHTS, _SUMS, _VALUES, _LOOP_END = 16, 17, 18, 21, 22, 23, 25
_OUTPUT, _OUTPUT_FACTOR, _STORE, _OUTPUT_END, _AGAIN = 27, 28, 30, 31, 40


@cache
def sram_bytes_of(tile: TileConfig, of: AttentionExtents) -> int:
    """Shared memory of one program: what the compiled kernel asks for, or a little more.

    What is not known of the call yet is taken as what costs most.
    """
    masks = MASKS if of.mask == "any" else (of.mask,)
    generations = (of.generation,) if of.generation.startswith("sm_") else GENERATIONS
    # Whether tiles of keys fit, and whether the rows of a mask begin where they may be copied.
    known = of.keys_multiple
    multiples = (known,) if known is not None else (MAX_TILE_KEYS, 1)
    return max(
        packed_bytes(_Layout(tile, replace(of, mask=m, keys_multiple=k, generation=g)).buffers())
        for m, k, g in product(masks, multiples, generations)
    ) + SRAM_SLACK_BYTES  # fmt: skip


class _Layout:
    """Where the operands of a program's matmuls are; all of the call is known."""

    def __init__(self, tile: TileConfig, of: AttentionExtents) -> None:
        self.tile, self.of = tile, of
        self.matmuls = Matmuls(of.generation, of.element_bytes, tile.block_m, tile.num_warps)
        width = of.width
        self.padded_k, self.padded_v = rank_padded(of.rank_k, width), rank_padded(of.rank_v, width)
        self.chunk_d, self.chunk_q = lift_chunk(of.head_dim_qk, width), lift_chunk(of.rank_q, width)
        self.chunk_dv = output_chunk(of.head_dim_v, width, of.is_widened)
        # Of one step they are no loops when warps are given out: their matmuls stand in the block
        # around them.
        self.is_one_lift = of.head_dim_qk <= self.chunk_d or not of.k_lifted
        self.is_one_chunk = of.rank_q <= self.chunk_q
        # float16 leaves its range too soon: see SEEKS_MAXIMUM in the kernel.
        self.seeks_maximum = of.is_float16 and of.mask in ("rows", "added")
        self.narrow_n = max(16, tile.block_n // 2)
        assert of.keys_multiple is not None
        self.keys_multiple = of.keys_multiple
        self.keys_fit = of.keys_multiple % tile.block_n == 0 and of.mask != "scanned"

    # ---- who multiplies what --------------------------------------------------------------------

    @cached_property
    def lift_columns(self) -> int:
        return self.chunk_d if self.of.k_lifted else self.padded_k

    @cached_property
    def blocks(self) -> list[list[str]]:
        """Matmuls that stand in one block and depend on one another, and those of the D loop."""
        of = self.of
        lift = ["lift"] if of.q_lifted and self.is_one_chunk else []
        query = ["query"] if of.k_lifted else []
        outside = [*lift, *query] if self.is_one_lift else []
        inside = [] if self.is_one_lift else [*lift, *query]
        if not self.seeks_maximum:
            outside.append("reference")
        # Two chunks of the output are unrolled where the kernel finds them short.
        is_pair = of.head_dim_v == 2 * self.chunk_dv and self.padded_v <= 64
        is_pair = is_pair and of.rank_v * of.element_bytes % 16 == 0
        if of.v_lifted and (of.head_dim_v <= self.chunk_dv or is_pair):
            outside += ["output"] * (2 if is_pair else 1)
        return [outside, inside]

    def warps(self, name: str) -> Warps:
        columns = {"lift": self.lift_columns, "query": self.padded_k,
                   "reference": self.tile.block_n, "output": self.chunk_dv}  # fmt: skip
        for block in self.blocks:
            if name in block and len(block) > 1:
                return self.matmuls.chained(columns[block[-1]])
        return self.matmuls.balanced(columns[name])

    @cached_property
    def is_loop_split(self) -> bool:
        """Whether a branch parts the loop's two matmuls, so that neither sees the other.

        The causal check does. Elsewhere they meet by what masks both loads at the end of the keys.
        """
        return self.of.is_causal and self.keys_fit and not self.seeks_maximum

    @cached_property
    def score_warps(self) -> Warps:
        columns = self.tile.block_n if self.is_loop_split else self.padded_v
        return self._loop_warps(columns)

    @cached_property
    def value_warps(self) -> Warps:
        return self._loop_warps(self.padded_v)

    def _loop_warps(self, columns: int) -> Warps:
        deal = self.matmuls.balanced if self.is_loop_split else self.matmuls.chained
        return deal(columns)

    @cached_property
    def first_warps(self) -> Warps:
        """Of the scores that the first reference comes from."""
        if self.seeks_maximum:
            return self.matmuls.balanced(self.tile.block_n)
        return self.warps("reference")

    @cached_property
    def second_warps(self) -> list[Warps]:
        """Of the scores of a second attempt, in narrower tiles: for the maxima, and the sums."""
        if self.seeks_maximum:
            return []
        columns = self.narrow_n if self.is_loop_split else self.padded_v
        return [self.matmuls.balanced(self.narrow_n), self._loop_warps(columns)]

    # ---- what passes through shared memory ------------------------------------------------------

    @cached_property
    def _query_source(self) -> Warps | None:
        """Of what computes q̃; None where it is read as it is."""
        if self.of.k_lifted:
            return self.warps("query")
        return self.warps("lift") if self.of.q_lifted else None

    def _needs_query(self, warps: Warps) -> bool:
        """Whether ``warps`` find q̃ in shared memory only."""
        source = self._query_source
        return source is None or not self.matmuls.hand_over(source, warps)

    @cached_property
    def query_end(self) -> int:
        """Until when q̃ is in shared memory; 0 where it never is."""
        if self.matmuls.are_exact:
            return _AGAIN
        if self.matmuls.are_warpgroups:
            # They read it there, unless its matmul's result is theirs.
            is_read = not self.of.k_lifted and not self.of.q_lifted
            is_shared = not self.matmuls.fill_warpgroups and not (
                self.is_one_lift if self.of.k_lifted else self.is_one_chunk
            )
            return _AGAIN if is_read or is_shared else 0
        loop, first, second = self.score_warps, self.first_warps, self.second_warps
        if not any(map(self._needs_query, (loop, first, *second))):
            return 0
        if self._query_source is None:
            return _LOOP_END if self.seeks_maximum else _AGAIN
        if self.seeks_maximum:
            is_kept = first != loop or self.of.mask == "rows"
            return _LOOP_END if is_kept and self._needs_query(loop) else _QUERY_READ
        if loop != first and {loop} == set(second) and "output" in self.blocks[0]:
            return _REFERENCE  # read once for all of them
        # Whoever reads it as the first pass does has that one's registers.
        reads: Callable[[Warps], bool] = lambda w: w != first and self._needs_query(w)  # noqa: E731
        if any(map(reads, second)):
            return _AGAIN
        return _LOOP_END if reads(loop) else _REFERENCE

    @cached_property
    def is_lifted_shared(self) -> bool:
        """Whether a chunk of the lifted query is."""
        if not self.of.k_lifted:
            return False
        if self.matmuls.are_warpgroups:
            is_alike = self.matmuls.fill_warpgroups or self.is_one_chunk
            return not (self.of.q_lifted and is_alike)
        lift, query = self.warps("lift"), self.warps("query")
        return not (self.of.q_lifted and self.matmuls.hand_over(lift, query))

    @cached_property
    def are_weights_shared(self) -> bool:
        """Whether exponentials are."""
        if self.matmuls.are_warpgroups:
            is_branched = self.of.is_causal or not self.keys_fit
            return is_branched and not self.matmuls.fill_warpgroups
        is_alike = self.score_warps == self.value_warps and own_rows(self.score_warps)
        return self.matmuls.are_exact or not is_alike

    @cached_property
    def is_output_shared(self) -> bool:
        """Whether the latent output is."""
        return not self.matmuls.hand_over(self.value_warps, self.warps("output"))

    @cached_property
    def is_second_output_shared(self) -> bool:
        """The same of a second attempt, where one chunk of the output stands alone."""
        if self.seeks_maximum or self.blocks[0].count("output") != 1:
            return False
        warps = self.matmuls.balanced(self.chunk_dv)
        return not self.matmuls.hand_over(self.value_warps, warps)

    def shared_rows(self, warps: Warps) -> int:
        """Elements that warps which share a row exchange to reduce it."""
        m, n = self.tile.block_m, self.tile.block_n
        if self.matmuls.are_exact or (own_rows(warps) and not self.matmuls.are_warpgroups):
            return 0
        if self.matmuls.are_warpgroups:
            return 0 if self.matmuls.fill_warpgroups else 2 * m
        return m * min(self.tile.num_warps, n // WARP_COLUMNS)

    # ---- buffers --------------------------------------------------------------------------------

    def copies(self, rank: int, elements: int) -> int:
        """Tiles ahead of P_k or P_v."""
        of = self.of
        row = 16 if of.is_widened else rank * of.element_bytes
        can_copy = self.tile.is_described or self.matmuls.can_copy(row, elements)
        return self.matmuls.tiles_ahead(self.tile.num_stages) if can_copy else 0

    def mask_bytes(self) -> tuple[int, int]:
        """Of a mask's tiles: those copied ahead, and what one takes to change its layout."""
        of, tile = self.of, self.tile
        elements = tile.block_m * tile.block_n
        ahead = max(0, tile.num_stages - 1)
        if of.mask == "rows":
            # A byte each; Triton knows of strides whether they are multiples of 16.
            a_thread = elements // (THREADS * tile.num_warps)
            can_copy = self.keys_multiple % 16 == 0 and a_thread >= 4 and ahead
            return (ahead * elements, 0) if can_copy else (0, elements)
        if of.mask == "added":
            if (of.is_capped or not (of.q_lifted or of.k_lifted)) and ahead:
                return ahead * elements * ADDED_BYTES, 0
            # Where scores need no scale and no cap the mask is what they are added to, and its load
            # is none to copy.
            if not self.matmuls.are_exact:
                return 0, elements * ADDED_BYTES // self._mask_steps
        return 0, 0

    @cached_property
    def _mask_steps(self) -> int:
        """In how many steps an added mask changes its layout; or in more.

        In halves where a thread loads eight neighbours, as it does if it does so of another tile of
        the same shape, in 16 bits; and once for each row of warps.
        """
        of, tile = self.of, self.tile
        m, n = tile.block_m, tile.block_n
        last = self.chunk_dv if of.v_lifted else self.padded_v
        tiles = [(m, last, of.head_dim_v), (n, self.padded_v, of.rank_v)]
        if of.k_lifted:
            tiles.append((self.chunk_d, self.padded_k, of.rank_k))
        if of.q_lifted:
            tiles.append((m, self.chunk_q, of.rank_q))
        else:
            tiles.append((m, self.lift_columns, of.head_dim_qk))
        is_eight = any((rows, columns) == (m, n) and row % 8 == 0 for rows, columns, row in tiles)
        if not is_eight or m * n < 8 * THREADS * tile.num_warps:
            return 1
        return 2 * max(1, m // (WARP_ROWS * tile.num_warps))

    def buffers(self) -> Iterator[Buffer]:
        of, tile, size = self.of, self.tile, self.of.element_bytes
        m, n = tile.block_m, tile.block_n
        keys, values = n * self.padded_k * size, n * self.padded_v * size
        if not self.seeks_maximum:
            yield Buffer(keys, _FIRST, _REFERENCE)
        if of.k_lifted:
            yield Buffer(self.chunk_d * self.padded_k * size, _KEY_FACTOR, _LIFTED_END)
        if of.q_lifted:
            # One chunk is the same for all of the D loop, and read ahead of it.
            is_kept = self.is_one_chunk and not self.is_one_lift
            during = (_FIRST + 0.5, _LIFTED_END + 0.5) if is_kept else (_QUERIES, _LIFTED)
            yield Buffer(m * self.chunk_q * size, *during)
            yield Buffer(self.chunk_q * self.lift_columns * size, _QUERY_FACTOR, _LIFTED)
        if self.is_lifted_shared:
            yield Buffer(m * self.chunk_d * size, _LIFTED, _LIFTED_END)
        if of.table_bytes >= WIDE_TABLE_BYTES and self.padded_k > NARROW_TABLE:
            # A table changes its layout to that of the query, which is in registers meanwhile.
            yield Buffer(m * self.padded_k * of.table_bytes, _LIFTED, _LIFTED_END)
        if of.table_bytes and m == WARP_ROWS:
            # So does the query, with padding, where all warps share its rows: beside the lift of
            # the columns' partners. To be normalised it is in float32.
            row = self.padded_k * (4 if of.is_normed else size)
            yield Buffer(m * row * 5 // 4, _QUERIES, _LIFTED_END)
        if self.query_end:
            yield Buffer(m * self.padded_k * size, _QUERY, self.query_end)
        copied_keys, copied_values = (
            self.copies(rank, n * padded)
            for rank, padded in ((of.rank_k, self.padded_k), (of.rank_v, self.padded_v))
        )
        mask_ahead, mask = self.mask_bytes()
        is_added = of.mask == "added"  # to it scores are added: keys wait beside it
        if self.seeks_maximum:
            yield Buffer(mask_ahead, _MAXIMA, _REFERENCE_END)
            yield Buffer(copied_keys * keys, _MAXIMA, _REFERENCE_END)
            yield Buffer(mask, _MAXIMA + 0.5, _MAXIMA + 1)
            if not copied_keys:
                yield Buffer(keys, _MAXIMA + (0.5 if is_added else 1), _MAXIMA + 2)
        yield Buffer(4 * self.shared_rows(self.first_warps), _REFERENCE, _REFERENCE + 1)
        for ahead in (mask_ahead, copied_keys * keys, copied_values * values):
            yield Buffer(ahead, _LOOP, _LOOP_END)
        yield Buffer(mask, _LOOP_MASK, _LOOP_MASK + 1)
        if not copied_keys:
            yield Buffer(keys, _LOOP_MASK if is_added else _LOOP_KEYS, _WEIGHTS - 1)
        if self.are_weights_shared:
            yield Buffer(m * n * size, _WEIGHTS, _LOOP_END)
        if self.are_weights_shared or not self.matmuls.are_warpgroups:
            yield Buffer(LANES_BYTES * self.shared_rows(self.score_warps), _SUMS, _SUMS + 1)
        if not copied_values:
            yield Buffer(values, _VALUES, _LOOP_END)
        stored = self.chunk_dv if of.v_lifted else self.padded_v
        if of.v_lifted:
            if self.is_output_shared:
                yield Buffer(m * self.padded_v * size, _OUTPUT, _OUTPUT_END)
                # A second attempt's bias, where rows see a key.
                if of.mask != "none" and m == WARP_ROWS and not self.seeks_maximum:
                    yield Buffer(m * stored * 4, _STORE - 1, _OUTPUT_END)
            yield Buffer(self.padded_v * stored * size, _OUTPUT_FACTOR, _STORE)
        if not self.matmuls.are_exact:
            warps = self.warps("output") if of.v_lifted else self.value_warps
            scratch = self.matmuls.scratch(stored, warps)
            yield Buffer(scratch * size, _STORE, _OUTPUT_END)
        if tile.is_described and tile.num_stages == 1:
            yield Buffer(DESCRIBED_ALIGNMENT, _FIRST, _LOOP_END)  # of what follows a barrier
        if of.v_lifted and self.is_second_output_shared:
            yield Buffer(m * self.padded_v * size, _AGAIN, _AGAIN + 2)
            yield Buffer(self.padded_v * stored * size, _AGAIN + 1, _AGAIN + 2)
