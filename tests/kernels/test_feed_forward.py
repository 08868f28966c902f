"""The three low-rank feed-forwards: against float64, on awkward sizes, and what they refuse."""

from functools import partial

import pytest
import torch
from flashsvd_compile.kernels import feed_forward_blocks
from flashsvd_compile.kernels.activations import ACTIVATIONS
from flashsvd_compile.kernels.feed_forward import streamed_feed_forward
from flashsvd_compile.kernels.feed_forward_blocks import (
    default_block_rows,
    row_blocks_feed_forward,
)
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
from flashsvd_compile.kernels.feed_forward_reference import unfused_feed_forward
from flashsvd_compile.kernels.primitives import INTERPRETED
from flashsvd_compile.kernels.tiles import TileConfig
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rounding import EAGER_ERROR, assert_as_exact_as_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL_TILE = TileConfig(block_m=16, block_n=32, num_warps=4, num_stages=2)

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="needs Triton's interpreter or a CUDA device"
)


def random_operands(rows, rank, intermediate, rank_down, dtype, rank_gate=None, bias=True):
    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)

    operands = {
        "up": normal(rows, rank),
        "up_factor": normal(intermediate, rank, scale=rank**-0.5),
        "down_factor": normal(rank_down, intermediate, scale=intermediate**-0.5),
    }
    if bias:
        operands |= {"up_bias": normal(intermediate), "down_bias": normal(rank_down)}
    if rank_gate is not None:
        operands["gate"] = normal(rows, rank_gate)
        operands["gate_factor"] = normal(intermediate, rank_gate, scale=rank_gate**-0.5)
        if bias:
            operands["gate_bias"] = normal(intermediate)
    return operands


def streamed(operands, activation, out, tile=SMALL_TILE):
    return streamed_feed_forward(
        FeedForwardOperands(**operands, activation=activation), out=out, tile=tile
    )


def row_blocks(operands, activation, out, block_rows=13):
    of = FeedForwardOperands(**operands, activation=activation)
    return row_blocks_feed_forward(of, out=out, block_rows=block_rows)


IMPLEMENTATIONS = [
    pytest.param(streamed, marks=needs_interpreter, id="streamed"),
    pytest.param(row_blocks, id="row_blocks"),
]


def assert_right(implementation, operands, activation, **how):
    up = operands["up"]
    out = up.new_full((up.shape[0], operands["down_factor"].shape[0]), float("nan"))
    assert implementation(operands, activation, out, **how) is out
    double = {name: operand.double() for name, operand in operands.items()}
    assert_as_exact_as_eager(
        out,
        eager=unfused_feed_forward(FeedForwardOperands(**operands, activation=activation)),
        exact=unfused_feed_forward(FeedForwardOperands(**double, activation=activation)),
        bias=operands.get("down_bias"),
        slack=None if implementation is streamed else EAGER_ERROR,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank_gate", [None, 37], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_float64(implementation, activation, rank_gate, dtype):
    assert_right(implementation, random_operands(20, 8, 45, 15, dtype, rank_gate), activation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("rows", "rank", "rank_gate", "intermediate", "rank_down"),
    [
        pytest.param(1, 1, None, 1, 1, id="ones"),
        pytest.param(16, 16, 16, 32, 16, id="whole tiles"),
        pytest.param(33, 15, 64, 65, 96, id="one over"),
        pytest.param(17, 240, None, 48, 128, id="bert's rank"),
        pytest.param(18, 257, 300, 40, 37, id="ranks in chunks"),
        pytest.param(5, 37, None, 30, 257, id="wide down"),
        pytest.param(0, 8, 8, 30, 8, id="no rows"),
    ],
)
def test_sizes(implementation, rows, rank, rank_gate, intermediate, rank_down):
    operands = random_operands(rows, rank, intermediate, rank_down, torch.float32, rank_gate)
    assert_right(implementation, operands, "silu")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("absent", ["up_bias", "gate_bias", "down_bias"])
def test_each_bias_may_be_absent(implementation, absent):
    operands = random_operands(18, 8, 40, 8, torch.float32, rank_gate=8)
    del operands[absent]
    assert_right(implementation, operands, "gelu")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_strides(implementation):
    operands = random_operands(18, 8, 40, 12, torch.float32, rank_gate=16)
    for name, operand in operands.items():
        columns_first = operand.t().contiguous().t() if operand.dim() == 2 else operand
        operands[name] = columns_first.repeat_interleave(2, dim=0)[::2]
        assert not operands[name].is_contiguous()
    operands["up"] = operands["up"][:1].expand(18, -1)
    assert_right(implementation, operands, "relu")


@pytest.mark.parametrize("block_rows", [1, 7, 21, 100])
def test_row_blocks_of_any_size(block_rows):
    operands = random_operands(21, 8, 40, 12, torch.float32, rank_gate=16)
    assert_right(row_blocks, operands, "quick_gelu", block_rows=block_rows)


@pytest.mark.parametrize("rank_gate", [None, 7, 16], ids=["plain", "gated", "gate fits"])
def test_row_blocks_pad_ranks(monkeypatch, rank_gate):
    """As on a GPU, of which library matmuls want multiples of 16 bytes."""
    assert [feed_forward_blocks.padded_rank(n, 4, True) for n in (0, 1, 4, 9)] == [0, 4, 4, 12]
    as_on_gpu = partial(feed_forward_blocks.padded_rank, on_gpu=True)
    monkeypatch.setattr(
        feed_forward_blocks, "padded_rank", lambda rank, size, _: as_on_gpu(rank, size)
    )
    operands = random_operands(21, 9, 40, 11, torch.float32, rank_gate)
    assert_right(row_blocks, operands, "gelu", block_rows=8)


@pytest.mark.parametrize("rank_gate", [None, 8], ids=["plain", "gated"])
def test_row_blocks_hold_one_block(rank_gate):
    """Nothing as large as the intermediate activation is ever made."""
    rows, intermediate = 640, 96
    operands = random_operands(rows, 8, intermediate, 4, torch.float32, rank_gate)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.untyped_storage().nbytes() // 4)
            return result

    with Largest() as largest:
        row_blocks_feed_forward(FeedForwardOperands(**operands, activation="gelu"), block_rows=64)
    assert largest.numel == 64 * intermediate


def test_default_row_blocks_run():
    rows = default_block_rows(rank_down=8, multiprocessors=0)
    operands = random_operands(rows + 1, 8, 40, 8, torch.float32)
    assert_right(row_blocks, operands, "gelu", block_rows=None)


@pytest.mark.parametrize("rank_gate", [None, 3], ids=["plain", "gated"])
def test_reference_is_differentiable(rank_gate):
    operands = random_operands(4, 3, 6, 2, torch.float64, rank_gate)
    names = list(operands)

    def function(*values):
        given = dict(zip(names, values, strict=True))
        return unfused_feed_forward(FeedForwardOperands(**given, activation="gelu"))

    values = [operand.requires_grad_() for operand in operands.values()]
    assert torch.autograd.gradcheck(function, values)


def test_reference_traces_with_symbolic_rows():
    operands = random_operands(6, 3, 8, 2, torch.float32, rank_gate=4)

    class Module(torch.nn.Module):
        def forward(self, operands):
            return unfused_feed_forward(FeedForwardOperands(**operands, activation="silu"))

    rows = torch.export.Dim("rows", min=2)
    dynamic = {name: {0: rows} if name in ("up", "gate") else None for name in operands}
    program = torch.export.export(Module(), (operands,), dynamic_shapes=(dynamic,))
    more = operands | {"up": torch.randn(9, 3), "gate": torch.randn(9, 4)}
    more = {name: operand.to(DEVICE) for name, operand in more.items()}
    torch.testing.assert_close(program.module()(more), Module()(more))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "swish"}, "unknown activation 'swish'; allowed: gelu, "),
        ({"gate_factor": None}, "gate and gate_factor go together"),
        ({"gate": None, "gate_factor": None}, "gate_bias needs gate and gate_factor"),
        ({"up": torch.zeros(2, 5, 4)}, r"up must be 2-D, is \[2, 5, 4\]"),
        ({"up_factor": torch.zeros(9, 4)}, r"up_factor must be \[8, 4\] .* is \[9, 4\]"),
        ({"gate": torch.zeros(6, 3)}, r"gate must be \[5, 3\] .* is \[6, 3\]"),
        ({"gate_factor": torch.zeros(8, 4)}, r"gate_factor must be \[8, 3\] .* is \[8, 4\]"),
        ({"up_bias": torch.zeros(1)}, r"up_bias must be \[8\] .* is \[1\]"),
        ({"down_bias": torch.zeros(8)}, r"down_bias must be \[2\] .* is \[8\]"),
        ({"down_bias": torch.zeros(2).half()}, "down_bias is torch.float16"),
        ({"down_factor": torch.zeros(2, 8).double()}, "down_factor is torch.float64"),
        ({"up": torch.zeros(5, 4, dtype=torch.int32)}, "up is torch.int32"),
    ],
)
def test_refuses(changes, message):
    operands = {
        name: operand.cpu()
        for name, operand in random_operands(5, 4, 8, 2, torch.float32, rank_gate=3).items()
    }
    with pytest.raises(ValueError, match=message):
        FeedForwardOperands(**(operands | {"activation": "gelu"} | changes))


@pytest.mark.parametrize("call", [streamed_feed_forward, row_blocks_feed_forward])
def test_refuses_an_unfit_out(call):
    operands = random_operands(5, 4, 8, 2, torch.float32)
    of = FeedForwardOperands(**operands, activation="gelu")
    with pytest.raises(ValueError, match=r"out must be \[5, 2\]"):
        call(of, out=torch.empty(5, 3, device=DEVICE))
    with pytest.raises(ValueError, match="out must be contiguous"):
        call(of, out=torch.empty(2, 5, device=DEVICE).t())


def test_refuses_zero_block_rows():
    with pytest.raises(ValueError, match="block_rows must be at least 1, is 0"):
        row_blocks(random_operands(5, 4, 8, 2, torch.float32), "gelu", None, block_rows=0)


def test_streamed_says_what_does_not_fit():
    operands = random_operands(5, 4, 8, 4096, torch.float32)
    with pytest.raises(ValueError, match=r"no tile .* up 4, gate None, down 4096 .* row blocks"):
        streamed_feed_forward(FeedForwardOperands(**operands, activation="gelu"))


def test_streamed_refuses_float64():
    operands = random_operands(5, 4, 8, 2, torch.float64)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        streamed_feed_forward(FeedForwardOperands(**operands, activation="gelu"))
