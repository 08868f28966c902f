"""The operands of sibling linears, products that read the same activations, and the plain result.

    P_i = x U_iᵀ + b_i          i = 0 … n - 1

| here         | shape     |                                                                    |
|--------------|-----------|--------------------------------------------------------------------|
| `x`          | [M, K]    | what all siblings read                                             |
| `weights[i]` | [R_i, K]  | U_i, of any strides; each sibling has a width of its own           |
| `biases[i]`  | [R_i]     | b_i, or None                                                       |
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SiblingOperands:
    """One call's operands, by the table above; a ValueError names the first that does not fit."""

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]

    @classmethod
    def of(
        cls, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], biased: Sequence[int]
    ) -> "SiblingOperands":
        """Those of siblings of which ``biased`` names, in order, the ones that have a bias."""
        if len(biases) != len(biased) or not set(biased) <= set(range(len(weights))):
            raise ValueError(f"{len(biases)} biases of siblings {list(biased)}, of {len(weights)}")
        by_index = dict(zip(biased, biases, strict=True))
        return cls(x, tuple(weights), tuple(by_index.get(i) for i in range(len(weights))))

    def __post_init__(self) -> None:
        if self.x.dim() != 2 or not self.x.is_floating_point():
            raise ValueError(f"x must be 2-D and floating, is {list(self.x.shape)}, {self.x.dtype}")
        if not self.weights or len(self.weights) != len(self.biases):
            raise ValueError(f"{len(self.weights)} weights beside {len(self.biases)} biases")
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if weight.dim() != 2 or weight.shape[1] != self.in_features:
                shape = f"[.., {self.in_features}]"
                raise ValueError(f"weight {index} must be {shape}, is {list(weight.shape)}")
            if bias is not None and tuple(bias.shape) != (weight.shape[0],):
                shape = f"[{weight.shape[0]}]"
                raise ValueError(f"bias {index} must be {shape}, is {list(bias.shape)}")
            for name, operand in (("weight", weight), ("bias", bias)):
                if operand is not None and (operand.dtype, operand.device) != self._kind:
                    raise ValueError(
                        f"all operands must share x's dtype and device ({self.x.dtype}, "
                        f"{self.x.device}); {name} {index} is {operand.dtype}, {operand.device}"
                    )

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def in_features(self) -> int:
        return self.x.shape[1]

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(weight.shape[0] for weight in self.weights)

    @property
    def _kind(self) -> tuple[object, object]:
        return self.x.dtype, self.x.device


def separate_linears(of: SiblingOperands) -> list[Tensor]:
    """Each P_i [M, R_i] by a library matmul of its own."""
    return [F.linear(of.x, w, b) for w, b in zip(of.weights, of.biases, strict=True)]
