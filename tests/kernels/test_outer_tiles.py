"""The tiles of what is streamed from x to y, as data: what fits a budget, and what is refused."""

import pytest
from flashsvd_compile.kernels import chain_tiles, feed_forward_whole_tiles
from flashsvd_compile.kernels.chain_tiles import ChainTile, shared_out
from flashsvd_compile.kernels.feed_forward_whole_tiles import WholeExtents, WholeTile

KIB = 1024


def extents(rank, gate_from="none", element_bytes=2, intermediate_size=3072, generation=""):
    rank_gate = None if gate_from == "none" else rank
    return WholeExtents(
        rank, rank_gate, rank, intermediate_size, gate_from, element_bytes, generation
    )


@pytest.mark.parametrize("sram_kib", [48, 64, 99, 164, 227])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("gate_from", ["none", "latent", "x", "own"])
@pytest.mark.parametrize("rank", [1, 16, 37, 64, 96, 128, 240, 256])
def test_a_whole_tile_fits(rank, gate_from, element_bytes, sram_kib):
    of = extents(rank, gate_from, element_bytes)
    tile = feed_forward_whole_tiles.default_tile(of, sram_kib * KIB)
    if tile is None:
        assert rank > 64 and (element_bytes == 4 or gate_from != "none")  # noqa: PT018
        return
    assert feed_forward_whole_tiles.sram_bytes_of(tile, of) <= sram_kib * KIB
    assert feed_forward_whole_tiles.registers_of(tile, of) <= 208


def test_whole_sram_bytes_read_off_a_compiled_kernel():
    """triton 3.6.0, sm_90, bfloat16: 73728, 81920 and 98304 bytes."""
    for tile, of, compiled in (
        (WholeTile(128, 64, 8, 3), extents(64, generation="sm_90"), 73728),
        (WholeTile(64, 32, 4, 2), extents(96, "x", generation="sm_90"), 81920),
        (WholeTile(128, 32, 8, 3), extents(64, "x", generation="sm_90"), 98304),
    ):
        assert 0 <= feed_forward_whole_tiles.sram_bytes_of(tile, of) - compiled <= 256


@pytest.mark.parametrize(("rank", "sram_bytes"), [(257, 227 * KIB), (64, 2 * KIB)])
def test_no_whole_tile_fits(rank, sram_bytes):
    assert feed_forward_whole_tiles.default_tile(extents(rank), sram_bytes) is None


def test_a_whole_tile_is_not_wider_than_the_intermediate_size():
    tile = feed_forward_whole_tiles.default_tile(extents(16, intermediate_size=20), 227 * KIB)
    assert tile is not None
    assert tile.block_n <= 32


@pytest.mark.parametrize("sram_kib", [48, 64, 99, 164, 227])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("rows", [1, 16, 256, 65536])
@pytest.mark.parametrize("rank", [1, 37, 64, 240, 256])
def test_a_chain_tile_fits(rank, rows, element_bytes, sram_kib):
    tile = chain_tiles.default_tile(
        rows=rows, rank=rank, out_size=768, element_bytes=element_bytes,
        sram_bytes=sram_kib * KIB, multiprocessors=132,
    )  # fmt: skip
    assert tile is not None
    sram_bytes = chain_tiles.sram_bytes_of(tile, rank=rank, element_bytes=element_bytes)
    assert sram_bytes <= sram_kib * KIB
    assert tile.columns % tile.block_n == 0


@pytest.mark.parametrize(
    ("rows", "out_size", "columns"),
    [
        (1, 768, 64),  # twelve programs: no more than there are steps
        (2048, 768, 192),  # 32 tiles of rows, four programs each
        (8448, 768, 768),  # a program for each multiprocessor
        (8192, 700, 704),
        (65536, 64, 64),
        (0, 768, 64),
    ],
)
def test_columns_are_shared_out_until_every_multiprocessor_has_a_program(rows, out_size, columns):
    assert shared_out(ChainTile(64, 64, 4, 3), rows, out_size, 132).columns == columns
