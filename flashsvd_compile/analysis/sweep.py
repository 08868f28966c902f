"""One forward sweep over a normalised graph: for each node, what follows from its inputs' facts.

No pattern is matched. Each operator belongs to one family (layout, product, softmax, dropout,
concatenation, elementwise) and its family's rule says which facts it carries on; every other
operator starts afresh. What an operator could not carry is kept in ``Facts.lost``, so that a site
that was not found can say where it broke.
"""

import operator

import torch
from torch import fx

from flashsvd_compile.analysis import (
    attention_rules,
    normed_rules,
    product_rules,
    sink_rules,
    turned_rules,
)
from flashsvd_compile.analysis.axes import Dims, same, shape_of
from flashsvd_compile.analysis.calls import (
    arguments,
    aten,
    constant,
    is_aten,
    is_tensor,
    overload,
    packet,
    tensor_inputs,
    value,
)
from flashsvd_compile.analysis.contraction import read_contraction
from flashsvd_compile.analysis.factored import Labelled, label_like
from flashsvd_compile.analysis.facts import (
    Facts,
    Lost,
    Pointwise,
    mutated_nodes,
    region_ids,
    weight_placeholders,
)
from flashsvd_compile.analysis.grouped import join_groups
from flashsvd_compile.analysis.layout import Moved, apply_layout, is_layout
from flashsvd_compile.analysis.pointwise import is_pointwise
from flashsvd_compile.reason import Code, reason_at

# Rounding to one of these is what any mixed-precision model does between operators; rounding to
# fewer bits (float8, integers) is a quantiser, which a rewrite must not drop.
_REAL_NUMBERS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def sweep(graph: fx.Graph) -> Facts:
    """The facts of every node of a normalised graph; its nodes and edges stay as they are."""
    facts = Facts()
    facts.mutated = mutated_nodes(graph)
    for node in facts.mutated:
        node.meta["mutated"] = True  # not the constant it was made as
    facts.regions = region_ids(graph)
    facts.weights = weight_placeholders(graph)
    for node in graph.nodes:
        if node.op == "call_function":
            _visit(facts, node)
        elif is_tensor(node) or node.op == "get_attr":
            _start(facts, node)
    return facts


def _start(facts: Facts, node: fx.Node) -> None:
    """A tensor that comes from outside the graph."""
    if node.op == "get_attr" and not is_tensor(node):
        held = getattr(node.graph.owning_module, str(node.target), None)
        if not isinstance(held, torch.Tensor):
            return
        node.meta["val"] = held
    if node.op == "get_attr":
        facts.weights.add(node)
    facts.inputs.add(node)
    facts.axes[node] = facts.space.fresh(shape_of(value(node)))


def _visit(facts: Facts, node: fx.Node) -> None:
    if node.target is operator.getitem:
        _pick(facts, node)
        return
    inputs = tensor_inputs(node)
    if inputs and is_aten(node) and all(n in facts.weights for n in inputs):
        facts.weights.add(node)
    if is_layout(node) and node.args[0] in facts.axes:
        _move(facts, node)
    if not is_tensor(node):
        return
    if node not in facts.axes:
        facts.axes[node] = _axes(facts, node)
    if node in facts.mutated:
        if any(atom.broadcast for atom in facts.all_atoms(node)):
            facts.axes[node] = facts.space.fresh(shape_of(value(node)))  # repeats may differ by now
        _lose(facts, node, Code.MUTATED, "memory that is written in place")
        return
    _infer(facts, node)
    if not is_layout(node):
        normed_rules.infer(facts, node)
        turned_rules.infer(facts, node)


def _infer(facts: Facts, node: fx.Node) -> None:
    """New facts from the facts of the inputs, by family."""
    if not is_layout(node) and (product := read_contraction(node)) is not None:
        product_rules.product(facts, product)
        return
    attention_rules.pass_on_end(facts, node)
    if is_layout(node):
        return
    if packet(node) is aten.scaled_dot_product_attention:
        attention_rules.sdpa(facts, node)
    elif packet(node) in (aten.softmax, aten._softmax) and node.args[0] in facts.scores:
        attention_rules.softmax(facts, node)
    elif packet(node) in (aten.softmax, aten._softmax) and node.args[0] in facts.sinks:
        sink_rules.softmax(facts, node)
    elif packet(node) in (aten.amax, aten.max) and node.args[0] in facts.sinks:
        return  # may be subtracted: then it is no end of them
    elif packet(node) is aten.dropout:
        _dropout(facts, node)
    elif packet(node) in (aten.cat, aten.concat, aten.concatenate):
        _cat(facts, node)
    elif is_pointwise(node):
        _elementwise(facts, node)
    else:
        _lose(facts, node, Code.OP_NOT_CARRIED, str(node.target))


# ---- axes ---------------------------------------------------------------------------------------


def _axes(facts: Facts, node: fx.Node) -> Dims:
    """Dimensions of an elementwise result are its inputs'; any other result has its own."""
    shape = shape_of(value(node))
    if _is_off(node):
        return facts.axes[node.args[0]]  # type: ignore[index]
    if not is_pointwise(node) or torch.Tag.nondeterministic_seeded in overload(node).tags:
        return facts.space.fresh(shape)
    varying = [n for n in tensor_inputs(node) if constant(n) is None]
    if len(varying) == 1 and varying[0] in facts.axes and _same_shape(node, varying[0]):
        return facts.axes[varying[0]]  # nothing else that it could vary along
    dims = list(facts.space.fresh(shape))
    for source in _by_knowledge(facts, tensor_inputs(node)):
        labels = facts.axes.get(source, ())
        sizes = shape_of(value(source))
        offset = len(shape) - len(sizes)
        for i, (label, size) in enumerate(zip(labels, sizes, strict=True)):
            if label and same(size, shape[offset + i]):
                dims[offset + i] = facts.space.varying(label, size)
    return tuple(dims)


def _is_off(node: fx.Node) -> bool:
    """Is ``node`` a dropout that drops nothing?"""
    if packet(node) is not aten.dropout:
        return False
    named = arguments(node)
    return not named["train"] or named["p"] == 0


def _by_knowledge(facts: Facts, nodes: list[fx.Node]) -> list[fx.Node]:
    """Least known first, so that the labels of the operand that facts speak of prevail."""
    return sorted(nodes, key=lambda n: n in facts.factored or n in facts.scores
                  or n in facts.probabilities or n in facts.pointwise
                  or n in facts.turned)  # fmt: skip


# ---- layout -------------------------------------------------------------------------------------


def _move(facts: Facts, node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    moved = apply_layout(facts.space, node, facts.axes[source])
    if not is_tensor(node):
        if moved is not None:
            facts.pieces[node] = moved
        return
    if moved is None:
        _lose(facts, node, Code.OP_NOT_CARRIED, f"{node.target}: dimensions do not divide")
        return
    _carry(facts, source, node, moved[0])


def _pick(facts: Facts, node: fx.Node) -> None:
    listed, index = node.args
    assert isinstance(listed, fx.Node)
    if listed in facts.pieces and isinstance(index, int) and node not in facts.mutated:
        source = listed.args[0]
        assert isinstance(source, fx.Node)
        if source in facts.weights:
            facts.weights.add(node)
        _carry(facts, source, node, facts.pieces[listed][index])
    elif is_tensor(node):
        facts.axes[node] = facts.space.fresh(shape_of(value(node)))


def _carry(facts: Facts, source: fx.Node, node: fx.Node, moved: Moved) -> None:
    facts.axes[node] = moved.dims
    if node in facts.mutated:
        return
    if value(node).dtype not in _REAL_NUMBERS:
        _lose(facts, node, Code.OP_NOT_CARRIED, f"{node.target} to {value(node).dtype}")
        return
    if source in facts.inputs:
        facts.inputs.add(node)
    if source in facts.appended:
        facts.appended[node] = facts.appended[source]
    if (fact := facts.factored.get(source)) is not None:
        facts.factored[node] = fact.cut(facts.space, moved.cut) if moved.cut else fact
    turned_rules.carry(facts, source, node, moved)
    if source in facts.lost:
        facts.lost[node] = facts.lost[source]
    if moved.cut is not None:
        if source in facts.sinks:
            sink_rules.cut(facts, source, node, moved)
        return
    for table in (facts.scores, facts.probabilities, facts.sinks):
        if source in table:
            table[node] = table[source]  # type: ignore[assignment]
    if source in facts.pointwise and is_layout(node):
        region = facts.pointwise[source]
        seen = {of: apply_layout(facts.space, node, dims) for of, dims in region.sources.items()}
        kept = {of: moved[0].dims for of, moved in seen.items() if moved is not None}
        if len(kept) == len(seen):
            facts.pointwise[node] = Pointwise(kept, (*region.nodes, node))


# ---- dropout, concatenation, elementwise --------------------------------------------------------


def _dropout(facts: Facts, node: fx.Node) -> None:
    named = arguments(node)
    source = named["input"]
    if not _is_off(node):
        observed = f"dropout p={named['p']} in training mode"
        _lose(facts, node, Code.DROPOUT_ACTIVE, observed, "eval mode, or p = 0")
        return
    _carry(facts, source, node, Moved(facts.axes[source]))
    if source in facts.pointwise:
        facts.pointwise[node] = facts.pointwise[source].then(node)


def _cat(facts: Facts, node: fx.Node) -> None:
    if sink_rules.join(facts, node):
        return
    named = arguments(node)
    parts = [facts.factored.get(part) for part in named["tensors"]]
    found = [part for part in parts if part is not None]
    if all(part in facts.inputs or part in facts.factored for part in named["tensors"]):
        facts.appended[node] = facts.axes[node][named["dim"] % len(facts.axes[node])]
    if not found or len(found) != len(parts):
        reason = reason_at(node, Code.OP_NOT_CARRIED, str(node.target), "a number or a mask")
        attention_rules.miss_here(facts, node, reason)
        return
    dims = [facts.axes[part] for part in named["tensors"]]
    axis = named["dim"] % len(dims[0])
    joined = join_groups(facts.space, facts.axes, found, dims, axis)
    if joined is None:
        _lose(facts, node, Code.OP_NOT_CARRIED, "cat of parts of unequal rank, width or spelling")
        return
    facts.factored[node], facts.axes[node] = joined


def _elementwise(facts: Facts, node: fx.Node) -> None:
    # A product of two graph inputs may be scores or a lift: what follows tells.
    is_lift = any(source in facts.factored for source in tensor_inputs(node))
    is_attention = attention_rules.elementwise(facts, node) or sink_rules.elementwise(facts, node)
    if is_attention and not is_lift:
        return
    _affine(facts, node)
    _stretch(facts, node)
    if node not in facts.factored and node not in facts.pointwise:
        _lose(facts, node, Code.OP_NOT_CARRIED, str(node.target))


def _affine(facts: Facts, node: fx.Node) -> None:
    """Sums with a bias and products with a number keep the factored fact."""
    operands = [a for a in node.args[:2] if not isinstance(a, (str, type(None)))]
    lifted = [a for a in operands if isinstance(a, fx.Node) and a in facts.factored]
    if len(operands) != 2 or len(lifted) != 1 or not _same_shape(node, lifted[0]):
        return
    fact = facts.factored[lifted[0]]
    own, its = (facts.space.refine(facts.axes[n]) for n in (node, lifted[0]))
    if own != its:
        return
    other = operands[1] if operands[0] is lifted[0] else operands[0]
    number = constant(other)
    kind = packet(node)
    if kind in (aten.mul, aten.multiply) and number is not None:
        facts.factored[node] = fact.scaled(number)
    elif kind in (aten.div, aten.true_divide) and number and operands[0] is lifted[0]:
        if arguments(node).get("rounding_mode") is None:
            facts.factored[node] = fact.scaled(1 / number)
    elif kind is aten.add and isinstance(other, fx.Node) and _is_bias(facts, other):
        weight = constant(arguments(node)["alpha"])
        labels = label_like(facts.space, facts.axes[node], shape_of(value(other)))
        if weight is None or labels is None or (weight != 1 and operands[0] is not other):
            return
        bias = Labelled((other,), labels)
        wide = set(fact.lifted_atoms(facts.space)) | set(facts.space.leaves(fact.rank))
        if number is None and set(bias.atoms(facts.space)) <= wide | set(
            fact.factor.atoms(facts.space)
        ):
            facts.factored[node] = fact.plus(bias)


def _is_bias(facts: Facts, other: fx.Node) -> bool:
    return facts.is_given(other) and other not in facts.mutated


def _stretch(facts: Facts, node: fx.Node) -> None:
    """Elementwise operators of lifted tensors and numbers form one stretch."""
    sources: dict[fx.Node, Dims] = {}
    nodes: list[fx.Node] = []
    if facts.factored.get(node) and facts.factored[node].scale == 1.0:
        return  # still the lift itself: a bias was added
    for operand in tensor_inputs(node):
        if constant(operand) is not None:
            continue
        region = facts.pointwise.get(operand)
        if region is None and operand in facts.factored and facts.factored[operand].scale == 1.0:
            region = Pointwise({operand: facts.axes[operand]}, ())
        if region is None or not _same_shape(node, operand):
            return
        for of, dims in region.sources.items():
            if facts.space.refine(sources.setdefault(of, dims)) != facts.space.refine(dims):
                return  # one tensor beside itself transposed
        nodes += [n for n in region.nodes if n not in nodes]
    if sources and len(sources) <= 2:
        facts.pointwise[node] = Pointwise(sources, (*nodes, node))


def _same_shape(node: fx.Node, operand: fx.Node) -> bool:
    left, right = shape_of(value(node)), shape_of(value(operand))
    return len(left) == len(right) and all(map(same, left, right))


def _lose(facts: Facts, node: fx.Node, code: Code, observed: str, required: str = "") -> None:
    """Remember where a fact ended, unless an earlier end is being passed on.

    Only operators of one activation pass it on: where two streams meet (a residual sum), a chain
    has simply ended.
    """
    attention_rules.miss_here(facts, node, reason_at(node, code, observed, required))
    known = [
        n
        for n in tensor_inputs(node)
        if n not in facts.weights and constant(n) is None and value(n).dtype in _REAL_NUMBERS
    ]
    if len(known) != 1:
        return
    source = known[0]
    if source in facts.lost:
        facts.lost[node] = facts.lost[source]
    elif source in facts.factored or source in facts.pointwise:
        required = required or "an operator that keeps latent × factor"
        region = facts.pointwise.get(source) or Pointwise({source: facts.axes[source]}, ())
        region = region.then(node) if is_pointwise(node) else region
        facts.lost[node] = Lost(reason_at(node, code, observed, required), region)
