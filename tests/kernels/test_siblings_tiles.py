"""The choice of tiles for sibling linears: what fits a budget, and what fills a device."""

import pytest
from flashsvd_compile.kernels.siblings_tiles import (
    FILLING_PROGRAMS,
    TILES,
    TILES_32_BIT,
    TILES_FEW_ROWS,
    MatmulTile,
    default_tile,
    programs_of,
    sram_bytes_of,
)

KIB = 1024


@pytest.mark.parametrize("sram_kib", [48, 64, 99, 164, 227])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("rows", [1, 16, 17, 256, 4096, 16384])
@pytest.mark.parametrize("widths", [(480,) * 3, (1024,) * 3, (1490,) * 2, (1,)], ids=str)
def test_default_tile_fits(widths, rows, element_bytes, sram_kib):
    tile = default_tile(
        rows=rows, widths=widths, element_bytes=element_bytes, sram_bytes=sram_kib * KIB
    )
    assert tile is not None
    assert sram_bytes_of(tile, element_bytes) <= sram_kib * KIB


def test_few_rows_take_short_tiles_and_enough_of_them():
    for widths in ((1024,) * 3, (1490,) * 2):
        tile = default_tile(rows=1, widths=widths, element_bytes=2, sram_bytes=227 * KIB)
        assert tile.block_m == 16
        assert programs_of(tile, 1, widths) >= FILLING_PROGRAMS


def test_where_none_fills_the_device_the_deepest_of_the_smallest_is_taken():
    tile = default_tile(rows=1, widths=(240,) * 3, element_bytes=2, sram_bytes=227 * KIB)
    assert (tile.block_m, tile.block_n, tile.block_k) == (16, 16, 256)
    tile = default_tile(rows=1, widths=(240,) * 3, element_bytes=2, sram_bytes=64 * KIB)
    assert (tile.block_m, tile.block_n, tile.block_k) == (16, 16, 128)


def test_many_rows_take_the_largest_tile():
    tile = default_tile(rows=16384, widths=(480,) * 3, element_bytes=2, sram_bytes=227 * KIB)
    assert tile == TILES[0]


def test_programs_are_counted_by_sibling():
    assert programs_of(MatmulTile(64, 64, 4, 4), 65, (1, 64, 65)) == 2 * (1 + 1 + 2)


def test_without_room_there_is_no_tile():
    assert default_tile(rows=1, widths=(8,), element_bytes=2, sram_bytes=KIB) is None


def test_sram_bytes_of_tiles_read_off_compiled_kernels():
    """triton 3.6.0, sm_90, bfloat16; with fewer than 64 rows a stage less is kept."""
    for tile, compiled in (
        (TILES[0], 131072),
        (TILES[1], 98304),
        (TILES[3], 61440),
        (TILES_FEW_ROWS[0], 61440),
        (TILES_FEW_ROWS[2], 65536),
    ):
        assert 0 <= sram_bytes_of(tile, 2, "sm_90") - compiled <= 256


def test_tiles_are_ordered_from_large_to_small():
    for tiles in (TILES, TILES_FEW_ROWS, TILES_32_BIT):
        areas = [tile.block_m * tile.block_n for tile in tiles]
        assert areas == sorted(areas, reverse=True)
