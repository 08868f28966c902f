"""Low-rank stand-ins for a linear layer: ``y = x Wᵀ + b`` with ``W ≈ V U``.

Notation: ``in`` and ``out`` features, ``r`` the rank, ``H`` heads of width ``D``, ``P`` parts of
a fused projection (query, key, value: 3). A *latent* is an activation in rank space.

===========================  ====================  ====================  ======================
module                       ``u``                 ``v``                 output
===========================  ====================  ====================  ======================
`LowRankLinear`              [r, in]               [out, r]              [.., out]
`PerHeadLowRankLinear`       [H, r, in]            [H, D, r]             [.., H·D]
`FusedPerHeadLowRankLinear`  [P, H, r, in]         [P, H, D, r]          [.., P·H·D]
===========================  ====================  ====================  ======================

``bias`` is [out] or None, as in ``nn.Linear``. The forward passes are ordinary eager PyTorch and
run anywhere; they write the latent *and* the full-width output to memory. Not doing so is the
compiler's work. They round to the activations' dtype at the latent and at the output, and per
head once more, before the bias.

What makes heads has two halves, ``forward(x) == lifted(latents_of(x))``: `LowRankLinear` with
latents [.., r] and `PerHeadLowRankLinear` with [.., H·r], head after head (``LatentCache``
keeps what is between them).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _LowRank(nn.Module):
    """What the layers share: factors over any leading axes, their start values, ``weight``."""

    bias: nn.Parameter | None
    method: str = "svd"  # who made the factors: this package's SVD, or a checkpoint's format

    def __init__(
        self,
        in_features: int,
        lead: tuple[int, ...],
        rows: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Factors of a [rows, in_features] matrix for each index of the leading axes ``lead``."""
        super().__init__()
        if min(in_features, rows, *lead) < 1:
            raise ValueError(f"sizes must be at least 1, got {(*lead, rows, in_features)}")
        if not 1 <= rank <= min(rows, in_features):
            raise ValueError(
                f"rank must be in [1, {min(rows, in_features)}] for a matrix of shape "
                f"{(rows, in_features)}, got {rank}"
            )
        self.in_features = in_features
        self.out_features = math.prod(lead) * rows
        self.rank = rank
        self.u = nn.Parameter(torch.empty(*lead, rank, in_features, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.empty(*lead, rows, rank, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random factors whose product has the variance of ``nn.Linear``'s start, 1/(3·in)."""
        nn.init.normal_(self.u, std=(3 * self.in_features) ** -0.5)
        nn.init.normal_(self.v, std=self.rank**-0.5)  # the product sums `rank` terms
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight(self) -> Tensor:
        """The product of the factors, [out, in] as in ``nn.Linear``, computed at each read.

        For code around a layer that reads its weight's dtype or multiplies with it by hand.
        Gradients reach the factors through it; writing into it changes nothing. T5's feed-forward
        reads it for the dtype alone and pays for the product in eager; compiled, it is dead code.
        """
        return (self.v @ self.u).reshape(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )

    def _biased(self, y: Tensor) -> Tensor:
        # The cast keeps autocast's dtype, as F.linear does with its bias.
        return y if self.bias is None else y + self.bias.to(y.dtype)


class LowRankLinear(_LowRank):
    """``y = (x Uᵀ) Vᵀ + b`` with ``u`` [r, in] and ``v`` [out, r]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, (), out_features, rank, bias, device, dtype)

    @property
    def latent_features(self) -> int:
        """How many numbers a token's latent has."""
        return self.rank

    def latents_of(self, x: Tensor) -> Tensor:
        """[.., in] → [.., r]."""
        return F.linear(x, self.u)

    def lifted(self, latents: Tensor) -> Tensor:
        """[.., r] → [.., out], with the bias."""
        return F.linear(latents, self.v, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lifted(self.latents_of(x))


class PerHeadLowRankLinear(_LowRank):
    """``y_h = (x U_hᵀ) V_hᵀ + b_h`` with ``u`` [H, r, in] and ``v`` [H, D, r].

    The output is laid out as the dense projection's: [.., H·D], head after head.
    """

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
        super().__init__(in_features, (num_heads,), head_dim, rank, bias, device, dtype)
        self.num_heads = num_heads
        self.head_dim = head_dim

    @property
    def latent_features(self) -> int:
        """How many numbers a token's latent has, all heads together."""
        return self.num_heads * self.rank

    def latents_of(self, x: Tensor) -> Tensor:
        """[.., in] → [.., H·r]."""
        return F.linear(x, self.u.flatten(0, 1))

    def lifted(self, latents: Tensor) -> Tensor:
        """[.., H·r] → [.., H·D], with the bias."""
        by_head = latents.unflatten(-1, (self.num_heads, self.rank))
        return self._biased(torch.einsum("...hr,hdr->...hd", by_head, self.v).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        return self.lifted(self.latents_of(x))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_heads={self.num_heads}, head_dim={self.head_dim}"


class FusedPerHeadLowRankLinear(_LowRank):
    """``y_ph = (x U_phᵀ) V_phᵀ + b_ph`` with ``u`` [P, H, r, in] and ``v`` [P, H, D, r].

    Query, key and value from one product, as GPT-2's ``c_attn`` has them: the output is
    [.., P·H·D], part after part and head after head within each. In models that store query, key
    and value side by side for each head (BLOOM, GPT-NeoX), ``u[p, h]`` still makes the D features
    that start at (p·H + h)·D: one head of one part, though not part p's head h.
    """

    def __init__(
        self,
        in_features: int,
        num_parts: int,
        num_heads: int,
        head_dim: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, (num_parts, num_heads), head_dim, rank, bias, device, dtype)
        self.num_parts = num_parts
        self.num_heads = num_heads
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        # One axis for all heads of all parts: whoever cuts the output may group them otherwise.
        shape = (self.num_parts * self.num_heads, self.rank)
        latents = F.linear(x, self.u.flatten(0, 2)).unflatten(-1, shape)
        lifted = torch.einsum("...hr,hdr->...hd", latents, self.v.flatten(0, 1))
        return self._biased(lifted.flatten(-2))

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, num_parts={self.num_parts}, num_heads={self.num_heads}, "
            f"head_dim={self.head_dim}"
        )
