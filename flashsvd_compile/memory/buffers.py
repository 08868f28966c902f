"""Which nodes of a graph own memory once Inductor has compiled it, and which are formulas.

    y = gelu(x @ w);  z = layer_norm(y + r);  p = z @ u

x @ w, z and p lie in memory: matmuls and other library calls read and write whole tensors. gelu,
the sum and the norm's statistics do not: elementwise operators and reductions are computed where
they are read, by the kernel that writes z.

The rules are Inductor's (torch 2.11 to 2.13, ``ir.StorageBox.should_realize_on_reuse``,
``ir.ExternKernel`` and ``lowering.cat``): what a library call reads or the graph returns is
written; so is what several read, if computing it loads more than four tensors, anything that loads
more than eight, and the result of a reduction. What is concatenated is written side by side, or, on
a GPU where only elementwise operators read it, computed where it is read.
"""

import operator
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from flashsvd_compile.analysis.axes import Size, same, size_of
from flashsvd_compile.analysis.calls import (
    aliased_argument,
    arguments,
    aten,
    is_aten,
    overload,
    packet,
    stored,
    value,
)
from flashsvd_compile.analysis.pointwise import is_pointwise
from flashsvd_compile.memory.places import Places
from flashsvd_compile.memory.view import GraphView

# ``torch._inductor.config.realize_reads_threshold`` and ``realize_acc_reads_threshold``.
MOST_LOADS_OF_SHARED = 4
MOST_LOADS = 8
# ``torch._inductor.config.max_complex_pointwise_cat_inputs``.
MOST_JOINED = 8

_JOINS = {aten.cat, aten.concat, aten.concatenate}
# What Inductor computes where it is read, beside all that torch tags as elementwise or reduction.
_FUSED = {
    aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten.group_norm, aten.native_group_norm,
    aten.batch_norm, aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax,
    aten.embedding, aten.where, aten.arange, aten.full, aten.full_like, aten.new_full, aten.zeros,
    aten.zeros_like, aten.new_zeros, aten.ones, aten.ones_like, aten.new_ones, aten.empty,
    aten.empty_like, aten.new_empty, aten.scalar_tensor, aten.lift_fresh_copy, aten.to,
    aten._to_copy, aten.type_as, aten.clone, aten.contiguous, aten.copy, aten.reshape, aten.flatten,
    aten.unflatten, aten.dropout, aten.feature_dropout, aten.detach, aten.alias, aten.masked_fill,
    aten.tril, aten.triu, aten.constant_pad_nd, aten.pad, aten.gather, aten.index,
    aten.index_select, aten.repeat, aten.repeat_interleave, aten.flip, aten.roll, aten.mean,
    aten.sum, aten.var, aten.std, aten.amax, aten.amin, aten.any, aten.all, aten.eye,
    aten.one_hot, aten.logical_and, aten.logical_or, aten.logical_not, aten.square, aten.rsub,
    aten.glu, aten.addcmul, aten.expand, aten.movedim, aten.take_along_dim, aten.linspace,
    *_JOINS,
}  # fmt: skip
# What gives back its argument, or a view of it, where it can, and a copy else.
_VIEWS_AT_TIMES = {
    aten.reshape, aten.flatten, aten.unflatten, aten.contiguous, aten.to, aten.type_as,
}  # fmt: skip
_REDUCTIONS = {
    aten.mean, aten.sum, aten.var, aten.std, aten.amax, aten.amin, aten.any, aten.all,
}  # fmt: skip
_FUSED_TAGS = {torch.Tag.pointwise} | {
    tag for name in ("reduction",) if (tag := getattr(torch.Tag, name, None)) is not None
}


@dataclass(frozen=True)
class Buffer:
    """``size_bytes`` of memory that ``node`` owns; ``reads``: what it is computed from, buffers and
    inputs of the graph.

    ``over``: buffers in whose place a kernel of Inductor's may write it, if it reads them for the
    last time, the likeliest first. ``is_fused``: written by such a kernel. ``is_output``: what the
    graph returns, or a part of it.
    """

    node: fx.Node
    size_bytes: Size
    reads: frozenset[fx.Node]
    over: tuple[fx.Node, ...]
    is_fused: bool
    is_output: bool


def find_buffers(view: GraphView) -> list[Buffer]:
    """The buffers of a graph in the order they are written; graph inputs are none."""
    owners = _owners(view)
    forced, returned = _forced(view, owners)
    readers = view.readers()
    masks = _masks_of_attention(view, owners)
    loads: dict[fx.Node, frozenset[fx.Node]] = {}
    written: set[fx.Node] = set()
    places = Places()
    buffers = []
    for node in view.nodes:
        if node.op in ("placeholder", "get_attr"):
            loads[node] = frozenset({node})
        if node.op != "call_function" or not _tensors(node):
            continue
        if (owner := owners.get(node, node)) is not node:
            loads[node] = loads.get(owner, frozenset())
            places.add_view(node, owner, is_formula=owner not in written)
            continue
        reads = frozenset().union(*(loads.get(x, frozenset()) for x in view.inputs(node)))
        fused = node not in view.lowered and _is_fused(node)
        if fused:
            places.add_formula(node, view.inputs(node))
        is_formula = fused and not _is_written_all_the_same(node, readers[node] > 1, len(reads))
        if packet(node) in _JOINS:
            is_formula = is_formula and _is_joined_where_read(node, owners, written)
        if is_formula and node not in forced and node not in view.written:
            loads[node] = reads
            continue
        over = places.written_over(node) if fused else ()
        loads[node] = frozenset({node})
        written.add(node)
        places.add_buffer(node)
        size = tensor_bytes(_tensors(node)) * masks.get(node, 1)
        buffers.append(Buffer(node, size, reads, over, fused, node in returned))
    return buffers


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> Size:
    """Bytes of all ``tensors``, a formula of the graph's symbols."""
    return sympy.Add(
        *(sympy.Mul(*map(size_of, tensor.shape)) * tensor.dtype.itemsize for tensor in tensors)
    )


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    found = [x for x in pytree.tree_leaves(value(node)) if isinstance(x, torch.Tensor)]
    return [stored(x) for x in found]


def _owners(view: GraphView) -> dict[fx.Node, fx.Node]:
    """The node that made the memory which each tensor lies in, where that is another one."""
    owners: dict[fx.Node, fx.Node] = {}
    for node in view.nodes:
        source = None if node in view.lowered else aliased_argument(node)
        if source is not None and (node.target is operator.getitem or _is_view(node, source)):
            owners[node] = owners.get(source, source)
    return owners


def _is_view(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node``, which may be a view of ``source``, is one.

    The traced storages tell, but for what reads a node that was put in another's place.
    """
    made, read = value(node), value(source)
    if not isinstance(made, torch.Tensor) or not isinstance(read, torch.Tensor):
        return isinstance(read, torch.Tensor)  # several views, as split makes them
    if made.untyped_storage()._cdata == read.untyped_storage()._cdata:
        return True
    if packet(node) not in _VIEWS_AT_TIMES:
        return any(result.alias_info is not None for result in overload(node)._schema.returns)
    same_kind = made.dtype == read.dtype and made.device == read.device
    return same_kind and _can_be_viewed(read, made)


def _can_be_viewed(read: torch.Tensor, made: torch.Tensor) -> bool:
    """Whether the shape and strides of ``made`` are those of a view of ``read``."""
    try:
        seen = read.view(made.shape)
    except (RuntimeError, ValueError):  # torch's ways to say that strides do not allow it
        return False
    return all(
        same(size_of(mine), size_of(its)) or size_of(size) == 1
        for size, mine, its in zip(made.shape, made.stride(), seen.stride(), strict=True)
    )


def _forced(view: GraphView, owners: dict[fx.Node, fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """What a library call or a view by strides reads; and what the graph returns."""
    read: set[fx.Node] = set()
    returned: set[fx.Node] = set()
    for node in view.nodes:
        sources = {owners.get(x, x) for x in view.inputs(node)}
        is_library = node in view.lowered or not (_is_fused(node) or node in owners)
        if node.op == "output":
            returned |= sources
        elif is_library or node.target is aten.as_strided.default:
            read |= sources
    return read | returned, returned


def _is_fused(node: fx.Node) -> bool:
    if not is_aten(node):
        return node.op != "call_function" or not _tensors(node)
    return packet(node) in _FUSED or bool(_FUSED_TAGS & set(overload(node).tags))


def _is_written_all_the_same(node: fx.Node, is_shared: bool, loads: int) -> bool:
    if is_aten(node) and packet(node) in _REDUCTIONS:
        return True
    return loads > MOST_LOADS or (is_shared and loads > MOST_LOADS_OF_SHARED)


def _is_joined_where_read(
    node: fx.Node, owners: Mapping[fx.Node, fx.Node], written: Container[fx.Node]
) -> bool:
    joined = pytree.tree_leaves(node.args[0])
    formulas = [x for x in joined if owners.get(x, x) not in written and x.op == "call_function"]
    if value(node).device.type == "cpu" or len(joined) > MOST_JOINED or not formulas:
        return False
    return _is_read_elementwise(node, owners) or len(formulas) == len(joined)


def _is_read_elementwise(node: fx.Node, owners: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether only elementwise operators read ``node``, if views of it."""
    return all(
        is_pointwise(user)
        or packet(user) in _JOINS
        or (user in owners and _is_read_elementwise(user, owners))
        for user in node.users
    )


def _masks_of_attention(view: GraphView, owners: dict[fx.Node, fx.Node]) -> dict[fx.Node, int]:
    """Boolean masks that library attention reads: written as numbers of so many bytes."""
    found = {}
    for node in view.nodes:
        if packet(node) is aten.scaled_dot_product_attention and node not in view.lowered:
            named = arguments(node)
            mask = named["attn_mask"]
            if isinstance(mask, fx.Node) and value(mask).dtype == torch.bool:
                found[owners.get(mask, mask)] = value(named["query"]).dtype.itemsize
    return found
