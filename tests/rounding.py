"""How far from float64 a kernel may be: what eager errs, and the roundings that it cannot avoid."""

import math
from collections.abc import Mapping

import torch
from flashsvd_compile.kernels.primitives import INTERPRETED
from torch import Tensor

EAGER_ERROR = 1.1  # times what eager errs


def assert_as_exact_as_eager(
    out: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    bias: Tensor | None = None,
    longest: int = 0,
    slack: float | None = None,
) -> None:
    """No further from ``exact`` than ``slack`` × eager is, 1.1 unless told, plus two roundings.

    Of the output and of the ``bias`` added to it: where they cancel, the output is small and what
    was rounded before is not. What float32 makes of a sum of ``longest`` terms that are added one
    after another is allowed, too, √(longest / 24) of its roundings in the mean: libraries split
    such sums, and over few columns errors do not average out. Triton's interpreter cuts float32 to
    bfloat16 where a GPU rounds: four times the variance a rounding has, and one-sided.
    """
    if slack is None:
        slack = 4.0 if INTERPRETED and out.dtype == torch.bfloat16 else EAGER_ERROR
    rounded = exact.norm()
    if bias is not None:
        rounded = rounded + bias.double().expand_as(exact).norm()
    roundings = 2 * torch.finfo(out.dtype).eps
    roundings += math.sqrt(longest / 24) * torch.finfo(torch.float32).eps
    budget = slack * (eager - exact).norm() + roundings * rounded
    error = (out - exact).norm()
    assert error <= budget, f"error {error:.3e}, budget {budget:.3e}"


def longest_sum(operands: Mapping[str, Tensor]) -> int:
    """The most terms that a product with one of the factors among ``operands`` adds up."""
    factors = (x for name, x in operands.items() if name.endswith(("factor", "u", "v")))
    return max(max(factor.shape) for factor in factors)
