"""A call of an operator in a graph, made again with operands of its own: real, random, as large.

Of the graph only shapes, strides, dtypes and numbers are read. Operands have values at which
results stay of order 1: latents are normal, factors normal over the root of their last dimension,
masks hide nothing, so that all work is done.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from flashsvd_compile.analysis.calls import value
from flashsvd_compile.lowering.tiled import TILED, Cut, TiledOperator
from flashsvd_compile.tuning.operands import Operand, numbers_of, operand_like


@dataclass(frozen=True)
class ExampleCall:
    """One call of ``target``, operands by name."""

    target: torch._ops.OpOverload
    operator: TiledOperator
    operands: Mapping[str, Operand]
    numbers: Mapping[str, Any]
    device: torch.device

    @property
    def name(self) -> str:
        return self.target._schema.name.split("::")[-1]

    @property
    def memory_bytes(self) -> int:
        return sum(o.elements * o.dtype.itemsize for o in self.operands.values())

    def cut(self, cut: Cut, count: int) -> "ExampleCall":
        """The first ``count`` of its results."""
        operands = {
            name: o.shortened(cut.operands[name], count) if name in cut.operands else o
            for name, o in self.operands.items()
        }
        return replace(self, operands=operands)

    def results(self, cut: Cut) -> int:
        """How many there are along it."""
        name, dim = next(iter(cut.operands.items()))
        return self.operands[name].shape[dim]

    def first_operands(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of `allocate`'s what the few results that are enough to compare are computed from."""
        named = dict(zip(self.operator.tensors, tensors, strict=True))
        for cut in self.operator.cuts:
            for name, dim in cut.operands.items():
                if (tensor := named[name]) is not None:
                    named[name] = tensor.narrow(dim, 0, min(cut.checked, tensor.shape[dim]))
        return list(named.values())

    def first_results(self, out: Tensor) -> Tensor:
        """Those of a whole result."""
        for cut in self.operator.cuts:
            out = out.narrow(cut.dim, 0, min(cut.checked, out.shape[cut.dim]))
        return out

    def allocate(self) -> list[Tensor | None]:
        """Fresh operands in the operator's order, the same ones at each call."""
        generator = torch.Generator(self.device).manual_seed(0)
        found: list[Tensor | None] = []
        for name in self.operator.tensors:
            operand = self.operands.get(name)
            scale = 1.0
            if name == "mask":
                scale = 0.0
            elif operand is not None and name not in self.operator.sizes:
                scale = operand.shape[-1] ** -0.5 if len(operand.shape) > 1 else 1.0
            found.append(None if operand is None else operand.allocate(scale, generator))
        return found

    def key(self) -> dict[str, Any]:
        """What its time depends on, sizes rounded up to powers of two."""
        tensors = {}
        for name, operand in self.operands.items():
            sizes = self.operator.sizes.get(name, 0)
            rounded = [_power_of_two(n) if i < sizes else n for i, n in enumerate(operand.shape)]
            tensors[name] = [str(operand.dtype), rounded, operand.alignment]
        numbers = {k: v for k, v in self.numbers.items() if not isinstance(v, float)}
        return {"operator": self.name, "tensors": tensors, "numbers": numbers}


def example_of(node: fx.Node) -> ExampleCall | None:
    """The call of a node whose target is in `TILED`; None where a size has no example value."""
    target: Any = node.target
    operator = TILED[target._schema.name.split("::")[-1]]
    values = dict(
        zip(operator.tensors, fx.map_arg(node.args, lambda n: n.meta["val"]), strict=False)
    )
    given = {name: x for name, x in values.items() if x is not None}
    operands = {}
    for name, tensor in given.items():
        if (operand := operand_like(tensor)) is None:
            return None
        operands[name] = operand
    numbers = {name: x for name, x in node.kwargs.items() if name != "tile"}
    for name, size in numbers.items():
        if isinstance(size, fx.Node):
            if (known := numbers_of([value(size)])) is None:
                return None
            numbers[name] = known[0]
    device = next(iter(given.values())).device
    return ExampleCall(target, operator, operands, numbers, device)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
