"""A few nodes of a graph as a graph of their own, that can be compiled and run by itself.

    graph      …  h = gelu(linear(p, v1));  s = linear(h, u2);  y = linear(s, v2)  …
    fragment   def forward(x0, x1, x2):  …  return linear(gelu(linear(x0, x1)), x2)

What they read from elsewhere becomes an input. Sizes that are symbols become their example values.
"""

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from flashsvd_compile.analysis.calls import is_tensor, value
from flashsvd_compile.tuning.operands import Operand, numbers_of, operand_like


@dataclass(frozen=True)
class Fragment:
    """``inputs``: what ``module`` takes, in order; ``names``: of the nodes that they stand for."""

    module: fx.GraphModule
    inputs: tuple[Operand, ...]
    names: tuple[str, ...]
    device: torch.device

    @property
    def input_bytes(self) -> int:
        return sum(x.elements * x.dtype.itemsize for x in self.inputs)

    def allocate(self) -> list[Tensor]:
        """Fresh inputs: normal over the root of their last size.

        The same ones at each call, and in each fragment that reads them.
        """
        generator = torch.Generator(self.device)
        found = []
        for x, name in zip(self.inputs, self.names, strict=True):
            generator.manual_seed(zlib.crc32(name.encode()))
            found.append(x.allocate(x.shape[-1] ** -0.5 if len(x.shape) > 1 else 1.0, generator))
        return found

    @cached_property
    def text(self) -> str:
        """The same for fragments that are the same computation on tensors alike."""
        return f"{self.inputs}\n{self.module.code}"


def fragment_of(
    targets: Sequence[fx.Node],
    inside: Collection[fx.Node],
    instead: Mapping[fx.Node, fx.Node],
) -> Fragment | None:
    """What computes ``targets`` by the nodes ``inside``, from whatever those read.

    ``instead``: what is to be read in place of some nodes. None where an input is no tensor, is
    empty, or has a size without an example value.
    """
    needed = _needed(targets, inside, instead)
    graph, copies = fx.Graph(), dict[fx.Node, Any]()
    inputs: dict[str, Operand] = {}
    for node in _outside(needed, inside, instead):
        if isinstance(value(node), torch.SymInt):
            known = numbers_of([value(node)])
            if known is None:
                return None
            copies[node] = known[0]
            continue
        operand = operand_like(value(node)) if is_tensor(node) else None
        if operand is None:
            return None
        copies[node] = graph.placeholder(f"x{len(inputs)}")
        inputs[node.name] = operand
    for count, node in enumerate(needed):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: copies[instead.get(n, n)])
        copies[node] = graph.create_node(node.op, node.target, args, kwargs, name=f"n{count}")
    graph.output(tuple(copies[instead.get(target, target)] for target in targets))
    device = value(targets[0]).device
    return Fragment(fx.GraphModule({}, graph), tuple(inputs.values()), tuple(inputs), device)


def _needed(
    targets: Sequence[fx.Node], inside: Collection[fx.Node], instead: Mapping[fx.Node, fx.Node]
) -> list[fx.Node]:
    """The nodes inside that ``targets`` take, each behind those that it reads."""
    found, pending = set[fx.Node](), list(targets)
    while pending:
        node = pending.pop()
        node = instead.get(node, node)
        if node in inside and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return sorted(found)


def _outside(
    needed: Sequence[fx.Node], inside: Collection[fx.Node], instead: Mapping[fx.Node, fx.Node]
) -> list[fx.Node]:
    """What ``needed`` read that is not inside, in the order in which it is read."""
    read = dict.fromkeys(instead.get(n, n) for node in needed for n in node.all_input_nodes)
    return [node for node in read if node not in inside]
