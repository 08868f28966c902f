"""A stack of low-rank transformer blocks of any depth, as Dynamo would hand it to a backend.

The graph is written directly, weights as placeholders, in the spelling of a model's own code: so
that graphs of 20,000 nodes do not cost the minutes that Dynamo takes to trace them. Widths are
tiny; they are none of a graph's nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.proxy import GraphAppendingTracer

BATCH, LENGTH, HEADS, HEAD_DIM, INTERMEDIATE, RANK = 2, 9, 4, 8, 72, 4
HIDDEN = HEADS * HEAD_DIM


@dataclass(frozen=True)
class DeepGraph:
    """What a backend gets: ``gm`` and a fake input for each of its placeholders."""

    gm: fx.GraphModule
    example_inputs: Sequence[Any]

    @property
    def nodes(self) -> int:
        return len(self.gm.graph.nodes)


def deep_graph(blocks: int, *, dynamic: bool = False) -> DeepGraph:
    """``blocks`` blocks under one padding mask; ``dynamic``: batch and length are symbols."""
    graph = fx.Graph()
    inputs = _Inputs(graph, dynamic)
    x = inputs.activation("x", torch.empty(BATCH, LENGTH, HIDDEN))
    keys = inputs.activation("keys", torch.empty(BATCH, LENGTH, dtype=torch.bool))
    weights = [_block_weights(inputs, index) for index in range(blocks)]
    mask = keys[:, None, None, :]
    for block in weights:
        x = _block(x, mask, block)
    graph.output((x.node,))
    return DeepGraph(fx.GraphModule(nn.Module(), graph), inputs.fakes)


class _Inputs:
    """Placeholders, which come first, and their fakes."""

    def __init__(self, graph: fx.Graph, dynamic: bool) -> None:
        self.fakes: list[Any] = []
        self._graph = graph
        self._tracer = GraphAppendingTracer(graph)
        self._mode = FakeTensorMode(shape_env=ShapeEnv())
        self._dynamic = dynamic

    def activation(self, name: str, example: torch.Tensor) -> Any:
        source = ConstantSource(name)
        fake = self._mode.from_tensor(example, static_shapes=not self._dynamic, source=source)
        return self._placeholder(name, fake)

    def weight(self, name: str, *shape: int) -> Any:
        parameter = nn.Parameter(torch.empty(shape))
        return self._placeholder(name, self._mode.from_tensor(parameter, static_shapes=True))

    def _placeholder(self, name: str, fake: torch.Tensor) -> fx.Proxy:
        node = self._graph.placeholder(name)
        node.meta["example_value"] = fake
        self.fakes.append(fake)
        return fx.Proxy(node, self._tracer)


def _block_weights(inputs: _Inputs, index: int) -> dict[str, Any]:
    widths = dict.fromkeys(("q", "k", "v", "o"), (HIDDEN, HIDDEN))
    widths |= {"up": (HIDDEN, INTERMEDIATE), "down": (INTERMEDIATE, HIDDEN)}
    found = {}
    for name, (before, after) in widths.items():
        for part, shape in (("u", (RANK, before)), ("v", (after, RANK)), ("b", (after,))):
            found[f"{name}_{part}"] = inputs.weight(f"l{index}_{name}_{part}", *shape)
    for name in ("norm1", "norm2"):
        for part in ("weight", "bias"):
            found[f"{name}_{part}"] = inputs.weight(f"l{index}_{name}_{part}", HIDDEN)
    return found


def _block(x: Any, mask: Any, weights: dict[str, Any]) -> Any:
    def low_rank(name: str, x: Any) -> Any:
        latent = F.linear(x, weights[f"{name}_u"])
        return F.linear(latent, weights[f"{name}_v"], weights[f"{name}_b"])

    def normed(name: str, x: Any) -> Any:
        return F.layer_norm(x, (HIDDEN,), weights[f"{name}_weight"], weights[f"{name}_bias"])

    batch, length = x.size(0), x.size(1)
    q, k, v = (
        low_rank(name, x).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2) for name in "qkv"
    )
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    attended = attended.transpose(1, 2).reshape(batch, length, HIDDEN)
    x = normed("norm1", x + low_rank("o", attended))
    return normed("norm2", x + low_rank("down", F.gelu(low_rank("up", x))))
