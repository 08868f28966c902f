"""Tables of tiles as data: whole, told apart by traits, and with what made them."""

import json

import pytest
from flashsvd_compile.kernels import attention_tiles, feed_forward_tiles
from flashsvd_compile.kernels.attention_extents import AttentionExtents
from flashsvd_compile.kernels.devices import generation_of
from flashsvd_compile.kernels.tile_tables import candidates, path_of, tables_of
from flashsvd_compile.kernels.tiles import TileConfig
from torch import device

KERNELS = (attention_tiles.KERNEL, feed_forward_tiles.KERNEL)
FILES = [
    path
    for kernel in KERNELS
    for path in sorted(path_of(kernel, "portable").parent.glob(f"{kernel}_tiles.*.json"))
]
UNKNOWN = ["", "sm_75", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120"]


def every(tile):
    return True


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_whole(path):
    content = json.loads(path.read_text())
    kernel, generation = content["kernel"], content["generation"]
    assert path == path_of(kernel, generation)
    tables = tables_of(kernel, generation)
    assert tables
    for table in tables:
        assert len(set(table.tiles)) == len(table.tiles) > 0
        for fields in table.tiles:
            tile = TileConfig(*fields)
            assert tile.block_m >= 16 <= tile.block_n
            assert all(n & (n - 1) == 0 for n in (tile.block_m, tile.block_n, tile.num_warps))
        assert table.measured["found"]
        if generation != "portable":
            assert {"gpu", "date", "command", "torch", "triton"} <= set(table.measured)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_call_has_a_portable_table(kernel):
    assert tables_of(kernel, "portable")[-1].when == {}
    assert tables_of(kernel, "sm_1") == ()


def test_the_first_table_that_holds_is_taken():
    def first(can_run=lambda tile: not tile.is_described, **traits):
        given = {"element_bytes": 2, "rank": 64, "is_causal": False, "ranks_fill": False} | traits
        return candidates("attention", "sm_90", given, can_run)

    assert first().first == TileConfig(128, 32, 8, 4)
    assert first(rank=32).first == TileConfig(128, 32, 4, 4, max_registers=128)
    assert first(rank=16, is_causal=True).first == TileConfig(64, 64, 4, 3)
    assert first(is_causal=True, ranks_fill=True).first == TileConfig(64, 32, 4, 3)
    assert first(is_causal=True).first == TileConfig(128, 32, 8, 4)
    assert first(rank=128).first == TileConfig(64, 64, 4, 3)
    assert first(every).first == TileConfig(64, 64, 4, 3, is_described=True)
    assert (first().source, first().is_measured) == ("table sm_90", True)
    exact = first(element_bytes=4)
    assert (exact.source, exact.is_measured) == ("portable list", False)


@pytest.mark.parametrize("generation", UNKNOWN)
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_unknown_gpu_gets_the_portable_list(kernel, generation):
    traits = {"element_bytes": 2, "rank": 64, "is_causal": False, "ranks_fill": True,
              "is_gated": False}  # fmt: skip
    found = candidates(kernel, generation, traits, every)
    assert (found.source, found.is_measured) == ("portable list", False)
    assert found.tiles


def test_legality_is_no_matter_of_tables():
    of = AttentionExtents(64, 64, 64, 64, 64, True, True, 2, generation="sm_90")
    for generation in ("sm_90", *UNKNOWN):
        found = candidates(
            "attention", generation, attention_tiles.traits_of(of),
            lambda tile: attention_tiles.can_run(tile, of, 48 * 1024),
        )  # fmt: skip
        assert found.tiles
        assert all(attention_tiles.sram_bytes_of(t, of) <= 48 * 1024 for t in found.tiles)
    assert (
        candidates("attention", "sm_90", attention_tiles.traits_of(of), lambda t: False).first
        is None
    )


def test_only_gpus_have_a_generation(monkeypatch):
    assert generation_of(device("cpu")) == ""
    monkeypatch.setattr("torch.version.hip", "6.2")
    assert generation_of.__wrapped__(device("cuda:0")) == ""
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 9))
    assert generation_of.__wrapped__(device("cuda:0")) == "sm_89"
