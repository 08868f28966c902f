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

# Roundings of float32, squared and summed over many tokens, stay below it.
LEAST = 1e-6


@dataclass
class Sums:
    """Of inputs x [tokens, in] and targets [tokens, out] by name, over all tokens; float64."""

    tokens: int = 0
    _x: Any = 0.0
    _xx: Any = 0.0
    _y: dict[str, Any] = field(default_factory=dict)
    _yx: dict[str, Any] = field(default_factory=dict)
    # The means of the first tokens are taken off before products are summed in float32, in which
    # what hardly varies would be lost in roundings of its square.
    _shift: dict[str, Tensor] = field(default_factory=dict)

    def add(self, x: Tensor, targets: Mapping[str, Tensor]) -> None:
        if not len(x):
            return
        x = self._shifted("", x)
        self.tokens += len(x)
        self._x = self._x + x.sum(0).double()
        self._xx = self._xx + (x.mT @ x).double()
        for name, target in targets.items():
            y = self._shifted(name, target)
            self._y[name] = self._y.get(name, 0.0) + y.sum(0).double()
            self._yx[name] = self._yx.get(name, 0.0) + (y.mT @ x).double()

    def _shifted(self, name: str, values: Tensor) -> Tensor:
        values = values.float()
        return values - self._shift.setdefault(name, values.mean(0))

    @property
    def mean(self) -> Tensor:
        return self._x / self.tokens + self._shift[""].double()

    def _mean_of(self, name: str) -> Tensor:
        return self._y[name] / self.tokens + self._shift[name].double()

    def inputs(self, centred: bool) -> Tensor:
        """E[x xᵀ], of what is not the mean where ``centred``; what hardly varies is taken to vary
        by `LEAST` of its size."""
        own = self._x / self.tokens
        varying = self._xx / self.tokens - torch.outer(own, own)
        whole = varying + torch.outer(self.mean, self.mean)
        if not centred:
            return whole
        return varying + torch.diag(LEAST * whole.diagonal())

    def crossed(self, name: str, centred: bool) -> Tensor:
        """E[t xᵀ], the same."""
        own = torch.outer(self._y[name], self._x) / self.tokens**2
        varying = self._yx[name] / self.tokens - own
        return varying if centred else varying + torch.outer(self._mean_of(name), self.mean)

    def bias(self, name: str, weight: Tensor) -> Tensor:
        """What the products of ``weight`` lack of the targets in the mean."""
        return self._mean_of(name) - weight @ self.mean


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
