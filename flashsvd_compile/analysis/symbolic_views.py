"""Rules for operators that only move elements: each is a substitution of indices.

    transpose   value(h, m, n)        →  value(h, n, m)
    x[3:]       value(n)              →  value(n + 3)
    pad[b, k]   value_pad(m, n)       →  value_pad(b, n), for index tensors worth b and n

A value names its dimensions from the right, so ``expand`` and a ``view`` that adds or drops
dimensions of length 1 substitute symbols for symbols, if anything.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flashsvd_compile.analysis.calls import aten
from flashsvd_compile.analysis.choices import Value, dependence, is_affine, substitute
from flashsvd_compile.analysis.predicates import (
    Domain,
    broadcasts_to,
    index_symbol,
    is_one,
    size_expr,
    symbol_of,
)
from flashsvd_compile.analysis.symbolic_call import Call, data
from flashsvd_compile.analysis.symbolic_elementwise import Rule


def _expand(call: Call) -> Value | None:
    broadcasts = broadcasts_to(call.shape_of("self"), call.shape)
    return call.value_of("self") if broadcasts else None


def _reshape(call: Call) -> Value | None:
    """Dimensions of length 1 come and go; the others must stay, in order."""
    if "dtype" in call.arguments:
        return None  # view.dtype reinterprets bits
    before, after = call.shape_of("self"), call.shape
    sources = [dim for dim, size in enumerate(before) if not is_one(size)]
    targets = [dim for dim, size in enumerate(after) if not is_one(size)]
    if len(sources) != len(targets):
        return None
    pairs = list(zip(sources, targets, strict=True))
    if not all(statically_known_true(before[s] == after[t]) for s, t in pairs):
        return None
    return _moved(call, {s: symbol_of(t, len(after)) for s, t in pairs})


def _permute(call: Call) -> Value | None:
    return _reordered(call, [dim % call.rank for dim in call.arguments["dims"]])


def _swap(first: str, second: str) -> Rule:
    """Two dimensions, given by the arguments of these names."""

    def rule(call: Call) -> Value | None:
        order = list(range(call.rank))
        i, j = (call.arguments[name] % call.rank for name in (first, second))
        order[i], order[j] = j, i
        return _reordered(call, order)

    return rule


def _transpose_matrix(call: Call) -> Value | None:
    return _reordered(call, [1, 0]) if call.rank == 2 else None


def _reordered(call: Call, sources: list[int]) -> Value:
    """Dimension ``sources[t]`` of the argument becomes dimension t."""
    return _moved(call, {s: symbol_of(t, call.rank) for t, s in enumerate(sources)})


def _slice(call: Call) -> Value | None:
    before = call.shape_of("self")
    dim = call.arguments["dim"] % len(before)
    start, step = call.integer("start", default=0), call.integer("step", default=1)
    start = None if start is None else _from_the_front(call, start, dim)
    if start is None or step is None or step.is_positive is not True:
        return None
    rank = len(before)
    index = symbol_of(dim, rank)
    return _moved(call, {d: symbol_of(d, rank) for d in range(rank)} | {dim: start + step * index})


def _select(call: Call) -> Value | None:
    before = call.shape_of("self")
    dim = call.arguments["dim"] % len(before)
    index = call.integer("index", default=0)
    index = None if index is None else _from_the_front(call, index, dim)
    if index is None:
        return None
    rank = call.rank
    kept = {d: symbol_of(d if d < dim else d - 1, rank) for d in range(rank + 1) if d != dim}
    return _moved(call, kept | {dim: index})


def _from_the_front(call: Call, index: sympy.Expr, dim: int) -> sympy.Expr | None:
    """A start or an index that counts from the end, counted from the front.

    None where its sign is not known, or where it might lie before the front (torch clamps). A
    start behind the end leaves no element, about which anything may be said.
    """
    domain = Domain.of(call.shape_of("self"))
    if domain.is_nonnegative(index):
        return index
    counted = size_expr(call.shape_of("self")[dim]) + index
    return counted if index.is_negative and domain.is_nonnegative(counted) else None


def _moved(call: Call, indices: dict[int, sympy.Expr]) -> Value:
    """The argument's value with each of its dimensions read at the given index."""
    rank = len(call.shape_of("self"))
    mapping = {symbol_of(dim, rank): index for dim, index in indices.items()}
    return substitute(call.value_of("self"), mapping)


def _index(call: Call) -> Value | None:
    """``x[i, :, j]`` with integer tensors, in torch's order of dimensions.

    Where an index may be negative (it wraps) or is data, only the dependence is known.
    """
    tensor_rank = len(call.shape_of("self"))
    given = {d: i for d, i in enumerate(call.arguments["indices"]) if i is not None}
    tensors = {d: i.meta["val"] for d, i in given.items()}
    if any(t.dtype in (torch.bool, torch.uint8) for t in tensors.values()):
        return None
    block = max(t.dim() for t in tensors.values())
    rank = call.rank
    if rank != tensor_rank - len(given) + block:
        return None
    # The indices' own dimensions stand in the place of theirs if these are adjacent, else first.
    dims = sorted(given)
    adjacent = dims[-1] - dims[0] == len(dims) - 1
    first = dims[0] if adjacent else 0
    block_shape = call.shape[first : first + block]
    if not all(broadcasts_to(t.shape, block_shape) for t in tensors.values()):
        return None
    shift = {index_symbol(p): symbol_of(first + block - 1 - p, rank) for p in range(block)}
    kept = [d for d in range(tensor_rank) if d not in given]
    free = [d for d in range(rank) if not first <= d < first + block]
    reads: dict[int, Any] = {d: symbol_of(t, rank) for d, t in zip(kept, free, strict=True)}
    known = True
    for dim, node in given.items():
        value = call.values[node]
        known &= is_affine(value) and Domain.of(tensors[dim].shape).is_nonnegative(value)
        reads[dim] = substitute(value, shift)
    if known:
        return _moved(call, reads)
    needed = dependence(call.value_of("self"))
    varies = [reads[d] for d in range(tensor_rank) if symbol_of(d, tensor_rank) in needed]
    return data(call.node, sorted({s for read in varies for s in dependence(read)}, key=str))


VIEW_RULES: dict[Any, Rule] = {
    aten.expand: _expand,
    aten.expand_as: _expand,
    aten.view: _reshape,
    aten.view_as: _reshape,
    aten.reshape: _reshape,
    aten._unsafe_view: _reshape,
    aten.flatten: _reshape,
    aten.unflatten: _reshape,
    aten.unsqueeze: _reshape,
    aten.squeeze: _reshape,
    aten.permute: _permute,
    aten.transpose: _swap("dim0", "dim1"),
    aten.swapaxes: _swap("axis0", "axis1"),
    aten.t: _transpose_matrix,
    aten.numpy_T: _transpose_matrix,
    aten.slice: _slice,
    aten.select: _select,
    aten.index: _index,
}
