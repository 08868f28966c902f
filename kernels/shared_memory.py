"""How much shared memory Triton takes for tiles that live at given moments. Imports no Triton.

Every kernel's `sram_bytes_of` lists its tiles as `Buffer`s; here is what they have in common: which
loads are copied ahead, which operands a matmul wants in shared memory, and how Triton packs what
lives side by side. Read off the TTGIR and the allocations of 1500 kernels that triton 3.6.0
compiled for sm_80, sm_86, sm_89, sm_90 and sm_120 on 2026-11-27 (`python -m bench.sram`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

# The generation whose tensor cores read operands of 64 rows from shared memory by themselves, and
# one of each kind.
HOPPER = "sm_90"
GENERATIONS = ("sm_80", HOPPER)
WITHOUT_STORED_MATRICES = ("sm_80", "sm_86", "sm_89")
WARPGROUP_ROWS = 64
WARPGROUP_WARPS = 4

# What an asynchronous copy moves at least, at once, for one thread; and at most.
COPIED_BYTES = 4
MOST_COPIED_BYTES = 16

# Rows and columns of what one warp of the older tensor cores multiplies.
WARP_ROWS = 16
WARP_COLUMNS = 8

THREADS = 32

# Beyond all moments.
ALWAYS = 1 << 30

# Warps along the rows and along the columns of a matmul's result.
Warps = tuple[int, int]


class Buffer(NamedTuple):
    """A tile in shared memory, from moment ``first`` on and gone at ``end``."""

    size: float
    first: float
    end: float

    def meets(self, other: "Buffer") -> bool:
        return self.first < other.end and other.first < self.end


@dataclass(frozen=True)
class Matmuls:
    """How the matmuls of one program read their operands, of ``rows`` (a tile's BLOCK_M)."""

    generation: str
    element_bytes: int
    rows: int
    num_warps: int

    @property
    def are_exact(self) -> bool:
        """Multiplied on the ordinary cores; every operand comes from shared memory."""
        return self.element_bytes == 4

    @property
    def are_warpgroups(self) -> bool:
        """Multiplied by whole warpgroups, asynchronously, on Hopper."""
        is_hopper = self.generation == HOPPER and not self.are_exact
        return is_hopper and self.rows >= WARPGROUP_ROWS and self.num_warps >= WARPGROUP_WARPS

    @property
    def fill_warpgroups(self) -> bool:
        """Whether each warp has rows of its own."""
        return self.are_warpgroups and self.rows >= WARP_ROWS * self.num_warps

    def tiles_ahead(self, num_stages: int) -> int:
        """Buffers of a tile that is copied ahead; 0 where none is.

        A matmul that reads shared memory by itself may still do so while the next tile arrives.
        """
        if num_stages == 1:
            return 0
        return num_stages if self.are_warpgroups else num_stages - 1

    def can_copy(self, row_bytes: int, elements: int) -> bool:
        """Whether a tile of ``elements`` can be copied, whose rows begin at multiples of
        ``row_bytes``."""
        alignment = min(row_bytes & -row_bytes, MOST_COPIED_BYTES)
        a_thread = elements * self.element_bytes // (THREADS * self.num_warps)
        return min(alignment, a_thread) >= COPIED_BYTES

    def balanced(self, columns: int) -> Warps:
        """Warps of a matmul that no other in its block feeds or follows."""
        m = n = 1
        row_tiles, column_tiles = max(1, self.rows // WARP_ROWS), max(1, columns // WARP_COLUMNS)
        while m * n < self.num_warps:
            if row_tiles >= column_tiles:
                m, row_tiles = 2 * m, max(1, row_tiles // 2)
            else:
                n, column_tiles = 2 * n, column_tiles // 2
        return m, n

    def chained(self, columns: int) -> Warps:
        """Warps of matmuls in one block that depend on one another; ``columns`` of the last."""
        return (self.num_warps, 1) if self.rows >= columns else (1, self.num_warps)

    def hand_over(self, source: Warps, target: Warps) -> bool:
        """Whether a result of ``source`` is an operand of ``target`` without leaving registers.

        Each warp has whole rows of it, of the one tile of rows that there is or of the same.
        """
        if self.are_warpgroups:
            return self.fill_warpgroups
        is_alike = own_rows(target) or self.rows == WARP_ROWS
        return own_rows(source) and is_alike and not self.are_exact

    def scratch(self, columns: int, warps: Warps) -> int:
        """Elements of a result that pass through shared memory at once where it is stored, at most.

        Where matrices are stored (from sm_90 on), those of each row of warps at a time; of 128
        accumulators a thread half at a time anywhere.
        """
        elements = self.rows * columns
        if self.are_warpgroups:
            warps = (min(self.num_warps, self.rows // WARP_ROWS), 1)
        steps = max(1, self.rows // (WARP_ROWS * warps[0]))
        if elements >= 128 * THREADS * self.num_warps:
            return elements // max(2, steps)
        return elements if self.generation in WITHOUT_STORED_MATRICES else elements // steps


def most_of(generation: str, sram_bytes_of: Callable[[str], int]) -> int:
    """``sram_bytes_of`` a generation; where it is not known the most of any."""
    names = (generation,) if generation.startswith("sm_") else GENERATIONS
    return max(map(sram_bytes_of, names))


def own_rows(warps: Warps) -> bool:
    """Whether each warp has whole rows of a result, so that they are summed, and are an operand of
    the next matmul, within it."""
    return warps[1] == 1


def packed_bytes(buffers: Iterable[Buffer]) -> int:
    """Bytes in which ``buffers``, in the program's order, find room; as Triton's allocator does it.

    It does not always find the least: largest first, each buffer goes to the lowest place that a
    sketch of what is free shows, and those that meet in spite of that are moved behind each other
    until none do (``lib/Analysis/Allocation.cpp``).
    """
    largest_first = sorted((b for b in buffers if b.size > 0), key=lambda b: -b.size)
    offsets = _first_offsets(largest_first)
    meeting = _meeting(largest_first, offsets)
    while any(meeting):
        colors: list[int] = []
        for i in range(len(largest_first)):
            taken = {colors[j] for j in meeting[i] if j < i}
            colors.append(next(c for c in range(len(taken) + 1) if c not in taken))
        for i, color in enumerate(colors):
            if color:
                offsets[i] = max(offsets[j] + largest_first[j].size for j in meeting[i])
        meeting = _meeting(largest_first, offsets)
    return int(max((o + b.size for o, b in zip(offsets, largest_first, strict=True)), default=0))


def _first_offsets(buffers: list[Buffer]) -> list[float]:
    """By offset and moments, what seems free: a buffer takes the lowest gap that it alone meets."""
    offsets = dict.fromkeys(range(len(buffers)), 0.0)
    left = list(offsets)
    everywhere = Buffer(0, 0, ALWAYS)  # a gap's ``size`` is its offset
    gaps = [everywhere]

    def insert(gap: Buffer) -> None:
        place = sum(other.size <= gap.size for other in gaps)
        gaps.insert(place, gap)

    while left:
        gap = gaps.pop(0) if gaps else everywhere
        fitting = (
            i for i in left
            if buffers[i].meets(gap) and not any(buffers[i].meets(other) for other in gaps)
        )  # fmt: skip
        if (i := next(fitting, None)) is None:
            continue
        left.remove(i)
        size, first, end = buffers[i]
        offsets[i] = gap.size
        insert(Buffer(gap.size + size, max(gap.first, first), min(gap.end, end)))
        if gap.first < first:
            insert(Buffer(gap.size, gap.first, end))
        if end < gap.end:
            insert(Buffer(gap.size, first, gap.end))
    return list(offsets.values())


def _meeting(buffers: list[Buffer], offsets: list[float]) -> list[list[int]]:
    """Of each buffer, those that live at the same time in the same place."""
    places = [Buffer(0, o, o + b.size) for o, b in zip(offsets, buffers, strict=True)]
    everyone = range(len(buffers))
    return [
        [j for j in everyone if j != i and buffers[i].meets(buffers[j])
         and places[i].meets(places[j])]
        for i in everyone
    ]  # fmt: skip
