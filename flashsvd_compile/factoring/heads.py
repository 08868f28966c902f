"""Which dense weights project to attention heads, and how wide those are: read off the axes.

    q = linear(x, w)                  [B, M, H·D]    (b,) (m,) (f,)
    q.view(B, M, H, D).transpose(..)  [B, H, M, D]   f was split into h, d
    scaled_dot_product_attention(q, k, v)            contracts d, so d is q's head

An operand of an attention, dense as it is, has come from a product, through views, rotations or
norms of single heads. Where the innermost atoms of that product's columns make up the operand's
head, each D of its columns are one head. A fused projection is cut before it is split: its cuts
must fall between heads. A wrong answer here makes nothing wrong, as any blocks of rows may be
factored on their own; the attention's own blocks are those that let it run on latents.
"""

from collections import defaultdict
from collections.abc import Iterator

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import AxisSpace, Dim, quotient, volume
from flashsvd_compile.analysis.calls import is_tensor, value
from flashsvd_compile.analysis.contraction import read_contraction
from flashsvd_compile.analysis.factored import Factored
from flashsvd_compile.analysis.facts import AttentionCandidate, Facts
from flashsvd_compile.analysis.layout import is_layout


def find_head_dims(facts: Facts) -> dict[fx.Node, int]:
    """The width of a head, for each product whose columns are heads of an attention.

    A product that is cut into heads of several widths has none.
    """
    found: dict[fx.Node, set[int]] = defaultdict(set)
    for candidate in facts.candidates:
        if not isinstance(candidate, AttentionCandidate):
            continue
        for operand in (candidate.query, candidate.key, candidate.value):
            width = volume(facts.atoms(operand.node, operand.feature))
            if isinstance(width, sympy.Integer) and len(operand.feature) == 1:
                feature = operand.feature[0]
                for product in _products_behind(facts, operand.node, feature, int(width)):
                    found[product].add(int(width))
    return {node: widths.pop() for node, widths in found.items() if len(widths) == 1}


def _products_behind(facts: Facts, operand: fx.Node, feature: int, width: int) -> Iterator[fx.Node]:
    """The products that an operand comes from, where their columns divide into its heads.

    ``feature``: which of its dimensions is the head, ``width`` wide. It is followed back as far as
    heads stand apart: what has them side by side came before they were made.
    """
    pending, seen = [(operand, feature)], {operand}
    while pending:
        node, dim = pending.pop()
        if (fact := facts.factored.get(node)) is not None:
            columns = facts.space.leaves(facts.axes[fact.lift][-1])
            if _innermost(columns, width) or _is_cut_into(facts.space, fact, width):
                yield fact.lift
            continue
        size = value(node).shape[dim]
        if not isinstance(size, int) or size > width or read_contraction(node) is not None:
            continue
        for source in node.all_input_nodes:
            if is_tensor(source) and source not in seen and source not in facts.weights:
                seen.add(source)
                pending += [(source, d) for d in _same_dimension(facts, node, dim, source)]


def _same_dimension(facts: Facts, node: fx.Node, dim: int, source: fx.Node) -> list[int]:
    """The dimension of ``source`` that ``dim`` of ``node`` was, or none."""
    space, rank = facts.space, value(source).dim()
    if is_layout(node) and source in facts.axes:
        atoms = space.leaves(facts.axes[node][dim])
        found = [d for d, own in enumerate(space.refine(facts.axes[source])) if own == atoms != ()]
        if found:
            return found[:1]
    from_right = dim - value(node).dim()
    return [rank + from_right] if rank >= -from_right else []


def _is_cut_into(space: AxisSpace, fact: Factored, width: int) -> bool:
    """Was a part cut from the columns that starts and ends between heads?"""
    rank = set(space.leaves(fact.rank))
    head = _innermost(tuple(a for a in fact.factor.atoms(space) if a not in rank), width)
    return bool(head) and all(
        cut.kept is None
        or not set(head) & set(space.leaves((cut.kept,)))
        or quotient(cut.start, sympy.Integer(width)) is not None
        for cut in fact.factor.cuts
    )


def _innermost(atoms: Dim, width: int) -> Dim:
    """The innermost of several atoms, as many as make up ``width``; none where they do not."""
    for first in reversed(range(len(atoms))):
        if volume(atoms[first:]) == width:
            return atoms[first:]
    return ()
