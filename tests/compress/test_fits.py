"""Factors in a metric: no others of the rank lose less, and the spectrum says how much that is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashsvd_compile.compress.fits import spectrum_of

LEADS = [(), (3,), (2, 3)]


def moment(*shape, generator):
    x = torch.randn(*shape, 3 * shape[-1], dtype=torch.float64, generator=generator)
    return x @ x.mT


def lost(error, inputs, outputs):
    """tr(G δW H δWᵀ), summed over the matrices."""
    return float(torch.einsum("...ij,...jk,kl,...il->", outputs, error, inputs, error))


def setting(lead, m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*lead, m, n, dtype=torch.float64, generator=generator)
    return weight, moment(n, generator=generator), moment(*lead, m, generator=generator), generator


@pytest.mark.parametrize("lead", LEADS, ids=str)
@settings(deadline=None, max_examples=30)
@given(m=st.integers(1, 7), n=st.integers(1, 9), seed=st.integers(0, 10**6), data=st.data())
def test_no_other_factors_lose_less(lead, m, n, seed, data):
    weight, inputs, outputs, generator = setting(lead, m, n, seed)
    rank = data.draw(st.integers(1, min(m, n)))
    spectrum = spectrum_of(weight, inputs, outputs)
    u, v = spectrum.factors(rank)
    assert (u.shape, v.shape) == ((*lead, rank, n), (*lead, m, rank))
    least = lost(weight - v @ u, inputs, outputs)
    predicted = float(spectrum.sigma[..., rank:].square().sum())
    whole = lost(weight, inputs, outputs)
    assert least == pytest.approx(predicted, rel=1e-2, abs=1e-2 * whole)
    for step in (1e-3, 1e-2, 1e-1):
        other_u, other_v = (
            x * (1 + step * torch.randn(x.shape, dtype=x.dtype, generator=generator))
            for x in (u, v)
        )
        assert lost(weight - other_v @ other_u, inputs, outputs) >= least - 1e-3 * whole


@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_all_ranks_are_exact_and_balanced(lead):
    weight, inputs, outputs, _ = setting(lead, 5, 8, 0)
    u, v = spectrum_of(weight, inputs, outputs).factors(5)
    torch.testing.assert_close(v @ u, weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(u.norm(dim=-1), v.norm(dim=-2))


def test_without_moments_it_is_the_plain_svd():
    weight = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(spectrum_of(weight).sigma, torch.linalg.svdvals(weight))


def test_a_diagonal_counts_inputs():
    weight, scale = torch.randn(6, 4, dtype=torch.float64), torch.tensor([4.0, 1.0, 9.0, 0.25])
    diagonal, full = spectrum_of(weight, scale), spectrum_of(weight, torch.diag(scale))
    torch.testing.assert_close(diagonal.sigma, full.sigma)
    torch.testing.assert_close(
        diagonal.sigma, torch.linalg.svdvals(weight * scale.sqrt()), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("dead", ["inputs", "outputs", "both"])
def test_singular_and_dead_moments_give_finite_factors(dead):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    one = torch.randn(8, 1, dtype=torch.float64, generator=generator)
    inputs = torch.zeros(8, 8) if dead != "outputs" else one @ one.T
    outputs = torch.zeros(6, 6) if dead != "inputs" else torch.diag(torch.tensor([1.0] + 5 * [0]))
    u, v = spectrum_of(weight, inputs, outputs).factors(6)
    torch.testing.assert_close(v @ u, weight, rtol=1e-6, atol=1e-6)


def test_a_weight_of_zeros():
    u, v = spectrum_of(torch.zeros(4, 3), torch.eye(3), torch.eye(4)).factors(2)
    assert not u.isnan().any()
    assert not (v @ u).any()
