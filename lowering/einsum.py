"""An einsum of three or more operands → two-operand ones, left to right; of one → a permute.

    einsum("bsd,dhr,hre->bhse", x, u, v)
    →  p = einsum("bsd,dhr->bshr", x, u);  einsum("bshr,hre->bhse", p, v)

so that its latent is a tensor of the graph. Torch itself contracts pairwise, too. What one
operand alone does (``bmhd->bhmd``) is a permute, unless it sums or takes a diagonal.
"""

import string

from flashsvd_compile.lowering.builder import Builder
from torch import fx

from flashsvd_compile.analysis.calls import arguments, aten, packet, value
from flashsvd_compile.analysis.contraction import Letters, einsum_letters


def split_einsums(graph: fx.Graph) -> None:
    """Rewrite, in place, every einsum of one operand, or more than two, in ``graph``."""
    for node in list(graph.nodes):
        if node.op == "call_function" and packet(node) is aten.einsum:
            _split(node)


def _split(node: fx.Node) -> None:
    named = arguments(node)
    operands = list(named["tensors"])
    letters = einsum_letters(named["equation"], [value(o).dim() for o in operands])
    if len(operands) == 2 or letters is None:
        return
    terms, out = letters
    if len(operands) == 1:
        _permute(node, operands[0], terms[0], out)
        return
    used = dict.fromkeys(c for term in terms for c in term)
    names = dict(zip(used, string.ascii_letters, strict=False))
    builder = Builder(node)
    while len(operands) > 2:
        rest = {c for term in terms[2:] for c in term} | set(out)
        kept: Letters = tuple(dict.fromkeys(c for term in terms[:2] for c in term if c in rest))
        product = _einsum(builder, names, terms[:2], kept, operands[:2])
        # Under autocast it runs in the whole einsum's dtype, which tracing it here does not show.
        product.meta["val"] = value(product).to(value(node).dtype)
        operands, terms = [product, *operands[2:]], [kept, *terms[2:]]
    node.replace_all_uses_with(_einsum(builder, names, terms, out, operands))
    node.graph.erase_node(node)


def _permute(node: fx.Node, operand: fx.Node, term: Letters, out: Letters) -> None:
    if sorted(term) != sorted(out) or len(set(term)) != len(term):
        return
    order = [term.index(letter) for letter in out]
    node.replace_all_uses_with(Builder(node).call(aten.permute.default, operand, order))
    node.graph.erase_node(node)


def _einsum(
    builder: Builder,
    names: dict[str, str],
    terms: list[Letters],
    out: Letters,
    operands: list[fx.Node],
) -> fx.Node:
    spelled = ["".join(names[c] for c in term) for term in (*terms, out)]
    equation = f"{','.join(spelled[:-1])}->{spelled[-1]}"
    return builder.call(aten.einsum.default, equation, operands)
