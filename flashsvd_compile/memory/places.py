"""Which buffers a kernel reads at the very places where it writes its result.

    y = gelu(h)           reads h where y lies: y may be written on top of it
    y = h.mT.contiguous() reads h elsewhere, as does h + h.flip(0)

Inductor writes a result over what it reads for the last time only where every element is read at
the index at which it is written (torch 2.11 to 2.13, ``scheduler.SchedulerNode.can_inplace``), and
of several over the one that it reads first.
"""

from collections.abc import Iterable

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import Size, shape_of, size_of
from flashsvd_compile.analysis.calls import aten, is_tensor, packet, value

# What Inductor computes where it is read, and whose elements come from other places.
_MOVES = {
    aten.gather, aten.index, aten.index_select, aten.take_along_dim, aten.embedding, aten.flip,
    aten.roll, aten.repeat, aten.repeat_interleave, aten.constant_pad_nd, aten.pad,
}  # fmt: skip

_Layout = tuple[Size, ...]
_Reads = dict[tuple[fx.Node, _Layout], None]  # in the order in which they are read
_ELSEWHERE: _Layout = ()


class Places:
    """Of each node met so far, the buffers that it reads, each with the layout it is read in."""

    def __init__(self) -> None:
        self._read: dict[fx.Node, _Reads] = {}

    def add_buffer(self, node: fx.Node) -> None:
        self._read[node] = {(node, _layout(node)): None}

    def add_view(self, node: fx.Node, owner: fx.Node, is_formula: bool) -> None:
        """``node`` is a view of ``owner``, of which nothing lies in memory if ``is_formula``."""
        if is_formula:
            self._read[node] = self._as_read(owner, in_place=_layout(node) == _layout(owner))
        else:
            self._read[node] = {(owner, _layout(node)): None}

    def add_formula(self, node: fx.Node, inputs: Iterable[fx.Node]) -> None:
        """``node`` is computed element by element where it is read, if nothing else is said."""
        moves, shape = packet(node) in _MOVES, _shape(node)
        read: _Reads = {}
        for x in inputs:
            read |= self._as_read(x, in_place=not moves and _shape(x) == shape)
        self._read[node] = read

    def written_over(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The buffers that the formula ``node`` reads where it would be written, and only there,
        those first that it reads first."""
        layout, read = _layout(node), self._read[node]
        elsewhere = {owner for owner, its in read if its != layout}
        return tuple(owner for owner, _ in read if owner not in elsewhere)

    def _as_read(self, node: fx.Node, in_place: bool) -> _Reads:
        found = self._read.get(node, {})
        return found if in_place else dict.fromkeys((owner, _ELSEWHERE) for owner, _ in found)


def _shape(node: fx.Node) -> _Layout | None:
    return shape_of(value(node)) if is_tensor(node) else None


def _layout(node: fx.Node) -> _Layout:
    """Equal for tensors of which the first element lies in the same place, and so on; a dense
    tensor in the order of its sizes is told by its volume alone."""
    if not is_tensor(node):
        return _ELSEWHERE
    tensor = value(node)
    pairs = zip(map(size_of, tensor.shape), map(size_of, tensor.stride()), strict=True)
    dense: Size = sympy.S.One
    kept = [(size, stride) for size, stride in pairs if size != 1]
    for size, stride in reversed(kept):
        if sympy.expand(stride - dense) != 0:
            return tuple(number for pair in kept for number in pair)
        dense *= size
    return (sympy.expand(dense),)
