"""A matrix moved to other inputs: what it returned from its own, it shall return from these.

    min E |t − W' x|² + λ Σ_i E[x_i²] |W'_i − W_i|²         t: targets, W_i: columns

from sums of x xᵀ and t xᵀ alone; with a bias, over what is not the mean, which the bias takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float64).tiny


@dataclass
class Sums:
    """Of inputs x [tokens, in] and targets [tokens, out] by name, over all tokens; float64."""

    tokens: int = 0
    x: Any = 0.0
    xx: Any = 0.0
    y: dict[str, Any] = field(default_factory=dict)
    yx: dict[str, Any] = field(default_factory=dict)

    def add(self, x: Tensor, targets: Mapping[str, Tensor]) -> None:
        x = x.float()
        self.tokens += len(x)
        self.x = self.x + x.sum(0).double()
        self.xx = self.xx + (x.mT @ x).double()
        for name, target in targets.items():
            y = target.float()
            self.y[name] = self.y.get(name, 0.0) + y.sum(0).double()
            self.yx[name] = self.yx.get(name, 0.0) + (y.mT @ x).double()

    def inputs(self, centred: bool) -> Tensor:
        """E[x xᵀ], of what is not the mean where ``centred``."""
        moment = self.xx / self.tokens
        return moment - torch.outer(self.x, self.x) / self.tokens**2 if centred else moment

    def crossed(self, name: str, centred: bool) -> Tensor:
        """E[t xᵀ], the same."""
        moment = self.yx[name] / self.tokens
        return moment - torch.outer(self.y[name], self.x) / self.tokens**2 if centred else moment

    def bias(self, name: str, weight: Tensor) -> Tensor:
        """What the products of ``weight`` lack of the targets in the mean."""
        return (self.y[name] - weight @ self.x) / self.tokens


@dataclass(frozen=True)
class Moved:
    """A matrix and its bias, float64."""

    weight: Tensor
    bias: Tensor | None


def moved(weight: Tensor, has_bias: bool, sums: Sums, name: str, ridge: float) -> Moved:
    """``weight`` for the inputs of ``sums``, returning the targets ``name``."""
    whole, inputs = weight.double(), sums.inputs(has_bias)
    found = drawn_to(whole, sums.crossed(name, has_bias) - whole @ inputs, inputs, ridge)
    return Moved(found, sums.bias(name, found) if has_bias else None)


def drawn_to(weight: Tensor, gap: Tensor, inputs: Tensor, ridge: float) -> Tensor:
    """The matrix that fits targets best, drawn to ``weight`` [m, n], in float64.

    ``gap`` [m, n]: the moment of what ``weight`` leaves of the targets with the inputs, ``inputs``
    [n, n] theirs. ``ridge``: its share of each input's own.
    """
    scale = inputs.diagonal().clamp_min(_TINY).sqrt()
    correlated = inputs / scale / scale[:, None]
    correlated.diagonal().add_(ridge)
    root = torch.linalg.cholesky(correlated)
    return weight.double() + torch.cholesky_solve((gap / scale).mT, root).mT / scale
