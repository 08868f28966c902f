"""The pass: dense weights of a graph in inference → factors of planned ranks, which are its inputs.

    find products and heads  →  read the spectra  →  plan ranks  →  factor  →  write the products

It runs before the analysis, which then finds sites as in any low-rank model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from flashsvd_compile.analysis.axes import shape_of
from flashsvd_compile.analysis.calls import value
from flashsvd_compile.analysis.sweep import sweep
from flashsvd_compile.compress.linears import DTYPES
from flashsvd_compile.factoring.factors import Form, Spectrum, factors_of, spectrum
from flashsvd_compile.factoring.feed import Feed, Slot
from flashsvd_compile.factoring.heads import find_head_dims
from flashsvd_compile.factoring.products import DenseWeight, find_dense_weights
from flashsvd_compile.factoring.ranks import Candidate, share_within
from flashsvd_compile.factoring.records import Factoring, WeightReport
from flashsvd_compile.factoring.writing import add_input, write_factored
from flashsvd_compile.reason import Code, Reason, reason_at


@dataclass(frozen=True)
class _Readable:
    """A weight that could be factored: its values, how they are read, and what bounds its rank."""

    weight: DenseWeight
    values: Tensor
    form: Form
    spectrum: Spectrum
    candidate: Candidate


def factor_weights(
    graph: fx.Graph,
    example_inputs: Sequence[Any],
    *,
    keep: float | None = None,
    weight_budget: int | None = None,
) -> tuple[Factoring, Feed | None]:
    """Factor the dense weights of a normalised ``graph``, in place.

    ``keep``: the share of its parameters that each factored matrix keeps, in (0, 1); or
    ``weight_budget``: bytes for all weights of the graph that can be factored. The feed makes the
    further inputs that the graph has then; None where it has none.
    """
    if (refused := _check_inference(graph, example_inputs)) is not None:
        return Factoring(keep, refused=refused), None
    judged = _judged(graph, example_inputs)
    candidates = [one.candidate for one in judged if isinstance(one, _Readable)]
    share = keep
    if weight_budget is not None:
        found = _share(candidates, weight_budget)
        if isinstance(found, Reason):
            return Factoring(None, refused=found), None
        share = found
    assert share is not None
    rows, slots = [], []
    for one in judged:
        if isinstance(one, WeightReport):
            rows.append(one)
            continue
        rank = one.candidate.planned_rank(share)
        if rank is not None:
            slots.append(_factored(graph, one, rank))
        rows.append(_row(one, rank))
    return Factoring(share, tuple(rows)), Feed(slots) if slots else None


def _check_inference(graph: fx.Graph, example_inputs: Sequence[Any]) -> Reason | None:
    """Why gradients may be wanted of this graph: factors that are made apart pass none on."""
    switched = any(
        node.target is torch._C._set_grad_enabled and node.args[0] is True for node in graph.nodes
    )
    if not (torch.is_grad_enabled() or switched):
        return None
    for node, given in zip(graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if isinstance(given, Tensor) and given.requires_grad:
            observed = f"{_path(node)} requires a gradient"
            return Reason(Code.GRADIENTS, observed, "inference, as under torch.no_grad()")
    return None


def _judged(graph: fx.Graph, example_inputs: Sequence[Any]) -> list[_Readable | WeightReport]:
    """Each weight of the graph ready to be factored, or the row that tells why it stays dense."""
    facts = sweep(graph)
    head_dims = find_head_dims(facts)
    judged: list[_Readable | WeightReport] = []
    for weight in find_dense_weights(facts, graph):
        values = example_inputs[weight.position]
        problem = weight.obstacle or _check_values(weight.node, values)
        if problem is not None:
            judged.append(_dense(weight, problem))
            continue
        inputs, out = (int(size) for size in shape_of(value(weight.node)))
        if not weight.is_transposed:
            inputs, out = out, inputs
        widths = {head_dims.get(product) for product in weight.products} - {None}
        width = widths.pop() if len(widths) == 1 else None
        heads = out // width if width and out % width == 0 else 1
        form = Form(heads, weight.is_transposed)
        found = spectrum(values, form)
        if found is None:
            observed = "values that are not finite"
            judged.append(_dense(weight, reason_at(weight.node, Code.NO_VALUES, observed)))
            continue
        candidate = Candidate(heads, out // heads, inputs, values.element_size(), found.rank)
        judged.append(_Readable(weight, values, form, found, candidate))
    return judged


def _check_values(node: fx.Node, values: Any) -> Reason | None:
    """Why there is nothing to factor in what the compiler was given for a weight."""
    if isinstance(values, FakeTensor) or values.is_meta:
        observed = "a weight without values, as on the meta device or under export"
        return reason_at(node, Code.NO_VALUES, observed, "real values to factor")
    if type(values) not in (Tensor, torch.nn.Parameter):
        return reason_at(node, Code.NO_VALUES, f"a {type(values).__qualname__}", "a plain tensor")
    if values.dtype not in DTYPES:
        return reason_at(node, Code.DTYPE, str(values.dtype), "a floating-point weight")
    if values.numel() == 0:
        return reason_at(node, Code.NO_VALUES, "an empty weight")
    return None


def _share(candidates: Sequence[Candidate], budget: int) -> float | Reason:
    """The share of parameters that the budget leaves to each, or why there is none to plan."""
    dense = sum(candidate.dense_bytes for candidate in candidates)
    if dense <= budget:
        observed = f"the weights take {dense} bytes as they are"
        return Reason(Code.WEIGHT_BUDGET, observed, f"more than the budget of {budget}")
    share = share_within(candidates, budget)
    if share is None:
        least = sum(candidate.planned_bytes(0.0) for candidate in candidates)
        observed = f"factors of rank 1 take {least} bytes"
        return Reason(Code.WEIGHT_BUDGET, observed, f"at most the budget of {budget}")
    return share


def _factored(graph: fx.Graph, one: _Readable, rank: int) -> Slot:
    """Write all products of one weight, and give the graph its factors as inputs."""
    factors = factors_of(one.values, one.form, rank)
    name = one.weight.node.name
    u = add_input(graph, f"{name}_u", factors.u)
    v = add_input(graph, f"{name}_v", factors.v)
    for product in one.weight.products:
        write_factored(product, u, v)
    return Slot(one.weight.position, _path(one.weight.node), one.values, factors)


def _row(one: _Readable, rank: int | None) -> WeightReport:
    candidate = one.candidate
    m, n = candidate.m, candidate.n
    if rank is None:
        observed = f"no smaller rank was planned than [{m}, {n}] has parameters for"
        problem = reason_at(one.weight.node, Code.RANK_TOO_LARGE, observed, "factors that save")
        return _dense(one.weight, problem, candidate.heads)
    return WeightReport(
        _path(one.weight.node),
        "matrix" if candidate.heads == 1 else "per_head",
        candidate.heads,
        rank,
        len(one.weight.products),
        candidate.dense_bytes,
        candidate.heads * rank * (m + n) * candidate.element_bytes,
        one.spectrum.error(rank),
    )


def _dense(weight: DenseWeight, reason: Reason, heads: int = 1) -> WeightReport:
    traced = value(weight.node)
    size = int(traced.numel()) * traced.element_size()
    name = _path(weight.node)
    return WeightReport(name, "dense", heads, None, len(weight.products), size, reason=reason)


def _path(node: fx.Node) -> str:
    """``L['self']._modules['q']._parameters['weight']`` → ``q.weight``; the node's own name where
    Dynamo tells no source."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    name = name() if callable(name) else name  # a method up to torch 2.11
    steps = re.findall(r"\w+", re.sub(r"^[LG]\['\w+'\](\[\d+\])?", "", name))
    return (
        ".".join(s for s in steps if s not in ("_modules", "_parameters", "_buffers")) or node.name
    )
