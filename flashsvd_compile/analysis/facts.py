"""All that one sweep over a graph learned: facts by node, candidates for sites, near-misses."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from flashsvd_compile.analysis.attention_facts import (
    Operand,
    Probabilities,
    ScoreMask,
    Scores,
    Sink,
    SinkScores,
)
from flashsvd_compile.analysis.axes import AxisSpace, Dim, Dims
from flashsvd_compile.analysis.calls import (
    aliased_argument,
    is_tensor,
    mutated_arguments,
    stored,
    value,
)
from flashsvd_compile.analysis.contraction import Contraction
from flashsvd_compile.analysis.factored import Factored
from flashsvd_compile.analysis.layout import Moved
from flashsvd_compile.analysis.turned import MeanSquare, Turned
from flashsvd_compile.reason import Reason


@dataclass(frozen=True)
class Pointwise:
    """Elementwise operators, and such as only rearrange, between lifted tensors and here.

    ``sources``: the lifted nodes they read, each with the dimensions of *this* tensor in the atoms
    of that one. ``nodes``: the operators in graph order.
    """

    sources: Mapping[fx.Node, Dims]
    nodes: tuple[fx.Node, ...]

    def then(self, node: fx.Node) -> "Pointwise":
        return replace(self, nodes=(*self.nodes, node))


@dataclass(frozen=True)
class Lost:
    """An operator that a fact did not survive, and the stretch that led to it.

    The operator ends the stretch where it is elementwise itself (its memory was written to, or it
    reads a weight), else the stretch ends before it.
    """

    reason: Reason
    region: Pointwise


@dataclass(frozen=True)
class AttentionCandidate:
    """``node`` computes softmax(scale · query · key + masks) · value.

    ``softcap`` and ``sink`` as `Scores` and `SinkScores` have them.

    ``batch``, ``rows`` and ``feature`` are the atoms of the output's dimensions.
    """

    node: fx.Node
    query: Operand
    key: Operand
    value: Operand
    batch: Dims
    rows: Dim
    key_rows: Dim
    feature: Dim
    scale: float
    is_causal: bool
    masks: tuple[ScoreMask, ...]
    softcap: float = 0.0
    sink: Sink | None = None


@dataclass(frozen=True)
class FeedForwardCandidate:
    """``down`` contracts a wide tensor that is elementwise in one or two lifted tensors.

    ``lost``: what came between that is not elementwise, if anything did.
    """

    down: Contraction
    region: Pointwise
    lost: Reason | None = None


@dataclass(frozen=True)
class Miss:
    """A place that looked like a site and could not be one."""

    kind: str
    node: fx.Node
    reason: Reason


@dataclass
class Facts:
    """Filled by the sweep, read-only afterwards.

    ``appended``: concatenations of inputs and lifts, each with the dimension along which;
    ``ended``: why a tensor that was made of scores is none of attention's any more.
    """

    space: AxisSpace = field(default_factory=AxisSpace)
    axes: dict[fx.Node, Dims] = field(default_factory=dict)
    pieces: dict[fx.Node, list[Moved]] = field(default_factory=dict)
    factored: dict[fx.Node, Factored] = field(default_factory=dict)
    turned: dict[fx.Node, Turned] = field(default_factory=dict)
    squares: dict[fx.Node, MeanSquare] = field(default_factory=dict)
    scores: dict[fx.Node, Scores] = field(default_factory=dict)
    probabilities: dict[fx.Node, Probabilities] = field(default_factory=dict)
    sinks: dict[fx.Node, SinkScores] = field(default_factory=dict)
    ended: dict[fx.Node, Reason] = field(default_factory=dict)
    pointwise: dict[fx.Node, Pointwise] = field(default_factory=dict)
    lost: dict[fx.Node, Lost] = field(default_factory=dict)
    weights: set[fx.Node] = field(default_factory=set)
    inputs: set[fx.Node] = field(default_factory=set)
    appended: dict[fx.Node, Dim] = field(default_factory=dict)
    mutated: set[fx.Node] = field(default_factory=set)
    regions: dict[fx.Node, int] = field(default_factory=dict)
    candidates: list[AttentionCandidate | FeedForwardCandidate] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)

    def atoms(self, node: fx.Node, dims: tuple[int, ...]) -> Dim:
        """The finest atoms of some of the node's dimensions, in the order given."""
        return self.space.leaves(tuple(a for d in dims for a in self.axes[node][d]))

    def all_atoms(self, node: fx.Node) -> Dim:
        """The finest atoms of all of the node's dimensions, in their order."""
        return self.atoms(node, tuple(range(len(self.axes[node]))))

    def is_given(self, node: fx.Node) -> bool:
        """Is ``node`` a weight or an input, and not what the graph computes from inputs?"""
        return node in self.weights or node in self.inputs


def mutated_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose memory some operator of the graph writes into, through whatever alias."""
    base: dict[fx.Node, fx.Node] = {}
    owner: dict[int, fx.Node] = {}  # of inputs that share memory the first stands for all
    for node in graph.nodes:
        above = aliased_argument(node) if node.op == "call_function" else None
        base[node] = node if above is None else base[above]
        if node.op == "placeholder" and is_tensor(node):
            base[node] = owner.setdefault(stored(value(node)).untyped_storage()._cdata, node)
    written = {base[target] for node in graph.nodes if node.op == "call_function"
               for target in mutated_arguments(node)}  # fmt: skip
    return {node for node, origin in base.items() if origin in written}


def region_ids(graph: fx.Graph) -> dict[fx.Node, int]:
    """A number for each stretch of the graph between switches of autocast or grad mode."""
    region, regions = 0, {}
    switches = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast,
                torch._C._set_grad_enabled)  # fmt: skip
    for node in graph.nodes:
        region += node.op == "call_function" and node.target in switches
        regions[node] = region
    return regions


def weight_placeholders(graph: fx.Graph) -> set[fx.Node]:
    """Placeholders that hold parameters and buffers of modules."""
    return {
        node
        for node in graph.find_nodes(op="placeholder")
        if is_tensor(node)
        and (
            isinstance(node.meta["val"], torch.nn.Parameter)
            or node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None
        )
    }
