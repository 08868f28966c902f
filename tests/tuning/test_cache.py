"""What was measured comes back whole, for its own key, or not at all."""

import json
import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from flashsvd_compile.tuning.cache import TileCache, cache_in

KEY = {"operator": "streamed_feed_forward", "torch": "2.11.0", "tensors": {"up": [[4096, 64], 16]}}
TILE = (64, 64, 4, 3, 0)
TILES = [TILE, (32, 32, 4, 2, 0)]
LOGGER = "flashsvd_compile.tuning.cache"


def kept(directory):
    TileCache(directory).put(KEY, TILE, {str(TILE): 0.5})
    (path,) = directory.iterdir()
    return path


def test_a_later_process_finds_what_was_kept(tmp_path):
    directory = tmp_path / "not" / "there"
    assert TileCache(directory).get(KEY, TILES) is None
    record = json.loads(kept(directory).read_text())
    assert record == {"key": KEY, "tile": list(TILE), "ms": {str(TILE): 0.5}}
    assert TileCache(directory).get(KEY, TILES) == TILE


@pytest.mark.parametrize(
    "other",
    [{"torch": "2.12.0"}, {"operator": "rank_space_attention"}, {"tensors": {"up": [[8192, 64]]}}],
    ids=str,
)
def test_another_key_is_a_miss(tmp_path, other):
    kept(tmp_path)
    assert TileCache(tmp_path).get(KEY | other, TILES) is None


def test_a_tile_that_is_no_candidate_any_more_is_a_miss(tmp_path):
    kept(tmp_path)
    assert TileCache(tmp_path).get(KEY, TILES[1:]) is None


SPOILED = {
    "empty": "",
    "cut": '{"key": {"oper',
    "no_json": "\x00\x01",
    "no_record": "[1, 2]",
    "number": "3",
    "no_tile": json.dumps({"key": KEY}),
    "other_key": json.dumps({"key": {}, "tile": TILE}),
    "tile_of_words": json.dumps({"key": KEY, "tile": ["64", "64"]}),
    "tile_of_truths": json.dumps({"key": KEY, "tile": [True, True]}),
    "tile_null": json.dumps({"key": KEY, "tile": None}),
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("text", SPOILED.values(), ids=SPOILED)
def test_a_spoiled_file_is_told_and_written_anew(tmp_path, text, caplog):
    path = kept(tmp_path)
    path.write_text(text)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert TileCache(tmp_path).get(KEY, TILES) is None
    assert "written anew" in caplog.text
    kept(tmp_path)
    assert TileCache(tmp_path).get(KEY, TILES) == TILE


def test_bytes_that_are_no_text(tmp_path):
    kept(tmp_path).write_bytes(b"\xff\xfe\x80")
    assert TileCache(tmp_path).get(KEY, TILES) is None


def test_where_nothing_can_be_written_the_process_still_knows(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = TileCache(tmp_path / "file")
    with caplog.at_level(logging.WARNING, LOGGER):
        cache.put(KEY, TILE, {})
    assert "could not be kept" in caplog.text
    assert cache.get(KEY, TILES) == TILE


def test_a_process_has_one_for_each_directory(tmp_path):
    assert cache_in(tmp_path) is cache_in(tmp_path) is not cache_in(tmp_path / "other")


def write_and_read(directory, number):
    """What one of several processes sees while all write one key."""
    seen = []
    for _ in range(100):
        TileCache(directory).put(KEY, TILES[number % 2], {"ms": float(number)})
        seen.append(TileCache(directory).get(KEY, TILES))
    return seen


def test_processes_may_write_at_once(tmp_path):
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = list(pool.map(write_and_read, [tmp_path] * 2, range(2)))
    assert all(tile in TILES for seen in runs for tile in seen)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
