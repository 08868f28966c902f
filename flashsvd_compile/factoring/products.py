"""Dense products of a normalised graph: x · Wᵀ (+ b) with a weight matrix of the model.

    aten.linear(x, w, b)          w [out, in]
    aten.addmm(b, x, w)           w [in, out], as transformers' Conv1D has it
    aten.matmul(x, aten.t(w))     w [out, in]

Products are gathered by weight: one weight is factored once, whoever reads it. A weight that
cannot be factored is told with the reason. What it is in the graph is judged here; what its values
allow, in `ranks`.
"""

from collections import defaultdict
from dataclasses import dataclass

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import shape_of
from flashsvd_compile.analysis.calls import aten, is_tensor, packet, value
from flashsvd_compile.analysis.contraction import Contraction, read_contraction
from flashsvd_compile.analysis.facts import Facts, weight_placeholders
from flashsvd_compile.analysis.layout import is_layout
from flashsvd_compile.analysis.low_rank import is_low_rank, lifts_of_latents
from flashsvd_compile.reason import Code, Reason, reason_at

_LOOKUPS = {aten.embedding, aten.embedding_bag, aten._embedding_bag}
_FORM = "x [.., in] times a matrix of the model, columns last"


@dataclass(frozen=True)
class DenseWeight:
    """A placeholder, the products x [.., in] · Wᵀ (+ bias) that read it, and what keeps it dense.

    ``is_transposed``: it lies as [in, out]. ``position``: its place among the graph's inputs.
    """

    node: fx.Node
    position: int
    products: tuple[fx.Node, ...]
    is_transposed: bool = False
    obstacle: Reason | None = None


def find_dense_weights(facts: Facts, graph: fx.Graph) -> list[DenseWeight]:
    """Every weight that activations are multiplied with, in the order of the first products."""
    positions = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    own = weight_placeholders(graph)
    latents = set(lifts_of_latents(facts))
    found: dict[fx.Node, list[tuple[fx.Node, bool | Reason]]] = defaultdict(list)
    for node in graph.nodes:
        product = read_contraction(node) if is_tensor(node) else None
        if product is None:
            continue
        x, weight = product.left, product.right
        if x in facts.weights:
            x, weight = weight, x
        source = _source(facts, weight)
        if x not in facts.weights and source in own:
            found[source].append((node, _orientation(facts, product, source, latents)))
    return [_gathered(source, positions[source], reads) for source, reads in found.items()]


def _gathered(
    source: fx.Node, position: int, reads: list[tuple[fx.Node, bool | Reason]]
) -> DenseWeight:
    products = tuple(product for product, _ in reads)
    ways = {way for _, way in reads}
    problem = next((way for way in ways if isinstance(way, Reason)), None)
    if any(packet(user) in _LOOKUPS for user in source.users):
        observed = "a table that tokens are looked up in, too"
        problem = reason_at(source, Code.EMBEDDING_TABLE, observed, "a matrix for products only")
    elif len(ways) > 1 and problem is None:
        observed = "a matrix that is read both as it lies and transposed"
        problem = reason_at(products[0], Code.BAD_LAYOUT, observed, "one way")
    return DenseWeight(source, position, products, True in ways, problem)


def _source(facts: Facts, node: fx.Node) -> fx.Node:
    """The weight that ``node`` is computed from alone, by whatever operators."""
    while node in facts.weights and node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def _orientation(
    facts: Facts, product: Contraction, source: fx.Node, latents: set[fx.Node]
) -> bool | Reason:
    """Whether ``source`` lies as [in, out] in a product with it, or why that cannot be factored."""
    node, weight = product.node, product.right
    if product.right not in facts.weights:
        return reason_at(node, Code.BAD_LAYOUT, "the weight on the left", _FORM)
    if {product.left, source, weight, product.bias} & facts.mutated:
        return reason_at(node, Code.MUTATED, "memory that is written in place")
    sizes = shape_of(value(source))
    if value(source).dim() != 2 or not all(isinstance(size, sympy.Integer) for size in sizes):
        return reason_at(node, Code.BAD_LAYOUT, f"a weight of shape {list(sizes)}", _FORM)
    if 1 in sizes:
        observed = f"a weight of shape {list(sizes)} has rank 1 as it is"
        return reason_at(node, Code.RANK_TOO_LARGE, observed, "factors that save")
    fact = facts.factored.get(node)
    is_lift = fact is not None and fact.latent.node in facts.factored and is_low_rank(facts, fact)
    if node in latents or is_lift:
        return reason_at(node, Code.ALREADY_LOW_RANK, "a factor of a low-rank product", "a matrix")
    step = weight
    while step is not source:
        if not is_layout(step) or value(step).dtype != value(source).dtype:
            observed = f"{step.name} is computed from the weight"
            return reason_at(node, Code.OP_NOT_CARRIED, observed, "the weight, or a transpose")
        step = step.all_input_nodes[0]
    shared, out = product.left_letters[-1], product.out_letters
    columns = [letter for letter in product.right_letters if letter != shared]
    plain = (
        product.scale == 1
        and value(weight).dim() == 2
        and product.contracted == {shared}
        and out == (*product.left_letters[:-1], *columns)
    )
    dims, taken = facts.space.refine(facts.axes[source]), facts.space.refine(facts.axes[weight])
    if not plain or taken not in (dims, dims[::-1]):
        return reason_at(node, Code.BAD_LAYOUT, f"{node.target} in another form", _FORM)
    return taken[product.right_letters.index(shared)] == dims[0]
