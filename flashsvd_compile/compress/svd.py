"""Truncated SVD, and the rank that a share of a matrix's parameters pays for.

    W = Q Σ Zᵀ ≈ V U        V = Q_r √Σ_r  [out, r]        U = √Σ_r Z_rᵀ  [r, in]

the best approximation of rank r in the Frobenius norm (Eckart–Young). The root of each singular
value goes into both factors, so that neither outgrows the range of half precision and a latent
has the scale of activations.
"""

import math

import torch
from torch import Tensor


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors ``u`` [.., rank, n] and ``v`` [.., m, rank] of ``weight`` [.., m, n], in its dtype.

    Computed on the weight's device in float32, in float64 for a float64 weight.
    """
    precise = weight.to(svd_dtype(weight))
    q, sigma, zh = torch.linalg.svd(precise, full_matrices=False)
    root = sigma[..., :rank].sqrt()
    u = root.unsqueeze(-1) * zh[..., :rank, :]
    v = q[..., :rank] * root.unsqueeze(-2)
    return u.to(weight.dtype).contiguous(), v.to(weight.dtype).contiguous()


def rank_for(keep: float, m: int, n: int) -> int:
    """The largest rank whose factors have at most ``keep`` of m·n parameters, at least 1."""
    return max(1, math.floor(keep * m * n / (m + n) + 1e-9))  # keep·m·n may fall just short


def svd_dtype(weight: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(weight.dtype, torch.float32)
