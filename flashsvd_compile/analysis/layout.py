"""What layout operators do to axes: which atoms each output dimension holds, and what was cut.

Six kinds cover every spelling of moving heads and cutting fused projections:

    regroup    view, reshape, flatten, squeeze, contiguous, casts: row-major order is kept
    permute    transpose, permute, movedim, t, mT: dimensions change places
    cut        slice, select, narrow, split, chunk, unbind: part of one dimension is kept
    expand     a dimension of size 1 is repeated
    repeat     a dimension is repeated as a whole, or element by element (repeat_interleave)
    pick       indexing by constants: a cut, repeated in either way
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flashsvd_compile.analysis.axes import (
    Atom,
    AxisSpace,
    Dim,
    Dims,
    Size,
    quotient,
    same,
    shape_of,
    size_of,
    volume,
)
from flashsvd_compile.analysis.calls import arguments, aten, overload, packet, value
from flashsvd_compile.analysis.picks import Pick, read_pick

_REGROUPS = {
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze,
    aten.unsqueeze, aten.view_as, aten.reshape_as, aten.contiguous, aten.clone,
    aten.alias, aten.lift_fresh_copy, aten.ravel,
}  # fmt: skip
_CASTS = {aten.to, aten._to_copy, aten.type_as, aten._autocast_to_full_precision,
          aten._autocast_to_reduced_precision}  # fmt: skip
_PERMUTES = {
    aten.permute, aten.transpose, aten.t, aten.numpy_T, aten.mT, aten.mH, aten.adjoint,
    aten.matrix_H, aten.movedim, aten.moveaxis, aten.swapaxes, aten.swapdims,
}  # fmt: skip
_CUTS = {
    aten.slice, aten.select, aten.narrow, aten.split, aten.split_with_sizes, aten.chunk,
    aten.unsafe_chunk, aten.unsafe_split, aten.unsafe_split_with_sizes, aten.unbind,
    aten.tensor_split,
}  # fmt: skip
_EXPANDS = {aten.expand, aten.expand_as, aten.broadcast_to}
_REPEATS = {aten.repeat, aten.tile, aten.repeat_interleave}


@dataclass(frozen=True)
class Cut:
    """``atom[start : start + length]`` was kept as ``kept``; as no atom if ``length`` is 1."""

    atom: Atom
    start: Size
    kept: Atom | None


@dataclass(frozen=True)
class Moved:
    """One output of a layout operator: its dimensions, and what was cut from the input."""

    dims: Dims
    cut: Cut | None = None


def is_layout(node: fx.Node) -> bool:
    """Does ``node`` only rearrange, cut, repeat or cast the elements of its first argument?"""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is aten.view.dtype:
        return False
    if packet(node) is aten.repeat_interleave and not _is_even_interleave(node):
        return False
    kinds = (_REGROUPS, _CASTS, _PERMUTES, _CUTS, _EXPANDS, _REPEATS)
    return any(packet(node) in kind for kind in kinds) or read_pick(node) is not None


def keeps_order(node: fx.Node) -> bool:
    """Are the output's elements the input's, all of them, in the same row-major order?"""
    return is_layout(node) and (packet(node) in _REGROUPS or packet(node) in _CASTS)


def apply_layout(space: AxisSpace, node: fx.Node, dims: Dims) -> list[Moved] | None:
    """The outputs of the layout operator ``node`` over an input with ``dims``.

    One entry for each output tensor (``split`` and its kin have several). None where the atoms do
    not divide: what was known of the input does not carry over.
    """
    outputs = value(node)
    tensors = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    if any(size == 0 for tensor in tensors for size in shape_of(tensor)):
        return None
    if keeps_order(node):
        grouped = space.regroup(dims, shape_of(tensors[0]))
        return None if grouped is None else [Moved(grouped)]
    if packet(node) in _PERMUTES:
        return [Moved(tuple(dims[i] for i in _permutation(node, len(dims))))]
    if packet(node) in _EXPANDS:
        return _expand(dims, shape_of(value(arguments(node)["self"])), shape_of(tensors[0]))
    if packet(node) in _REPEATS:
        inside = packet(node) is aten.repeat_interleave
        return _repeat(dims, shape_of(value(arguments(node)["self"])), shape_of(tensors[0]), inside)
    if (pick := read_pick(node)) is not None:
        return _pick(space, pick, dims, shape_of(value(arguments(node)["self"])))
    return _cut(space, node, dims, [shape_of(tensor) for tensor in tensors])


def _permutation(node: fx.Node, rank: int) -> list[int]:
    """Read off the operator itself: permute a tensor whose sizes name its dimensions."""
    probe = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    with torch.utils._python_dispatch._disable_current_modes():
        moved = overload(node)(probe, *node.args[1:], **node.kwargs)
    return [int(size) - 2 for size in moved.shape]


def _expand(dims: Dims, before: Sequence[Size], after: Sequence[Size]) -> list[Moved]:
    new = len(after) - len(before)
    padded = ((),) * new + dims
    sizes = (sympy.Integer(1),) * new + tuple(before)
    return [
        Moved(
            tuple(
                dim if same(old, size) else (Atom(size, broadcast=True),)
                for dim, old, size in zip(padded, sizes, after, strict=True)
            )
        )
    ]


def _is_even_interleave(node: fx.Node) -> bool:
    return node.target is aten.repeat_interleave.self_int and arguments(node)["dim"] is not None


def _repeat(
    dims: Dims, before: Sequence[Size], after: Sequence[Size], inside: bool
) -> list[Moved] | None:
    """Each repetition is an atom along which the tensor does not vary, inside or outside."""
    new = len(after) - len(before)
    repeated: list[Dim] = []
    sizes = (sympy.Integer(1),) * new + tuple(before)
    for dim, old, size in zip(((),) * new + dims, sizes, after, strict=True):
        count = quotient(size, old)
        if count is None:
            return None
        copies: Dim = () if count == 1 else (Atom(count, broadcast=True),)
        repeated.append((*dim, *copies) if inside else (*copies, *dim))
    return [Moved(tuple(repeated))]


def _pick(space: AxisSpace, pick: Pick, dims: Dims, before: Sequence[Size]) -> list[Moved] | None:
    axis, length = pick.axis, sympy.Integer(pick.length)
    part = _keep(space, dims[axis], before[axis], pick.start, length)
    if part is None:
        return None
    kept, cut = part
    outer, inner = (
        (Atom(sympy.Integer(copies), broadcast=True),) if copies > 1 else ()
        for copies in (pick.outer, pick.inner)
    )
    return [Moved((*dims[:axis], (*outer, *kept, *inner), *dims[axis + 1 :]), cut)]


def _cut(
    space: AxisSpace, node: fx.Node, dims: Dims, shapes: list[tuple[Size, ...]]
) -> list[Moved] | None:
    named = arguments(node)
    axis = named["dim"] % len(dims)
    if named.get("step", 1) != 1:
        return _stride(space, named, dims, axis)
    drops = packet(node) in (aten.select, aten.unbind)
    whole = shape_of(value(named["self"]))[axis]
    lengths = [sympy.Integer(1) if drops else shape[axis] for shape in shapes]
    start = _start(named, axis)
    if start is None:
        return None
    moved = []
    for length in lengths:
        part = _keep(space, dims[axis], whole, start, length)
        if part is None:
            return None
        kept, cut = part
        middle = () if drops else (kept,)
        moved.append(Moved(dims[:axis] + middle + dims[axis + 1 :], cut))
        start = start + length
    return moved


def _stride(space: AxisSpace, named: dict[str, Any], dims: Dims, axis: int) -> list[Moved] | None:
    """``x[start::step]`` of a whole number of steps: one of ``step`` interleaved parts."""
    step, whole = size_of(value(named["step"])), shape_of(value(named["self"]))[axis]
    start, rows = _start(named, axis), quotient(whole, step)
    to_the_end = named["end"] is None or named["end"] == sys.maxsize
    if (
        rows is None
        or start is None
        or not to_the_end
        or not (start.is_nonnegative and (start < step) == sympy.true)
    ):
        return None
    parts = space.regroup((dims[axis],), (rows, step))
    if parts is None or len(parts[1]) != 1:
        return None
    return [Moved((*dims[:axis], parts[0], *dims[axis + 1 :]), Cut(parts[1][0], start, None))]


def _start(named: dict[str, Any], axis: int) -> Size | None:
    """Where the cut begins, from the front, or None where that cannot be proved.

    Torch lets one that begins before the first element begin there.
    """
    begin = value(named.get("start", named.get("index", 0))) or 0
    if isinstance(begin, torch.Tensor):  # narrow.Tensor: known at run time only
        return None
    if statically_known_true(begin >= 0):
        return size_of(begin)
    from_front = begin + value(named["self"]).shape[axis]
    if not statically_known_true(begin < 0):
        return None
    if statically_known_true(from_front >= 0):
        return size_of(from_front)
    return sympy.Integer(0) if statically_known_true(from_front < 0) else None


def _keep(
    space: AxisSpace, dim: tuple[Atom, ...], whole: Size, start: Size, length: Size
) -> tuple[tuple[Atom, ...], Cut | None] | None:
    if same(start, sympy.Integer(0)) and same(length, whole):
        return dim, None
    leaves = space.leaves(dim)
    if not leaves:
        return None
    outer, inner = leaves[0], leaves[1:]
    if inner:
        # A cut through a dimension of several atoms must fall on the outermost one's boundaries.
        width = volume(inner)
        outer_start, outer_length = quotient(start, width), quotient(length, width)
        if outer_start is None or outer_length is None:
            return None
        start, length = outer_start, outer_length
    if length == 1:
        return inner, Cut(outer, start, None)
    kept = space.narrow(outer, start, length)
    return (kept, *inner), Cut(outer, start, kept)
