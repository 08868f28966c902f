"""Rules for operators whose result depends on where an element stands, not on its value alone.

``arange`` and ``full`` start expressions, ``tril`` compares two indices, ``diff`` and ``cumsum``
look along one.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch

from flashsvd_compile.analysis.calls import aten, value
from flashsvd_compile.analysis.choices import (
    Choice,
    Number,
    Value,
    constant_value,
    fits,
    is_affine,
    nonzero,
)
from flashsvd_compile.analysis.predicates import (
    broadcasts_to,
    index_symbol,
    size_expr,
    symbol_of,
)
from flashsvd_compile.analysis.symbolic_call import Call
from flashsvd_compile.analysis.symbolic_elementwise import Rule, select


def _arange(call: Call) -> Value | None:
    start, step = call.integer("start", default=0), call.integer("step", default=1)
    if call.dtype.is_floating_point or start is None or step is None:
        return None
    position = start + step * symbol_of(0, 1)
    return position if fits(position, call.dtype, call.domain) else None


def _filled_with(number: Number) -> Rule:
    return lambda call: constant_value(number, call.dtype)


def _full(call: Call) -> Value | None:
    filled = value(call.arguments["s" if "s" in call.arguments else "fill_value"])
    if isinstance(filled, torch.SymInt):
        size = size_expr(filled)
        return size if fits(size, call.dtype, call.domain) else None
    return constant_value(filled, call.dtype)


def _triangle(*, lower: bool) -> Rule:
    def rule(call: Call) -> Value | None:
        diagonal = call.integer("diagonal", default=0)
        if diagonal is None:
            return None
        # A dimension that is 1 long still has its index, 0, in the comparison.
        offset = index_symbol(0) - index_symbol(1) - diagonal
        kept = offset <= 0 if lower else offset >= 0
        zero = Choice.constant(0)
        return select(kept, call.operand("self"), zero, call)

    return rule


def _diff(call: Call) -> Value | None:
    """First differences of an affine value, with the value at index -1 prepended.

    transformers looks for packed sequences with them: positions that do not step by one.
    """
    values, arguments = call.value_of("self"), call.arguments
    if arguments["n"] != 1 or arguments["prepend"] is None or arguments["append"] is not None:
        return None
    before, shape = call.value_of("prepend"), call.shape_of("self")
    one_prepended = broadcasts_to(shape, call.shape) and broadcasts_to(call.shape, shape)
    if not one_prepended or not is_affine(values) or not is_affine(before):
        return None
    index = symbol_of(arguments["dim"] % call.rank, call.rank)
    if sympy.expand(before - values.xreplace({index: -sympy.S.One})) != 0:
        return None
    result = sympy.expand(values - values.xreplace({index: index - 1}))
    return result if fits(result, call.dtype, call.domain) else None


def _cumsum(call: Call) -> Value | None:
    """Only the sum of nothing."""
    empty = nonzero(call.value_of("self")) == sympy.false
    return constant_value(0, call.dtype) if empty else None


POSITION_RULES: dict[Any, Rule] = {
    aten.arange: _arange,
    aten.zeros: _filled_with(0),
    aten.new_zeros: _filled_with(0),
    aten.zeros_like: _filled_with(0),
    aten.ones: _filled_with(1),
    aten.new_ones: _filled_with(1),
    aten.ones_like: _filled_with(1),
    aten.full: _full,
    aten.new_full: _full,
    aten.full_like: _full,
    aten.scalar_tensor: _full,
    aten.tril: _triangle(lower=True),
    aten.triu: _triangle(lower=False),
    aten.diff: _diff,
    aten.cumsum: _cumsum,
}
