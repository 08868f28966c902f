"""A rewritten result may lie in memory otherwise than the original: make what follows agree.

    before   o = matmul(p, v)  [B, H, M, D] contiguous;   o.view(B·H, M, D)
    after    o = rank_space_attention(..), laid out [B, M, H, D];   o.reshape(B·H, M, D)

Views after it become reshapes (which copy only where they must), and a tensor that leaves the
graph leaves it with the strides that eager would have given it: code after a graph break may
``view`` it, too. What is written in place keeps its strides from the start.
"""

import operator
from collections.abc import Container, Mapping
from typing import Any

import torch
from flashsvd_compile.lowering.builder import Builder
from torch import fx

from flashsvd_compile.analysis.axes import same, size_of
from flashsvd_compile.analysis.calls import aten, is_aten, is_tensor, overload, value
from flashsvd_compile.analysis.known_sizes import KnownSizes


def settle_strides(
    graph: fx.Graph, replaced: Mapping[fx.Node, torch.Tensor], mutated: Container[fx.Node]
) -> None:
    """Follow the new results through ``graph`` as far as their strides are felt.

    ``replaced``: new results, with the traced values of those whose places they took.
    ``mutated``: nodes whose memory the graph writes into.
    """
    before: dict[fx.Node, Any] = {
        new: old for new, old in replaced.items() if not _same_strides(value(new), old)
    }
    sizes = KnownSizes()
    for node in list(graph.nodes):
        if not before.keys() & set(node.all_input_nodes) or node in before:
            continue
        if node.op == "output":
            _restore(node, before, Builder(node, sizes=sizes))
            continue
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        old, new = value(node), _traced_again(node)
        if new is not None and not _same_strides(new, old):
            before[node] = old
            # Traced here a node may miss the autocast that it runs under; its strides do not.
            node.meta["val"] = new.to(old.dtype) if isinstance(new, torch.Tensor) else new
            if node in mutated:
                del before[node]
                copied = _with_strides_of(node, old, Builder(node.next, sizes=sizes))
                node.replace_all_uses_with(copied, lambda user, own=copied: user is not own)


def _with_strides_of(result: fx.Node, original: torch.Tensor, builder: Builder) -> fx.Node:
    """``result``, copied if its strides are not those of the traced ``original``."""
    if _same_strides(value(result), original):
        return result
    options = {"dtype": value(result).dtype, "device": value(result).device}
    empty = builder.call(aten.empty_strided.default, *builder.layout(original), **options)
    return builder.call(aten.copy_.default, empty, result)


def _traced_again(node: fx.Node) -> Any:
    """What ``node`` computes from its inputs' present values; None where strides end."""
    if not isinstance(value(node), (torch.Tensor, list, tuple)):
        return None
    if node.target is not operator.getitem and (not is_aten(node) or _is_data_dependent(node)):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_data_dependent(node: fx.Node) -> bool:
    """Would tracing it again make new symbols?"""
    tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    return bool(tags & set(overload(node).tags))


def _restore(output: fx.Node, before: dict[fx.Node, Any], builder: Builder) -> None:
    for node in output.all_input_nodes:
        if node in before and is_tensor(node):
            output.replace_input_with(node, _with_strides_of(node, before[node], builder))


def _same_strides(left: Any, right: Any) -> bool:
    if isinstance(left, (list, tuple)):
        return all(map(_same_strides, left, right))
    if not isinstance(left, torch.Tensor):
        return True
    return all(
        size_of(size) == 1 or same(size_of(mine), size_of(theirs))
        for size, mine, theirs in zip(left.shape, left.stride(), right.stride(), strict=True)
    )
