"""Writing nodes into a graph: traced values for each, sizes as nodes, tensors by their atoms."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.utils._sympy.functions import FloorDiv

from flashsvd_compile.analysis.axes import AxisSpace, Dim, Size, same, shape_of, size_of, volume
from flashsvd_compile.analysis.calls import aten, value
from flashsvd_compile.analysis.factored import Bias, Labelled, expose
from flashsvd_compile.analysis.known_sizes import KnownSizes


class Builder:
    """Inserts nodes before ``anchor``; each gets its fake value and the anchor's origin.

    ``instead``: nodes that the graph no longer has, and what stands in their places. ``sizes``:
    shared by the builders of one pass, so that each size is looked for once.
    """

    def __init__(
        self,
        anchor: fx.Node,
        space: AxisSpace | None = None,
        instead: Mapping[fx.Node, fx.Node] = MappingProxyType({}),
        sizes: KnownSizes | None = None,
    ) -> None:
        self.space = space or AxisSpace()
        self._instead = instead
        self._sizes = sizes or KnownSizes()
        self._anchor = anchor
        self._graph = anchor.graph
        self._fake_mode = detect_fake_mode(value(anchor))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self._graph.inserting_before(self._anchor):
            node = self._graph.call_function(target, args, kwargs)
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), value)
        with self._fake_mode or nullcontext():
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        for key in ("stack_trace", "nn_module_stack"):
            if key in self._anchor.meta:
                node.meta[key] = self._anchor.meta[key]
        return node

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if value(node).dtype == dtype else self.call(aten.to.dtype, node, dtype)

    def times(self, node: fx.Node, factor: float) -> fx.Node:
        return node if factor == 1 else self.call(aten.mul.Tensor, node, factor)

    def fold(self, combine: Any, nodes: Iterable[fx.Node]) -> fx.Node | None:
        """``combine`` over all nodes, left to right; None where there are none."""
        result: fx.Node | None = None
        for node in list(nodes):
            result = node if result is None else self.call(combine, result, node)
        return result

    def bias(self, biases: Iterable[Bias], atoms: Dim, dtype: torch.dtype) -> fx.Node | None:
        """The sum of ``biases`` as a vector along ``atoms``; None where there are none."""
        terms = []
        for bias in biases:
            node = self.cast(self.arrange(bias.tensor, [atoms]), dtype)
            terms.append(self.times(node, bias.scale))
        return self.fold(aten.add.Tensor, terms)

    # ---- sizes ----------------------------------------------------------------------------------

    def size(self, size: Size) -> Any:
        """``size`` as a number, or as a node that computes it from sizes known before here.

        Raises LookupError where no tensor's sizes lead to it.
        """
        if isinstance(size, sympy.Integer):
            return int(size)
        if (node := self._known_size(size)) is not None:
            return node
        if isinstance(size, (sympy.Add, sympy.Mul)):
            combine = operator.add if isinstance(size, sympy.Add) else operator.mul
            result, *rest = (self.size(term) for term in size.args)
            for term in rest:
                result = self.call(combine, result, term)
            return result
        if isinstance(size, FloorDiv):
            return self.call(operator.floordiv, *map(self.size, size.args))
        if isinstance(size, sympy.Pow) and isinstance(size.exp, sympy.Integer) and size.exp > 1:
            return self.call(operator.pow, self.size(size.base), int(size.exp))
        if (node := self._known_size(size, inputs_only=False)) is not None:
            return node
        raise LookupError(f"no tensor of the graph has a size from which {size} can be computed")

    def layout(self, traced: torch.Tensor) -> tuple[list[Any], list[Any]]:
        """The sizes and strides of ``traced``, as `size` gives them; raises LookupError as it."""
        sizes, strides = (
            [self.size(size_of(number)) for number in numbers]
            for numbers in (traced.shape, traced.stride())
        )
        return sizes, strides

    def traced_size(self, size: Size) -> int | torch.SymInt:
        """``size`` as tracing sees it."""
        return value(self.size(size))

    def _known_size(self, size: Size, inputs_only: bool = True) -> fx.Node | None:
        holder = self._sizes.before(self._anchor, size, inputs_only=inputs_only)
        if holder is None or holder.dim is None:
            return None if holder is None else holder.node
        return self.call(aten.sym_size.int, holder.node, holder.dim)

    # ---- tensors by their atoms -----------------------------------------------------------------

    def arrange(self, tensor: Labelled, groups: Sequence[Dim]) -> fx.Node:
        """``tensor`` with one dimension for each group of atoms, in that order.

        An atom that the tensor does not vary along is repeated without copying if the group marks
        it as broadcast, and must not be in a group else. A view wherever strides allow one.
        """
        node, dims = self._stacked(tensor), list(tensor.dims)
        for cut in tensor.cuts:
            node, dims = self._cut(node, dims, cut.atom, cut.start, cut.kept)
        node, atoms = self._leaves(node, dims)
        wanted = [a for group in groups for a in self.space.leaves(group)]
        order = [atoms.index(a) for a in wanted if not a.broadcast]
        if order != list(range(len(atoms))):
            node = self.call(aten.permute.default, node, order)
        if any(a.broadcast for a in wanted):
            node = self.reshape(node, [sympy.Integer(1) if a.broadcast else a.size for a in wanted])
            node = self.call(aten.expand.default, node, [self.size(a.size) for a in wanted])
        return self.reshape(node, [volume(self.space.leaves(group)) for group in groups])

    def _stacked(self, tensor: Labelled) -> fx.Node:
        nodes = [self._instead.get(node, node) for node in tensor.nodes]
        return nodes[0] if len(nodes) == 1 else self.call(aten.stack.default, nodes, 0)

    def _cut(
        self, node: fx.Node, dims: list[Dim], atom: Any, start: Size, kept: Any
    ) -> tuple[fx.Node, list[Dim]]:
        exposed = [expose(self.space, dim, atom) for dim in dims]
        flat: list[Dim] = [(a,) for dim in exposed for a in dim]
        node = self.reshape(node, [volume(dim) for dim in flat])
        axis = flat.index((atom,))
        if kept is None:
            node = self.call(aten.select.int, node, axis, self.size(start))
            return node, flat[:axis] + flat[axis + 1 :]
        stop = self.size(start + kept.size)
        node = self.call(aten.slice.Tensor, node, axis, self.size(start), stop)
        return node, [*flat[:axis], (kept,), *flat[axis + 1 :]]

    def _leaves(self, node: fx.Node, dims: Sequence[Dim]) -> tuple[fx.Node, list[Any]]:
        """One dimension for each finest atom; along broadcast ones the first element stands."""
        atoms = [a for dim in dims for a in self.space.leaves(dim)]
        node = self.reshape(node, [a.size for a in atoms])
        for axis in reversed(range(len(atoms))):
            if atoms[axis].broadcast:
                node = self.call(aten.select.int, node, axis, 0)
        return node, [a for a in atoms if not a.broadcast]

    def reshape(self, node: fx.Node, shape: Sequence[Size]) -> fx.Node:
        """``node`` in another shape: itself if it has that one, a view wherever strides allow."""
        now = shape_of(value(node))
        if len(now) == len(shape) and all(map(same, now, shape)):
            return node
        return self.call(aten.reshape.default, node, [self.size(size) for size in shape])
