"""Which tiles a feed-forward streamed whole may have, and what they cost. Imports no Triton.

`default_tile` takes the first of an ordered list that fits the shared memory and the registers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from flashsvd_compile.kernels.feed_forward_tiles import (
    MAX_RESIDENT_RANK,
    SRAM_SLACK_BYTES,
    rank_padded,
)
from flashsvd_compile.kernels.outer_sram import (
    entry_buffers,
    entry_warps,
    exit_buffers,
    latent_from,
)
from flashsvd_compile.kernels.shared_memory import (
    Buffer,
    Matmuls,
    most_of,
    own_rows,
    packed_bytes,
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
    """What the choice of a tile depends on; ``gate_from`` as `WholeFeedForwardOperands` has it;
    ``generation`` of the device, as ``"sm_90"``."""

    rank_up: int
    rank_gate: int | None
    rank_down: int
    intermediate_size: int
    gate_from: str
    element_bytes: int
    generation: str = ""

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


@cache
def sram_bytes_of(tile: WholeTile, of: WholeExtents) -> int:
    """Shared memory of one program: what the compiled kernel asks for, or a little more.

    The three loops follow one another and share it.
    """
    most = most_of(of.generation, lambda name: packed_bytes(_buffers(tile, of, name)))
    return most + SRAM_SLACK_BYTES


# Moments of a program: the latents, of up and of the gate; the loop over h, in it the lifts of up
# and gate and the product with the down factor, its end; S, and its lift.
_ENTRIES, _LOOP, _LIFTS, _DOWN, _END, _EXIT = 0, 4, 5, 7, 9, 10


def _buffers(tile: WholeTile, of: WholeExtents, generation: str) -> Iterator[Buffer]:
    m, n, size = tile.block_m, tile.block_n, of.element_bytes
    matmuls = Matmuls(generation, size, m, tile.num_warps)
    ahead = matmuls.tiles_ahead(tile.num_stages)
    padded_down = rank_padded(of.rank_down)
    middle = matmuls.chained(padded_down)

    # The gate's latent of the same x is made in the same loop, of another in a second one.
    together = [of.latents] if of.gate_from == "x" else [(rank,) for rank in of.latents]
    for at, padded in enumerate(together, start=_ENTRIES):
        yield from entry_buffers(matmuls, padded, tile.block_k, tile.num_stages, at)
        if not matmuls.hand_over(entry_warps(matmuls, padded), middle):
            begin = latent_from(matmuls, tile.num_stages, at)
            for latent in padded:
                yield Buffer(m * latent * size, begin, _END)

    ranks = (of.rank_up, of.rank_gate) if of.rank_gate is not None else (of.rank_up,)
    factors = [(rank, rank_padded(rank)) for rank in ranks]
    for at, (row, padded) in enumerate(factors, start=_LIFTS):
        yield _factor(matmuls, row, n * padded, ahead, at)
    yield _factor(matmuls, of.intermediate_size, n * padded_down, ahead, _DOWN)
    if matmuls.are_exact or not (matmuls.are_warpgroups or own_rows(middle)):
        yield Buffer(m * n * size, _DOWN, _DOWN + 1)  # h

    # Of y are more columns than one step stores.
    yield from exit_buffers(
        matmuls, of.rank_down, padded_down, tile.block_o, tile.num_stages, _EXIT, steps=2
    )
    if not matmuls.hand_over(middle, matmuls.balanced(tile.block_o)):
        begin = latent_from(matmuls, tile.num_stages, _END - 1)
        yield Buffer(m * padded_down * size, begin, _EXIT + 2)  # S


def _factor(matmuls: Matmuls, row: int, elements: int, ahead: int, at: int) -> Buffer:
    """A tile of a factor whose rows have ``row`` elements: copied ahead or loaded at ``at``."""
    size = matmuls.element_bytes
    if ahead and matmuls.can_copy(row * size, elements):
        return Buffer(ahead * elements * size, _LOOP, _END)
    return Buffer(elements * size, at, at + 1)


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
