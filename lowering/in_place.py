"""In-place operators on memory that only they use → their ordinary selves.

    before   h = linear(p, v);  relu_(h);      s = linear(h, u)
    after    h = linear(p, v);  r = relu(h);   s = linear(r, u)

Only where nothing tells the difference: ``h`` is a fresh result of an operator of the graph, and
no other tensor shares its memory (a view made before would see the write). Everything that ran
after the write reads the new tensor, whatever ran before keeps the old one.
"""

import torch
from flashsvd_compile.lowering.builder import Builder
from torch import fx

from flashsvd_compile.analysis.calls import (
    aliased_argument,
    aten,
    is_tensor,
    mutated_arguments,
    overload,
    packet,
    value,
)
from flashsvd_compile.analysis.pointwise import is_pointwise_operator


def free_in_place(graph: fx.Graph) -> None:
    """Rewrite, in place, the in-place elementwise operators of ``graph`` that may be."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        ordinary = _ordinary(node)
        if ordinary is None:
            continue
        target = node.args[0]
        if isinstance(target, fx.Node) and _is_private(target, node):
            _replace(node, target, ordinary, order)


def _ordinary(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that computes what the in-place ``node`` writes, if it is elementwise."""
    if node.op != "call_function" or not mutated_arguments(node):
        return None
    name = packet(node).__name__
    found = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    ordinary = getattr(found, overload(node)._overloadname, None)
    if ordinary is None or not (is_pointwise_operator(ordinary) or found is aten.dropout):
        return None
    return ordinary


def _is_private(target: fx.Node, node: fx.Node) -> bool:
    """Is ``target`` fresh memory of the graph's own that no other tensor can share with it?"""
    if target.op != "call_function" or not isinstance(target.target, torch._ops.OpOverload):
        return False
    if not is_tensor(target) or aliased_argument(target) is not None:
        return False
    return all(user is node or aliased_argument(user) is not target for user in target.users)


def _replace(
    node: fx.Node, target: fx.Node, ordinary: torch._ops.OpOverload, order: dict[fx.Node, int]
) -> None:
    builder = Builder(node)
    result = builder.call(ordinary, *node.args, **node.kwargs)
    result = builder.cast(result, value(target).dtype)
    later = {user for user in target.users if order.get(user, -1) > order[node]}
    target.replace_all_uses_with(result, delete_user_cb=later.__contains__)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
