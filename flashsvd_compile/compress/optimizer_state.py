"""An optimizer's state of a factor, for the factor that takes its place after a cut.

With factors U' = C U and V' = V R that stand for the same matrix, the gradient at U' is V'ᵀ of the
matrix's, so Rᵀ times that at U, and so is any mean of it: momenta are carried over exactly, but for
what bases moved while they were gathered. The mean of a gradient's square is carried over as that
of components that vary independently: (Rᵀ)² times it, by elements, which stays positive. Both have
the size that the new parameters' gradients will have. All else of the old parameter's shape has no
meaning in other bases: then its whole state is dropped, and begins anew with the next step.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from flashsvd_compile.compress.latents import Side

# What optimizers of torch call a mean of gradients, and of their squares.
MEANS = {"exp_avg", "momentum_buffer", "grad_avg"}
SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


def check_optimizer(optimizer: Any) -> None:
    """Raises TypeError for what has no groups of parameters and no state."""
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")


def carried(state: Mapping[str, Any], side: Side, change: Tensor) -> dict[str, Any]:
    """``state`` of the parameter behind ``side``, whose gradients by ranks ``change`` [.., r', r]
    makes those of the new one; empty where it cannot be had."""
    old = side.parameter
    found: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.shape != old.shape or value.dim() == 0:
            found[name] = value  # a count of steps
        elif name in MEANS | SQUARES:
            by = change if name in MEANS else change.square()
            moved = side.stored(by @ side.by_rank(value.double()))
            found[name] = moved.to(value.dtype).contiguous()
        else:
            return {}
    return found


def swap_parameters(
    optimizer: Any, new: Mapping[nn.Parameter, nn.Parameter], states: Mapping[Any, dict[str, Any]]
) -> None:
    """Put ``new`` parameters in the places of old ones in all groups, with ``states`` by old."""
    for group in optimizer.param_groups:
        group["params"][:] = [new.get(p, p) for p in group["params"]]
    for old, parameter in new.items():
        if optimizer.state.pop(old, None) is not None and states.get(old):
            optimizer.state[parameter] = states[old]
