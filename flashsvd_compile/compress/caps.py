"""The largest ranks whose kernels have a tile within the shared memory of a block.

Heads' factors go to attention, whose q, k and v then have that rank each; whole matrices to a
streamed feed-forward, up and down alike. No GPU is known here, so that what a tile takes is the
most that it takes on any.
"""

from collections.abc import Callable

from flashsvd_compile.compress.matrices import Matrices
from flashsvd_compile.compress.ranks import RANK_STEP
from flashsvd_compile.kernels import attention_tiles, feed_forward_tiles
from flashsvd_compile.kernels.attention_extents import AttentionExtents


def cap_of(one: Matrices, sram_bytes: int) -> int:
    """The largest rank of ``one`` that runs on chip within ``sram_bytes``.

    Raises ValueError where not even one step of ranks does.
    """
    fits = _attends(one, sram_bytes) if one.layout is not None else _streams(one, sram_bytes)
    most = min(one.shape)
    for rank in (most, *range(most - most % RANK_STEP, 0, -RANK_STEP)):
        if fits(rank):
            return rank
    raise ValueError(
        f"sram_budget is {sram_bytes} bytes, and {one.linear.path} runs in no tile of that, not "
        f"even at rank {min(most, RANK_STEP)}"
    )


def _attends(one: Matrices, sram_bytes: int) -> Callable[[int], bool]:
    def fits(rank: int) -> bool:
        extents = AttentionExtents(
            one.shape[0], one.shape[0], rank, rank, rank, q_lifted=True, v_lifted=True,
            element_bytes=one.weight.element_size(), mask="any",
        )  # fmt: skip
        tile = attention_tiles.default_tile(extents, sram_bytes)
        return (tile or attention_tiles.last_resort(extents, sram_bytes)) is not None

    return fits


def _streams(one: Matrices, sram_bytes: int) -> Callable[[int], bool]:
    def fits(rank: int) -> bool:
        tile = feed_forward_tiles.default_tile(
            rank_up=rank, rank_gate=None, rank_down=rank, intermediate_size=max(one.shape),
            element_bytes=one.weight.element_size(), sram_bytes=sram_bytes,
        )  # fmt: skip
        return tile is not None

    return fits
