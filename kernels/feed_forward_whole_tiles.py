"""Which tiles a feed-forward streamed whole may have, and what they cost. Imports no Triton.

`default_tile` takes the first of an ordered list that fits the shared memory and the registers.
"""

from dataclasses import dataclass

from flashsvd_compile.kernels.feed_forward_tiles import (
    MAX_RESIDENT_RANK,
    SRAM_SLACK_BYTES,
    rank_padded,
)
from flashsvd_compile.kernels.tiles import TileConfig


@dataclass(frozen=True)
class WholeTile(TileConfig):
    """``block_n`` is of the intermediate axis; ``block_k`` columns of x and ``block_o`` of y are
    walked per step of the outer loops."""

    block_k: int = 64
    block_o: int = 64


@dataclass(frozen=True)
class WholeExtents:
    """What the choice of a tile depends on; ``gate_from`` as `WholeFeedForwardOperands` has it."""

    rank_up: int
    rank_gate: int | None
    rank_down: int
    intermediate_size: int
    gate_from: str
    element_bytes: int

    @property
    def latents(self) -> tuple[int, ...]:
        """Padded ranks of the latents that a program holds."""
        held = [rank_padded(self.rank_up)]
        if self.gate_from in ("x", "own"):
            held.append(rank_padded(self.rank_gate or 0))
        return tuple(held)

    @property
    def lifts(self) -> tuple[int, ...]:
        """Padded ranks of the lifts to the intermediate axis."""
        gate = () if self.rank_gate is None else (rank_padded(self.rank_gate),)
        return (rank_padded(self.rank_up), *gate)


# Latents are never in memory, so none is too long for a tile.
MAX_RANK = MAX_RESIDENT_RANK

# The largest ranks at which it was faster than the streamed one between library matmuls. H100 80GB
# HBM3, torch 2.11.0, triton 3.6.0, bfloat16, 2026-11-26, 768 → rank → 3072 → rank → 768 at 65536
# rows: GELU, rank 32: 0.188 ms against 0.236; 64: 0.226, 0.259; 96: 0.368, 0.401; 128: 0.361,
# 0.333; gated SiLU, rank 32: 0.223, 0.308; 64: 0.320, 0.369; 96: 0.467, 0.484; 128: 0.480, 0.478.
WHOLE_FASTEST_UP_TO_RANK = 96
WHOLE_FASTEST_UP_TO_RANK_GATED = 96

# Registers of tiles beyond which ptxas spills. Of 139 kernels in 16 bits compiled for sm_90 with
# triton 3.6.0, 2026-11-26, none spilled up to 208 but one (48 bytes), and all from 256 on; of the
# same for sm_80 and sm_86 seven gated ones did, at 128 to 192 (up to 184 bytes). Of 51 in exact
# float32, which is only run where it is asked for, seven did, from 36 on.
MAX_REGISTERS_16_BIT = 208
MAX_REGISTERS_32_BIT = 72

# Fastest first, then ever smaller: the first that fits is taken. Same H100 and versions, `python -m
# bench.outer_tiles whole`, 16384 rows: at ranks 64 (GELU, and gated SiLU) and 240 (GELU) what is
# taken was the best of 10 to 48 tiles, or within 1% of it.
_FALLBACK = (
    WholeTile(64, 64, 4, 2),
    WholeTile(64, 32, 4, 2),
    WholeTile(64, 32, 4, 2, block_k=32, block_o=32),
    WholeTile(32, 32, 4, 2, block_k=32, block_o=32),
    WholeTile(16, 32, 4, 2, block_k=32, block_o=32),
    WholeTile(16, 16, 4, 1, block_k=16, block_o=16),
)
# By the largest padded rank.
NARROW_RANK = 64
TILES_NARROW = (WholeTile(64, 64, 4, 3), *_FALLBACK)
TILES_WIDE = (WholeTile(128, 32, 8, 3), *TILES_NARROW)
TILES_32_BIT = (
    WholeTile(32, 32, 4, 2, block_k=32, block_o=32),
    WholeTile(32, 32, 8, 2, block_k=32, block_o=32),
    WholeTile(16, 16, 4, 1, block_k=16, block_o=16),
)


def sram_bytes_of(tile: WholeTile, of: WholeExtents) -> int:
    """Shared memory of one program: at least what the compiled kernel asks for.

    The three loops follow one another and share it; each keeps its tiles ``num_stages`` times.
    """
    m, stages = tile.block_m, tile.num_stages
    latents, rank_down = sum(of.latents), rank_padded(of.rank_down)
    prologue = stages * tile.block_k * (m + latents)
    middle = stages * tile.block_n * (sum(of.lifts) + rank_down) + m * latents
    epilogue = stages * tile.block_o * rank_down + m * (tile.block_o + rank_down)
    return max(prologue, middle, epilogue) * of.element_bytes + SRAM_SLACK_BYTES


def registers_of(tile: WholeTile, of: WholeExtents) -> int:
    """32-bit registers of one thread that hold tiles, in the loop that holds most."""
    rank_down = rank_padded(of.rank_down)
    halves = of.element_bytes / 4
    latents = sum(of.latents)
    middle = latents * halves + rank_down + tile.block_n * len(of.lifts)
    epilogue = rank_down * halves + tile.block_o
    widest = max(latents, middle, epilogue)
    return int(tile.block_m * widest) // (32 * tile.num_warps)


def default_tile(of: WholeExtents, sram_bytes: int) -> WholeTile | None:
    """The preferred tile that fits, or None."""
    if max(of.rank_up, of.rank_gate or 0, of.rank_down) > MAX_RANK:
        return None
    limit = MAX_REGISTERS_16_BIT if of.element_bytes == 2 else MAX_REGISTERS_32_BIT
    for tile in _preferred(of):
        oversized = tile.block_n > rank_padded(of.intermediate_size)
        fits = sram_bytes_of(tile, of) <= sram_bytes and registers_of(tile, of) <= limit
        if fits and not oversized:
            return tile
    return None


def _preferred(of: WholeExtents) -> tuple[WholeTile, ...]:
    if of.element_bytes == 4:
        return TILES_32_BIT
    is_narrow = max(*of.latents, rank_padded(of.rank_down)) <= NARROW_RANK
    return TILES_NARROW if is_narrow else TILES_WIDE
