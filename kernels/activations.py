"""The elementwise activations a feed-forward may have, by name, as torch computes them.

Imports no Triton: a planner or a rewrite may read this table. The same names are spelled for a
tile on chip by `activate` in ``activations_triton.py``; a test holds the two together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

QUICK_GELU_SLOPE = 1.702


@dataclass(frozen=True)
class Activation:
    """One activation.

    ``function`` is differentiable and works in every floating dtype. ``in_place`` overwrites its
    argument with the same value and returns it; no autograd. Where torch has no single in-place
    operator for it (``quick_gelu``), one temporary of the argument's size is used.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(QUICK_GELU_SLOPE * x)


def _quick_gelu_in_place(x: Tensor) -> Tensor:
    # Not silu(1.702 x) / 1.702, which needs no temporary but overflows near float16's end.
    return x.mul_((QUICK_GELU_SLOPE * x).sigmoid_())


def _gelu_in_place(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(x)


def _gelu_tanh_in_place(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(x, approximate="tanh")


def _table(*activations: Activation) -> Mapping[str, Activation]:
    return MappingProxyType({activation.name: activation for activation in activations})


ACTIVATIONS: Mapping[str, Activation] = _table(
    Activation("gelu", F.gelu, _gelu_in_place),
    Activation("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_in_place),
    Activation("quick_gelu", _quick_gelu, _quick_gelu_in_place),
    Activation("relu", F.relu, torch.relu_),
    Activation("relu_squared", lambda x: F.relu(x).square(), lambda x: x.relu_().square_()),
    Activation("silu", F.silu, lambda x: F.silu(x, inplace=True)),
    Activation("sigmoid", torch.sigmoid, torch.sigmoid_),
    Activation("tanh", torch.tanh, torch.tanh_),
    Activation("identity", lambda x: x, lambda x: x),
)


def validate_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; allowed: {', '.join(ACTIVATIONS)}")
