"""How the turned fact begins and travels: signs, joins, products with tables, sums.

It begins where a lift's features meet one of these operators, beside what else is known of the
tensor. The last dimension is that of the features; all before it are the lift's own.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import Atom, Dims, shape_of
from flashsvd_compile.analysis.calls import arguments, aten, constant, is_tensor, packet, value
from flashsvd_compile.analysis.factored import label_like, uncut
from flashsvd_compile.analysis.facts import Facts
from flashsvd_compile.analysis.layout import Moved
from flashsvd_compile.analysis.low_rank import is_low_rank
from flashsvd_compile.analysis.turned import Sum, Table, Turned, turned_by_nothing

Found = tuple[Turned, Dims]


def infer(facts: Facts, node: fx.Node) -> None:
    """What ``node``, which is no layout operator and writes nothing, is of turned operands, where
    no simpler fact tells it."""
    rule = _RULES.get(packet(node))
    if rule is None or any(node in known for known in (facts.factored, facts.scores, facts.turned)):
        return
    found = rule(facts, node)
    if found is not None:
        facts.turned[node], facts.axes[node] = found


def carry(facts: Facts, source: fx.Node, node: fx.Node, moved: Moved) -> None:
    """What ``node``, another layout of ``source``, is of it."""
    turned: Turned | None = facts.turned.get(source)
    if turned is not None and moved.cut is not None:
        turned = turned.cut(facts.space, moved.cut)
    if turned is not None and (found := turned.laid_out(facts.space, moved.dims)) is not None:
        facts.turned[node] = found


def known_turned(facts: Facts, node: Any) -> Found | None:
    """``node`` as a turned tensor, if only by nothing yet, whose last dimension are its features;
    or, complex, pairs of them."""
    if not is_tensor(node):
        return None
    dims = facts.axes[node]
    found = _read(facts, node, dims)
    return None if found is None else (found, dims)


def _read(facts: Facts, node: fx.Node, dims: Dims) -> Turned | None:
    """``node`` as it would be laid out with ``dims``."""
    fact, turned = facts.factored.get(node), facts.turned.get(node)
    if turned is not None:
        turned = turned.laid_out(facts.space, dims)
    elif fact is not None and is_low_rank(facts, uncut(fact)):  # a part may be narrower than ranks
        turned = turned_by_nothing(facts.space, fact, dims)
    if turned is None:
        return None
    features = turned.features[:-1] if turned.is_complex else turned.features
    return turned if facts.space.leaves(dims[-1]) == features else None


# ---- elementwise --------------------------------------------------------------------------------


def _negative(facts: Facts, node: fx.Node) -> Found | None:
    known = known_turned(facts, node.args[0])
    return None if known is None else (known[0].scaled(-1.0), known[1])


def _product(facts: Facts, node: fx.Node) -> Found | None:
    for one, other in (node.args[:2], node.args[1::-1]):
        if (known := known_turned(facts, one)) is None:
            continue
        if (number := constant(other)) is not None:
            found = known[0].scaled(number) if math.isfinite(number) else None
        else:
            found = _by_table(facts, node, known, other)
        return None if found is None else (found, known[1])
    return None


def _quotient(facts: Facts, node: fx.Node) -> Found | None:
    number, known = constant(node.args[1]), known_turned(facts, node.args[0])
    if known is None or not number or arguments(node).get("rounding_mode") is not None:
        return None
    return known[0].scaled(1 / number), known[1]


def _sum(facts: Facts, node: fx.Node) -> Found | None:
    left, right = (known_turned(facts, argument) for argument in node.args[:2])
    number = constant(arguments(node)["alpha"])
    if left is None or right is None or number is None:
        return None
    (mine, dims), (its, others) = left, right
    if packet(node) in (aten.sub, aten.subtract):
        number = -number
    alike = mine.is_of(its) and len(mine.sums) == len(its.sums)
    if not alike or mine.is_complex or its.is_complex or not share_outer(facts, dims, others):
        return None
    return mine.plus(its.scaled(number)), dims


def _by_table(facts: Facts, node: fx.Node, known: Found, other: Any) -> Turned | None:
    """Each feature times what ``other`` has for it, at each place of the other dimensions."""
    turned, dims = known
    if not is_tensor(other) or other in facts.mutated:
        return None
    sizes, shape = shape_of(value(other)), shape_of(value(node))
    labels = label_like(facts.space, dims, sizes)
    is_complex = value(other).is_complex()
    untouched = all(len(s) == 1 and s[0].table is None for s in turned.sums)
    if labels is None or not untouched or len(shape) != len(dims):
        return None
    if is_complex != turned.is_complex or not (is_complex or value(other).is_floating_point()):
        return None
    if value(other).is_conj():  # has no real parts to be read
        return None
    last = bool(labels) and labels[-1] != ()
    features = (len(labels) - 1,) if last else ()
    table = Table(other, (*labels[:-1], ()) if labels else (), features, is_complex)
    count = len(turned.sums) // (2 if is_complex else 1)
    entries = range(count) if last else itertools.repeat(0, count)
    if not is_complex:
        pairs = zip(turned.sums, entries, strict=True)
        return replace(turned, sums=tuple((s[0].of(table, entry),) for s, entry in pairs))
    return replace(turned, sums=tuple(_complex_product(turned.sums, table, entries)))


def _complex_product(sums: tuple[Sum, ...], table: Table, entries: Any) -> list[Sum]:
    """(a + b i)(c + s i) = (a c − b s) + (b c + a s) i, of each pair of features."""
    found: list[Sum] = []
    for (a,), (b,), entry in zip(sums[::2], sums[1::2], entries, strict=True):
        c, s = 2 * entry, 2 * entry + 1
        found.append((a.of(table, c), b.times(-1.0).of(table, s)))
        found.append((b.of(table, c), a.of(table, s)))
    return found


# ---- joins --------------------------------------------------------------------------------------


def share_outer(facts: Facts, dims: Dims, others: Dims) -> bool:
    refine = facts.space.refine
    return len(dims) == len(others) and refine(dims[:-1]) == refine(others[:-1])


def _parts(facts: Facts, node: fx.Node) -> list[Found] | None:
    """The tensors that ``node`` joins, if all are made of the same lift; but for those without
    features, as what partial RoPE passes is where it is all."""
    parts: list[Found] = []
    for tensor in node.args[0]:  # type: ignore[union-attr]
        if value(tensor).dim() == value(node).dim() and shape_of(value(tensor))[-1] == 0:
            continue
        known = known_turned(facts, tensor)
        if known is None or known[0].is_complex:
            return None
        if parts and not (
            known[0].is_of(parts[0][0]) and share_outer(facts, known[1], parts[0][1])
        ):
            return None
        parts.append(known)
    return parts or None


def _cat(facts: Facts, node: fx.Node) -> Found | None:
    parts = _parts(facts, node)
    if parts is None or arguments(node)["dim"] % len(parts[0][1]) != len(parts[0][1]) - 1:
        return None
    sums = tuple(s for turned, _ in parts for s in turned.sums)
    joined = Atom(sympy.Integer(len(sums)))
    turned, dims = parts[0]
    return replace(turned, features=(joined,), sums=sums), (*dims[:-1], (joined,))


def _stack(facts: Facts, node: fx.Node) -> Found | None:
    """Along a new last dimension."""
    parts = _parts(facts, node)
    if parts is None or arguments(node)["dim"] % (len(parts[0][1]) + 1) != len(parts[0][1]):
        return None
    (turned, dims), stacked = parts[0], Atom(sympy.Integer(len(parts)))
    counts = {len(other.sums) for other, _ in parts}
    if len(counts) != 1 or len(parts) == 1:
        return None
    sums = tuple(
        s for same_place in zip(*(t.sums for t, _ in parts), strict=True) for s in same_place
    )
    features = (*facts.space.leaves(dims[-1]), stacked)
    return replace(turned, features=features, sums=sums), (*dims, (stacked,))


# ---- complex numbers ----------------------------------------------------------------------------


def _as_complex(facts: Facts, node: fx.Node) -> Found | None:
    """The last dimension is a pair's: it becomes the element's own."""
    source = node.args[0]
    dims = facts.axes[source] if isinstance(source, fx.Node) else ()
    if len(dims) < 2:
        return None
    flat = (*dims[:-2], (*dims[-2], *dims[-1]))
    turned = _read(facts, source, flat)  # type: ignore[arg-type]
    if turned is None or turned.is_complex or len(facts.space.leaves(dims[-1])) != 1:
        return None
    return replace(turned, is_complex=True), dims[:-1]


def _as_real(facts: Facts, node: fx.Node) -> Found | None:
    known = known_turned(facts, node.args[0])
    if known is None or not known[0].is_complex:
        return None
    turned, dims = known
    return replace(turned, is_complex=False), (*dims, turned.features[-1:])


_RULES: dict[Any, Callable[[Facts, fx.Node], Found | None]] = {
    aten.neg: _negative,
    aten.negative: _negative,
    aten.mul: _product,
    aten.multiply: _product,
    aten.div: _quotient,
    aten.true_divide: _quotient,
    aten.divide: _quotient,
    aten.add: _sum,
    aten.sub: _sum,
    aten.subtract: _sum,
    aten.cat: _cat,
    aten.concat: _cat,
    aten.concatenate: _cat,
    aten.stack: _stack,
    aten.view_as_complex: _as_complex,
    aten.view_as_real: _as_real,
}
