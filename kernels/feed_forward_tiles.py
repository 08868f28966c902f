"""Which tiles a streamed feed-forward may have, and what they cost on chip. Imports no Triton.

`candidate_tiles` are those of an ordered list that fit the shared memory and the registers.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from flashsvd_compile.kernels.shared_memory import (
    Buffer,
    Matmuls,
    most_of,
    own_rows,
    packed_bytes,
)
from flashsvd_compile.kernels.tile_tables import Candidates, candidates
from flashsvd_compile.kernels.tiles import TileConfig

# The tensor cores' least extent along a contraction.
MIN_PADDED_RANK = 16

# Up to here a latent's tile stays on chip; beyond, each column tile reads it again in chunks.
MAX_RESIDENT_RANK = 256
STREAMED_CHUNK = 64

# Beyond the tiles themselves: barriers and small conversions. 256 is the most seen in 224 kernels
# compiled for sm_80 and sm_90 with triton 3.6.0, 2026-11-25.
SRAM_SLACK_BYTES = 256

# Accumulators (32-bit registers of a thread) beyond which ptxas spills a third of all registers or
# more. Of 224 kernels compiled for sm_80 and sm_90 with triton 3.6.0, 2026-11-25, the 16-bit
# ones spilled from 256 on and, resident latents given, not at 192. Rows that do not begin at
# multiples of 4 bytes (an odd rank in 16 bits) are loaded element by element, whose addresses take
# registers: with 8 warps those spilled up to 152, on sm_90 up to 10 at 80; with 4 warps up to 50 at
# 96. Exact float32, which keeps operands in registers too, spilled 360 at 72, up to 78 at 48
# (triton 3.9.0, 2026-11-26, the grid of tests/kernels/test_compiled_tiles.py).
MAX_ACCUMULATORS_16_BIT = 192
MAX_ACCUMULATORS_ELEMENTWISE = 96
MAX_ACCUMULATORS_ELEMENTWISE_8_WARPS = {"sm_90": 80}  # others: none
MAX_ACCUMULATORS_32_BIT = 48
COPIED_BYTES = 4

# By which the planner and the launcher name this kernel's tables.
KERNEL = "feed_forward"


def rank_padded(rank: int) -> int:
    """The power of two that a tile runs ``rank`` at."""
    return max(MIN_PADDED_RANK, 1 << max(rank - 1, 0).bit_length())


def rank_chunk(rank: int) -> int:
    """Ranks of a latent multiplied at once: all of them, padded, or chunks of a large rank."""
    padded = rank_padded(rank)
    return padded if padded <= MAX_RESIDENT_RANK else STREAMED_CHUNK


class Run(NamedTuple):
    """How a factor lies in memory: ``length`` elements side by side, each run ``stride`` from the
    one before."""

    length: int
    stride: int


@cache
def sram_bytes_of(
    tile: TileConfig,
    *,
    rank_up: int,
    rank_gate: int | None,
    rank_down: int,
    intermediate_size: int,
    element_bytes: int,
    generation: str = "",
    runs: tuple[Run, Run, Run] | None = None,
) -> int:
    """Shared memory of one program: what the compiled kernel asks for, or a little more.

    ``runs`` of the factors of up, gate and down; by default those of contiguous ones.
    ``generation`` of the device; where that is not known the most that it takes on any.
    """
    lengths = (rank_up, rank_gate or 0, intermediate_size)
    laid_out = runs or tuple(Run(length, length) for length in lengths)
    most = most_of(
        generation,
        lambda name: _sram_bytes_of(
            tile, (rank_up, rank_gate), rank_down, laid_out,
            Matmuls(name, element_bytes, tile.block_m, tile.num_warps),
        ),
    )  # fmt: skip
    return most + SRAM_SLACK_BYTES


def _sram_bytes_of(
    tile: TileConfig,
    lifted: tuple[int, int | None],
    rank_down: int,
    runs: Sequence[Run],
    matmuls: Matmuls,
) -> int:
    m, n = tile.block_m, tile.block_n
    arms = [(r, rank_chunk(r), run) for r, run in zip(lifted, runs, strict=False) if r is not None]
    # Loops over chunks are the innermost ones, and only those have stages.
    has_chunks = any(rank > chunk for rank, chunk, _ in arms)
    ahead = matmuls.tiles_ahead(tile.num_stages)

    def copies(run: Run, elements: int) -> int:
        """Buffers of a tile. Where the kernel is compiled only those strides are known that are
        multiples of 16, and a run's end cuts what is copied at once."""
        known = min(16, run.length & -run.length) if run.stride % 16 == 0 else 1
        return ahead if matmuls.can_copy(known * matmuls.element_bytes, elements) else 0

    buffers = []
    for at, (rank, chunk, run) in enumerate(arms, start=_LIFTS):
        up_to = copies(run, n * chunk)
        if rank > chunk:
            # The latent is contiguous, or its rows begin where they may be copied as well.
            for x in (m, n):
                buffers.append(Buffer(max(1, up_to) * x * chunk, at, at + 1))
            continue
        buffers.append(Buffer(m * chunk, 0, _END))  # the latent
        if has_chunks or not up_to:
            buffers.append(Buffer(n * chunk, at, at + 1))
        else:
            buffers.append(Buffer(up_to * n * chunk, _LOOP, _END))
    padded = rank_padded(rank_down)
    up_to = copies(runs[-1], n * padded)
    if has_chunks or not up_to:
        buffers.append(Buffer(n * padded, _DOWN, _DOWN + 1))
    else:
        buffers.append(Buffer(up_to * n * padded, _LOOP, _END))
    if not _is_hidden_in_registers(matmuls, padded, has_chunks):
        buffers.append(Buffer(m * n, _DOWN, _DOWN + 1))
    is_chained = any(rank <= chunk for rank, chunk, _ in arms)
    warps = matmuls.chained(padded) if is_chained else matmuls.balanced(padded)
    buffers.append(Buffer(matmuls.scratch(padded, warps), _STORE, _STORE + 1))
    return packed_bytes(b._replace(size=b.size * matmuls.element_bytes) for b in buffers)


# Moments of a program: the loop, in it the lifts of up and gate and the product with the down
# factor, its end, and S on its way to memory.
_LOOP, _LIFTS, _DOWN, _END, _STORE = 1, 2, 4, 6, 7


def _is_hidden_in_registers(matmuls: Matmuls, padded_down: int, has_chunks: bool) -> bool:
    """Whether h goes from its matmul into the next without passing through shared memory.

    Warpgroups and warps that have rows of their own hand it over. What is lifted in a loop of
    chunks does not know what follows: there only full warpgroups do.
    """
    if matmuls.are_exact:
        return False
    if has_chunks:
        return matmuls.fill_warpgroups
    return matmuls.are_warpgroups or own_rows(matmuls.chained(padded_down))


def accumulators_of(tile: TileConfig, *, gated: bool, rank_down: int) -> int:
    """Registers of one thread that hold S's tile and the pre-activations."""
    columns = rank_padded(rank_down) + tile.block_n * (2 if gated else 1)
    return tile.block_m * columns // (32 * tile.num_warps)


def traits_of(
    *, rank_up: int, rank_gate: int | None, rank_down: int, element_bytes: int, **_: Any
) -> dict[str, int | bool]:
    """What the tables distinguish calls by."""
    return {
        "element_bytes": element_bytes,
        "rank": rank_padded(max(rank_up, rank_gate or 0, rank_down)),
        "is_gated": rank_gate is not None,
    }


def candidate_tiles(*, sram_bytes: int, generation: str = "", **shape: Any) -> Candidates:
    """The tiles that `can_run` a call of ``shape``, best first.

    ``generation`` of the device, as ``"sm_90"``.
    """
    traits = traits_of(**shape)
    return candidates(
        KERNEL,
        generation,
        traits,
        lambda tile: can_run(tile, sram_bytes=sram_bytes, generation=generation, **shape),
    )


def default_tile(**shape: Any) -> TileConfig | None:
    """The first of `candidate_tiles`, which takes the same arguments, or None where none fits."""
    return candidate_tiles(**shape).first


def can_run(
    tile: TileConfig,
    *,
    rank_up: int,
    rank_gate: int | None,
    rank_down: int,
    intermediate_size: int,
    element_bytes: int,
    sram_bytes: int,
    generation: str = "",
    runs: tuple[Run, Run, Run] | None = None,
) -> bool:
    """Whether it fits ``sram_bytes`` of shared memory a block and the registers, and is no wider
    than the intermediate size."""
    sram = sram_bytes_of(
        tile,
        rank_up=rank_up,
        rank_gate=rank_gate,
        rank_down=rank_down,
        intermediate_size=intermediate_size,
        element_bytes=element_bytes,
        generation=generation,
        runs=runs,
    )
    ranks = (rank_up, rank_gate or 0, rank_down)
    limit = MAX_ACCUMULATORS_16_BIT if element_bytes == 2 else MAX_ACCUMULATORS_32_BIT
    if any(rank * element_bytes % COPIED_BYTES for rank in ranks):
        limit = min(limit, MAX_ACCUMULATORS_ELEMENTWISE)
        if tile.num_warps > 4:
            limit = min(limit, MAX_ACCUMULATORS_ELEMENTWISE_8_WARPS.get(generation, 0))
    registers = accumulators_of(tile, gated=rank_gate is not None, rank_down=rank_down)
    is_oversized = tile.block_n > rank_padded(intermediate_size)
    return not is_oversized and registers <= limit and sram <= sram_bytes
