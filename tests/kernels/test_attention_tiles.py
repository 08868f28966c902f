"""Which tiles fit: padding of ranks, preference, and the budget of shared memory."""

import subprocess
import sys
from dataclasses import replace

import pytest
from flashsvd_compile.kernels.attention_extents import (
    AttentionExtents,
    common_width,
    lift_chunk,
    rank_padded,
    widened,
)
from flashsvd_compile.kernels.attention_sram import sram_bytes_of
from flashsvd_compile.kernels.attention_tiles import (
    candidate_tiles,
    default_tile,
    last_resort,
    query_accumulators_of,
)
from flashsvd_compile.kernels.tiles import TileConfig

KIB = 1024
BERT = AttentionExtents(
    head_dim_qk=64,
    head_dim_v=64,
    rank_q=32,
    rank_k=32,
    rank_v=32,
    q_lifted=True,
    v_lifted=True,
    element_bytes=2,
    generation="sm_90",
)


def of_rank(rank, **others):
    return replace(BERT, rank_q=rank, rank_k=rank, rank_v=rank, **others)


@pytest.mark.parametrize(
    ("rank", "padded"), [(1, 16), (15, 16), (16, 16), (17, 32), (40, 64), (64, 64), (257, 512)]
)
def test_ranks_are_padded_to_powers_of_two(rank, padded):
    assert rank_padded(rank) == padded


def test_ranks_of_one_call_are_padded_alike_up_to_the_swizzle():
    assert common_width(8, 16, 16, 2) == 16
    assert common_width(8, 40, 16, 2) == 64
    assert common_width(8, 257, 16, 2) == 64
    assert common_width(8, 40, 16, 4) == 32
    assert rank_padded(8, 64) == 64
    assert lift_chunk(8, 64) == lift_chunk(256, 16) == 64


@pytest.mark.parametrize("sram_kib", [48, 64, 99, 164, 227])
@pytest.mark.parametrize("rank", [8, 32, 40, 64, 96, 128])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_every_budget_has_a_tile_within_it(rank, sram_kib, element_bytes):
    case = of_rank(rank, element_bytes=element_bytes, mask="any")
    if (rank, element_bytes, sram_kib) in {(96, 4, 48), (128, 4, 48), (96, 4, 64), (128, 4, 64)}:
        pytest.skip("a chunk of V_v alone takes it")
    tiles = candidate_tiles(case, sram_kib * KIB).tiles
    assert tiles[0] == default_tile(case, sram_kib * KIB)
    assert len(set(tiles)) == len(tiles)
    assert all(sram_bytes_of(t, case) <= sram_kib * KIB for t in tiles)


def test_measured_best_tiles_come_first_on_a_large_gpu():
    assert default_tile(BERT, 227 * KIB) == TileConfig(128, 32, 4, 4, max_registers=128)
    assert default_tile(of_rank(40), 227 * KIB) == TileConfig(128, 32, 8, 4)
    described = TileConfig(64, 64, 4, 3, is_described=True)
    assert default_tile(of_rank(64), 227 * KIB) == described
    assert default_tile(of_rank(32, is_causal=True), 227 * KIB) == described
    assert default_tile(of_rank(128), 227 * KIB) == TileConfig(64, 32, 4, 4, is_described=True)


@pytest.mark.parametrize(
    "change",
    [
        {"is_describable": False},
        {"generation": "sm_80"},
        {"rank_k": 40},
        {"rank_v": 48},
        {"rank_k": 32},
    ],
    ids=str,
)
def test_tiles_are_described_only_where_that_is_possible(change):
    case = replace(of_rank(64), **change)
    tiles = candidate_tiles(case, 227 * KIB).tiles
    assert tiles
    assert not any(tile.is_described for tile in tiles)


def test_registers_are_not_capped_below_what_the_accumulators_need():
    for rank in (96, 128, 257):
        for tile in candidate_tiles(of_rank(rank), 227 * KIB).tiles:
            assert tile.max_registers == 0 or tile.block_m * (128 + tile.block_n) <= (
                tile.max_registers // 2 * 32 * tile.num_warps
            )


def test_nothing_fits_a_rank_too_large():
    assert default_tile(of_rank(2048), 227 * KIB) is None
    assert default_tile(of_rank(512), 48 * KIB) is None


def test_a_mask_takes_its_tile():
    tile = TileConfig(64, 64, 4, 3)
    without, rows, added, scanned = (
        sram_bytes_of(tile, replace(BERT, mask=mask, keys_multiple=64))
        for mask in ("none", "rows", "added", "scanned")
    )
    assert rows == without + 64 * 64 * 2  # copied two tiles ahead
    assert added == without + 64 * 64 * 4  # changes its layout
    assert scanned == without
    assert sram_bytes_of(tile, replace(BERT, mask="any")) == max(rows, added)


def test_is_data_that_imports_no_triton():
    code = (
        "import flashsvd_compile.kernels.attention_tiles, sys; assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_causal_programs_are_shorter_where_ranks_fill_their_tiles():
    for rank in (16, 32, 64):
        every, causal = (
            default_tile(of_rank(rank, is_causal=is_causal, is_describable=False), 227 * KIB)
            for is_causal in (False, True)
        )
        assert causal.block_m < every.block_m
    ragged = of_rank(40)
    assert default_tile(replace(ragged, is_causal=True), 227 * KIB) == default_tile(
        ragged, 227 * KIB
    )


GENERATIONS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120", ""]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("rank_k", [257, 300, 512])
def test_keys_that_no_registers_hold_are_refused(rank_k, generation):
    """As with ranks 257, 257 and 1, whose program spilled 290 registers."""
    case = replace(of_rank(rank_k, generation=generation), rank_v=1, head_dim_v=256, mask="any")
    assert candidate_tiles(case, 227 * KIB).tiles == ()


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("rank_k", [129, 200, 256])
def test_wide_keys_take_short_tiles_of_queries_but_on_a_hopper(rank_k, generation):
    case = replace(of_rank(rank_k, generation=generation), rank_v=64)
    tiles = candidate_tiles(case, 227 * KIB).tiles
    assert tiles
    assert generation == "sm_90" or max(tile.block_m for tile in tiles) <= (
        16 if rank_k % 2 else 32
    )
    most = max(query_accumulators_of(tile, rank_k=rank_k) for tile in tiles)
    assert most <= (64 if rank_k % 2 else 128)


def test_what_registers_do_not_hold_runs_as_a_last_resort():
    tile = last_resort(of_rank(257), 227 * KIB)
    assert sram_bytes_of(tile, of_rank(257)) <= 227 * KIB
    assert last_resort(of_rank(257), 16 * KIB) is None


def test_widened_operands_are_padded_to_a_row_of_the_swizzle():
    case = replace(BERT, rank_q=8, rank_k=40, rank_v=200)
    assert widened(case) == replace(case, rank_q=64, rank_k=64, rank_v=200, is_widened=True)
    assert widened(replace(case, element_bytes=4)).rank_q == 32
