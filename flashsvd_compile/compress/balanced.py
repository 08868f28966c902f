"""The best cut of a latent space whose moments are known by their roots.

What passes through a latent z of rank r is written by ``a`` and read by ``b``, both [.., r, k]: z's
moment is a aᵀ, that of the loss's gradient at z is b bᵀ. In z's place put C z of rank r' and read
it by R, so that what was z is R C z. The loss is off by ‖bᵀ (R C − 1) a‖², and best is

    bᵀ a = (Q_b K_b) (Q_a K_a)ᵀ,   K_b K_aᵀ = X Σ Yᵀ       QR of both, SVD of the core [r, r]
    C = Σ^-½ Xᵀ K_b,   R = K_aᵀ Y Σ^-½                     of the r' largest; C R = 1

which is balanced truncation by the square-root method (Laub et al., 1987). With a = U and b = Vᵀ it
is the truncated SVD of V U, of which C U and V R have the root of each singular value in both. The
product is never made, and no moment is squared first, so that small components are as exact as
large ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Of the largest singular value: what is smaller is rounding of float64, and has no direction.
NOTHING = 1e-14


@dataclass(frozen=True)
class Components:
    """Of a latent, the most important first: ``sigma`` [.., r], in all that is lost without one;
    ``narrow`` [.., r, r] makes them of the latent by its rows, ``widen`` [.., r, r] the latent of
    them by its columns. Components that are nothing are zeros in both."""

    sigma: Tensor
    narrow: Tensor
    widen: Tensor

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """C [.., rank, r] and R [.., r, rank]."""
        return self.narrow[..., :rank, :], self.widen[..., :rank]


def components(a: Tensor, b: Tensor) -> Components:
    """``a`` [.., r, k] writes the latent, ``b`` [.., r, l] reads it; float64, any k and l."""
    root_a, root_b = root_of_rows(a), root_of_rows(b)
    left, sigma, right = torch.linalg.svd(root_b @ root_a.mT, full_matrices=False)
    largest = sigma[..., :1]
    scale = torch.where(sigma > NOTHING * largest, sigma, torch.inf).rsqrt()
    rank = a.shape[-2]
    narrow = scale[..., None] * (left.mT @ root_b)
    widen = (root_a.mT @ right.mT) * scale[..., None, :]
    # Fewer components than ranks where a side is narrower than the latent.
    missing = rank - sigma.shape[-1]
    pad = torch.nn.functional.pad
    return Components(
        pad(sigma, (0, missing)), pad(narrow, (0, 0, 0, missing)), pad(widen, (0, missing))
    )


def root_of_rows(x: Tensor) -> Tensor:
    """K [.., min(k, r), r] with Kᵀ K = x xᵀ, of ``x`` [.., r, k]."""
    return torch.linalg.qr(x.mT, mode="r").R
