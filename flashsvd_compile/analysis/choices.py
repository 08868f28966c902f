"""What a tensor of a mask is worth: an expression of its indices.

    sympy.Expr   integers: affine, ``m - 3``, ``b*s0 + n``; or data, ``lengths(b)``
    Boolean      booleans: a predicate, ``(n <= m) & (pad(b, n) != 0)``
    Choice       numbers, at most two of them: ``0 where n <= m, else -inf``

An expression never holds the index of a dimension that is provably 1 long. Data takes part in no
arithmetic and no comparison (integers wrap, floats have NaN): what is computed from it is data
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from flashsvd_compile.analysis.predicates import Domain, is_index, negate

Number: TypeAlias = int | float

# A predicate of more comparisons is no longer followed but taken as data, so that the analysis
# stays linear in the graph whatever the graph computes.
MAX_COMPARISONS = 64

# Integers of 64 bits are taken as unbounded: extents are under 2**31, and so, by this bound, are
# the numbers that multiply them or are added to them.
INT64_CONSTANT_LIMIT = 2**31


@dataclass(frozen=True)
class Choice:
    """``yes`` where ``pred`` holds, else ``no``. See ``is_exact`` for what the numbers are."""

    pred: Boolean
    yes: Number
    no: Number

    @classmethod
    def constant(cls, number: Number) -> Choice:
        return cls(sympy.true, number, number)

    def cases(self) -> list[tuple[Boolean, Number]]:
        """Disjoint conditions with the number that each gives; impossible ones left out."""
        cases = [(self.pred, self.yes), (negate(self.pred), self.no)]
        return [(condition, number) for condition, number in cases if condition != sympy.false]


Value: TypeAlias = sympy.Expr | Boolean | Choice


def is_affine(value: Value | None) -> TypeGuard[sympy.Expr]:
    """An integer expression without data."""
    return isinstance(value, sympy.Expr) and not value.has(AppliedUndef)


def dependence(value: Value) -> frozenset[sympy.Symbol]:
    """The indices that the value may vary along; along any other it is constant."""
    expression = value.pred if isinstance(value, Choice) else value
    return frozenset(s for s in expression.free_symbols if is_index(s))


def substitute(value: Value, mapping: Mapping[sympy.Basic, sympy.Basic]) -> Value:
    """Replace index symbols, all at once."""
    if isinstance(value, Choice):
        return Choice(value.pred.xreplace(mapping), value.yes, value.no)
    return value.xreplace(mapping)


def is_oversized(value: Value) -> bool:
    expression = value.pred if isinstance(value, Choice) else value
    return len(expression.atoms(Relational)) > MAX_COMPARISONS


def is_exact(number: Number) -> bool:
    """Every format holds it exactly. Any other float stands for itself up to its rounding."""
    return isinstance(number, int) or number in (-2, -1, 0, 1, 2) or abs(number) == math.inf


def admit(number: Number, dtype: torch.dtype) -> Number | None:
    """``number`` as ``dtype`` holds it, or None where rounding could change a conclusion.

    A float that is not exact is taken from 4 up only: rounding is monotone and 4 is in every
    format, so it cannot meet one of the exact ones.
    """
    if dtype is torch.bool:
        return int(number != 0)
    if dtype.is_floating_point:
        number = float(number)
        if is_exact(number):
            return number
        # The comparison is false for NaN.
        return number if 4 <= abs(number) <= torch.finfo(dtype).max else None
    if dtype.is_complex or number != number or abs(number) == math.inf or int(number) != number:
        return None
    limits = torch.iinfo(dtype)
    return int(number) if limits.min <= number <= limits.max else None


def as_choice(value: Value | None) -> Choice | None:
    if isinstance(value, Boolean):
        return Choice(value, 1, 0)
    if isinstance(value, sympy.Integer):
        return Choice.constant(int(value))
    return value if isinstance(value, Choice) else None


def nonzero(value: Value) -> Boolean:
    """Where the value counts as true."""
    if isinstance(value, Choice):
        return sympy.Or(*(condition for condition, number in value.cases() if number != 0))
    return value if isinstance(value, Boolean) else sympy.Ne(value, 0)


def gather_cases(
    cases: Iterable[tuple[Boolean, Number | None]], dtype: torch.dtype
) -> Value | None:
    """One value of ``dtype`` from disjoint, exhaustive cases; None where that takes more than two.

    A case whose number is None is not known.
    """
    by_number: dict[Number, list[Boolean]] = {}
    for condition, number in cases:
        if condition == sympy.false:
            continue
        admitted = None if number is None else admit(number, dtype)
        if admitted is None:
            return None
        by_number.setdefault(admitted, []).append(condition)
    if dtype is torch.bool:
        return sympy.Or(*by_number.get(1, ()))
    if len(by_number) == 1:
        (number,) = by_number
        return Choice.constant(number)
    if len(by_number) != 2:
        return None
    # The shorter condition is the choice's own, the other one follows by negation.
    (yes, conditions), (no, _) = sorted(by_number.items(), key=lambda item: len(item[1]))
    return Choice(sympy.Or(*conditions), yes, no)


def combine(
    function: Callable[[Number, Number], Number | None],
    left: Choice,
    right: Choice,
    dtype: torch.dtype,
) -> Value | None:
    """``function`` of two choices, case by case."""
    return gather_cases(
        ((sympy.And(p, q), function(x, y)) for p, x in left.cases() for q, y in right.cases()),
        dtype,
    )


# --- formats ------------------------------------------------------------------------------------


def constant_value(number: Any, dtype: torch.dtype) -> Value | None:
    """The value of a tensor filled with ``number``."""
    admitted = admit(number, dtype) if isinstance(number, int | float) else None
    if admitted is None:
        return None
    if dtype is torch.bool:
        return sympy.true if admitted else sympy.false
    return sympy.Integer(admitted) if isinstance(admitted, int) else Choice.constant(admitted)


def fits(expression: sympy.Expr, dtype: torch.dtype, domain: Domain) -> bool:
    """Provably no wrap-around: integers of ``dtype`` hold ``expression``."""
    if dtype is torch.bool or dtype.is_floating_point or dtype.is_complex:
        return False
    if dtype is torch.int64:
        return all(abs(number) < INT64_CONSTANT_LIMIT for number in expression.atoms(sympy.Integer))
    limits = torch.iinfo(dtype)
    return domain.is_nonnegative(limits.max - expression) and domain.is_nonnegative(
        expression - limits.min
    )


def cast(value: Value, dtype: torch.dtype, domain: Domain) -> Value | None:
    """The value in another format; None where the conversion could change it."""
    if dtype is torch.bool:
        return nonzero(value)
    if is_affine(value) and fits(value, dtype, domain):
        return value
    choice = as_choice(value)
    return gather_cases(choice.cases(), dtype) if choice else None
