"""RoPE read off a turned tensor: which lift is turned, by which tables, in which pairs.

    y[c] = g (q[c] cos[c] ∓ q[c ± pair] sin[c])   for c < rotary_dim,   g q[c] for the rest

where the order of q's features is that of some lifted tensor on the way to y.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import Atom, AxisSpace, Dim, Dims, shape_of
from flashsvd_compile.analysis.calls import value
from flashsvd_compile.analysis.factored import Factored, Labelled, uncut
from flashsvd_compile.analysis.facts import Facts
from flashsvd_compile.analysis.low_rank import is_low_rank
from flashsvd_compile.analysis.regions import between
from flashsvd_compile.analysis.site_records import Angles, Rotation
from flashsvd_compile.analysis.turned import Table, Term, Turned, places_of_last


@dataclass(frozen=True)
class RotatedLift:
    """``lifted`` is turned by ``rotation`` to make ``node``; ``fact``: of ``lifted``, times what
    all of ``node`` is scaled by. ``region``: the nodes between."""

    node: fx.Node
    lifted: fx.Node
    fact: Factored
    rotation: Rotation
    region: frozenset[fx.Node]


def rotated_lift(facts: Facts, node: fx.Node) -> RotatedLift | None:
    """``node`` as a lift that was turned, if it is one."""
    turned = facts.turned.get(node)
    if turned is None or facts.space.leaves(facts.axes[node][-1]) != turned.features:
        return None
    tables = {term.table for s in turned.sums for term in s if term.table is not None}
    ends = {*turned.latent.nodes, *turned.whole.factor.nodes, *(table.node for table in tables)}
    region = between(facts, [node], ends)
    if not region.isdisjoint(ends):
        return None
    for lifted in sorted(region):
        fact = facts.factored.get(lifted)
        if fact is None or not is_low_rank(facts, fact):
            continue
        if uncut(fact) != turned.whole or fact.latent != turned.latent:
            continue
        dims = facts.axes[lifted]
        if _outer(facts, lifted) != _outer(facts, node):  # more heads, or more rows
            continue
        places = places_of_last(facts.space, fact, dims)
        if turned.norm is not None and (turned.norm.places != places or not _is_unscaled(fact)):
            continue
        if places is not None and (found := _read(facts.space, turned, places, dims)) is not None:
            number, rotation = found
            return RotatedLift(node, lifted, fact.scaled(number), rotation, region)
    return None


def _is_unscaled(fact: Factored) -> bool:
    return fact.scale == 1 and all(bias.scale == 1 for bias in fact.biases)


def _outer(facts: Facts, node: fx.Node) -> set[Atom]:
    """What ``node`` varies along beside its last dimension."""
    atoms = facts.atoms(node, tuple(range(value(node).dim() - 1)))
    return {atom for atom in atoms if not atom.broadcast}


def _read(
    space: AxisSpace, turned: Turned, places: Sequence[int], dims: Dims
) -> tuple[float, Rotation] | None:
    """The rotation, and the number that all is multiplied by."""
    sums = turned.sums
    rotary_dim = sum(len(s) == 2 for s in sums)
    turning, rest = sums[:rotary_dim], sums[rotary_dim:]
    if len(sums) != len(places) or len(set(places)) != len(places):
        return None
    if not rotary_dim or not all(len(s) == 2 for s in turning):
        return None
    own: list[Term] = []
    other: list[Term] = []
    for place, (one, two) in zip(places, turning, strict=False):
        own.append(one if one.place == place else two)
        other.append(two if one.place == place else one)
    number = own[0].number
    alike = all(t.place == p and t.number == number for t, p in zip(own, places, strict=False))
    passing = all(s == (Term(p, number),) for s, p in zip(rest, places[rotary_dim:], strict=True))
    if not (alike and passing and number) or other[0].place not in places:
        return None
    pair = places.index(other[0].place)
    if pair < 1 or rotary_dim % (2 * pair):
        return None
    firsts = [c % (2 * pair) < pair for c in range(rotary_dim)]
    partners = [c + pair if first else c - pair for c, first in enumerate(firsts)]
    if [t.place for t in other] != [places[c] for c in partners]:
        return None
    signs = [-t.number if first else t.number for t, first in zip(other, firsts, strict=True)]
    if len(set(signs)) != 1 or abs(signs[0]) != abs(number):
        return None
    cos, sin = (_angles(space, terms, rotary_dim, pair) for terms in (own, other))
    if cos is None or sin is None or cos.count != sin.count:
        return None
    sin = replace(sin, negated=signs[0] != number)
    rotation = Rotation(
        turned.whole.lift, cos, sin, rotary_dim, pair, space.leaves(dims[-1]), turned.norm
    )
    return number, rotation


def _angles(space: AxisSpace, terms: Sequence[Term], rotary_dim: int, pair: int) -> Angles | None:
    """One table for all, whose entries follow each other at one step, feature by feature or pair
    by pair."""
    table = terms[0].table
    if table is None or any(term.table != table for term in terms):
        return None
    entries = [term.entry for term in terms]
    by_pair = [c // (2 * pair) * pair + c % pair for c in range(rotary_dim)]
    for count, order in ((rotary_dim, list(range(rotary_dim))), (rotary_dim // 2, by_pair)):
        after = order.index(1) if count > 1 else 0
        step = entries[after] - entries[0] if count > 1 else 1
        if step > 0 and entries == [entries[0] + step * number for number in order]:
            return _named(table, entries[0], step, count)
    return None


def _named(table: Table, start: int, step: int, count: int) -> Angles:
    """Its entries, which may have been of any tensor's features, get atoms of their own."""
    sizes = shape_of(value(table.node))
    of_features = {axis: Atom(sizes[axis]) for axis in table.features}
    dims: Dims = tuple(
        (of_features[axis],) if axis in of_features else dim for axis, dim in enumerate(table.dims)
    )
    features: Dim = tuple(of_features.values())
    if table.is_complex:
        parts = Atom(sympy.Integer(2))
        dims, features = (*dims, (parts,)), (*features, parts)
    labelled = Labelled((table.node,), dims)
    return Angles(labelled, features, start, step, count, table.is_complex)
