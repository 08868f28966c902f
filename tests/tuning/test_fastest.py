"""The fastest of a few tiles: what is measured, what is dropped, what is kept.

Without a GPU a clock that says what it is told stands for events, and the library operators, which
take no notice of a tile, for the kernel.
"""

import itertools
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from flashsvd_compile.lowering import ops
from torch import fx
from torch._subclasses import FakeTensorMode

from flashsvd_compile.tuning import circumstances, fastest, operands
from flashsvd_compile.tuning.cache import TileCache
from flashsvd_compile.tuning.example_call import example_of
from flashsvd_compile.tuning.fastest import fastest_tile, launch_behind, measure

TILES = [(64, 64, 4, 3, 0), (32, 32, 4, 2, 0), (16, 16, 4, 1, 0)]
FASTEST = TILES[1]
LOGGER = "flashsvd_compile.tuning.fastest"


@pytest.fixture
def clock(monkeypatch):
    """A device that is there; ``clock.timed`` gets the tiles that were timed."""
    found = SimpleNamespace(timed=[], free_bytes=2**33, name="Some GPU sm_86")

    def timed(runs, device, deadline):
        found.timed.append(list(runs))
        return {tile: abs(tile[0] - FASTEST[0]) + 1.0 for tile in runs}

    monkeypatch.setattr(fastest, "_can_be_timed", lambda device: True)
    monkeypatch.setattr(fastest, "_timed", timed)
    monkeypatch.setattr(fastest, "_free_bytes", lambda device: found.free_bytes)
    monkeypatch.setattr(circumstances, "device_name", lambda device: found.name)
    return found


def attention_node(
    *, batch=2, rows=40, keys=37, ranks=(8, 8, 8), dtype=torch.bfloat16, mask=None, offset=0
):
    """A launch in a graph: latents [B, M, H, R] in memory, two heads of 16."""
    graph = fx.Graph()
    with FakeTensorMode():
        latents = [
            torch.empty(batch * n * 2 * r + offset, dtype=dtype)[offset:]
            .view(batch, n, 2, r).transpose(1, 2)
            for n, r in zip((rows, keys, keys), ranks, strict=True)
        ]  # fmt: skip
        factors = [torch.empty(2, 16, r, dtype=dtype) for r in ranks]
        bias = torch.empty(2, 16, dtype=dtype)
        if mask is not None:
            mask = torch.empty(batch, 1, rows if mask == "rows" else 1, keys, dtype=torch.bool)
    values = [*latents, factors[0], bias, *factors[1:], None, mask]
    arguments = []
    for index, tensor in enumerate(values):
        node = None
        if tensor is not None:
            node = graph.placeholder(f"x{index}")
            node.meta["val"] = tensor
        arguments.append(node)
    numbers = {"num_heads": 2, "is_causal": False, "scale": 0.25, "tile": list(TILES[0])}
    return graph.call_function(ops.rank_space_attention, tuple(arguments), numbers)


def feed_forward_node(rows=600, rank=8, width=24, dtype=torch.bfloat16):
    graph = fx.Graph()
    arguments = []
    for index, shape in enumerate(((rows, rank), (width, rank), (rank, width))):
        node = graph.placeholder(f"x{index}")
        with FakeTensorMode():
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        arguments.append(node)
    numbers = {"activation": "gelu", "tile": list(TILES[0])}
    return graph.call_function(ops.streamed_feed_forward, tuple(arguments), numbers)


# ---- example calls ------------------------------------------------------------------------------


def test_operands_are_as_the_graph_has_them():
    node = attention_node(ranks=(8, 24, 5), mask="rows", offset=3)
    call = example_of(node)
    operands = call.allocate()
    assert len(operands) == len(call.operator.tensors)
    for operand, tensor in itertools.zip_longest(operands, node.args):
        if tensor is None:
            assert operand is None
            continue
        traced = tensor.meta["val"]
        assert (operand.shape, operand.stride()) == (traced.shape, traced.stride())
        assert operand.dtype == traced.dtype
        assert (operand.data_ptr() - 2 * traced.storage_offset()) % 16 == 0
        assert operand.isfinite().all()


def test_results_stay_of_order_1():
    for node in (attention_node(mask="rows"), feed_forward_node(rows=64, rank=64, width=512)):
        call = example_of(node)
        numbers = dict(call.numbers)
        out = call.operator.plain(call.allocate(), numbers).float()
        assert 1e-2 < out.std() < 10


def test_the_first_results_need_the_first_operands_only():
    for node in (attention_node(rows=300, mask="rows"), feed_forward_node(rows=1300)):
        call = example_of(node)
        tensors = call.allocate()
        whole = call.operator.plain(tensors, dict(call.numbers))
        few = call.operator.plain(call.first_operands(tensors), dict(call.numbers))
        assert few.numel() < whole.numel()
        torch.testing.assert_close(few, call.first_results(whole))


def test_a_broadcast_operand_takes_no_memory_of_its_own():
    node = attention_node()
    with FakeTensorMode():
        node.args[1].meta["val"] = torch.empty(1, 1, 37, 8, dtype=torch.bfloat16).expand(
            2, 2, 37, 8
        )
    call = example_of(node)
    assert call.operands["k"].elements == 37 * 8
    assert call.allocate()[1].stride() == (0, 0, 8, 1)


def test_sizes_without_an_example_are_not_guessed(monkeypatch, clock, tmp_path):
    monkeypatch.setattr(operands, "numbers_of", lambda sizes: None)
    assert example_of(attention_node()) is None
    assert fastest_tile(attention_node(), TILES, TileCache(tmp_path), True) is None


def test_keys_tell_apart_what_time_depends_on():
    def key(**shape):
        return example_of(attention_node(**shape)).key()

    assert key(batch=3, rows=33, keys=60) == key(batch=4, rows=64, keys=64)
    others = [{"rows": 65}, {"keys": 65}, {"ranks": (8, 16, 8)}, {"mask": "rows"},
              {"mask": "keys"}, {"dtype": torch.float16}, {"offset": 1}]  # fmt: skip
    keys = [key(rows=64, keys=64), *(key(**{"rows": 64, "keys": 64} | o) for o in others)]
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])


# ---- measuring ----------------------------------------------------------------------------------


def test_the_fastest_is_taken_and_kept(clock, tmp_path):
    node = attention_node()
    assert fastest_tile(node, TILES, TileCache(tmp_path), True) == (FASTEST, "measured now")
    assert clock.timed == [TILES]
    for may_measure in (True, False):
        again = fastest_tile(attention_node(), TILES, TileCache(tmp_path), may_measure)
        assert again == (FASTEST, "measured before")
    assert len(clock.timed) == 1


@pytest.mark.parametrize("what", ["torch", "triton", "device", "kernels", "tiles", "rank"])
def test_other_circumstances_are_measured_anew(what, clock, tmp_path, monkeypatch):
    assert fastest_tile(attention_node(), TILES, TileCache(tmp_path), True)
    node, tiles = attention_node(), TILES
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "3.0.0")
    elif what == "triton":
        monkeypatch.setattr(circumstances, "_version", lambda package: "9.9")
    elif what == "device":
        clock.name = "Another GPU sm_86"
    elif what == "kernels":
        monkeypatch.setattr(circumstances, "_sources", lambda: "changed")
    elif what == "tiles":
        tiles = TILES[:2]
    else:
        node = attention_node(ranks=(8, 8, 9))
    assert fastest_tile(node, tiles, TileCache(tmp_path), False) is None
    assert fastest_tile(node, tiles, TileCache(tmp_path), True) == (FASTEST, "measured now")


def test_nothing_is_measured_where_no_device_is(clock, tmp_path, monkeypatch):
    monkeypatch.undo()
    assert fastest_tile(attention_node(), TILES, TileCache(tmp_path), True) is None
    assert list(tmp_path.iterdir()) == []


def broken(node, break_tile):
    """The call, run by the operator and then by ``break_tile(tile, result)``."""
    call = example_of(node)

    def target(*tensors, tile, **numbers):
        return break_tile(tuple(tile), call.target(*tensors, tile=tile, **numbers))

    target._schema = call.target._schema
    return replace(call, target=target)


def spoil(tile, out, wrong):
    """The middle tile goes wrong in a way of its own."""
    if tile != TILES[1]:
        return out
    if wrong == "raises":
        raise RuntimeError("out of resource: shared memory")
    if wrong == "unwritten":
        return out.new_empty(out.shape)
    if wrong == "zero":
        return torch.zeros_like(out)
    if wrong == "one_row":
        return torch.cat([out[:, :, :1] * 3, out[:, :, 1:]], 2)
    return torch.cat([out[:-1], out[-1:] * 1.5])  # beyond what is compared with the library


@pytest.mark.parametrize("wrong", ["raises", "unwritten", "zero", "one_row", "last_batch"])
def test_tiles_that_fail_or_are_wrong_are_dropped(wrong, clock, caplog):
    call = broken(attention_node(), lambda tile, out: spoil(tile, out, wrong))
    with caplog.at_level(logging.INFO, LOGGER):
        times = measure(call, TILES)
    assert list(times) == [TILES[0], TILES[2]]
    assert ("does not run here" if wrong == "raises" else "is wrong here") in caplog.text


def test_a_first_tile_that_is_wrong_does_not_judge_the_others(clock):
    call = broken(attention_node(), lambda tile, out: out * (2 if tile == TILES[0] else 1))
    assert list(measure(call, TILES)) == TILES[1:]


def test_a_first_tile_that_leaves_its_end_unwritten_does_not_judge_the_others(clock):
    def forget(tile, out):
        return torch.cat([out[:-1], out.new_empty(out[-1:].shape)]) if tile == TILES[0] else out

    assert list(measure(broken(attention_node(), forget), TILES)) == TILES[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_right_tiles_pass_in_every_dtype(dtype, clock):
    node = attention_node(rows=150, keys=150, dtype=dtype, mask="rows")
    assert list(measure(example_of(node), TILES)) == TILES


def test_where_all_fail_the_first_stays(clock, tmp_path, monkeypatch, caplog):
    call = broken(attention_node(), lambda tile, out: out * 2)
    monkeypatch.setattr(fastest, "example_of", lambda node: call)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert fastest_tile(attention_node(), TILES, TileCache(tmp_path), True) is None
    assert "the first stays" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_time_is_bounded_but_one_tile_is_measured(clock, monkeypatch):
    monkeypatch.setattr(fastest, "MAX_SECONDS", 0.0)
    assert list(measure(example_of(attention_node()), TILES)) == TILES[:1]


def test_memory_is_bounded(clock, monkeypatch):
    sizes = []

    def remember(tile, out):
        sizes.append(out.shape[0])
        return out

    call = broken(attention_node(batch=8), remember)
    clock.free_bytes = call.memory_bytes * 2
    assert measure(call, TILES)
    assert set(sizes) <= {2, 4}
    clock.free_bytes = 100
    assert measure(call, TILES) == {}


def test_neither_random_numbers_nor_settings_move(clock, tmp_path):
    state = torch.get_rng_state()
    node = attention_node(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), FakeTensorMode():
        assert fastest_tile(node, TILES, TileCache(tmp_path), True) == (FASTEST, "measured now")
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_launch_is_found_behind_what_rearranges_its_result():
    node = attention_node()
    with node.graph.inserting_after(node):
        view = node.graph.call_function(torch.ops.aten.permute.default, (node, [0, 2, 1, 3]))
    assert launch_behind(view) is node is launch_behind(node)
