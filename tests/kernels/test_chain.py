"""The streamed chain against float64, on awkward sizes and shares of columns; what it refuses."""

import pytest
import torch
from flashsvd_compile.kernels.chain import streamed_chain
from flashsvd_compile.kernels.chain_operands import ChainOperands, unfused_chain
from flashsvd_compile.kernels.chain_tiles import ChainTile
from flashsvd_compile.kernels.primitives import INTERPRETED

from tests.rounding import assert_as_exact_as_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL_TILE = ChainTile(16, 16, 4, 2, block_k=16, columns=32)

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="needs Triton's interpreter or a CUDA device"
)


def random_operands(rows, hidden, rank, out, dtype=torch.float32, biases=True):
    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)

    operands = {
        "x": normal(rows, hidden),
        "u": normal(rank, hidden, scale=hidden**-0.5),
        "v": normal(out, rank, scale=rank**-0.5),
    }
    return operands | ({"latent_bias": normal(rank), "bias": normal(out)} if biases else {})


def assert_right(operands, tile=SMALL_TILE):
    of = ChainOperands(**operands)
    out = of.x.new_full((of.rows, of.out_size), float("nan"))
    assert streamed_chain(of, out=out, tile=tile) is out
    assert_as_exact_as_eager(
        out,
        eager=unfused_chain(of),
        exact=unfused_chain(ChainOperands(**{name: x.double() for name, x in operands.items()})),
        bias=of.bias,
    )


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [16, 32, 48, 64])
def test_against_float64(columns, dtype):
    tile = ChainTile(16, 16, 4, 2, block_k=32, columns=columns)
    assert_right(random_operands(20, 40, 9, 50, dtype), tile)


@needs_interpreter
@pytest.mark.parametrize(
    ("rows", "hidden", "rank", "out"),
    [
        pytest.param(1, 1, 1, 1, id="ones"),
        pytest.param(16, 32, 16, 64, id="whole tiles"),
        pytest.param(33, 17, 31, 65, id="one over"),
        pytest.param(3, 300, 240, 270, id="bert's rank"),
        pytest.param(0, 8, 4, 8, id="no rows"),
    ],
)
@pytest.mark.parametrize("tile", [SMALL_TILE, None], ids=["small", "default"])
def test_sizes(rows, hidden, rank, out, tile):
    assert_right(random_operands(rows, hidden, rank, out), tile)


@needs_interpreter
@pytest.mark.parametrize("absent", [["latent_bias"], ["bias"], ["latent_bias", "bias"]], ids=str)
def test_biases_may_be_absent(absent):
    operands = random_operands(18, 40, 8, 40)
    assert_right({name: x for name, x in operands.items() if name not in absent})


@needs_interpreter
def test_any_strides():
    operands = random_operands(18, 24, 8, 40)
    for name, operand in operands.items():
        columns_first = operand.t().contiguous().t() if operand.dim() == 2 else operand
        operands[name] = columns_first.repeat_interleave(2, dim=0)[::2]
    operands["x"] = operands["x"][:1].expand(18, -1)
    assert_right(operands)


def test_reference_is_differentiable():
    operands = random_operands(4, 5, 2, 6, torch.float64)
    values = [operand.requires_grad_() for operand in operands.values()]

    def function(*given):
        return unfused_chain(ChainOperands(**dict(zip(operands, given, strict=True))))

    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 5, 4)}, r"x must be 2-D, is \[2, 5, 4\]"),
        ({"u": torch.zeros(3, 7)}, r"u must be \[3, 8\] .* is \[3, 7\]"),
        ({"v": torch.zeros(6, 4)}, r"v must be \[6, 3\] .* is \[6, 4\]"),
        ({"bias": torch.zeros(1)}, r"bias must be \[6\] .* is \[1\]"),
        ({"latent_bias": torch.zeros(3).half()}, "latent_bias is torch.float16"),
        ({"x": torch.zeros(5, 8, dtype=torch.int32)}, "x is torch.int32"),
    ],
)
def test_refuses(changes, message):
    operands = {name: x.cpu() for name, x in random_operands(5, 8, 3, 6).items()}
    with pytest.raises(ValueError, match=message):
        ChainOperands(**(operands | changes))


def test_refuses_what_the_kernel_cannot_run():
    with pytest.raises(ValueError, match=r"out must be \[5, 6\]"):
        streamed_chain(ChainOperands(**random_operands(5, 8, 3, 6)),
                       out=torch.empty(5, 3, device=DEVICE))  # fmt: skip
    with pytest.raises(ValueError, match=r"no tile .* rank 257"):
        streamed_chain(ChainOperands(**random_operands(5, 8, 257, 6)))
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        streamed_chain(ChainOperands(**random_operands(5, 8, 3, 6, torch.float64)))
