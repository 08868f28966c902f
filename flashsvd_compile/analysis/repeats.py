"""What a tensor holds more than once, before it was repeated."""

import torch
from torch import fx

from flashsvd_compile.analysis.axes import Atom
from flashsvd_compile.analysis.calls import value
from flashsvd_compile.analysis.facts import Facts
from flashsvd_compile.analysis.layout import is_layout


def unrepeated(facts: Facts, node: fx.Node, region: int) -> fx.Node:
    """What ``node`` holds more than once, before it was repeated: such as the keys of each group.

    A copy that repeats need not be written then. ``region``: of the graph, where it is read; a
    repeat in another one may stop gradients.
    """
    found = node
    while any(atom.broadcast for atom in facts.all_atoms(found)):
        source = found.args[0] if is_layout(found) else None
        if not isinstance(source, fx.Node) or source not in facts.axes or source in facts.mutated:
            return node
        if facts.regions[found] != region or _kind(source) != _kind(node):
            return node
        if _varying(facts, source) != _varying(facts, node):
            return node
        found = source
    return found


def _kind(node: fx.Node) -> tuple[torch.dtype, torch.device]:
    return value(node).dtype, value(node).device


def _varying(facts: Facts, node: fx.Node) -> set[Atom]:
    return {atom for atom in facts.all_atoms(node) if not atom.broadcast}
