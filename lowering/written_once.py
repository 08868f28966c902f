"""What several read lies in memory once, where Inductor would compute it again for every reader.

    before   x₁ = x₀ + f(x₀);  x₂ = x₁ + g(x₁);  x₃ = x₂ + h(x₂)
    after    x₁ = x₀ + f(x₀);  y₁ = as_strided(x₁);  x₂ = y₁ + g(y₁);  y₂ = as_strided(x₂);  …

What `as_strided` views has to lie in memory; the kernel that first reads it writes it. Two kinds:

Residual sums. Inductor keeps a sum of up to four reads as a formula: x₃ holds x₀, f, g and h in
memory where x₂ and h would do, and each norm reads all of them. ViT-B/16's shape, batch 128,
bfloat16, H100 80GB HBM3, torch 2.11.0, 2026-11-26, every sum written: 9.20 ms and 180 MiB at the
peak, else 9.76 ms and 291 MiB. Only sums of sums are: what a norm alone reads (BERT's) never needs
to lie in memory, and writing it cost 24 of 95 MiB there.

What operators of ours read, and something else does, too, if only another argument of the same.
Inductor (torch 2.11 to 2.13, ``ir.ExternKernel.require_exact_strides``) writes a copy of a formula,
or of a view of one, for each such argument: ViT's norm three times before an attention that makes
q, k and v of it itself.
"""

from collections import Counter
from collections.abc import Collection

import sympy
from flashsvd_compile.lowering.builder import Builder
from torch import fx
from torch.utils import _pytree as pytree

from flashsvd_compile.analysis.axes import Size, same, shape_of
from flashsvd_compile.analysis.calls import (
    aliased_argument,
    aten,
    is_nested,
    is_tensor,
    packet,
    value,
)
from flashsvd_compile.analysis.known_sizes import KnownSizes

# Read tensors from memory, as our own operators do.
_LIBRARY = {
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.matmul, aten.linear,
    aten.scaled_dot_product_attention,
}  # fmt: skip


def write_once(graph: fx.Graph, mutated: Collection[fx.Node]) -> None:
    """``mutated``: nodes whose memory the graph writes into; they are left alone."""
    sizes = KnownSizes()
    chosen = (_copied(graph) - set(mutated)) | sums_of_sums(graph, mutated)
    for node in list(graph.nodes):
        if node in chosen:
            _write(node, Builder(node.next, sizes=sizes))


def sums_of_sums(graph: fx.Graph, mutated: Collection[fx.Node]) -> frozenset[fx.Node]:
    """The residual sums that ``write_once`` writes: they are there whichever sites are lowered."""
    return frozenset(n for n in graph.nodes if n not in mutated and _is_sum_of_a_sum(n))


def _copied(graph: fx.Graph) -> set[fx.Node]:
    """What operators read from memory more than once, ours among them."""
    reads: Counter[fx.Node] = Counter()
    ours: set[fx.Node] = set()
    for node in graph.nodes:
        is_ours = getattr(node.target, "namespace", None) == "flashsvd"
        if not is_ours and packet(node) not in _LIBRARY:
            continue
        for read in filter(is_tensor, pytree.tree_leaves((node.args, node.kwargs))):
            whole = _viewed_whole(read)
            reads[whole] += 1
            if is_ours:
                ours.add(whole)
    return {
        node
        for node in ours
        if reads[node] > 1 and node.op == "call_function" and aliased_argument(node) is None
    }


def _viewed_whole(node: fx.Node) -> fx.Node:
    """What ``node`` is a view of all elements of, or itself."""
    while (source := aliased_argument(node)) is not None and is_tensor(source):
        if value(node).dtype != value(source).dtype or not same(_volume(node), _volume(source)):
            break
        node = source
    return node


def _volume(node: fx.Node) -> Size:
    return sympy.Mul(*shape_of(value(node)))


def _is_sum_of_a_sum(node: fx.Node) -> bool:
    """Whether another sum reads the sum ``node``, and something else, too."""
    return _is_sum(node) and len(node.users) > 1 and any(map(_is_sum, node.users))


def _is_sum(node: fx.Node) -> bool:
    """Whether ``node`` adds two tensors of its own shape."""
    if (
        is_nested(node)
        or node.target is not aten.add.Tensor
        or not all(map(is_tensor, node.args[:2]))
    ):
        return False
    shape = shape_of(value(node))
    return all(
        len(term) == len(shape) and all(map(same, term, shape))
        for term in (shape_of(value(argument)) for argument in node.args[:2])
    )


def _write(node: fx.Node, builder: Builder) -> None:
    try:
        layout = builder.layout(value(node))
    except LookupError:
        return
    written = builder.call(aten.as_strided.default, node, *layout)
    # What leaves the graph is no view, as it was none.
    node.replace_all_uses_with(written, lambda user: user is not written and user.op != "output")
