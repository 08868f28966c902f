"""RMSNorm of each query of each head, x / √(mean x² + ε) · weight. Plain torch."""

import torch
from torch import Tensor


def normalized(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x`` [B, H, M, D] with mean squares of 1, times ``weight`` [D]; differentiable.

    Computes in float32 at least, rounds once.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    found = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (found if weight is None else found * weight.to(wide.dtype)).to(x.dtype)
