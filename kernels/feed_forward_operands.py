"""The operands of a low-rank feed-forward: what its three implementations agree on.

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
"""

from dataclasses import KW_ONLY, dataclass

from flashsvd_compile.kernels.activations import validate_activation
from flashsvd_compile.kernels.checks import checked_output, validate_operands
from torch import Tensor


@dataclass(frozen=True)
class FeedForwardOperands:
    """One call's operands, by the table above; a ValueError names the first that does not fit."""

    up: Tensor
    up_factor: Tensor
    down_factor: Tensor
    _: KW_ONLY
    activation: str
    up_bias: Tensor | None = None
    gate: Tensor | None = None
    gate_factor: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __post_init__(self) -> None:
        validate_activation(self.activation)
        if (self.gate is None) != (self.gate_factor is None):
            raise ValueError("gate and gate_factor go together: give both or neither")
        if self.gate_bias is not None and self.gate is None:
            raise ValueError("gate_bias needs gate and gate_factor")
        for name in ("up", "up_factor", "down_factor", "gate"):
            operand = getattr(self, name)
            if operand is not None and operand.dim() != 2:
                raise ValueError(f"{name} must be 2-D, is {list(operand.shape)}")
        width = self.intermediate_size
        expected = {
            "up_factor": (width, self.rank_up),
            "up_bias": (width,),
            "gate": (self.rows, self.rank_gate),
            "gate_factor": (width, self.rank_gate),
            "gate_bias": (width,),
            "down_factor": (self.rank_down, width),
            "down_bias": (self.rank_down,),
        }
        validate_operands(self, expected, like="up")

    @property
    def rows(self) -> int:
        return self.up.shape[0]

    @property
    def intermediate_size(self) -> int:
        return self.down_factor.shape[1]

    @property
    def rank_up(self) -> int:
        return self.up.shape[1]

    @property
    def rank_gate(self) -> int | None:
        return None if self.gate is None else self.gate.shape[1]

    @property
    def rank_down(self) -> int:
        return self.down_factor.shape[0]

    def allocate_output(self, out: Tensor | None) -> Tensor:
        """``out`` checked, or a new contiguous [T, R_d]."""
        return checked_output(out, (self.rows, self.rank_down), self.up)
