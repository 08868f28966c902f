"""The best factors of a matrix where errors count by what they do, not by their size.

With H the second moment of a matrix's inputs and G that of the loss's gradient at its outputs, an
error δW changes the loss, to second order and where tokens are independent, by

    E (gᵀ δW x)² = tr(G δW H δWᵀ) = ‖G^½ δW H^½‖²

whose best approximation of rank r is the truncated SVD of G^½ W H^½ (Eckart–Young), mapped back.
Roots are Cholesky factors. H alone is the whitening of SVD-LLM (Wang et al., 2024), a diagonal H of
row Fisher information FWSVD (Hsu et al., 2022).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Added to a moment's diagonal, of its mean: directions that calibration never saw, or saw less than
# this, count as little as this. Far above the roundings of float32, far below what matters.
DAMPING = 1e-4


@dataclass(frozen=True)
class Spectrum:
    """``weight`` [.., m, n] = ``left`` [.., m, k] · diag(``sigma`` [.., k]) · ``right`` [.., k, n].

    Without the components from r on it is off by the sum of their ``sigma``², in the metric.
    """

    left: Tensor
    sigma: Tensor
    right: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """``u`` [.., rank, n] and ``v`` [.., m, rank], each component as long in both."""
        left, right = self.left[..., :rank], self.right[..., :rank, :]
        longs = self.sigma[..., :rank] * left.norm(dim=-2) * right.norm(dim=-1)
        root = longs.sqrt()
        u = right * (root / right.norm(dim=-1).clamp_min(_TINY)).unsqueeze(-1)
        v = left * (root / left.norm(dim=-2).clamp_min(_TINY)).unsqueeze(-2)
        return u, v


_TINY = torch.finfo(torch.float64).tiny


def tails(sigma: Tensor) -> list[float]:
    """What is lost at each rank from 0 on, together over all leading dimensions of ``sigma``."""
    by_rank = sigma.square().reshape(-1, sigma.shape[-1]).sum(0)
    return [*by_rank.flip(0).cumsum(0).flip(0).tolist(), 0.0]


def spectrum_of(
    weight: Tensor, inputs: Tensor | None = None, outputs: Tensor | None = None
) -> Spectrum:
    """The components of ``weight`` [.., m, n], the most important first, in float64.

    ``inputs``: H [n, n], or its diagonal [n]; ``outputs``: G [.., m, m]; the identity where None.
    """
    whole = weight.double()
    root_in = None if inputs is None else root_of(inputs)
    root_out = None if outputs is None else root_of(outputs)
    scaled = whole if root_in is None else whole @ root_in
    scaled = scaled if root_out is None else root_out.mT @ scaled
    left, sigma, right = torch.linalg.svd(scaled, full_matrices=False)
    if root_out is not None:
        left = torch.linalg.solve_triangular(root_out.mT, left, upper=True)
    if root_in is not None:
        right = torch.linalg.solve_triangular(root_in, right, upper=False, left=False)
    return Spectrum(left, sigma, right)


def root_of(moment: Tensor) -> Tensor:
    """L with L Lᵀ the damped moment, which may be a diagonal; a moment of zeros tells nothing, and
    is the identity."""
    moment = torch.diag(moment.double()) if moment.dim() == 1 else moment.double()
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    damped = (moment + moment.mT) / 2 + DAMPING * mean * eye
    return torch.linalg.cholesky(torch.where(mean > 0, damped, eye))
