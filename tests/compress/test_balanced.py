"""The cut of a latent is the best there is, and is found without squaring."""

import pytest
import torch

from flashsvd_compile.compress.balanced import components

F64 = torch.float64


@pytest.mark.parametrize(
    ("lead", "m", "rank", "n"),
    [((), 20, 7, 12), ((3,), 5, 4, 12), ((2, 3), 5, 4, 3), ((), 3, 7, 2)],
)
def test_it_is_the_truncated_svd_of_the_product(lead, m, rank, n):
    torch.manual_seed(0)
    u, v = torch.randn(*lead, rank, n, dtype=F64), torch.randn(*lead, m, rank, dtype=F64)
    found = components(u, v.mT)
    q, sigma, z = torch.linalg.svd(v @ u, full_matrices=False)
    least = min(m, n, rank)
    torch.testing.assert_close(found.sigma[..., :least], sigma[..., :least])
    for cut in range(1, rank + 1):
        narrow, widen = found.cut(cut)
        best = q[..., :cut] * sigma[..., None, :cut] @ z[..., :cut, :]
        torch.testing.assert_close((v @ widen) @ (narrow @ u), best)
        if cut <= least:
            eye = torch.eye(cut, dtype=F64).expand(*lead, cut, cut)
            torch.testing.assert_close(narrow @ widen, eye)


def test_small_components_are_exact():
    """Moments squared in float64 would lose all below 1e-8 of the largest."""
    torch.manual_seed(0)
    sizes = torch.tensor([1.0, 1e-5, 1e-10], dtype=F64)
    q, _ = torch.linalg.qr(torch.randn(9, 3, dtype=F64))
    z, _ = torch.linalg.qr(torch.randn(8, 3, dtype=F64))
    found = components((z * sizes.sqrt()).mT, (q * sizes.sqrt()).mT)
    torch.testing.assert_close(found.sigma, sizes, rtol=1e-5, atol=0)


def test_a_latent_of_zeros_stays_zeros():
    found = components(torch.zeros(4, 6, dtype=F64), torch.randn(4, 5, dtype=F64))
    assert not found.sigma.any()
    assert torch.isfinite(found.narrow).all()
    assert torch.isfinite(found.widen).all()
    assert not found.narrow.any()
