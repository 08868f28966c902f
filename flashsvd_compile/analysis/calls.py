"""Reading a node of the graph: its arguments by name, its value, what it aliases or mutates."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

aten = torch.ops.aten


def is_aten(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == "aten"


def overload(node: fx.Node) -> OpOverload:
    """The operator that ``node`` calls; only for nodes known to call one."""
    assert isinstance(node.target, OpOverload)
    return node.target


def packet(node: fx.Node) -> Any:
    """The operator without its overload (``aten.add``), or the target itself."""
    return node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by the schema's names, with its defaults filled in."""
    named: dict[str, Any] = {}
    for position, argument in enumerate(overload(node)._schema.arguments):
        if position < len(node.args):
            named[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value if argument.has_default_value() else None
    return named


def value(node: Any) -> Any:
    """The traced value of an argument: a fake tensor, a symbol, or the constant itself."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def is_nested(node: Any) -> bool:
    """Is ``node`` a nested tensor, one dimension of which has a length for every entry?"""
    return is_tensor(node) and value(node).is_nested


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """Where the numbers of ``tensor`` lie: side by side in a tensor of its own if it is nested."""
    found: Any = tensor
    return found._values if tensor.is_nested else tensor


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.all_input_nodes if is_tensor(argument)]


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """Nodes that ``node`` writes into."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return []
    named = arguments(node)
    written = [
        named[a.name]
        for a in node.target._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    ]
    return [n for n in pytree.tree_leaves(written) if isinstance(n, fx.Node)]


# They may hand back their argument, and their schemas do not tell.
_UNDECLARED_ALIASES = {
    aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout,
    aten.type_as, aten.einsum,
}  # fmt: skip


def aliased_argument(node: fx.Node) -> fx.Node | None:
    """The node whose memory the result may share, as the operator's schema declares it."""
    if not isinstance(node.target, OpOverload):
        source = node.args[0] if node.target is operator.getitem else None
        return source if isinstance(source, fx.Node) else None
    if packet(node) in _UNDECLARED_ALIASES:
        return node.all_input_nodes[0]
    if not any(r.alias_info is not None for r in node.target._schema.returns):
        return None
    named = arguments(node)
    for argument in node.target._schema.arguments:
        if argument.alias_info is not None and isinstance(named[argument.name], fx.Node):
            return named[argument.name]
    return None


def constant(node: Any) -> float | None:
    """The number that ``node`` is in every run, else None.

    A Python float that Dynamo made symbolic counts as the number that it is now, unguarded: under
    dynamic shapes the scales that modules hold are symbolic, too. What becomes of a graph may rest
    on it only after ``pin_floats``.
    """
    number = _constant(node)
    if number is None or not is_tensor(node):
        return number
    return float(torch.tensor(number, dtype=torch.float64).to(value(node).dtype))


def _constant(node: Any) -> float | None:
    if isinstance(node, bool):
        return None
    if isinstance(node, (int, float)):
        return float(node)
    if not isinstance(node, fx.Node) or node.meta.get("mutated"):
        return None
    traced = node.meta.get("val")
    if isinstance(traced, torch.SymFloat):
        return None if traced.node.hint is None else float(traced.node.hint)
    if node.op == "get_attr":
        return _constant_tensor(node)
    if node.op != "call_function" or not is_aten(node):
        return None
    named = arguments(node)
    if packet(node) in (aten.full, aten.full_like, aten.new_full):
        return constant(named["fill_value"])
    if packet(node) is aten.scalar_tensor:
        return constant(named["s"])
    if packet(node) in (aten.zeros, aten.zeros_like, aten.new_zeros):
        return 0.0
    if packet(node) in (aten.ones, aten.ones_like, aten.new_ones):
        return 1.0
    if packet(node) in (aten.lift_fresh_copy, aten.to, aten._to_copy, aten.expand, aten.detach):
        return constant(node.args[0])
    return None


def pin_floats(nodes: Iterable[fx.Node]) -> None:
    """Guard every symbolic float that ``nodes`` read as a number: it stays as ``constant`` told.

    Each new value of a guarded float costs a compile, so this is for the nodes of sites alone.
    """
    pending = [source for node in nodes for source in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if constant(node) is None:
            continue
        if isinstance(value(node), torch.SymFloat):
            float(value(node))  # torch's own way to ask for a guard
        else:
            pending += node.all_input_nodes  # a tensor filled with it


def _constant_tensor(node: fx.Node) -> float | None:
    """A scalar tensor that the model's code made, held by the graph itself."""
    owner = node.graph.owning_module
    held = getattr(owner, str(node.target), None)
    if not isinstance(held, torch.Tensor) or isinstance(held, torch.nn.Parameter):
        return None
    return float(held) if held.dim() == 0 and type(held) is torch.Tensor else None
