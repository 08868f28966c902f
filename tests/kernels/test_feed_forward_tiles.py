"""The choice of tiles as data: what fits a budget, and what is refused."""

import pytest
from flashsvd_compile.kernels.feed_forward_tiles import (
    MAX_ACCUMULATORS_16_BIT,
    MAX_RESIDENT_RANK,
    STREAMED_CHUNK,
    Run,
    accumulators_of,
    candidate_tiles,
    default_tile,
    rank_chunk,
    rank_padded,
    sram_bytes_of,
)
from flashsvd_compile.kernels.tiles import TileConfig

KIB = 1024


@pytest.mark.parametrize(
    ("rank", "padded"), [(0, 16), (1, 16), (16, 16), (17, 32), (240, 256), (257, 512)]
)
def test_rank_padded(rank, padded):
    assert rank_padded(rank) == padded


@pytest.mark.parametrize(("rank", "chunk"), [(8, 16), (240, 256), (257, 64), (4096, 64)])
def test_rank_chunk(rank, chunk):
    assert rank_chunk(rank) == chunk
    assert (chunk == STREAMED_CHUNK) or rank <= MAX_RESIDENT_RANK


def test_sram_bytes_of_a_tile_read_off_a_compiled_kernel():
    """triton 3.6.0, sm_90, bfloat16: 65536, 114688 and 196608 bytes, and the slack."""
    for tile, rank, compiled in (
        (TileConfig(128, 64, 8, 3), 64, 65536),
        (TileConfig(64, 64, 4, 3), 128, 114688),
        (TileConfig(128, 64, 8, 2), 240, 196608),
    ):
        shape = {"rank_up": rank, "rank_gate": None, "rank_down": rank}
        shape |= {"intermediate_size": 3072, "element_bytes": 2}
        assert 0 <= sram_bytes_of(tile, **shape, generation="sm_90") - compiled <= 256


@pytest.mark.parametrize("sram_kib", [48, 64, 99, 164, 227])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("rank", [1, 16, 37, 64, 96, 128, 240, 256])
def test_default_tile_fits(rank, gated, element_bytes, sram_kib):
    ranks = {"rank_up": rank, "rank_gate": rank if gated else None, "rank_down": rank}
    ranks |= {"element_bytes": element_bytes, "intermediate_size": 3072}
    tile = default_tile(sram_bytes=sram_kib * KIB, **ranks)
    if tile is None:
        assert rank >= 128
        return
    assert sram_bytes_of(tile, **ranks) <= sram_kib * KIB
    assert accumulators_of(tile, gated=gated, rank_down=rank) <= MAX_ACCUMULATORS_16_BIT


def test_default_tile_is_not_wider_than_the_intermediate_size():
    tile = default_tile(
        rank_up=16,
        rank_gate=None,
        rank_down=16,
        intermediate_size=20,
        element_bytes=2,
        sram_bytes=227 * KIB,
    )
    assert tile is not None
    assert tile.block_n <= 32


def test_factors_that_lie_otherwise_are_copied_otherwise():
    """Rows of rank 37 cannot be copied ahead; its columns of 3072 can, and are."""
    shape = {"rank_up": 37, "rank_gate": None, "rank_down": 37, "intermediate_size": 3072}
    tile, run = TileConfig(64, 64, 4, 3), Run(3072, 3072)
    by_rows, by_columns, padded = (
        sram_bytes_of(tile, **shape, element_bytes=2, generation="sm_90", runs=runs)
        for runs in (None, (run, Run(0, 0), run), (Run(37, 64), Run(0, 0), run))
    )
    assert by_columns == by_rows + 64 * 64 * 2 * 2
    assert padded == by_rows


@pytest.mark.parametrize(("rank_down", "sram_bytes"), [(4096, 227 * KIB), (64, 4 * KIB)])
def test_nothing_fits(rank_down, sram_bytes):
    tile = default_tile(
        rank_up=64,
        rank_gate=None,
        rank_down=rank_down,
        intermediate_size=3072,
        element_bytes=2,
        sram_bytes=sram_bytes,
    )
    assert tile is None


@pytest.mark.parametrize("generation", ["sm_80", "sm_86", "sm_90", "sm_120", ""])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("rank", [37, 101, 201])
def test_rows_that_are_loaded_element_by_element_leave_registers_for_addresses(
    rank, gated, generation
):
    shape = {"rank_up": rank, "rank_gate": rank if gated else None, "rank_down": rank}
    found = candidate_tiles(
        **shape, element_bytes=2, intermediate_size=3072, sram_bytes=227 * KIB,
        generation=generation,
    )  # fmt: skip
    assert found.tiles
    for tile in found.tiles:
        registers = accumulators_of(tile, gated=gated, rank_down=rank)
        assert registers <= 96
        assert tile.num_warps <= 4 or (generation == "sm_90" and registers <= 80)
