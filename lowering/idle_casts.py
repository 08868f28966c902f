"""Conversions that convert nothing → what they were given, as torch returns it itself.

    before   x₂ = x₁ + f;  y = x₂.to(float32), which x₂ is;  x₃ = y + g;  norm(y)
    after    x₂ = x₁ + f;                                    x₃ = x₂ + g;  norm(x₂)

Norms in transformers convert so, and in float32 hand the residual stream on as a conversion, which
hides from whoever looks for sums of sums that these are some.
"""

from typing import Any

import torch
from torch import fx

from flashsvd_compile.analysis.calls import arguments, aten, is_tensor, packet, value


def drop_idle_casts(graph: fx.Graph) -> None:
    """Take them out of ``graph``; their nodes stay until dead ones are erased."""
    for node in list(graph.nodes):
        if node.op == "call_function" and packet(node) is aten.to and is_tensor(node):
            given = arguments(node)
            source = given["self"]
            if not given.get("copy") and _is_the_same(given, source, node):
                node.replace_all_uses_with(source)


def _is_the_same(given: dict[str, Any], source: fx.Node, node: fx.Node) -> bool:
    had, has = value(source), value(node)
    return (
        (had.dtype, had.device, had.layout) == (has.dtype, has.device, has.layout)
        and given.get("memory_format") in (None, torch.preserve_format)
    )  # fmt: skip
