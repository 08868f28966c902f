"""How a lift's features come to be normalised: RMSNorm, spelled out or as one operator.

    x²  →  mean over all features of x  →  + ε  →  its inverse root  →  times x  →  times a weight

Each step is a fact of its own, so that casts and layouts between them change nothing. What is
normalised is a turned tensor (``turned.py``) whose features are those of the lift, divided by the
root of their mean square.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from flashsvd_compile.analysis.axes import Dims
from flashsvd_compile.analysis.calls import arguments, aten, constant, is_tensor, packet, value
from flashsvd_compile.analysis.facts import Facts
from flashsvd_compile.analysis.turned import MeanSquare, Norm, Turned
from flashsvd_compile.analysis.turned_rules import known_turned, share_outer

Found = tuple[Turned, Dims]


def infer(facts: Facts, node: fx.Node) -> None:
    """What ``node``, which is no layout operator and writes nothing, is of squares and means."""
    rule = _RULES.get(packet(node))
    if rule is not None and node not in facts.factored and node not in facts.scores:
        rule(facts, node)


def _lift_alone(facts: Facts, node: Any) -> Found | None:
    """``node`` as a lift of which nothing was made yet; its last dimension is all features."""
    known = known_turned(facts, node)
    if known is None or known[0].is_complex or known[0].norm is not None:
        return None
    alone = all(len(s) == 1 and s[0].table is None and s[0].number == 1 for s in known[0].sums)
    return known if alone else None


def _square(facts: Facts, node: fx.Node) -> None:
    if packet(node) is aten.pow and constant(node.args[1]) != 2:
        _inverse_root(facts, node)
    elif (known := _lift_alone(facts, node.args[0])) is not None:
        facts.squares[node] = MeanSquare(*known)


def _mean(facts: Facts, node: fx.Node) -> None:
    named = arguments(node)
    square = facts.squares.get(named["self"])
    if square is None or square.stage != "square" or "dim" not in named or not named["keepdim"]:
        return
    if named["dim"] is not None and [d % len(square.dims) for d in named["dim"]] == [
        len(square.dims) - 1
    ]:
        facts.squares[node] = replace(square, stage="mean")


def _shift(facts: Facts, node: fx.Node) -> None:
    left, right = node.args[:2]
    mean = facts.squares.get(left)  # type: ignore[arg-type]
    eps = constant(right)
    if mean is None or mean.stage != "mean" or eps is None or not eps > 0:
        return
    if constant(arguments(node)["alpha"]) == 1:
        facts.squares[node] = replace(mean, stage="shifted", eps=eps)


def _inverse_root(facts: Facts, node: fx.Node) -> None:
    shifted = facts.squares.get(node.args[0])  # type: ignore[arg-type]
    is_root = packet(node) is aten.rsqrt or constant(node.args[1]) == -0.5
    if shifted is not None and shifted.stage == "shifted" and is_root:
        facts.squares[node] = replace(shifted, stage="inverse")


def _product(facts: Facts, node: fx.Node) -> None:
    left, right = node.args[:2]
    if left is right:
        _square(facts, node)
        return
    for one, other in ((left, right), (right, left)):
        inverse = facts.squares.get(other)  # type: ignore[arg-type]
        if inverse is not None and inverse.stage == "inverse":
            _normalise(facts, node, one, inverse)
            return
        if is_tensor(other) and (known := known_turned(facts, one)) is not None:
            _weigh(facts, node, known, other)  # type: ignore[arg-type]


def _normalise(facts: Facts, node: fx.Node, lift: Any, inverse: MeanSquare) -> None:
    known = _lift_alone(facts, lift)
    if known is None or not (known[0].is_of(inverse.of) and known[0].sums == inverse.of.sums):
        return
    if share_outer(facts, known[1], inverse.dims):
        norm = Norm(known[0].places, inverse.eps)
        facts.turned[node], facts.axes[node] = replace(known[0], norm=norm), known[1]


def _weigh(facts: Facts, node: fx.Node, known: Found, weight: fx.Node) -> None:
    """A weight for each feature, of the model, right behind the norm."""
    turned, dims = known
    norm = turned.norm
    if norm is None or norm.weight is not None or not facts.is_given(weight):
        return
    if weight in facts.mutated or not value(weight).dtype.is_floating_point:
        return
    untouched = all(len(s) == 1 and s[0].table is None and s[0].number == 1 for s in turned.sums)
    is_one_each = tuple(value(weight).shape) == (len(norm.places),)
    if untouched and is_one_each and turned.places == norm.places:
        facts.turned[node] = replace(turned, norm=replace(norm, weight=weight))
        facts.axes[node] = dims


def _rms_norm(facts: Facts, node: fx.Node) -> None:
    named = arguments(node)
    known, weight = _lift_alone(facts, named["input"]), named["weight"]
    eps = constant(named["eps"])
    if known is None or eps is None or not eps > 0 or len(named["normalized_shape"]) != 1:
        return
    if weight is not None and (weight in facts.mutated or not facts.is_given(weight)):
        return
    norm = Norm(known[0].places, eps, weight)
    facts.turned[node], facts.axes[node] = replace(known[0], norm=norm), known[1]


_RULES: dict[Any, Callable[[Facts, fx.Node], None]] = {
    aten.pow: _square,
    aten.square: _square,
    aten.mean: _mean,
    aten.add: _shift,
    aten.rsqrt: _inverse_root,
    aten.mul: _product,
    aten.multiply: _product,
    aten.rms_norm: _rms_norm,
}
