"""Attention sinks: a column behind the scores that takes a share of the softmax and has no value.

    cat([scores, sink], -1)      SinkScores, if the sink is one column that differs by head at most
    - its maximum over columns   the same: softmax drops it
    softmax                      the same, as weights
    [..., :-1]                   Probabilities beside a sink

Any other way on ends them, with a reason.
"""

import operator
from dataclasses import replace
from typing import Any

from torch import fx

from flashsvd_compile.analysis.attention_facts import Scores, Sink, SinkScores
from flashsvd_compile.analysis.attention_rules import miss_here, probabilities_of
from flashsvd_compile.analysis.axes import Dim, same, shape_of, volume
from flashsvd_compile.analysis.calls import arguments, aten, constant, is_tensor, packet, value
from flashsvd_compile.analysis.factored import Labelled, label_like
from flashsvd_compile.analysis.facts import Facts
from flashsvd_compile.analysis.layout import Moved
from flashsvd_compile.analysis.repeats import unrepeated
from flashsvd_compile.reason import Code, Reason, reason_at

_REQUIRED = "one column, of a number for each head, behind the scores"


def join(facts: Facts, node: fx.Node) -> bool:
    """Scores joined with a sink, by the cat ``node``. False where no scores are joined."""
    parts = arguments(node)["tensors"]
    if not any(part in facts.scores for part in parts):
        return False
    found = _joined(facts, node, parts)
    if isinstance(found, Reason):
        miss_here(facts, node, found)
    else:
        facts.sinks[node] = found
    return True


def _joined(facts: Facts, node: fx.Node, parts: list[fx.Node]) -> SinkScores | Reason:
    def no(observed: str, code: Code = Code.OP_NOT_CARRIED) -> Reason:
        return reason_at(node, code, f"{node.target} of {observed}", _REQUIRED)

    if len(parts) != 2:
        return no(f"{len(parts)} tensors")
    source, column = parts
    if source not in facts.scores or column in facts.scores:
        return no("scores behind something else")
    scores, dims = facts.scores[source], facts.axes[source]
    axis = arguments(node)["dim"] % len(dims)
    shape = shape_of(value(column))
    if not same(shape[axis], shape_of(value(node))[axis] - shape_of(value(source))[axis]):
        return no("tensors of other sizes")
    if shape[axis] != 1:
        return no(f"{shape[axis]} columns")
    if column in facts.mutated:
        return no("memory that is written in place", Code.MUTATED)
    keys = dims[axis]
    if not _are_keys(facts, scores, keys):
        return no("rows, and not of keys", Code.SOFTMAX_AXIS)
    tensor = unrepeated(facts, column, facts.regions[node])
    labels = label_like(facts.space, dims, shape_of(value(tensor)))
    if labels is None or tensor in facts.mutated:
        return no("a column of another layout", Code.BAD_LAYOUT)
    labelled = Labelled((tensor,), labels)
    if not set(labelled.atoms(facts.space)) <= set(facts.space.leaves(scores.batch)):
        return no("a sink that differs between queries", Code.BAD_LAYOUT)
    columns = facts.space.fresh((shape_of(value(node))[axis],))[0]
    facts.axes[node] = (*dims[:axis], columns, *dims[axis + 1 :])
    return SinkScores(scores, Sink(column, labelled), keys, columns)


def _are_keys(facts: Facts, scores: Scores, keys: Dim) -> bool:
    """Are they all the rows of one operand, which softmax may then find to be the keys?"""
    return probabilities_of(facts, scores, facts.space.leaves(keys)) is not None


def elementwise(facts: Facts, node: fx.Node) -> bool:
    """Subtract a row's maximum. False where no operand of ``node`` is scores beside a sink."""
    operands = [n for n in node.all_input_nodes if n in facts.sinks]
    if not operands:
        return False
    source = operands[0]
    if _is_shifted(facts, node, source):
        facts.sinks[node], facts.axes[node] = facts.sinks[source], facts.axes[source]
    else:
        observed = f"{node.target} of scores beside a sink"
        required = "their maximum subtracted, then softmax"
        miss_here(facts, node, reason_at(node, Code.OP_NOT_CARRIED, observed, required))
    return True


def _is_shifted(facts: Facts, node: fx.Node, source: fx.Node) -> bool:
    if packet(node) is not aten.sub or facts.sinks[source].is_softmax:
        return False
    named = arguments(node)
    axis = _axis(facts, source)
    return (
        named["self"] is source
        and constant(named["alpha"]) == 1
        and axis is not None
        and _is_maximum(named["other"], source, axis)
    )


def _is_maximum(node: Any, of: fx.Node, axis: int) -> bool:
    """Is ``node`` the maximum of ``of`` along ``axis``, which it keeps?"""
    if not isinstance(node, fx.Node):
        return False
    if packet(node) is aten.detach:
        return _is_maximum(node.args[0], of, axis)
    reduction: Any = node
    if node.target is operator.getitem and node.args[1] == 0:
        reduction = node.args[0]
        if reduction.target is not aten.max.dim:
            return False
    elif packet(node) is not aten.amax:
        return False
    named, rank = arguments(reduction), value(of).dim()
    over = named["dim"] if isinstance(named["dim"], (list, tuple)) else [named["dim"]]
    return named["self"] is of and named["keepdim"] and [d % rank for d in over] == [axis]


def _axis(facts: Facts, node: fx.Node) -> int | None:
    """Which dimension of ``node`` holds keys and sink; None where a view has hidden it."""
    columns = facts.space.leaves(facts.sinks[node].columns)
    dims = facts.space.refine(facts.axes[node])
    return dims.index(columns) if columns in dims else None


def softmax(facts: Facts, node: fx.Node) -> None:
    named = arguments(node)
    source = named["self"]
    fact, dims = facts.sinks[source], facts.axes[source]
    facts.axes[node] = dims
    if fact.is_softmax or named["dim"] % len(dims) != _axis(facts, source):
        required = "softmax over the keys and the sink, once"
        observed = f"softmax over dim {named['dim']}"
        miss_here(facts, node, reason_at(node, Code.SOFTMAX_AXIS, observed, required))
        return
    facts.sinks[node] = replace(fact, is_softmax=True)


def cut(facts: Facts, source: fx.Node, node: fx.Node, moved: Moved) -> None:
    """The sink's column cut off ``source``, or something else."""
    fact, axis, cut = facts.sinks[source], _axis(facts, source), moved.cut
    keys = volume(facts.space.leaves(fact.keys))
    if (
        not fact.is_softmax
        or axis is None
        or cut is None
        or (cut.atom,) != facts.space.leaves(fact.columns)
        or cut.start != 0
        or len(moved.dims) != len(facts.axes[source])
        or not same(shape_of(value(node))[axis], keys)
        or not is_tensor(node)
    ):
        observed = (
            f"{node.target} of weights with a sink"
            if fact.is_softmax
            else (f"{node.target} of scores beside a sink")
        )
        required = "its column cut off behind the softmax"
        miss_here(facts, node, reason_at(node, Code.OP_NOT_CARRIED, observed, required))
        return
    facts.axes[node] = (*moved.dims[:axis], fact.keys, *moved.dims[axis + 1 :])
    found = probabilities_of(facts, fact.scores, facts.space.leaves(fact.keys))
    assert found is not None
    facts.probabilities[node] = replace(found, sink=fact.sink)
