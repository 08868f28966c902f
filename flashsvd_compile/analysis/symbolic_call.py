"""One operator call of a normalised graph, as the rules of symbolic evaluation read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from flashsvd_compile.analysis.calls import arguments, is_tensor, tensor_inputs, value
from flashsvd_compile.analysis.choices import Value, cast, constant_value, dependence
from flashsvd_compile.analysis.predicates import (
    Domain,
    broadcasts_to,
    is_one,
    load,
    size_expr,
    symbol_of,
)


def opaque(node: fx.Node) -> Value:
    """The node's value as data, along each dimension that is not provably 1 long."""
    shape = node.meta["val"].shape
    rank = len(shape)
    return data(node, [symbol_of(dim, rank) for dim in range(rank) if not is_one(shape[dim])])


def data(node: fx.Node, indices: Sequence[sympy.Basic]) -> Value:
    loaded = load(node.name, indices)
    return sympy.Ne(loaded, 0) if node.meta["val"].dtype is torch.bool else loaded


@dataclass(frozen=True)
class Call:
    """A node with its arguments by name and the values of its operands."""

    node: fx.Node
    values: Mapping[fx.Node, Value]

    @cached_property
    def arguments(self) -> dict[str, Any]:
        return arguments(self.node)

    @property
    def dtype(self) -> torch.dtype:
        return self.node.meta["val"].dtype

    @property
    def shape(self) -> torch.Size:
        return self.node.meta["val"].shape

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def domain(self) -> Domain:
        return Domain.of(self.shape)

    def shape_of(self, name: str) -> torch.Size:
        return self.arguments[name].meta["val"].shape

    def value_of(self, name: str) -> Value:
        return self.values[self.arguments[name]]

    def integer(self, name: str, default: int) -> sympy.Expr | None:
        """An integer argument, maybe symbolic; None where it is something else."""
        given = value(self.arguments.get(name))
        given = default if given is None else given
        if isinstance(given, bool) or not isinstance(given, int | torch.SymInt):
            return None
        return size_expr(given)

    def operand(self, name: str, dtype: torch.dtype | None = None) -> Value | None:
        """An elementwise operand, as the operator sees it: in the promoted ``dtype``, if given.

        A tensor that broadcasts to the result, or a number; None where it cannot be followed.
        """
        given = self.arguments[name]
        if is_tensor(given):
            tensor, held = given.meta["val"], self.values[given]
            if not broadcasts_to(tensor.shape, self.shape):
                return None
            if dtype is None or dtype is tensor.dtype:
                return held
            return cast(held, dtype, Domain.of(tensor.shape))
        number = value(given)
        if isinstance(number, torch.SymInt):
            return size_expr(number) if dtype is torch.int64 else None
        return constant_value(number, dtype or self.dtype)

    def promoted_dtype(self) -> torch.dtype | None:
        """What ``self`` and ``other`` are converted to before the operator compares them."""
        left, right = (value(self.arguments[name]) for name in ("self", "other"))
        symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)
        if isinstance(left, symbolic) or isinstance(right, torch.SymFloat | torch.SymBool):
            return None
        return torch.result_type(left, 0 if isinstance(right, torch.SymInt) else right)

    def elementwise_data(self) -> Value:
        """Data that varies only along what the operands vary along."""
        operands = tensor_inputs(self.node)
        if not all(broadcasts_to(n.meta["val"].shape, self.shape) for n in operands):
            return opaque(self.node)
        indices = frozenset[sympy.Symbol]().union(*(dependence(self.values[n]) for n in operands))
        return data(self.node, sorted(indices, key=str))
