"""A graph as it would be with other nodes in the places of some: what memory is planned on.

A plan takes the place of a site's result and reads latents, or what they are made of; what nobody
reads any more is gone. Nothing is rewritten to see how much the graph would then hold.
"""

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import Size


@dataclass(frozen=True)
class Lowered:
    """What is known of an operator of ours: the nodes it reads and what it holds for itself.

    ``is_early``: its result is allocated before what it reads, by a compiler that sees an
    allocation that waits for nothing.
    """

    reads: tuple[fx.Node, ...]
    scratch_bytes: Size = sympy.S.Zero
    is_early: bool = False


class GraphView:
    """``graph`` with each node of ``lowered`` reading what that says, and without dead nodes.

    ``written``: formulas that will lie in memory, whoever reads them.
    """

    def __init__(
        self,
        graph: fx.Graph,
        lowered: Mapping[fx.Node, Lowered],
        written: Container[fx.Node] = frozenset(),
    ) -> None:
        self.lowered, self.written = lowered, written
        alive: set[fx.Node] = set()
        pending = [n for n in graph.nodes if n.op in ("placeholder", "output") or n.is_impure()]
        while pending:
            node = pending.pop()
            if node not in alive:
                alive.add(node)
                pending += self.inputs(node)
        self.nodes = [node for node in graph.nodes if node in alive]

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        found = self.lowered.get(node)
        return node.all_input_nodes if found is None else list(found.reads)

    def readers(self) -> Counter[fx.Node]:
        """How many nodes read each."""
        return Counter(source for node in self.nodes for source in self.inputs(node))
