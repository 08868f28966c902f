"""Indexing by numbers that the graph holds, where it is a cut or repeats one.

    x[:, :, [-2]]                            one element, and its dimension stays
    x.index_select(1, torch.tensor([2, 3]))  a run of elements
    x[:, [0, 0, 1, 1]]                       a run, each element of it twice
    x[:, [0, 1, 0, 1]]                       a run, twice as a whole

Any other order of elements is neither.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from flashsvd_compile.analysis.axes import Size, shape_of
from flashsvd_compile.analysis.calls import arguments, aten, is_tensor, packet, value


@dataclass(frozen=True)
class Pick:
    """``outer`` copies of ``x[start : start + length]`` along ``axis``, each element of them
    ``inner`` times."""

    axis: int
    start: Size
    length: int
    outer: int
    inner: int


def read_pick(node: fx.Node) -> Pick | None:
    """What the indexing ``node`` picks along one dimension; None where it is none of the above."""
    if packet(node) not in (aten.index, aten.index_select):
        return None
    named = arguments(node)
    indices = named["indices"] if packet(node) is aten.index else [named["index"]]
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    if len(axes) != 1 or not is_tensor(named["self"]):
        return None
    numbers = _numbers(indices[axes[0]])
    sizes = shape_of(value(named["self"]))
    axis = axes[0] if packet(node) is aten.index else named["dim"] % max(1, len(sizes))
    if not numbers or axis >= len(sizes) or len({number < 0 for number in numbers}) != 1:
        return None
    inner = len(list(next(itertools.groupby(numbers))[1]))
    each = numbers[::inner]
    length = next((i for i, number in enumerate(each) if number != each[0] + i), len(each))
    run = range(each[0], each[0] + length)
    outer, rest = divmod(len(numbers), length * inner)
    if rest or numbers != outer * [number for number in run for _ in range(inner)]:
        return None
    start: Size = sympy.Integer(run.start)
    return Pick(axis, start + sizes[axis] if run.start < 0 else start, length, outer, inner)


def _numbers(node: Any) -> Sequence[int]:
    """The integers that the 1-D tensor ``node`` holds in every run; none where they are unknown."""
    if not is_tensor(node) or value(node).dim() != 1 or value(node).dtype != torch.int64:
        return []
    while packet(node) is aten.lift_fresh_copy and not node.meta.get("mutated"):
        node = node.args[0]
    is_held = node.target is torch.tensor and not node.meta.get("mutated")
    return node.args[0] if is_held else []
