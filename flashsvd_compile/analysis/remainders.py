"""What stays of a lift for its other readers: a product for each run of rows that they read.

    q, k, v = linear(p, w).split(..)                   q | k | v      linear(p, w[: q + k])
    .. .view(B, M, H, 3, D).unbind(3)                  H × q | k | v  [H, M, r] · [H, r, 2·D]
    einsum("bmgr,gdr->bmgd", p, w).flatten(2).chunk    a latent for each head: those of q and k

Rows of one atom that follow each other stay together if so no weight and no latent is copied, and
become products of their own else.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import Atom, AxisSpace, Size, volume
from flashsvd_compile.analysis.factored import Factored, uncut
from flashsvd_compile.analysis.facts import Facts
from flashsvd_compile.analysis.layout import Cut
from flashsvd_compile.analysis.shared_lift_records import ProductShape, Reader, Remainder
from flashsvd_compile.analysis.strided import strided
from flashsvd_compile.reason import Code, Reason, reason_at

_APART = "rows that lie side by side, or side by side for each head"

# Columns for which it pays to make each group's apart: on 2 cores, of 1536 rows of a factor two in
# three as a batched product took 1.7 to 2.1 times as long as all at once in groups of 8, 0.7 to 1.0
# times in groups of 16 and 0.5 to 0.8 times in wider ones (ranks 64 and 256, torch 2.13).
LEAST_COLUMNS_OF_A_GROUP = 16


@dataclass(frozen=True)
class _Rows:
    """What ``nodes`` hold alike: ``whole`` [.., start : stop] of ``atom``; no atom where it is no
    such run. ``kept``: the atom that is left of it."""

    nodes: tuple[fx.Node, ...]
    fact: Factored
    whole: Factored
    atom: Atom | None
    start: Size
    stop: Size
    kept: Atom | None


def places_of(facts: Facts, nodes: Iterable[fx.Node]) -> frozenset[int] | Reason:
    """Where the rows of the factor begin in memory that ``nodes`` are made of."""
    found: frozenset[int] = frozenset()
    for node in nodes:
        fact = facts.factored[node]
        if len(fact.factor.nodes) > 1:
            return _several(node)
        rows = strided(facts.space, fact.factor).without(set(facts.space.leaves(fact.rank)))
        if not rows.is_known:
            return reason_at(node, Code.BAD_LAYOUT, "a factor of symbolic sizes", "numbers")
        found |= rows.places()
    return found


def _several(node: fx.Node) -> Reason:
    return reason_at(node, Code.BAD_LAYOUT, f"{node.name} is made by several factors", "by one")


def remainders_of(facts: Facts, readers: Sequence[fx.Node]) -> tuple[Remainder, ...] | Reason:
    found: list[Remainder] = []
    for run in _runs(_alike(facts, readers)):
        together = _remainder(facts, run)
        if not isinstance(together, Reason):
            found.append(together)
            continue
        for rows in run:
            alone = _remainder(facts, [rows])
            if isinstance(alone, Reason):
                return alone
            found.append(alone)
    nodes = [[reader.node for reader in remainder.readers] for remainder in found]
    known = (places_of(facts, own) for own in nodes)
    places = [own for own in known if not isinstance(own, Reason)]
    if len(frozenset().union(*places)) != sum(map(len, places)):
        observed = f"{nodes[0][0].name} and others share rows"
        return reason_at(nodes[0][0], Code.BAD_LAYOUT, observed, _APART)
    return tuple(found)


def _alike(facts: Facts, readers: Sequence[fx.Node]) -> list[_Rows]:
    by_fact: dict[Factored, list[fx.Node]] = {}
    for reader in readers:
        by_fact.setdefault(facts.factored[reader], []).append(reader)
    return [_rows(facts.space, fact, tuple(nodes)) for fact, nodes in by_fact.items()]


def _rows(space: AxisSpace, fact: Factored, nodes: tuple[fx.Node, ...]) -> _Rows:
    """All cuts as one, if each is of what the one before has kept."""
    whole, zero = uncut(fact), sympy.Integer(0)
    apart = _Rows(nodes, fact, whole, None, zero, zero, None)
    again, start = whole, zero
    kept: Atom | None = None
    for index, cut in enumerate(fact.factor.cuts):
        if index and cut.atom is not kept:
            return apart
        again, start, kept = again.cut(space, cut), start + cut.start, cut.kept
    if not fact.factor.cuts or again != fact:  # a latent that is cut otherwise, too
        return apart
    length = sympy.Integer(1) if kept is None else kept.size
    return _Rows(nodes, fact, whole, fact.factor.cuts[0].atom, start, start + length, kept)


def _runs(rows: Sequence[_Rows]) -> list[list[_Rows]]:
    """Rows of one atom that follow each other, or overlap, are one run."""
    runs: list[list[_Rows]] = []
    for one in sorted(rows, key=lambda rows: rows.start):
        for run in runs:
            beside = one.atom is run[0].atom is not None and one.whole == run[0].whole
            if beside and one.start <= max(other.stop for other in run):
                run.append(one)
                break
        else:
            runs.append([one])
    return runs


def _remainder(facts: Facts, run: Sequence[_Rows]) -> Remainder | Reason:
    first = run[0]
    if len(run) == 1:
        readers = [Reader(node, facts.axes[node]) for node in first.nodes]
        return product_of(facts, first.fact, first.nodes[0], readers)
    assert first.atom is not None
    length = max(rows.stop for rows in run) - first.start
    kept = Atom(length)  # not one that a reader of all of the run may have split
    fact = first.whole.cut(facts.space, Cut(first.atom, first.start, kept))
    readers = [
        Reader(node, facts.axes[node], Cut(kept, rows.start - first.start, rows.kept))
        for rows in run
        for node in rows.nodes
    ]
    return product_of(facts, fact, first.nodes[0], readers)


def product_of(
    facts: Facts, fact: Factored, node: fx.Node, readers: Sequence[Reader]
) -> Remainder | Reason:
    """``fact`` as one product for which neither its factor nor its latent is copied."""
    space, rank = facts.space, facts.space.leaves(fact.rank)
    if len(fact.factor.nodes) > 1 or len(fact.latent.nodes) > 1:
        return _several(node)
    weight, latent = strided(space, fact.factor), strided(space, fact.latent)
    groups = tuple(a for a in weight.atoms if a in latent.atoms and a not in rank)
    width = tuple(a for a in weight.atoms if a not in latent.atoms and a not in rank)
    tokens = tuple(a for a in latent.atoms if a not in rank and a not in groups)
    latent_has_groups = bool(groups)
    if not groups:
        while not weight.is_one_dimension(width[len(groups) :]):
            groups = width[: len(groups) + 1]
        width = width[len(groups) :]
        if groups and volume(width) < LEAST_COLUMNS_OF_A_GROUP:
            observed = f"{volume(groups)} groups of {volume(width)} rows of the factor"
            required = f"at least {LEAST_COLUMNS_OF_A_GROUP} a group"
            return reason_at(node, Code.BAD_LAYOUT, observed, required)
    lies_well = (
        bool(width)
        and all(map(weight.is_one_dimension, (groups, width, rank)))
        and 1 in (weight.innermost_stride(width), weight.innermost_stride(rank))
        and (not latent_has_groups or latent.is_one_dimension(groups))
    )
    made = {*groups, *width}
    is_plain = all(
        len(b.tensor.nodes) == 1 and set(b.tensor.atoms(space)) == made for b in fact.biases
    )
    if not (lies_well and is_plain):
        observed = f"{node.name} would need a copy of its factor or latent"
        return reason_at(node, Code.BAD_LAYOUT, observed, _APART)
    sizes = (int(volume(groups)), volume(tokens), int(volume(width)), int(volume(rank)))
    return Remainder(
        tuple(readers), fact, groups, tokens, width, rank, latent_has_groups, ProductShape(*sizes)
    )  # fmt: skip
