"""Every matmul spelling as one thing: two operands whose dimensions carry letters.

``linear``, ``mm``, ``matmul``, ``bmm``, ``addmm``, ``baddbmm``, ``tensordot`` and a two-operand
``einsum`` all read as: letters shared by both operands and the output are batch, shared letters
missing from the output are contracted, the rest belong to one operand.

    aten.linear(x [B, M, d], w [o, d], b [o])      x: 0 1 9   w: 8 9   out: 0 1 8   bias: w's 8
    aten.einsum("bmd,hdr->bhmr", x, u)             x: b m d   u: h d r   out: b h m r
"""

import string
from dataclasses import dataclass

from torch import fx

from flashsvd_compile.analysis.axes import same, shape_of
from flashsvd_compile.analysis.calls import arguments, aten, constant, packet, value

Letters = tuple[str, ...]


@dataclass(frozen=True)
class Contraction:
    """``node = scale · left · right (+ bias)``; one letter for each dimension of each operand.

    A letter of an operand's size-1 dimension may stand for a longer one in the output
    (broadcasting).
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_letters: Letters
    right_letters: Letters
    out_letters: Letters
    bias: fx.Node | None = None
    scale: float = 1.0

    @property
    def contracted(self) -> set[str]:
        return (set(self.left_letters) & set(self.right_letters)) - set(self.out_letters)


def read_contraction(node: fx.Node) -> Contraction | None:
    """``node`` as a contraction of two operands, or None if it is not one."""
    reader = _READERS.get(packet(node)) if node.op == "call_function" else None
    return reader(node) if reader else None


def _linear(node: fx.Node) -> Contraction | None:
    named = arguments(node)
    batch = tuple(string.ascii_lowercase[: value(named["input"]).dim() - 1])
    if value(named["weight"]).dim() != 2:
        return None
    return Contraction(
        node, named["input"], named["weight"], (*batch, "I"), ("O", "I"), (*batch, "O"),
        named["bias"],
    )  # fmt: skip


def _matmul(node: fx.Node) -> Contraction | None:
    named = arguments(node)
    return _product(node, named["self"], named["other" if "other" in named else "mat2"])


def _product(
    node: fx.Node,
    left: fx.Node,
    right: fx.Node,
    bias: fx.Node | None = None,
    scale: float = 1.0,
) -> Contraction | None:
    left_rank, right_rank = value(left).dim(), value(right).dim()
    if left_rank < 2 or right_rank < 2:
        return None
    batch = string.ascii_lowercase[: max(left_rank, right_rank) - 2]
    left_batch = tuple(batch[len(batch) - (left_rank - 2) :])
    right_batch = tuple(batch[len(batch) - (right_rank - 2) :])
    return Contraction(
        node, left, right, (*left_batch, "M", "K"), (*right_batch, "K", "N"), (*batch, "M", "N"),
        bias, scale,
    )  # fmt: skip


def _addmm(node: fx.Node) -> Contraction | None:
    named = arguments(node)
    alpha, beta = constant(named["alpha"]), constant(named["beta"])
    bias = named["self"]
    if beta == 0 or constant(bias) == 0:
        bias = None  # torch reads no bias then, whatever is in it
    elif beta != 1:
        return None
    if alpha is None:
        return None
    left, right = ("batch1", "batch2") if packet(node) is aten.baddbmm else ("mat1", "mat2")
    return _product(node, named[left], named[right], bias, alpha)


def _tensordot(node: fx.Node) -> Contraction | None:
    named = arguments(node)
    ranks = [value(named[side]).dim() for side in ("self", "other")]
    letters = iter(string.ascii_lowercase)
    left, right = ([next(letters) for _ in range(rank)] for rank in ranks)
    for i, j in zip(named["dims_self"], named["dims_other"], strict=True):
        right[j] = left[i]
    out = [c for c in left if c not in right] + [c for c in right if c not in left]
    return Contraction(
        node, named["self"], named["other"], tuple(left), tuple(right), tuple(out)
    )  # fmt: skip


def _einsum(node: fx.Node) -> Contraction | None:
    named = arguments(node)
    if len(named["tensors"]) != 2:
        return None
    left, right = named["tensors"]
    letters = einsum_letters(named["equation"], [value(left).dim(), value(right).dim()])
    if letters is None:
        return None
    (left_letters, right_letters), out = letters
    # A letter twice in one operand is a diagonal, and one that vanishes from a single operand a
    # sum: neither is a product.
    lonely = set(left_letters) ^ set(right_letters)
    if lonely - set(out) or any(len(set(w)) < len(w) for w in (left_letters, right_letters, out)):
        return None
    sizes = [
        dict(zip(letters, shape_of(value(operand)), strict=True))
        for letters, operand in ((left_letters, left), (right_letters, right))
    ]
    for letter in set(left_letters) & set(right_letters) - set(out):
        if not same(sizes[0][letter], sizes[1][letter]):
            return None  # a length of 1 that is repeated: the product with a sum
    return Contraction(node, left, right, left_letters, right_letters, out)


def einsum_letters(equation: str, ranks: list[int]) -> tuple[list[Letters], Letters] | None:
    """The letters of each operand and of the output; an ellipsis becomes letters of its own."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(ranks):
        return None
    dots = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    longest = max((d for d, t in zip(dots, terms, strict=True) if "..." in t), default=0)
    names = [f".{i}" for i in range(longest)]

    def spell(term: str, count: int) -> Letters:
        head, ellipsis, tail = term.partition("...")
        return (*head, *(names[longest - count :] if ellipsis else ()), *tail)

    operands = [spell(term, count) for term, count in zip(terms, dots, strict=True)]
    if arrow:
        return operands, spell(output, longest)
    every = [letter for letters in operands for letter in letters if letter not in names]
    return operands, (*names, *sorted(c for c in set(every) if every.count(c) == 1))


_READERS = {
    aten.linear: _linear,
    aten.matmul: _matmul,
    aten.mm: _matmul,
    aten.bmm: _matmul,
    aten.addmm: _addmm,
    aten.baddbmm: _addmm,
    aten.einsum: _einsum,
    aten.tensordot: _tensordot,
}
