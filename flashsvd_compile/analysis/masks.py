"""An attention mask: how far from its own place a query sees, and the tensors that say the rest.

    keep = (k <= q) & (k > q - 4096) & pad[b, k]      a boolean mask [B, 1, M, N]
    →  Mask(ahead=0, behind=4095, terms=(pad[b, k] kept along (batch, key),))

A boolean mask is a conjunction (``symbolic_values``). Conjuncts that hold at every index in
0 <= b < B, 0 <= h < H, 0 <= m < M, 0 <= n < N are dropped, ``n <= m + c`` and ``n >= m - c`` become
bounds, where c is a number or made of sizes, and each of the rest is found again in the graph: the
node that is worth it, or else a node that is worth it and other conjuncts of the mask. So a kernel
reads a padding mask [B, N], not [B, 1, M, N].

An additive mask that is 0 where a predicate holds and -inf elsewhere says the same. (A row
without any key is zero under SDPA for either spelling.) With a finite number in place of -inf
such a row is an average over *all* keys; this is kept: only a mask that is true everywhere, or
that is bounds and nothing else and shows each query a key, is taken apart there.

Nothing is claimed that is not proven, and no guard is added; what cannot be followed is a term.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flashsvd_compile.analysis.choices import Choice, dependence
from flashsvd_compile.analysis.predicates import (
    Domain,
    broadcasts_to,
    conjuncts,
    index_symbol,
    is_index,
    is_one,
    margin_of,
    negate,
    size_expr,
)
from flashsvd_compile.analysis.symbolic_values import SymbolicValues

# Adding a number this low leaves a masked key no weight: exp(-1e4 + s) is 0 in fp32 unless its
# score exceeds the row's best by 1e4 - 104 (exp(-104) is the smallest fp32 number halved). The
# usual ones are -1e4 (old BERTs) and finfo.min.
NO_WEIGHT_BELOW = -1e4


@dataclass(frozen=True)
class MaskTerm:
    """One tensor of the graph that masks.

    ``node`` broadcasts to the scores [B, H, M, N]. ``keeps`` says along which of (batch, head,
    query, key) it may vary; where it is False and the node is full there, narrowing the node to
    length 1 is exact. ``additive``: floating point and added to the scores; else boolean, True =
    attend.
    """

    node: fx.Node
    keeps: tuple[bool, bool, bool, bool]
    additive: bool


@dataclass(frozen=True)
class Mask:
    """``query - behind <= key <= query + ahead``, from the top left, and all of ``terms``; a bound
    that is None is none, and ``ahead`` 0 is SDPA's ``is_causal``."""

    terms: tuple[MaskTerm, ...]
    ahead: sympy.Expr | None = None
    behind: sympy.Expr | None = None


def analyse_mask(
    node: fx.Node,
    sizes: Sequence[int | torch.SymInt],
    values: SymbolicValues | None = None,
    *,
    with_bounds: bool = True,
) -> Mask:
    """What the mask at ``node`` does to scores of ``sizes`` (B, H, M, N).

    ``values`` shares the evaluation between the masks of one graph. Unless ``with_bounds`` all that
    is not true everywhere is a term.
    """
    tensor = node.meta["val"]
    additive = _validate_mask(tensor, sizes)
    values = values or SymbolicValues(node.graph)
    whole = Mask((MaskTerm(node, _long_dimensions(tensor.shape), additive),))
    if not broadcasts_to(tensor.shape, sizes):
        return whole
    lineage = values.lineage(node)
    if any(values.is_mutated(each) for each in lineage):
        return whole

    value = values[node]
    domain = Domain.of(sizes)
    split = partial(_split, node, lineage, values, domain, sizes, with_bounds)
    if not additive:
        assert isinstance(value, Boolean)
        return split(domain.simplify(value))
    if not isinstance(value, Choice):
        return Mask((_term(node, dependence(value), additive=True),))
    value = _with_zero_kept(value)
    pred = domain.simplify(value.pred)
    if value.yes == 0 and pred == sympy.true:
        return Mask(())
    if value.yes == 0 and value.no == -float("inf"):
        return split(pred)
    if value.yes == 0 and value.no <= NO_WEIGHT_BELOW and with_bounds:
        bounds = _Bounds.of(pred, sizes)
        if bounds.said == conjuncts(pred) and bounds.show_each_query_a_key(domain, sizes):
            return Mask((), bounds.ahead, bounds.behind)
    return Mask((_term(node, dependence(pred), additive=True),))


def _validate_mask(tensor: torch.Tensor, sizes: Sequence[int | torch.SymInt]) -> bool:
    if len(sizes) != 4:
        raise ValueError(f"scores have 4 sizes (batch, head, query, key), got {len(sizes)}")
    if tensor.dtype is not torch.bool and not tensor.dtype.is_floating_point:
        raise ValueError(f"a mask is boolean or floating point, got {tensor.dtype}")
    shape = tensor.shape
    fits = len(shape) <= 4 and not any(
        statically_known_true(size != goal) and not is_one(size)
        for size, goal in zip(reversed(shape), reversed(sizes), strict=False)
    )
    if not fits:
        raise ValueError(f"mask {tuple(shape)} does not broadcast to scores {tuple(sizes)}")
    return tensor.dtype is not torch.bool


def _with_zero_kept(value: Choice) -> Choice:
    """Zero is what a kept score gets: it comes first, if it is one of the two."""
    if value.yes == 0:
        return value if value.no != 0 else Choice(sympy.true, 0, 0)
    return Choice(negate(value.pred), value.no, value.yes) if value.no == 0 else value


def _split(
    node: fx.Node,
    lineage: Iterable[fx.Node],
    values: SymbolicValues,
    domain: Domain,
    sizes: Sequence[int | torch.SymInt],
    with_bounds: bool,
    pred: Boolean,
) -> Mask:
    """The mask that ``pred``, the simplified predicate of ``node``, stands for."""
    bounds = _Bounds.of(pred, sizes) if with_bounds else _Bounds()
    whole = conjuncts(pred)
    missing = whole - bounds.said
    # Nodes that the mask implies, with what each of them contributes; the mask itself is the last.
    worth: dict[fx.Node, frozenset[Boolean]] = {}
    for each in lineage:
        tensor = each.meta["val"]
        if tensor.dtype is torch.bool and broadcasts_to(tensor.shape, sizes):
            parts = conjuncts(domain.simplify(values[each]))
            if parts <= whole:
                worth[each] = parts
    worth[node] = whole

    # The purest node for each conjunct: the least said twice, then the earliest computed.
    chosen: dict[fx.Node, frozenset[Boolean]] = {}
    for conjunct in sorted(missing, key=sympy.default_sort_key):
        if any(conjunct in parts for parts in chosen.values()):
            continue
        best = min((n for n in worth if conjunct in worth[n]), key=lambda n: len(worth[n]))
        chosen[best] = worth[best]
    terms = [
        _term(n, frozenset().union(*map(dependence, parts)), n.meta["val"].dtype is not torch.bool)
        for n, parts in worth.items()
        if n in chosen
    ]
    return Mask(tuple(terms), bounds.ahead, bounds.behind)


@dataclass(frozen=True)
class _Bounds:
    """Of a predicate, the conjuncts ``n <= m + ahead`` and ``n >= m - behind``, in any spelling."""

    said: frozenset[Boolean] = frozenset()
    ahead: sympy.Expr | None = None
    behind: sympy.Expr | None = None

    @classmethod
    def of(cls, pred: Boolean, sizes: Sequence[int | torch.SymInt]) -> _Bounds:
        """At most one of each; of several the first is taken, the others stay conjuncts."""
        n, m = (
            sympy.S.Zero if is_one(size) else index_symbol(position)
            for position, size in ((0, sizes[3]), (1, sizes[2]))
        )
        found = cls()
        for conjunct in sorted(conjuncts(pred), key=sympy.default_sort_key):
            if (margin := margin_of(conjunct)) is None or margin.has(AppliedUndef):
                continue
            ahead, behind = sympy.expand(margin - (m - n)), sympy.expand(margin - (n - m))
            said = found.said | {conjunct}
            if found.ahead is None and not any(map(is_index, ahead.free_symbols)):
                found = replace(found, said=said, ahead=ahead)
            elif found.behind is None and not any(map(is_index, behind.free_symbols)):
                found = replace(found, said=said, behind=behind)
        return found

    def show_each_query_a_key(self, domain: Domain, sizes: Sequence[int | torch.SymInt]) -> bool:
        """Provably: that of its own number, or the last."""
        queries, keys = size_expr(sizes[2]), size_expr(sizes[3])
        needed = [self.ahead] if self.ahead is not None else []
        if self.behind is not None:
            needed += [self.behind, keys - queries + self.behind]
        return all(map(domain.is_nonnegative, needed))


def _term(node: fx.Node, varies_along: frozenset[sympy.Symbol], additive: bool) -> MaskTerm:
    batch, head, query, key = (index_symbol(position) in varies_along for position in (3, 2, 1, 0))
    return MaskTerm(node, (batch, head, query, key), additive)


def _long_dimensions(shape: Sequence[int | torch.SymInt]) -> tuple[bool, bool, bool, bool]:
    missing = [False] * (4 - len(shape))
    batch, head, query, key = missing + [not is_one(size) for size in shape]
    return batch, head, query, key
