"""Linears around attention whose head width itself is reduced: factors without a lift.

Nothing may stand between a query and a key but their product, and between a value and the output
projection but a weighted mean. Then a head of width ``D`` may be narrowed to rank ``r`` on both
sides at once, and neither side has to be lifted again:

    q'_h = P_h q_h,  k'_h = S_h k_h          with S_hᵀ P_h ≈ 1       q'·k' ≈ q·k
    v'_h = P_h v_h,  o reads L_h v'_h        with L_h P_h ≈ 1

===================  ===================  =============================================
module               ``weight``           what it does
===================  ===================  =============================================
`NarrowHeadsLinear`  [H, r, in]           makes heads: r features, then D − r zeros
`NarrowInputLinear`  [out, H, r]          reads the first r of the D features of each
===================  ===================  =============================================

The attention module in between sees heads of D features, as before; to the compiler the zeros are
a lift by an identity, so that it runs on the latents. ``bias`` may be None; that of
`NarrowHeadsLinear` is the latents', [H·r].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Narrow(nn.Module):
    """What both share; ``method``: who made the factors."""

    bias: nn.Parameter | None
    method: str = "planned"

    def __init__(
        self,
        shape: tuple[int, int, int],
        in_features: int,
        out_features: int,
        head_dim: int,
        num_heads: int,
        rank: int,
        biases: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if min(in_features, out_features, num_heads) < 1:
            raise ValueError(
                f"sizes must be at least 1, got {(in_features, out_features, num_heads)}"
            )
        if not 1 <= rank <= head_dim:
            raise ValueError(f"rank must be in [1, {head_dim}] for heads of {head_dim}, got {rank}")
        self.in_features, self.out_features = in_features, out_features
        self.num_heads, self.head_dim, self.rank = num_heads, head_dim, rank
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if biases:
            self.bias = nn.Parameter(torch.empty(biases, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear`` begins."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


class NarrowHeadsLinear(_Narrow):
    """``y_h = [x W_hᵀ + b_h; 0]`` with ``weight`` [H, r, in]; the output is [.., H·D].

    ``lift`` [D, r], the identity that puts zeros behind latents, is a buffer and not stored.
    """

    lift: Tensor

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_dim: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (num_heads, rank, in_features), in_features, num_heads * head_dim, head_dim,
            num_heads, rank, num_heads * rank * bias, device, dtype,
        )  # fmt: skip
        lift = torch.eye(head_dim, rank, device=device, dtype=dtype)
        self.register_buffer("lift", lift, persistent=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "lift" in self._buffers:
            nn.init.eye_(self.lift)

    def dense_weight(self) -> Tensor:
        """[out, in], zeros included."""
        padding = (0, 0, 0, self.head_dim - self.rank)
        return F.pad(self.weight, padding).flatten(0, 1)

    @property
    def latent_features(self) -> int:
        """How many numbers a token's latent has, all heads together."""
        return self.num_heads * self.rank

    def latents_of(self, x: Tensor) -> Tensor:
        """[.., in] → [.., H·r], with the bias."""
        return F.linear(x, self.weight.flatten(0, 1), self.bias)

    def lifted(self, latents: Tensor) -> Tensor:
        """[.., H·r] → [.., H·D]: zeros behind each head's latent."""
        lift = self.lift.to(latents.dtype)
        return F.linear(latents.unflatten(-1, (self.num_heads, self.rank)), lift).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lifted(self.latents_of(x))


class NarrowInputLinear(_Narrow):
    """``y = Σ_h x_h[:r] W_hᵀ + b`` with ``weight`` [out, H, r]; the input is [.., H·D]."""

    def __init__(
        self,
        out_features: int,
        num_heads: int,
        head_dim: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (out_features, num_heads, rank), num_heads * head_dim, out_features, head_dim,
            num_heads, rank, out_features * bias, device, dtype,
        )  # fmt: skip

    def dense_weight(self) -> Tensor:
        """[out, in], zeros included."""
        return F.pad(self.weight, (0, self.head_dim - self.rank)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        read = x.unflatten(-1, (self.num_heads, self.head_dim))[..., : self.rank].flatten(-2)
        return F.linear(read, self.weight.flatten(1), self.bias)
