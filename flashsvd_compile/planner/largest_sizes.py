"""The sizes that a memory budget has to hold for, and the guards that see to it.

A dynamic size is planned at what the user told (``max_batch`` for first dimensions of inputs,
``max_length`` for second ones), or at the size of the call that is compiled for. The graph is
guarded to sizes up to that: a larger call is planned anew.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import fx

from flashsvd_compile.analysis.axes import Size
from flashsvd_compile.analysis.calls import is_nested, is_tensor, stored, value
from flashsvd_compile.options import Options


def largest_sizes(graph: fx.Graph, options: Options, hints: Mapping[Size, int]) -> dict[Size, int]:
    """The largest value of each symbol of the graph's inputs; ``hints``: of the example call."""
    sizes = dict(hints)
    told = (options.max_batch, options.max_length)
    for node in graph.nodes:
        if node.op == "placeholder" and is_tensor(node) and not is_nested(node):
            for size, most in zip(value(node).shape, told, strict=False):
                if isinstance(size, torch.SymInt) and most is not None:
                    symbol = size.node.expr
                    sizes[symbol] = max(most, sizes.get(symbol, 0))
    return sizes


def hold_at_most(graph: fx.Graph, sizes: Mapping[Size, int]) -> None:
    """Guard each dynamic size to at most that of ``sizes``."""
    for size in _symbols(graph):
        most = sizes.get(size.node.expr)
        if most is not None:
            bool(size <= most)  # torch's own way to ask for a guard


def _symbols(graph: fx.Graph) -> Iterator[torch.SymInt]:
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        found = value(node)
        for size in stored(found).shape if is_tensor(node) else (found,):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                yield size
