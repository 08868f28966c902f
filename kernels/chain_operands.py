"""The operands of a chain: y = (x Uᵀ + a) Vᵀ + b, whose latent is narrower than x and y.

| here          | shape     |     |
|---------------|-----------|-----|
| `x`           | [T, K]    |     |
| `u`           | [R, K]    |     |
| `v`           | [OUT, R]  |     |
| `latent_bias` | [R]       | a   |
| `bias`        | [OUT]     | b   |
"""

from dataclasses import KW_ONLY, dataclass

import torch.nn.functional as F
from flashsvd_compile.kernels.checks import checked_output, validate_operands
from torch import Tensor


@dataclass(frozen=True)
class ChainOperands:
    """One call's operands, by the table above; a ValueError names the first that does not fit."""

    x: Tensor
    u: Tensor
    v: Tensor
    _: KW_ONLY
    latent_bias: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("x", "u", "v"):
            operand = getattr(self, name)
            if operand.dim() != 2:
                raise ValueError(f"{name} must be 2-D, is {list(operand.shape)}")
        expected = {
            "x": (self.rows, self.in_size),
            "u": (self.rank, self.in_size),
            "latent_bias": (self.rank,),
            "v": (self.out_size, self.rank),
            "bias": (self.out_size,),
        }
        validate_operands(self, expected, like="x")

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def in_size(self) -> int:
        return self.x.shape[1]

    @property
    def out_size(self) -> int:
        return self.v.shape[0]

    @property
    def rank(self) -> int:
        return self.u.shape[0]

    def allocate_output(self, out: Tensor | None) -> Tensor:
        """``out`` checked, or a new contiguous [T, OUT]."""
        return checked_output(out, (self.rows, self.out_size), self.x)


def unfused_chain(of: ChainOperands) -> Tensor:
    """y on library operators, the latent in memory: the reference. Differentiable."""
    return F.linear(F.linear(of.x, of.u, of.latent_bias), of.v, of.bias)
