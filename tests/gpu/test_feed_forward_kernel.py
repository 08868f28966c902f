"""The streamed feed-forward compiled for a GPU: real tiles, real roundings, real address widths."""

from dataclasses import astuple
from functools import partial

import pytest
import torch
from flashsvd_compile.kernels.activations import ACTIVATIONS
from flashsvd_compile.kernels.devices import generation_of
from flashsvd_compile.kernels.feed_forward import _feed_forward_kernel, streamed_feed_forward
from flashsvd_compile.kernels.feed_forward_blocks import (
    held_elements,
    row_blocks_feed_forward,
)
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
from flashsvd_compile.kernels.feed_forward_reference import unfused_feed_forward
from flashsvd_compile.kernels.feed_forward_tiles import sram_bytes_of
from flashsvd_compile.kernels.lifted_activation_tiles import TILE
from flashsvd_compile.kernels.tile_tables import tables_of
from flashsvd_compile.kernels.tiles import TileConfig
from flashsvd_compile.lowering import ops

from tests.rounding import assert_as_exact_as_eager, longest_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

TILES = sorted(
    {
        TileConfig(*fields)
        for generation in ("sm_90", "portable")
        for table in tables_of("feed_forward", generation)
        for fields in table.tiles
    },
    key=str,
)


def requested_peak(fn):
    """Most bytes asked for at once in a call of ``fn``. The allocator counts the blocks it gives,
    up to 1 MiB larger, and which those are depends on all that ran before."""
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def random_operands(rows, rank, intermediate, rank_down, dtype, rank_gate=None, bias=True):
    """Fresh operands of a feed-forward whose values stay of order 1."""

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    operands = {
        "up": normal(rows, rank),
        "up_factor": normal(intermediate, rank, scale=rank**-0.5),
        "down_factor": normal(rank_down, intermediate, scale=intermediate**-0.5),
    }
    if bias:
        operands["up_bias"] = normal(intermediate)
        operands["down_bias"] = normal(rank_down)
    if rank_gate is not None:
        operands["gate"] = normal(rows, rank_gate)
        operands["gate_factor"] = normal(intermediate, rank_gate, scale=rank_gate**-0.5)
        if bias:
            operands["gate_bias"] = normal(intermediate)
    return operands


def assert_streamed_is_right(operands, activation, slack=None, **launch):
    up = operands["up"]
    out = up.new_full((up.shape[0], operands["down_factor"].shape[0]), float("nan"))
    result = streamed_feed_forward(
        FeedForwardOperands(**operands, activation=activation), out=out, **launch
    )
    assert result is out
    double = {name: operand.double() for name, operand in operands.items()}
    assert_as_exact_as_eager(
        out,
        eager=unfused_feed_forward(FeedForwardOperands(**operands, activation=activation)),
        exact=unfused_feed_forward(FeedForwardOperands(**double, activation=activation)),
        bias=operands.get("down_bias"),
        longest=longest_sum(operands),
        slack=slack,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank_gate", [None, 37], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, rank_gate, dtype):
    assert_streamed_is_right(random_operands(300, 64, 515, 48, dtype, rank_gate), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rank", "rank_down"),
    [
        *[(1, 1), (8, 8), (15, 16), (16, 15), (37, 96), (96, 37)],
        *[(64, 64), (128, 128), (128, 240), (257, 64), (64, 257)],
    ],
)
def test_ranks(rank, rank_down, dtype):
    operands = random_operands(193, rank, 333, rank_down, dtype)
    if rank_down > 256 and dtype == torch.float32:
        with pytest.raises(ValueError, match="use row blocks"):
            streamed_feed_forward(FeedForwardOperands(**operands, activation="gelu"))
        return
    assert_streamed_is_right(operands, "gelu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank_gate", [None, 240], ids=["plain", "gated"])
def test_bert_ranks(rank_gate, dtype):
    assert_streamed_is_right(random_operands(1000, 240, 3072, 240, dtype, rank_gate), "gelu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_default_tile(tile, dtype):
    """At the rank the wide ones were measured at, with ragged rows and intermediate size."""
    operands = random_operands(331, 120, 1000, 100, dtype, rank_gate=128)
    assert_streamed_is_right(operands, "silu", tile=tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_neighbours(dtype):
    """A dense up projection has R_u = hidden size, a dense down one R_d = hidden size."""
    assert_streamed_is_right(random_operands(130, 768, 512, 64, dtype, rank_gate=768), "silu")


@pytest.mark.parametrize("rows", [0, 1, 63, 4097])
def test_row_counts(rows):
    assert_streamed_is_right(random_operands(rows, 64, 1000, 64, torch.bfloat16), "gelu")


def test_without_biases():
    operands = random_operands(129, 64, 1024, 64, torch.bfloat16, rank_gate=64, bias=False)
    assert_streamed_is_right(operands, "silu")


def test_any_strides():
    operands = random_operands(200, 64, 515, 48, torch.float16, rank_gate=64)
    for name, operand in operands.items():
        if operand.dim() == 2:
            operands[name] = operand.t().contiguous().t()
        else:
            operands[name] = operand.repeat_interleave(3)[::3]
    assert_streamed_is_right(operands, "silu")


def test_tf32_when_allowed(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    # Triton leaves the rounding to tf32 to the tensor cores, which cut; cuBLAS rounds to nearest.
    operands = random_operands(200, 64, 515, 64, torch.float32)
    assert_streamed_is_right(operands, "gelu", slack=4)


def test_offsets_beyond_int32():
    """More than 2³¹ elements in the latent, in the output and, by its strides, in a factor."""
    rows, rank = 2**25 + 5, 64
    operands = random_operands(1, rank, 32, rank, torch.bfloat16)
    operands["up"] = torch.randn(rows, rank, device="cuda", dtype=torch.bfloat16)
    far_apart = torch.empty(31 * 2**27 + rank, device="cuda", dtype=torch.bfloat16)
    factor = far_apart.as_strided((32, rank), (2**27, 1)).copy_(operands["up_factor"])
    operands["up_factor"] = factor
    assert (rows - 1) * rank > 2**31
    out = operands["up"].new_full((rows, rank), float("nan"))
    streamed_feed_forward(FeedForwardOperands(**operands, activation="relu"), out=out)
    for part in (slice(0, 70), slice(2**24, 2**24 + 70), slice(rows - 70, rows)):
        few = {**operands, "up": operands["up"][part].clone()}
        double = {name: operand.double() for name, operand in few.items()}
        exact = unfused_feed_forward(FeedForwardOperands(**double, activation="relu"))
        assert (out[part] - exact).norm() <= 2**-7 * exact.norm()
    assert not out.isnan().any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("rank_gate", [None, 299], ids=["plain", "gated"])
@pytest.mark.parametrize("tile", [None, TILE, TileConfig(128, 256, 8, 4)], ids=str)
@pytest.mark.parametrize(
    ("rows", "rank"), [(5000, 300), (5000, 301), (100, 301), (100, 304), (3000, 520), (3000, 1096)]
)
def test_row_blocks_on_a_gpu(rows, rank, rank_gate, dtype, tile):
    """Of ranks that are padded and that are not; lifted by libraries and at once. They hold no more
    than is foreseen, and not much less."""
    if tile is not None and dtype.itemsize != 2:
        pytest.skip("the kernel lifts 16 bits")
    operands = random_operands(rows, rank, 1000, rank + 2, dtype, rank_gate=rank_gate)
    double = {name: operand.double() for name, operand in operands.items()}
    of = FeedForwardOperands(**operands, activation="silu")
    eager = unfused_feed_forward(of)
    out = torch.full_like(eager, float("nan"))
    run = partial(row_blocks_feed_forward, of, out=out, block_rows=512, tile=tile)
    assert run() is out
    held = requested_peak(run)
    exact = unfused_feed_forward(FeedForwardOperands(**double, activation="silu"))
    assert_as_exact_as_eager(out, eager, exact, bias=of.down_bias)
    by_row, always = held_elements(
        lift_ranks=[rank] if rank_gate is None else [rank, rank_gate],
        rank_down=rank + 2,
        width=1000,
        element_bytes=dtype.itemsize,
        on_gpu=True,
        at_once=tile is not None,
    )
    foreseen = (min(rows, 512) * by_row + always) * dtype.itemsize
    if dtype != torch.float64:  # which no kernel of ours activates
        assert 0.9 * foreseen <= held <= foreseen


@pytest.mark.parametrize("rank_gate", [None, 72], ids=["plain", "gated"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_one_block_of_rows_as_nodes_of_a_graph(rank_gate, bias):
    """Right, and no more held than the operator on its own holds: its intermediate."""
    operands = random_operands(3000, 136, 1000, 200, torch.bfloat16, rank_gate, bias)
    names = ("up", "up_factor", "down_factor", "up_bias", "gate", "gate_factor", "gate_bias",
             "down_bias")  # fmt: skip
    tensors = [operands.get(name) for name in names]

    @torch.no_grad()
    def one_block(*tensors):
        return ops.row_blocks_feed_forward_op(
            *tensors, activation="silu", block_rows=3000, tile=list(astuple(TILE))
        )

    compiled = torch.compile(one_block, fullgraph=True)
    double = {name: operand.double() for name, operand in operands.items()}
    exact = unfused_feed_forward(FeedForwardOperands(**double, activation="silu"))
    eager = unfused_feed_forward(FeedForwardOperands(**operands, activation="silu"))
    result = compiled(*tensors)
    assert_as_exact_as_eager(
        result, eager, exact, bias=operands.get("down_bias"), longest=longest_sum(operands)
    )
    operator, inlined = (requested_peak(partial(f, *tensors)) for f in (one_block, compiled))
    assert inlined <= operator + 4096  # an element stands in for an absent operand


def test_compiles_inside_a_triton_op():
    """Traced under ``torch.library.triton_op`` with a symbolic number of rows."""

    @torch.library.triton_op("flashsvd_test::streamed_feed_forward", mutates_args=())
    def op(up: torch.Tensor, up_factor: torch.Tensor, down_factor: torch.Tensor) -> torch.Tensor:
        of = FeedForwardOperands(up, up_factor, down_factor, activation="gelu")
        return streamed_feed_forward(of)

    compiled = torch.compile(op, dynamic=True, fullgraph=True)
    for rows in (70, 200):
        operands = random_operands(rows, 64, 256, 64, torch.bfloat16, bias=False)
        torch.testing.assert_close(compiled(*operands.values()), op(*operands.values()))


def shared_bytes_compiled() -> dict[str, int]:
    """Shared memory by hash of every compiled streamed kernel of this process."""
    kernels = _feed_forward_kernel.device_caches[torch.cuda.current_device()][0].values()
    return {kernel.hash: kernel.metadata.shared for kernel in kernels}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rank", "rank_gate", "rank_down"),
    [(16, None, 16), (64, None, 64), (37, None, 96), (128, 128, 128), (300, 64, 64)],
)
@pytest.mark.parametrize("tile", [TileConfig(64, 32, 4, 3), TileConfig(16, 16, 4, 1)], ids=str)
def test_shared_memory_is_foreseen(tile, rank, rank_gate, rank_down, dtype):
    operands = random_operands(64, rank, 176, rank_down, dtype, rank_gate)
    before = shared_bytes_compiled()
    assert_streamed_is_right(operands, "relu", tile=tile)
    compiled = {hash_: n for hash_, n in shared_bytes_compiled().items() if hash_ not in before}
    foreseen = sram_bytes_of(
        tile,
        rank_up=rank,
        rank_gate=rank_gate,
        rank_down=rank_down,
        intermediate_size=176,
        element_bytes=dtype.itemsize,
        generation=generation_of(torch.device("cuda:0")),
    )
    assert compiled
    assert max(compiled.values()) <= foreseen
