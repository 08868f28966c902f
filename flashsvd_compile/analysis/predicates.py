"""Predicates over the indices of a tensor, and what can be proven of them.

The indices are the symbols ``n, m, h, b, ...``, which name dimensions **from the right**: so a
tensor's expression stays what it is under broadcasting and under leading dimensions of length 1.
Sizes are the symbols of torch's shape environment. A predicate is built by And and Or from

    n <= m + 3          comparisons of integer expressions that are affine in the indices
    pad(b, n) != 0      data: an undefined function, called by the name of the node that holds
                        it, of the indices that it may depend on

A ``Domain`` knows ``0 <= index < extent`` for each index, and the shape environment's facts. It
proves an inequality at the corner of the box where it is tightest, and adds no guard. Of data
nothing is proven.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true


@functools.cache
def index_symbol(position: int) -> sympy.Symbol:
    """The index of the dimension at ``position`` counted from the right: n, m, h, b, i4, ..."""
    name = "nmhb"[position] if position < 4 else f"i{position}"
    return sympy.Symbol(name, integer=True, nonnegative=True)


def is_index(symbol: sympy.Basic) -> bool:
    return isinstance(symbol, sympy.Symbol) and symbol in _index_symbols()


@functools.cache
def _index_symbols() -> frozenset[sympy.Symbol]:
    return frozenset(index_symbol(position) for position in range(16))


def symbol_of(dim: int, rank: int) -> sympy.Symbol:
    return index_symbol(rank - 1 - dim)


def load(name: str, indices: Iterable[sympy.Basic]) -> sympy.Expr:
    return sympy.Function(name, integer=True)(*indices)


def negate(pred: Boolean) -> Boolean:
    """Not, pushed down to the comparisons."""
    if isinstance(pred, sympy.And):
        return sympy.Or(*map(negate, pred.args))
    if isinstance(pred, sympy.Or):
        return sympy.And(*map(negate, pred.args))
    return sympy.Not(pred)


def conjuncts(pred: Boolean) -> frozenset[Boolean]:
    return frozenset(sympy.And.make_args(pred)) - {sympy.true}


def size_expr(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def is_one(size: int | torch.SymInt) -> bool:
    return statically_known_true(size == 1)


def broadcasts_to(shape: Sequence[Any], target: Sequence[Any]) -> bool:
    """Provably, each dimension from the right is 1 long or as long as the target's."""
    return len(shape) <= len(target) and all(
        is_one(size) or statically_known_true(size == goal)
        for size, goal in zip(reversed(shape), reversed(target), strict=False)
    )


@dataclass(frozen=True)
class Domain:
    """The box of indices of one shape."""

    extents: dict[sympy.Symbol, sympy.Expr]
    shape_env: ShapeEnv | None

    @classmethod
    def of(cls, shape: Sequence[int | torch.SymInt]) -> Domain:
        rank = len(shape)
        symbolic = [size for size in shape if isinstance(size, torch.SymInt)]
        return cls(
            {symbol_of(dim, rank): size_expr(size) for dim, size in enumerate(shape)},
            symbolic[0].node.shape_env if symbolic else None,
        )

    def is_nonnegative(self, expression: sympy.Expr) -> bool:
        """Provably >= 0 at every index."""
        expression = sympy.expand(expression)
        for symbol, extent in self.extents.items():
            if symbol not in expression.free_symbols:
                continue
            slope = expression.coeff(symbol)
            if symbol in (expression - slope * symbol).expand().free_symbols:
                return False
            if slope.is_nonnegative:
                corner = sympy.Integer(0)
            elif slope.is_nonpositive:
                corner = extent - 1
            else:
                return False
            expression = sympy.expand(expression.xreplace({symbol: corner}))
        if expression.is_nonnegative is not None:
            return bool(expression.is_nonnegative)
        if self.shape_env is None:
            return False
        size = self.shape_env.create_symintnode(expression, hint=None)
        return statically_known_true(size >= 0)

    def simplify(self, pred: Boolean) -> Boolean:
        """The same predicate at every index of the box, without the comparisons decided there."""
        if isinstance(pred, sympy.And | sympy.Or):
            return pred.func(*map(self.simplify, pred.args))
        if not isinstance(pred, Relational) or pred.has(AppliedUndef):
            return pred
        if self._holds(pred):
            return sympy.true
        return sympy.false if self._holds(negate(pred)) else pred

    def _holds(self, comparison: Boolean) -> bool:
        margin = margin_of(comparison)
        if margin is not None:
            return self.is_nonnegative(margin)
        if isinstance(comparison, sympy.Eq):
            return sympy.expand(comparison.lhs - comparison.rhs) == 0
        if isinstance(comparison, sympy.Ne):
            difference = comparison.lhs - comparison.rhs
            return self.is_nonnegative(difference - 1) or self.is_nonnegative(-difference - 1)
        return comparison == sympy.true


def margin_of(comparison: Boolean) -> sympy.Expr | None:
    """The integer expression that is >= 0 exactly where an order comparison holds."""
    if not isinstance(comparison, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
        return None
    # .lts <= .gts for all four; a strict one between integers leaves a margin of one.
    strict = isinstance(comparison, sympy.Lt | sympy.Gt)
    return comparison.gts - comparison.lts - int(strict)
