"""Nodes that nobody reads leave the graph, if all they do is compute."""

import operator

import torch
from torch import fx

from flashsvd_compile.analysis.calls import aten, is_aten, overload


def erase_dead(graph: fx.Graph) -> None:
    """Remove what nobody reads and what changes nothing: no mutation, no random numbers."""
    for node in reversed(graph.nodes):
        if not node.users and node.op == "call_function" and _is_pure(node):
            graph.erase_node(node)


def _is_pure(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not (is_aten(node) or getattr(node.target, "namespace", "") == "flashsvd"):
        return False
    op = overload(node)
    seeded = torch.Tag.nondeterministic_seeded in op.tags
    harmless = op.overloadpacket is aten.dropout and not node.args[2]
    return not op._schema.is_mutable and (not seeded or harmless)
