"""Siblings → one ``sibling_linears`` for all of them, where the first one stood.

    before   p = linear(x, u1);  …;  s = linear(x, u2, b2)
    after    all = sibling_linears(x, [u1, u2], [b2], biased=[1]);  p = all[0];  s = all[1];  …

Weights are read where they lie: those stored [in, rank], or by head, are passed as views.
"""

import operator
from collections.abc import Sequence

import sympy
from flashsvd_compile.lowering import ops
from flashsvd_compile.lowering.builder import Builder
from torch import fx

from flashsvd_compile.analysis.axes import shape_of
from flashsvd_compile.analysis.calls import aten, value
from flashsvd_compile.analysis.known_sizes import KnownSizes
from flashsvd_compile.analysis.site_records import Sibling, SiblingsSite


def lower_siblings(
    site: SiblingsSite, tile: Sequence[int], sizes: KnownSizes | None = None
) -> list[fx.Node]:
    """The nodes that stand for the members of the site, in their order."""
    for node in site.hoisted:
        if site.node < node:  # else another site has moved it
            site.node.prepend(node)
    builder = Builder(site.node, sizes=sizes)
    first = site.members[0]
    features = sympy.Integer(first.in_features)
    x = builder.cast(builder.reshape(first.x, [site.rows, features]), site.dtype)
    biased = [index for index, member in enumerate(site.members) if member.bias is not None]
    outs = builder.call(
        ops.sibling_linears,
        x,
        [_weight(member, builder, site) for member in site.members],
        [_bias(member, builder, site) for member in site.members if member.bias is not None],
        biased=biased,
        tile=list(tile),
    )
    return [_laid_out(outs, index, member, builder) for index, member in enumerate(site.members)]


def _weight(member: Sibling, builder: Builder, site: SiblingsSite) -> fx.Node:
    """The weight as [width, in_features]."""
    node, rank = member.weight, value(member.weight).dim()
    if member.contracted != rank - 1:
        own = [dim for dim in range(rank) if dim != member.contracted]
        node = builder.call(aten.permute.default, node, [*own, member.contracted])
    shape = [sympy.Integer(member.width), sympy.Integer(member.in_features)]
    return builder.cast(builder.reshape(node, shape), site.dtype)


def _bias(member: Sibling, builder: Builder, site: SiblingsSite) -> fx.Node:
    assert member.bias is not None
    return builder.cast(builder.reshape(member.bias, [sympy.Integer(member.width)]), site.dtype)


def _laid_out(outs: fx.Node, index: int, member: Sibling, builder: Builder) -> fx.Node:
    """[rows, width] as the member's own dimensions."""
    node = builder.call(operator.getitem, outs, index)
    own = shape_of(value(member.weight))
    columns = [size for dim, size in enumerate(own) if dim != member.contracted]
    node = builder.reshape(node, [*shape_of(value(member.x))[:-1], *columns])
    if member.order != tuple(range(len(member.order))):
        node = builder.call(aten.permute.default, node, list(member.order))
    return node
