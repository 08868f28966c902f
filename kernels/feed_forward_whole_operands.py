"""The operands of a low-rank feed-forward with its outer factors: from x to y.

    P_u = x U_uᵀ + a_u        P_g = x_g U_gᵀ + a_g        (where gated)
    h   = act(P_u V_uᵀ + b_u)        or, gated,        act(P_g V_gᵀ + b_g) · (P_u V_uᵀ + b_u)
    S   = h U_dᵀ + a_d
    y   = S V_dᵀ + b_d

| here                | shape      |                                                        |
|---------------------|------------|--------------------------------------------------------|
| `x`                 | [T, K]     |                                                        |
| `up_u`, `up_v`      | [R_u, K], [F, R_u] | the factors of the up projection               |
| `gate_x`            | [T, K_g]   | x_g; None where the gate reads `x`                     |
| `gate_u`            | [R_g, K_g] | U_g; None where the gate reads P_u (one fused projection) |
| `gate_v`            | [F, R_g]   | V_g; given exactly where there is a gate               |
| `down_u`, `down_v`  | [R_d, F], [OUT, R_d] | the factors of the down projection             |
| `up_latent_bias`, `gate_latent_bias`, `down_latent_bias` | [R] | a_u, a_g, a_d             |
| `up_bias`, `gate_bias`, `down_bias`                      | [F], [F], [OUT] | b_u, b_g, b_d   |
"""

from dataclasses import KW_ONLY, dataclass

from flashsvd_compile.kernels.activations import validate_activation
from flashsvd_compile.kernels.checks import checked_output, validate_operands
from torch import Tensor


@dataclass(frozen=True)
class WholeFeedForwardOperands:
    """One call's operands, by the table above; a ValueError names the first that does not fit."""

    x: Tensor
    up_u: Tensor
    up_v: Tensor
    down_u: Tensor
    down_v: Tensor
    _: KW_ONLY
    activation: str
    up_latent_bias: Tensor | None = None
    up_bias: Tensor | None = None
    gate_x: Tensor | None = None
    gate_u: Tensor | None = None
    gate_v: Tensor | None = None
    gate_latent_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_latent_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __post_init__(self) -> None:
        validate_activation(self.activation)
        for name, needed in (
            ("gate_x", "gate_u"),
            ("gate_latent_bias", "gate_u"),
            ("gate_u", "gate_v"),
            ("gate_bias", "gate_v"),
        ):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ValueError(f"{name} needs {needed}")
        for name in ("x", "up_u", "up_v", "gate_x", "gate_u", "gate_v", "down_u", "down_v"):
            operand = getattr(self, name)
            if operand is not None and operand.dim() != 2:
                raise ValueError(f"{name} must be 2-D, is {list(operand.shape)}")
        width = self.intermediate_size
        gate_x = self.x if self.gate_x is None else self.gate_x
        expected = {
            "x": (self.rows, self.hidden_size),
            "up_u": (self.rank_up, self.hidden_size),
            "up_latent_bias": (self.rank_up,),
            "up_v": (width, self.rank_up),
            "up_bias": (width,),
            "gate_x": (self.rows, gate_x.shape[1]),
            "gate_u": (self.rank_gate, gate_x.shape[1]),
            "gate_latent_bias": (self.rank_gate,),
            "gate_v": (width, self.rank_gate),
            "gate_bias": (width,),
            "down_u": (self.rank_down, width),
            "down_latent_bias": (self.rank_down,),
            "down_v": (self.out_size, self.rank_down),
            "down_bias": (self.out_size,),
        }
        validate_operands(self, expected, like="x")

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.x.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.up_v.shape[0]

    @property
    def out_size(self) -> int:
        return self.down_v.shape[0]

    @property
    def rank_up(self) -> int:
        return self.up_u.shape[0]

    @property
    def rank_gate(self) -> int | None:
        return None if self.gate_v is None else self.gate_v.shape[1]

    @property
    def rank_down(self) -> int:
        return self.down_u.shape[0]

    @property
    def gate_from(self) -> str:
        """What the gate's latent comes from: none, P_u ("latent"), "x", or an x of its "own"."""
        if self.gate_v is None:
            return "none"
        if self.gate_u is None:
            return "latent"
        return "x" if self.gate_x is None else "own"

    def allocate_output(self, out: Tensor | None) -> Tensor:
        """``out`` checked, or a new contiguous [T, OUT]."""
        return checked_output(out, (self.rows, self.out_size), self.x)
