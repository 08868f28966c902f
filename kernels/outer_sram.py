"""Shared memory of the loops at either end of a chain (``outer_products.py``). No Triton.

Shared by the streamed chain and the feed-forward streamed whole. A loop of one step is none: there
its loads are not copied ahead.
"""

from collections.abc import Iterator

from flashsvd_compile.kernels.shared_memory import MOST_COPIED_BYTES, Buffer, Matmuls, Warps


def entry_warps(matmuls: Matmuls, padded: tuple[int, ...]) -> Warps:
    """Of the products that make the latents of one x; those of two depend on each other."""
    return matmuls.balanced(*padded) if len(padded) == 1 else matmuls.chained(padded[-1])


def entry_buffers(
    matmuls: Matmuls, padded: tuple[int, ...], block_k: int, num_stages: int, at: int
) -> Iterator[Buffer]:
    """Of the loop that makes latents of x, padded to ``padded`` ranks, at moment ``at``.

    Rows of x and of U are taken to begin where they may be copied: those of hidden sizes do.
    """
    size, ahead = matmuls.element_bytes, matmuls.tiles_ahead(num_stages)

    def tile(columns: int, first: float, end: float) -> Buffer:
        elements = block_k * columns
        if ahead and matmuls.can_copy(MOST_COPIED_BYTES, elements):
            return Buffer(ahead * elements * size, at, at + 1)
        return Buffer(elements * size, first, end)

    yield tile(matmuls.rows, at, at + 1)
    for turn, columns in enumerate(padded):
        step = 1 / len(padded)
        yield tile(columns, at + turn * step, at + (turn + 1) * step)


def latent_from(matmuls: Matmuls, num_stages: int, at: int) -> float:
    """When a latent that is made at ``at`` comes to lie in shared memory.

    Exact results are not rounded first, and come before the last copies are let go.
    """
    is_early = matmuls.are_exact and matmuls.tiles_ahead(num_stages) > 0
    return at + (0.5 if is_early else 1)


def exit_buffers(
    matmuls: Matmuls,
    rank: int,
    padded: int,
    block_o: int,
    num_stages: int,
    at: int,
    *,
    steps: int,
) -> Iterator[Buffer]:
    """Of the loop that lifts a latent and stores ``block_o`` columns a step, at moment ``at``."""
    size, elements = matmuls.element_bytes, padded * block_o
    copies = 0
    if steps > 1 and matmuls.can_copy(rank * size, elements):
        copies = matmuls.tiles_ahead(num_stages)
    yield Buffer(max(1, copies) * elements * size, at, at + (2 if copies else 1))
    if not matmuls.are_exact:
        scratch = matmuls.scratch(block_o, matmuls.balanced(block_o))
        yield Buffer(scratch * size, at + 1, at + 2)
