"""Where a symbolic size stands in a graph: a node that is it, or a tensor's dimension.

Many places ask for the same few sizes, so each is looked for once: a search passes every node.
"""

from dataclasses import dataclass

import torch
from torch import fx

from flashsvd_compile.analysis.axes import Size, same, size_of
from flashsvd_compile.analysis.calls import is_tensor, value


@dataclass(frozen=True)
class SizeHolder:
    """``node`` is the size itself, or the size is that of its dimension ``dim``."""

    node: fx.Node
    dim: int | None = None


class KnownSizes:
    """Sizes of one graph, to which nodes may be added while it is asked.

    Of the nodes that were there before, placeholders and symbolic numbers must stay.
    """

    def __init__(self) -> None:
        self._found: dict[Size, SizeHolder] = {}

    def before(self, anchor: fx.Node, size: Size, *, inputs_only: bool) -> SizeHolder | None:
        """The first node ahead of ``anchor`` that holds ``size``, which is no plain number.

        ``inputs_only``: of tensors only those count that come from outside the graph.
        """
        known = self._found.get(size)
        if known is not None and known.node < anchor:
            return known
        for node in anchor.graph.nodes:
            if node is anchor:
                return None
            if (holder := _holder(node, size, inputs_only)) is not None:
                if inputs_only:
                    self._found[size] = holder
                return holder
        return None


def _holder(node: fx.Node, size: Size, inputs_only: bool) -> SizeHolder | None:
    if isinstance(value(node), torch.SymInt):
        return SizeHolder(node) if same(size_of(value(node)), size) else None
    if is_tensor(node) and (node.op == "placeholder" or not inputs_only):
        for dim, length in enumerate(value(node).shape):
            if isinstance(length, torch.SymInt) and same(size_of(length), size):
                return SizeHolder(node, dim)
    return None
