"""Factored products in the place of dense ones.

y = linear(x, w, b)
→  p = linear(x, u);  y = linear(p, v, b)                                     a whole matrix
→  p = unflatten(linear(x, u), [H, r]);  y = flatten(einsum(p, v)) + b        per head
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode

from flashsvd_compile.analysis.calls import aten, value
from flashsvd_compile.analysis.contraction import read_contraction


def write_factored(node: fx.Node, u: fx.Node, v: fx.Node) -> None:
    """Replace the dense product ``node`` by one with ``u`` [H·r, in] and ``v`` [H, D, r], or with
    [r, in] and [out, r] of a whole matrix."""
    product = read_contraction(node)
    assert product is not None
    write, bias = _Writer(node), product.bias
    latent = write(aten.linear.default, product.left, u)
    if value(v).dim() == 3:
        heads, _, rank = value(v).shape
        latent = write(aten.unflatten.int, latent, -1, [int(heads), int(rank)])
        wide = write(aten.einsum.default, "...hr,hdr->...hd", [latent, v])
        result = write(aten.flatten.using_ints, wide, -2, -1)
    elif bias is not None and value(bias).dim() == 1:
        result, bias = write(aten.linear.default, latent, v, bias), None
    else:
        result = write(aten.linear.default, latent, v)
    if bias is not None:
        if value(bias).dtype != value(node).dtype:
            bias = write(aten.to.dtype, bias, value(node).dtype)
        result = write(aten.add.Tensor, result, bias)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


class _Writer:
    """Writes nodes before a product, traced in its dtype: under autocast operands have others."""

    def __init__(self, product: fx.Node) -> None:
        self._product = product
        self._fake_mode = detect_fake_mode(value(product))

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        graph, dtype = self._product.graph, value(self._product).dtype
        with graph.inserting_before(self._product):
            node = graph.call_function(target, args)

        def traced(source: fx.Node) -> Any:
            found = value(source)
            return found.to(dtype) if isinstance(found, torch.Tensor) else found

        # By torch's decompositions in Python: `aten.linear` itself reads no symbolic sizes.
        with enable_python_dispatcher(), self._fake_mode or nullcontext():
            node.meta["val"] = target(*fx.map_arg(args, traced))
        for key in ("stack_trace", "nn_module_stack"):
            if key in self._product.meta:
                node.meta[key] = self._product.meta[key]
        return node


def add_input(graph: fx.Graph, name: str, tensor: torch.Tensor) -> fx.Node:
    """A placeholder behind all others that holds a weight of the model, ``tensor`` in its trace."""
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    fake_mode = detect_fake_mode([value(n) for n in graph.nodes if value(n) is not None])
    # Of static sizes: whoever makes a fake of this tensor later gets this one.
    traced = tensor if fake_mode is None else fake_mode.from_tensor(tensor, static_shapes=True)
    # What torch and the analysis read off a placeholder that Dynamo made of a parameter. That it
    # comes from nowhere in the user's code is what a source of None says.
    node.meta |= {"val": traced, "example_value": traced,
                  "tensor_dict": {"_dynamo_static_input_type": "unguarded"}}  # fmt: skip
    node._dynamo_source = None
    return node
