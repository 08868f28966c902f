"""How large a rank each weight gets: one share of parameters for all, and never more than is there.

    r = share · m·n / (m + n)    of an [m, n] matrix; with heads of a head's own [D, in]

``keep`` is that share; of a budget in bytes it is the largest share with which all weights, those
included that stay dense because factors would save nothing, fit.

What the spectra decide is where to stop: singular values that storing the weight in its dtype blurs
anyway (`rank_of`) buy nothing, and under a budget what they would have cost goes to the others.
They do not decide who gets more. Energies of different matrices are no common unit, as their
inputs have different scales, and planning by them was worse than an equal share. Queries and keys
have one, the error of their scores; but of all-MiniLM-L6-v2 that moved no layer's rank by more than
one at shares of 0.3, 0.5 and 0.7, and its embeddings came no closer to the dense ones. The heads of
one matrix read one input and could be compared; but the kernels run one rank for all heads of a
call, lower ones would be padded with zeros to the largest, and the best plan that pays for its
padding is the equal one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsvd_compile.compress.svd import rank_for

_HALVINGS = 50


@dataclass(frozen=True)
class Candidate:
    """``heads`` matrices [m, n] of ``element_bytes`` each number, none of more than ``rank``."""

    heads: int
    m: int
    n: int
    element_bytes: int
    rank: int

    @property
    def dense_bytes(self) -> int:
        return self.heads * self.m * self.n * self.element_bytes

    def planned_rank(self, share: float) -> int | None:
        """None where the factors would be no smaller than the matrix."""
        rank = min(rank_for(share, self.m, self.n), self.rank)
        return rank if rank * (self.m + self.n) < self.m * self.n else None

    def planned_bytes(self, share: float) -> int:
        rank = self.planned_rank(share)
        if rank is None:
            return self.dense_bytes
        return self.heads * rank * (self.m + self.n) * self.element_bytes


def share_within(candidates: Sequence[Candidate], budget: int) -> float | None:
    """The largest share with which all fit into ``budget`` bytes; None if rank 1 is too much."""

    def fits(share: float) -> bool:
        return sum(candidate.planned_bytes(share) for candidate in candidates) <= budget

    low, high = 0.0, 1.0
    if not fits(low):
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def rank_of(matrices: Tensor, sigma: Tensor) -> int:
    """The largest rank of ``matrices`` [.., m, n] with singular values ``sigma`` [.., min(m, n)]
    above what rounding to their dtype does to them; at least 1.

    Rounding adds noise of up to eps/2 of each number, whose largest singular value is about
    (√m + √n) times its own size; the SVD that makes the factors adds a few eps of the largest.
    """
    m, n = matrices.shape[-2:]
    size = sigma.square().sum(-1, keepdim=True).div(m * n).sqrt()
    rounding = torch.finfo(matrices.dtype).eps / 2 * size * (m**0.5 + n**0.5)
    precise = torch.promote_types(matrices.dtype, torch.float32)
    computing = 4 * torch.finfo(precise).eps * sigma[..., :1] * max(m, n) ** 0.5
    above = (sigma > rounding + computing).sum(-1)
    return max(1, int(above.max()))
