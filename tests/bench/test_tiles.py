"""The sweep of tiles: which shapes belong to which table, and what it writes."""

import json

import pytest
import torch
from flashsvd_compile.kernels.tile_tables import tables_of
from flashsvd_compile.kernels.tiles import TileConfig

from bench import tiles

FAST, SLOW, LARGE = TileConfig(64, 64, 4, 3), TileConfig(32, 32, 4, 2), TileConfig(128, 64, 8, 3)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """What is asked of a GPU apart from time."""
    monkeypatch.setattr(tiles, "generation_of", lambda device: "sm_86")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")


def test_tiles_are_ordered_by_how_near_they_come_to_each_best():
    times = [{FAST: 1.0, SLOW: 2.0}, {FAST: 1.2, SLOW: 4.0, LARGE: 1.0}]
    ordered, found = tiles.order(times)
    assert ordered == [LARGE, FAST]  # the slow one takes more than SLOWEST
    assert "of 3 tiles, on 2 shapes" in found
    assert "1.00 times the best" in found


@pytest.mark.parametrize("kernel", tiles.CASES)
def test_every_table_has_a_shape(kernel):
    found = [tiles.table_of(case) for case in tiles.CASES[kernel]]
    assert all(table in found for table in tables_of(kernel, tiles.TEMPLATE))


@pytest.mark.parametrize("kernel", tiles.CASES)
def test_tables_are_written_whole(kernel):
    times = {}
    for case in tiles.CASES[kernel]:
        fitting = [tile for tile in tiles.TILES if case.can_run(tile, 99 * 1024)]
        if fitting:
            times[case] = {tile: 1.0 + index / 10 for index, tile in enumerate(fitting)}
    content = json.loads(tiles.written(kernel, times))
    assert (content["kernel"], content["generation"]) == (kernel, "sm_86")
    template = tables_of(kernel, tiles.TEMPLATE)
    assert [table["when"] for table in content["tables"]] == [table.when for table in template]
    smallest = tables_of(kernel, "portable")[0].tiles[-1]
    for table in content["tables"]:
        assert table["tiles"][-1] == list(smallest)
        assert table["measured"]["command"] == f"python -m bench.tiles {kernel} --write"
        assert table["measured"]["gpu"] == "Some GPU"
