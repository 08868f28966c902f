"""The value of any tensor of a normalised graph as an expression of its indices (``predicates``).

    arange = aten.arange(7)                     n
    q = aten.unsqueeze(arange, 1)               m
    le = aten.le(arange, q)                     n <= m
    pad = aten.index(mask, [b_idx, k_idx])      mask(b, n) != 0
    both = aten.and(le, pad)                    (n <= m) & (mask(b, n) != 0)

What no rule follows is data. It is held constant along a dimension only where that is certain:
the dimension is provably 1 long, or the operator works element by element on operands that are.

Tensors whose memory the graph writes to are not followed: what a node is worth would depend on
when it is read. ``is_mutated`` says so, by the storage of the fake tensors, which views share.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from flashsvd_compile.analysis.calls import (
    constant,
    is_tensor,
    mutated_arguments,
    packet,
    tensor_inputs,
)
from flashsvd_compile.analysis.choices import Value, constant_value, is_oversized, substitute
from flashsvd_compile.analysis.predicates import is_one, symbol_of
from flashsvd_compile.analysis.symbolic_call import Call, opaque
from flashsvd_compile.analysis.symbolic_elementwise import (
    ELEMENTWISE_RULES,
    UNTAGGED_ELEMENTWISE,
    Rule,
)
from flashsvd_compile.analysis.symbolic_positions import POSITION_RULES
from flashsvd_compile.analysis.symbolic_views import VIEW_RULES

_RULES = ELEMENTWISE_RULES | POSITION_RULES | VIEW_RULES


class SymbolicValues:
    """Values of the nodes of one graph, each computed once.

    Meanwhile nodes may come that write to no memory, and take the place of others of equal worth.
    """

    def __init__(self, graph: fx.Graph):
        self._values: dict[fx.Node, Value] = {}
        self._mutated = {
            storage for node in graph.nodes for storage in map(_storage, _written_by(node))
        }

    def __getitem__(self, node: fx.Node) -> Value:
        if node not in self._values:
            for each in self.lineage(node):
                if each not in self._values:
                    self._values[each] = self._evaluate(each)
        return self._values[node]

    def lineage(self, node: fx.Node) -> list[fx.Node]:
        """``node`` and the tensors that its value is computed from, operands first."""
        finished: dict[fx.Node, None] = {}
        stack = [(node, iter(_followed(node)))]
        entered = {node}
        while stack:
            current, operands = stack[-1]
            operand = next((o for o in operands if o not in entered), None)
            if operand is None:
                finished[current] = None
                stack.pop()
            else:
                entered.add(operand)
                stack.append((operand, iter(_followed(operand))))
        return list(finished)

    def is_mutated(self, node: fx.Node) -> bool:
        return _storage(node) in self._mutated

    def _evaluate(self, node: fx.Node) -> Value:
        rule = _rule_of(node)
        call = Call(node, self._values)
        if node.op == "get_attr":
            value = constant_value(constant(node), node.meta["val"].dtype)
        else:
            value = rule(call) if rule is not None else None
        if value is None or is_oversized(value):
            value = call.elementwise_data() if _is_elementwise(node) else opaque(node)
        shape = node.meta["val"].shape
        ones = [dim for dim, size in enumerate(shape) if is_one(size)]
        return substitute(value, {symbol_of(dim, len(shape)): sympy.S.Zero for dim in ones})


def _rule_of(node: fx.Node) -> Rule | None:
    return _RULES.get(packet(node)) if node.op == "call_function" and is_tensor(node) else None


def _is_elementwise(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload) or not is_tensor(node):
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    return torch.Tag.pointwise in node.target.tags or packet(node) in UNTAGGED_ELEMENTWISE


def _followed(node: fx.Node) -> list[fx.Node]:
    """The tensors that the node's value is read from; none where it is data in any case."""
    return tensor_inputs(node) if _rule_of(node) is not None or _is_elementwise(node) else []


def _written_by(node: fx.Node) -> list[fx.Node]:
    """The tensors whose memory the node may write to."""
    if node.target is torch.ops.aten.detach_.default:
        return []  # changes what autograd knows, not the data
    if node.op in ("placeholder", "get_attr", "output") or isinstance(node.target, OpOverload):
        return [n for n in mutated_arguments(node) if is_tensor(n)]
    # A higher-order operator or an unknown callable may write to anything it is given.
    return tensor_inputs(node)


def _storage(node: fx.Node) -> int:
    """Fake tensors that share memory share a storage."""
    return node.meta["val"].untyped_storage()._cdata
