"""Rules for operators that work element by element.

Each rule gives the value of a call, or None where it cannot follow it; the evaluation then takes
the call's result as data. Arithmetic stays affine or works on the two numbers of a choice, case
by case; comparisons turn both into predicates.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean

from flashsvd_compile.analysis.calls import aten
from flashsvd_compile.analysis.choices import (
    Number,
    Value,
    as_choice,
    combine,
    fits,
    gather_cases,
    is_affine,
    is_exact,
    nonzero,
)
from flashsvd_compile.analysis.predicates import (
    is_index,
    negate,
)
from flashsvd_compile.analysis.symbolic_call import Call

Rule: TypeAlias = Callable[[Call], Value | None]


# --- numbers, case by case ----------------------------------------------------------------------


def _add(x: Number, y: Number) -> Number | None:
    if x == 0 or y == 0 or (is_exact(x) and is_exact(y)):
        return x + y  # NaN from inf - inf is admitted nowhere
    return None


def _sub(x: Number, y: Number) -> Number | None:
    return _add(x, -y)


def _mul(x: Number, y: Number) -> Number | None:
    return x * y if is_exact(x) or is_exact(y) else None


def _exactly(function: Callable[[Any, Any], Any]) -> Callable[[Number, Number], Number | None]:
    """A comparison or bit operation where rounding cannot change the answer (``is_exact``)."""

    def apply(x: Number, y: Number) -> Number | None:
        return int(function(x, y)) if is_exact(x) or is_exact(y) else None

    return apply


# --- affine expressions -------------------------------------------------------------------------


def _affine_product(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr | None:
    """A product stays affine while at most one side has indices."""
    varying = [e for e in (x, y) if any(is_index(s) for s in e.free_symbols)]
    return None if len(varying) == 2 else sympy.expand(x * y)


def _arithmetic(
    on_expressions: Callable[[Any, Any], Any],
    on_numbers: Callable[[Number, Number], Number | None],
    *,
    reverse: bool = False,
) -> Rule:
    def rule(call: Call) -> Value | None:
        if call.arguments.get("alpha", 1) != 1:
            return None
        left, right = call.operand("self", call.dtype), call.operand("other", call.dtype)
        if reverse:
            left, right = right, left
        if is_affine(left) and is_affine(right):
            result = on_expressions(left, right)
            fitting = result is not None and fits(result, call.dtype, call.domain)
            return result if fitting else None
        p, q = as_choice(left), as_choice(right)
        return combine(on_numbers, p, q, call.dtype) if p and q else None

    return rule


def _comparison(relation: type[sympy.Basic], function: Callable[[Any, Any], bool]) -> Rule:
    def rule(call: Call) -> Value | None:
        dtype = call.promoted_dtype()
        left, right = call.operand("self", dtype), call.operand("other", dtype)
        if dtype is None:
            return None
        if is_affine(left) and is_affine(right):
            return relation(left, right)
        p, q = as_choice(left), as_choice(right)
        return combine(_exactly(function), p, q, torch.bool) if p and q else None

    return rule


# --- booleans -----------------------------------------------------------------------------------


def _xor(p: Boolean, q: Boolean) -> Boolean:
    return sympy.Or(sympy.And(p, negate(q)), sympy.And(negate(p), q))


def _logical(connective: Callable[[Boolean, Boolean], Boolean]) -> Rule:
    def rule(call: Call) -> Value | None:
        left, right = call.operand("self"), call.operand("other")
        if left is None or right is None:
            return None
        return connective(nonzero(left), nonzero(right))

    return rule


def _bitwise(
    connective: Callable[[Boolean, Boolean], Boolean], function: Callable[[Any, Any], Any]
) -> Rule:
    logical = _logical(connective)

    def rule(call: Call) -> Value | None:
        if call.dtype is torch.bool:
            return logical(call)
        p, q = (as_choice(call.operand(name, call.dtype)) for name in ("self", "other"))
        return combine(_exactly(function), p, q, call.dtype) if p and q else None

    return rule


def _logical_not(call: Call) -> Value | None:
    operand = call.operand("self")
    return None if operand is None else negate(nonzero(operand))


def _bitwise_not(call: Call) -> Value | None:
    return _logical_not(call) if call.dtype is torch.bool else None


# --- choices ------------------------------------------------------------------------------------


def select(
    condition: Value | None, yes: Value | None, no: Value | None, call: Call
) -> Value | None:
    """``where(condition, yes, no)``."""
    p, q = as_choice(yes), as_choice(no)
    if not isinstance(condition, Boolean) or p is None or q is None:
        return None
    return gather_cases(
        [(sympy.And(condition, c), number) for c, number in p.cases()]
        + [(sympy.And(negate(condition), c), number) for c, number in q.cases()],
        call.dtype,
    )


def _where(call: Call) -> Value | None:
    yes, no = call.operand("self", call.dtype), call.operand("other", call.dtype)
    return select(call.operand("condition"), yes, no, call)


def _masked_fill(call: Call) -> Value | None:
    yes, no = call.operand("value", call.dtype), call.operand("self", call.dtype)
    return select(call.operand("mask"), yes, no, call)


def _cast(call: Call) -> Value | None:
    return call.operand("self", call.dtype)


def _identity(call: Call) -> Value | None:
    return call.operand("self")


ELEMENTWISE_RULES: dict[Any, Rule] = {
    aten.to: _cast,
    aten._to_copy: _cast,
    aten.clone: _identity,
    aten.contiguous: _identity,
    aten.detach: _identity,
    aten.detach_: _identity,
    aten.alias: _identity,
    aten.lift_fresh_copy: _identity,
    aten.add: _arithmetic(operator.add, _add),
    aten.sub: _arithmetic(operator.sub, _sub),
    aten.rsub: _arithmetic(operator.sub, _sub, reverse=True),
    aten.mul: _arithmetic(_affine_product, _mul),
    aten.eq: _comparison(sympy.Eq, operator.eq),
    aten.ne: _comparison(sympy.Ne, operator.ne),
    aten.lt: _comparison(sympy.Lt, operator.lt),
    aten.le: _comparison(sympy.Le, operator.le),
    aten.gt: _comparison(sympy.Gt, operator.gt),
    aten.ge: _comparison(sympy.Ge, operator.ge),
    aten.logical_and: _logical(sympy.And),
    aten.logical_or: _logical(sympy.Or),
    aten.logical_xor: _logical(_xor),
    aten.logical_not: _logical_not,
    aten.bitwise_and: _bitwise(sympy.And, operator.and_),
    aten.__and__: _bitwise(sympy.And, operator.and_),
    aten.bitwise_or: _bitwise(sympy.Or, operator.or_),
    aten.__or__: _bitwise(sympy.Or, operator.or_),
    aten.bitwise_xor: _bitwise(_xor, operator.xor),
    aten.__xor__: _bitwise(_xor, operator.xor),
    aten.bitwise_not: _bitwise_not,
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    aten.type_as: _cast,
}

# Tracing before autograd keeps aliases as they are written.
ELEMENTWISE_RULES |= {
    aten.subtract: ELEMENTWISE_RULES[aten.sub],
    aten.multiply: ELEMENTWISE_RULES[aten.mul],
    aten.not_equal: ELEMENTWISE_RULES[aten.ne],
    aten.less: ELEMENTWISE_RULES[aten.lt],
    aten.less_equal: ELEMENTWISE_RULES[aten.le],
    aten.greater: ELEMENTWISE_RULES[aten.gt],
    aten.greater_equal: ELEMENTWISE_RULES[aten.ge],
}

# Elementwise, though torch does not tag them so.
UNTAGGED_ELEMENTWISE = frozenset(
    {
        *(aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.lift_fresh_copy),
        *(aten.detach, aten.detach_, aten.alias, aten.type_as),
        *(aten.rsub, aten.__and__, aten.__or__, aten.where, aten.masked_fill, aten.floor_divide),
    }
)
