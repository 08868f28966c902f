"""The low-rank feed-forward written plainly, and the check of operands every lowering of it uses.

    h = act(P_u V_uᵀ + b_u)                          or, gated,
    h = act(P_g V_gᵀ + b_g) · (P_u V_uᵀ + b_u)
    S = h U_dᵀ + b_d

| here          | shape      |                                                            |
|---------------|------------|------------------------------------------------------------|
| `up`          | [T, R_u]   | P_u, a latent (or x itself before a dense up projection)   |
| `up_factor`   | [F, R_u]   | V_u; F is the intermediate size                            |
| `gate`        | [T, R_g]   | P_g, given exactly when `gate_factor` [F, R_g] is          |
| `down_factor` | [R_d, F]   | U_d (or the weight of a dense down projection)             |
| `up_bias`, `gate_bias` | [F] | b_u, b_g                                                  |
| `down_bias`   | [R_d]      | b_d                                                        |

Here the whole [T, F] is in memory (twice or more), and every operator rounds to the dtype. It is
differentiable, works in float64 and on fake tensors with symbolic shapes.
"""

import torch.nn.functional as F
from flashsvd_compile.kernels.activations import ACTIVATIONS, validate_activation
from torch import Tensor


def unfused_feed_forward(
    up: Tensor,
    up_factor: Tensor,
    down_factor: Tensor,
    *,
    activation: str,
    up_bias: Tensor | None = None,
    gate: Tensor | None = None,
    gate_factor: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """S [T, R_d], one library operator after another."""
    validate_feed_forward(
        up, up_factor, down_factor, activation, up_bias, gate, gate_factor, gate_bias, down_bias
    )
    act = ACTIVATIONS[activation].function
    hidden = F.linear(up, up_factor, up_bias)
    if gate is None or gate_factor is None:
        hidden = act(hidden)
    else:
        hidden = act(F.linear(gate, gate_factor, gate_bias)) * hidden
    return F.linear(hidden, down_factor, down_bias)


def validate_feed_forward(
    up: Tensor,
    up_factor: Tensor,
    down_factor: Tensor,
    activation: str,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_factor: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    """Raise ValueError naming the first operand that does not fit the table above."""
    validate_activation(activation)
    if (gate is None) != (gate_factor is None):
        raise ValueError("gate and gate_factor go together: give both or neither")
    if gate_bias is not None and gate is None:
        raise ValueError("gate_bias needs gate and gate_factor")
    for name, tensor in (("up", up), ("up_factor", up_factor), ("down_factor", down_factor)):
        if tensor.dim() != 2:
            raise ValueError(f"{name} must be 2-D, is {_shape(tensor)}")
    if not up.is_floating_point():
        raise ValueError(f"the operands must be floating point, up is {up.dtype}")

    rows, rank_up = up.shape
    rank_down, intermediate_size = down_factor.shape
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("up_factor", up_factor, (intermediate_size, rank_up)),
        ("up_bias", up_bias, (intermediate_size,)),
        ("gate_bias", gate_bias, (intermediate_size,)),
        ("down_bias", down_bias, (rank_down,)),
    ]
    if gate is not None and gate_factor is not None:
        if gate.dim() != 2:
            raise ValueError(f"gate must be 2-D, is {_shape(gate)}")
        rank_gate = gate.shape[1]
        expected.append(("gate", gate, (rows, rank_gate)))
        expected.append(("gate_factor", gate_factor, (intermediate_size, rank_gate)))
    for name, operand, shape in expected:
        if operand is not None and tuple(operand.shape) != shape:
            raise ValueError(
                f"{name} must be {list(shape)} beside up {_shape(up)} and "
                f"down_factor {_shape(down_factor)}, is {_shape(operand)}"
            )
    for name, operand, _ in [*expected, ("down_factor", down_factor, ())]:
        if operand is not None and (operand.dtype, operand.device) != (up.dtype, up.device):
            raise ValueError(
                f"all operands must share up's dtype and device ({up.dtype}, {up.device}); "
                f"{name} is {operand.dtype}, {operand.device}"
            )


def allocate_feed_forward_output(up: Tensor, rank_down: int, out: Tensor | None) -> Tensor:
    """``out`` checked, or a new contiguous [T, R_d]."""
    if out is None:
        return up.new_empty(up.shape[0], rank_down)
    shape = (up.shape[0], rank_down)
    if tuple(out.shape) != shape or (out.dtype, out.device) != (up.dtype, up.device):
        raise ValueError(
            f"out must be {list(shape)} of {up.dtype} on {up.device}, "
            f"is {list(out.shape)} of {out.dtype} on {out.device}"
        )
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, has strides {out.stride()}")
    return out


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
