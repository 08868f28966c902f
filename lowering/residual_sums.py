"""Residual sums are written once, where Inductor would add them up again for every reader.

    before   x₁ = x₀ + f(x₀);  x₂ = x₁ + g(x₁);  x₃ = x₂ + h(x₂)
    after    x₁ = x₀ + f(x₀);  y₁ = as_strided(x₁);  x₂ = y₁ + g(y₁);  y₂ = as_strided(x₂);  …

Inductor keeps a sum of up to four reads as a formula: x₃ holds x₀, f, g and h in memory where x₂
and h would do, and each norm reads all of them. What `as_strided` views has to lie in memory; the
sum is written by the kernel that first reads it. ViT-B/16's shape, batch 128, bfloat16, H100 80GB
HBM3, torch 2.11.0, 2026-11-26, every sum written: 9.20 ms and 180 MiB at the peak, else 9.76 ms and
291 MiB. Only sums of sums are: what a norm alone reads (BERT's) never needs to lie in memory, and
writing it cost 24 of 95 MiB there.
"""

from collections.abc import Container

from flashsvd_compile.lowering.builder import Builder
from torch import fx

from flashsvd_compile.analysis.axes import same, shape_of
from flashsvd_compile.analysis.calls import aten, is_tensor, value
from flashsvd_compile.analysis.known_sizes import KnownSizes


def write_residual_sums(graph: fx.Graph, mutated: Container[fx.Node]) -> None:
    """``mutated``: nodes whose memory the graph writes into; they are left alone."""
    sizes = KnownSizes()
    for node in list(graph.nodes):
        if not _is_sum(node) or node in mutated or len(node.users) < 2:
            continue
        if any(_is_sum(user) for user in node.users):
            _write(node, Builder(node.next, sizes=sizes))


def _is_sum(node: fx.Node) -> bool:
    """Whether ``node`` adds two tensors of its own shape."""
    if node.target is not aten.add.Tensor or not all(map(is_tensor, node.args[:2])):
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
