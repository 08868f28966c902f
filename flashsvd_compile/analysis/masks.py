"""An attention mask, as the tensors that it is made of: causal or not, and what is left.

    keep = (k <= q) & (k >= 0) & pad[b, k]      a boolean mask [B, 1, M, N]
    →  Mask(is_causal=True, terms=(pad[b, k] kept along (batch, key),))

A boolean mask is a conjunction (``symbolic_values``). Conjuncts that hold at every index in
0 <= b < B, 0 <= h < H, 0 <= m < M, 0 <= n < N are dropped, ``n <= m`` becomes ``is_causal``, and
each of the rest is found again in the graph: the node that is worth it, or else a node that is
worth it and other conjuncts of the mask. So a kernel reads a padding mask [B, N], not [B, 1, M, N].

An additive mask that is 0 where a predicate holds and -inf elsewhere says the same. (A row
without any key is zero under SDPA for either spelling.) With a finite number in place of -inf
such a row is an average over *all* keys; this is kept: only a mask that is true everywhere, or
causal and nothing else, is taken apart there.

Nothing is claimed that is not proven, and no guard is added; what cannot be followed is a term.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flashsvd_compile.analysis.choices import Choice, dependence
from flashsvd_compile.analysis.predicates import (
    Domain,
    broadcasts_to,
    conjuncts,
    index_symbol,
    is_one,
    margin_of,
    negate,
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
    """``key <= query`` (from the top left, as SDPA's ``is_causal``) if so, and all of ``terms``."""

    is_causal: bool
    terms: tuple[MaskTerm, ...]


def analyse_mask(
    node: fx.Node,
    sizes: Sequence[int | torch.SymInt],
    values: SymbolicValues | None = None,
) -> Mask:
    """What the mask at ``node`` does to scores of ``sizes`` (B, H, M, N).

    ``values`` shares the evaluation between the masks of one graph.
    """
    tensor = node.meta["val"]
    additive = _validate_mask(tensor, sizes)
    values = values or SymbolicValues(node.graph)
    whole = Mask(False, (MaskTerm(node, _long_dimensions(tensor.shape), additive),))
    if not broadcasts_to(tensor.shape, sizes):
        return whole
    lineage = values.lineage(node)
    if any(values.is_mutated(each) for each in lineage):
        return whole

    value = values[node]
    domain = Domain.of(sizes)
    if not additive:
        assert isinstance(value, Boolean)
        return _split(node, domain.simplify(value), lineage, values, domain, sizes)
    if isinstance(value, Choice):
        return _additive(node, _with_zero_kept(value), lineage, values, domain, sizes)
    return Mask(False, (_term(node, dependence(value), additive=True),))


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


def _additive(
    node: fx.Node,
    value: Choice,
    lineage: Iterable[fx.Node],
    values: SymbolicValues,
    domain: Domain,
    sizes: Sequence[int | torch.SymInt],
) -> Mask:
    pred = domain.simplify(value.pred)
    if value.yes == 0:
        if pred == sympy.true:
            return Mask(False, ())
        if value.no == -float("inf"):
            return _split(node, pred, lineage, values, domain, sizes)
        if value.no <= NO_WEIGHT_BELOW and conjuncts(pred) == _causal(pred, sizes):
            # Every row sees key 0, so none is an average over all keys.
            return Mask(True, ())
    return Mask(False, (_term(node, dependence(pred), additive=True),))


def _split(
    node: fx.Node,
    pred: Boolean,
    lineage: Iterable[fx.Node],
    values: SymbolicValues,
    domain: Domain,
    sizes: Sequence[int | torch.SymInt],
) -> Mask:
    """The mask that ``pred``, the simplified predicate of ``node``, stands for."""
    causal = _causal(pred, sizes)
    whole = conjuncts(pred)
    missing = whole - causal
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
    return Mask(bool(causal), tuple(terms))


def _causal(pred: Boolean, sizes: Sequence[int | torch.SymInt]) -> frozenset[Boolean]:
    """The conjuncts that say ``n <= m`` and nothing else, in whatever spelling."""
    n, m = (
        sympy.S.Zero if is_one(size) else index_symbol(position)
        for position, size in ((0, sizes[3]), (1, sizes[2]))
    )
    margins = {conjunct: margin_of(conjunct) for conjunct in conjuncts(pred)}
    return frozenset(
        conjunct
        for conjunct, margin in margins.items()
        if margin is not None and sympy.expand(margin - (m - n)) == 0
    )


def _term(node: fx.Node, varies_along: frozenset[sympy.Symbol], additive: bool) -> MaskTerm:
    batch, head, query, key = (index_symbol(position) in varies_along for position in (3, 2, 1, 0))
    return MaskTerm(node, (batch, head, query, key), additive)


def _long_dimensions(shape: Sequence[int | torch.SymInt]) -> tuple[bool, bool, bool, bool]:
    missing = [False] * (4 - len(shape))
    batch, head, query, key = missing + [not is_one(size) for size in shape]
    return batch, head, query, key
