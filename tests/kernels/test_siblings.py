"""Sibling linears in one launch: against float64, on awkward sizes, and what they refuse."""

import pytest
import torch
from flashsvd_compile.kernels.primitives import INTERPRETED
from flashsvd_compile.kernels.siblings import sibling_linears
from flashsvd_compile.kernels.siblings_operands import SiblingOperands, separate_linears
from flashsvd_compile.kernels.siblings_tiles import MAX_SIBLINGS, MatmulTile

from tests.rounding import assert_as_exact_as_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL_TILE = MatmulTile(16, 16, 4, 2, block_k=32)

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="needs Triton's interpreter or a CUDA device"
)


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that torch hands out is full of NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.zeros(1, device=DEVICE).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def operands(rows, features, widths, dtype, biased=(), transposed=()):
    """Fresh operands whose products stay of order 1."""

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)

    weights = [
        normal(features, width, scale=features**-0.5).t()
        if index in transposed
        else normal(width, features, scale=features**-0.5)
        for index, width in enumerate(widths)
    ]
    biases = [normal(width) if index in biased else None for index, width in enumerate(widths)]
    return SiblingOperands(normal(rows, features), tuple(weights), tuple(biases))


def doubled(of):
    biases = tuple(None if b is None else b.double() for b in of.biases)
    return SiblingOperands(of.x.double(), tuple(w.double() for w in of.weights), biases)


def assert_right(of, tile=SMALL_TILE):
    outs = sibling_linears(of, tile=tile)
    expected = zip(separate_linears(of), separate_linears(doubled(of)), of.biases, strict=True)
    for out, (eager, exact, bias) in zip(outs, expected, strict=True):
        assert (out.shape, out.dtype, out.is_contiguous()) == (eager.shape, eager.dtype, True)
        assert_as_exact_as_eager(out, eager, exact, bias=bias)


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("widths", "biased"),
    [
        ((20,), ()),
        ((20, 33), (1,)),
        ((1, 16, 17), (0, 2)),
        ((5, 4, 3, 40, 2, 1, 16, 31), (1, 3, 7)),
    ],
    ids=str,
)
def test_against_float64(widths, biased, dtype):
    assert_right(operands(37, 50, widths, dtype, biased))


@needs_interpreter
@pytest.mark.parametrize("count", range(1, MAX_SIBLINGS + 1))
def test_every_count(count):
    widths = [18 + index for index in range(count)]
    assert_right(operands(17, 33, widths, torch.float32, biased=range(0, count, 2)))


@needs_interpreter
@pytest.mark.parametrize(
    ("rows", "features", "widths"),
    [
        pytest.param(1, 1, (1, 1), id="ones"),
        pytest.param(16, 32, (16, 32), id="whole tiles"),
        pytest.param(17, 33, (17, 15), id="one over"),
        pytest.param(150, 31, (40, 7), id="several groups of rows"),
        pytest.param(0, 8, (3, 4), id="no rows"),
    ],
)
def test_sizes(rows, features, widths):
    assert_right(operands(rows, features, widths, torch.float32, biased=(1,)))


@needs_interpreter
@pytest.mark.parametrize("transposed", [(0, 1, 2), (1,)], ids=["all", "one"])
def test_weights_lie_either_way(transposed):
    assert_right(operands(18, 40, (20, 33, 5), torch.float32, (1,), transposed))


@needs_interpreter
def test_any_strides():
    of = operands(18, 40, (20, 33), torch.float32, biased=(0, 1))
    spread = SiblingOperands(
        of.x.repeat_interleave(2, dim=1)[:, ::2],
        (of.weights[0].repeat_interleave(3, dim=1)[:, ::3], of.weights[1][::2]),
        (of.biases[0].repeat_interleave(2)[::2], of.biases[1][::2]),
    )
    assert not any(x.is_contiguous() for x in (spread.x, *spread.weights, *spread.biases))
    assert_right(spread)


@needs_interpreter
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_default_tiles_run(rows):
    assert_right(operands(rows, 40, (20, 33), torch.float16), tile=None)


@needs_interpreter
def test_outputs_are_tensors_of_their_own():
    outs = sibling_linears(operands(3, 4, (5, 6), torch.float32), tile=SMALL_TILE)
    assert len({out.untyped_storage().data_ptr() for out in outs}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 5, 4)}, r"x must be 2-D and floating, is \[2, 5, 4\]"),
        ({"x": torch.zeros(5, 4, dtype=torch.int32)}, "x must be 2-D and floating"),
        ({"weights": ()}, "0 weights beside 2 biases"),
        ({"weights": (torch.zeros(3, 4), torch.zeros(4, 3))}, r"weight 1 must be \[.., 4\]"),
        ({"weights": (torch.zeros(3, 4).half(), torch.zeros(2, 4))}, "weight 0 is torch.float16"),
        ({"biases": (None, torch.zeros(3))}, r"bias 1 must be \[2\], is \[3\]"),
        ({"biases": (None, torch.zeros(2).double())}, "bias 1 is torch.float64"),
    ],
)
def test_refuses(changes, message):
    weights = (torch.zeros(3, 4), torch.zeros(2, 4))
    right = {"x": torch.zeros(5, 4), "weights": weights, "biases": (None, None)}
    with pytest.raises(ValueError, match=message):
        SiblingOperands(**(right | changes))


@pytest.mark.parametrize("biased", [[], [0, 1], [2]])
def test_refuses_biases_of_nobody(biased):
    weights = [torch.zeros(3, 4), torch.zeros(2, 4)]
    with pytest.raises(ValueError, match="1 biases of siblings"):
        SiblingOperands.of(torch.zeros(5, 4), weights, [torch.zeros(3)], biased)


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (SiblingOperands(torch.zeros(2, 3), (torch.zeros(1, 3),) * 9, (None,) * 9), "not 9 of 3"),
        (SiblingOperands(torch.zeros(2, 0), (torch.zeros(1, 0),), (None,)), "not 1 of 0"),
        (SiblingOperands(torch.zeros(2, 3).double(), (torch.zeros(1, 3).double(),), (None,)),
         r"not torch\.float64"),
    ],
)  # fmt: skip
def test_launch_refuses(of, message):
    with pytest.raises(ValueError, match=message):
        sibling_linears(of)
