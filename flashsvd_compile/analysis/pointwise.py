"""Elementwise stretches between a lift and the next matmul, and what function they compute.

A stretch is recognised by its values, not by its spelling: it is run in float64 over sample
points and compared with every known activation. ``0.5 * x * (1 + tanh(...))``, ``gelu(x,
approximate="tanh")`` and a version with casts in between are then the same thing, and a constant
that is off in the fourth digit is not.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from flashsvd_compile.analysis.calls import aten, constant, is_aten, overload, packet
from flashsvd_compile.analysis.facts import Pointwise
from flashsvd_compile.analysis.layout import is_layout
from flashsvd_compile.kernels.activations import ACTIVATIONS

# Two functions are the same if they agree to this, relative to 1 + |f|, at every sample point:
# an eighth of float32's rounding unit, 2^-24 ≈ 6e-8, so far below what any dtype could show.
SAME_FUNCTION = 2.0**-27
_EXTRA_POINTWISE = {
    aten.hardswish, aten.log_sigmoid, aten.rsub, aten.multiply, aten.subtract, aten.divide,
    aten.true_divide, aten.negative, aten.special_erf, aten.special_expit, aten.where,
    aten.masked_fill,
}  # fmt: skip


def is_pointwise(node: fx.Node) -> bool:
    """Does each output element depend on the inputs' elements at the same place alone?"""
    return is_aten(node) and is_pointwise_operator(overload(node))


def is_pointwise_operator(op: torch._ops.OpOverload) -> bool:
    if op._schema.is_mutable:
        return False
    return torch.Tag.pointwise in op.tags or op.overloadpacket in _EXTRA_POINTWISE


def name_activation(
    region: Pointwise, result: fx.Node
) -> tuple[str, fx.Node, fx.Node | None] | None:
    """``(activation, activated source, other source)`` such that ``result`` = act(a) [· b].

    None where no known activation fits.
    """
    samples = _samples(len(region.sources))
    got = _evaluate(region, result, dict(zip(region.sources, samples, strict=True)))
    if got is None:
        return None
    orders = [(0,)] if len(samples) == 1 else [(0, 1), (1, 0)]
    for order in orders:
        activated, *others = (samples[i] for i in order)
        for name, activation in ACTIVATIONS.items():
            expected = activation.function(activated)
            for other in others:
                expected = expected * other
            if _agree(got, expected):
                nodes = [list(region.sources)[i] for i in order]
                return name, nodes[0], nodes[1] if others else None
    return None


def is_nonlinear(region: Pointwise) -> bool | None:
    """Is the stretch's result more than a weighted sum of its sources and a number?

    A product of two sources is. None where the function cannot be told.
    """
    if not region.nodes:
        return False
    samples = _samples(len(region.sources))
    # First the sources all at zero, then each at one alone: a linear function is known from there.
    corners = torch.cat([torch.zeros(1, len(samples)), torch.eye(len(samples))]).double()
    given = [torch.cat([corner, points]) for corner, points in zip(corners.T, samples, strict=True)]
    got = _evaluate(region, region.nodes[-1], dict(zip(region.sources, given, strict=True)))
    if got is None or got.shape != given[0].shape:
        return None
    at_zero, at_ones, rest = got.split([1, len(samples), len(samples[0])])
    linear = at_zero + sum((one - at_zero) * p for one, p in zip(at_ones, samples, strict=True))
    return not _agree(rest, linear)


def _agree(got: torch.Tensor, expected: torch.Tensor) -> bool:
    error = (got - expected).abs() / (1 + expected.abs())
    return bool((error <= SAME_FUNCTION).all())  # NaN is never equal


def _samples(count: int) -> list[torch.Tensor]:
    """Points over the range where activations bend, and far out; pairs that are independent."""
    points = torch.cat(
        [
            torch.linspace(-12, 12, 769, dtype=torch.float64),
            torch.tensor([-80.0, -30, 30, 80]).double(),
        ]
    )
    mixed = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))]
    return [points, mixed][:count]


def _evaluate(
    region: Pointwise, result: fx.Node, values: Mapping[fx.Node, torch.Tensor]
) -> torch.Tensor | None:
    known: dict[fx.Node, Any] = dict(values)

    def argument(node: fx.Node) -> Any:
        if node in known:
            return known[node]
        number = constant(node)
        if number is None:
            raise LookupError(node.name)
        return torch.tensor(number, dtype=torch.float64)

    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
        for node in region.nodes:
            if is_layout(node) or packet(node) is aten.dropout:
                known[node] = argument(node.args[0])  # type: ignore[arg-type]
                continue
            try:
                args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
                known[node] = overload(node)(*args, **kwargs)
            except (LookupError, RuntimeError, TypeError):
                return None
    return known.get(result)
