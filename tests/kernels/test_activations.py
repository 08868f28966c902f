"""The table of activations, and that a tile on chip computes the same functions."""

import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from flashsvd_compile.kernels.activation_pass import activate_
from flashsvd_compile.kernels.activations import ACTIVATIONS, validate_activation
from flashsvd_compile.kernels.activations_triton import activate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 1024


@triton.jit
def activate_kernel(
    x_ptr, y_ptr, n, ACTIVATION: tl.constexpr, SHORT: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(y_ptr + offsets, activate(x, ACTIVATION, SHORT), mask=offsets < n)


def on_chip(x: torch.Tensor, activation: str, short: bool) -> torch.Tensor:
    y = torch.full_like(x, float("nan"))
    activate_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), activation, short, BLOCK)
    return y


def wide_range() -> torch.Tensor:
    """Near 0, the transition, the tails, and float32's ends; both signs."""
    largest = torch.finfo(torch.float32).max
    magnitudes = torch.cat(
        [
            torch.zeros(1),
            torch.logspace(-38, 38, 3000),
            torch.linspace(0, 20, 20_000),
            torch.tensor([65504.0, largest]),
        ]
    )
    return torch.cat([magnitudes, -magnitudes]).to(DEVICE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_on_chip_is_what_torch_computes(activation):
    x = wide_range()
    exact = ACTIVATIONS[activation].function(x.double())
    y = on_chip(x, activation, short=False)
    assert not y.isnan().any()
    # In the negative tail erf cancels (an error of an ulp of x, as torch has; torch's tanh form
    # does so even in float64), and the rounding of an exponent as large as 88 counts 88-fold.
    eps = torch.finfo(torch.float32).eps
    in_range = exact.abs() < torch.finfo(torch.float32).max
    tail = x < -1
    budget = eps * torch.where(tail, 100, 8) * exact.abs() + 1e-37
    if activation in ("gelu", "gelu_tanh"):
        ulp = eps if activation == "gelu" else torch.finfo(torch.float64).eps
        budget += 4 * ulp * torch.where(tail & (x > -20), x.abs(), 0)
    assert ((y - exact).abs() <= budget)[in_range].all()
    assert (y[~in_range] == exact[~in_range].float()).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("short", [False, True], ids=["exact", "short"])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
def test_on_chip_propagates_nan(activation, short):
    x = torch.tensor([1.0, float("nan"), -1.0], device=DEVICE)
    assert on_chip(x, activation, short).isnan().tolist() == [False, True, False]


def test_short_gelu_is_below_the_rounding_of_16_bits():
    """The bounds that ``activations_triton.py`` states, on every scale and densely up to 20."""
    x = wide_range()
    exact = x.double() * torch.special.ndtr(x.double())
    error = (on_chip(x, "gelu", short=True) - exact).abs()
    counts = exact.abs() >= 2**-24
    assert (error[counts] <= 2**-14 * exact[counts].abs()).all()
    assert (error[~counts] <= 2**-27).all()


def test_short_gelu_keeps_infinities():
    x = torch.tensor([float("inf"), -float("inf")], device=DEVICE)
    y = on_chip(x, "gelu", short=True).tolist()
    assert y[0] == float("inf")
    assert abs(y[1]) <= 2**-27


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_place_overwrites_with_the_same(activation, dtype):
    x = torch.linspace(-30, 30, 1001).to(dtype)
    expected = ACTIVATIONS[activation].function(x.clone())
    result = ACTIVATIONS[activation].in_place(x)
    assert result is x
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_finite_at_float16_ends(activation):
    if activation == "relu_squared":
        pytest.skip("its square leaves float16's range")
    for function in (ACTIVATIONS[activation].function, ACTIVATIONS[activation].in_place):
        assert function(torch.tensor([65504.0, -65504.0], dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_differentiable(activation):
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ACTIVATIONS[activation].function, x)


def test_unknown_name_is_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match=r"unknown activation 'gelu_new'; allowed: gelu, "):
        validate_activation("gelu_new")


@pytest.mark.parametrize("module", ["activations", "feed_forward_tiles", "feed_forward_blocks"])
def test_imports_no_triton(module):
    code = f"import sys, flashsvd_compile.kernels.{module}; print('triton.language' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_pass_over_memory(dtype, gated, activation):
    """More than one block of it, the last one ragged; rounded once."""
    hidden, gate = (torch.randn(37, 111, device=DEVICE).to(dtype) for _ in range(2))
    function = ACTIVATIONS[activation].function
    doubled = hidden.double()
    exact = function(gate.double()) * doubled if gated else function(doubled)
    result = activate_(hidden, gate if gated else None, activation)
    assert result is hidden
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), exact, rtol=2 * eps, atol=2 * eps)
