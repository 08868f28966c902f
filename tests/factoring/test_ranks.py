"""Ranks from a share or a budget, and how far a spectrum reaches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashsvd_compile.compress.svd import rank_for
from flashsvd_compile.factoring.factors import Form, spectrum
from flashsvd_compile.factoring.ranks import Candidate, share_within

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        heads=st.integers(1, 4),
        m=st.integers(2, 60),
        n=st.integers(2, 60),
        element_bytes=st.sampled_from([2, 4]),
        rank=st.integers(1, 60),
    ),
    min_size=1,
    max_size=5,
)


def test_the_share_is_each_matrix_own():
    whole, heads = Candidate(1, 72, 32, 4, 32), Candidate(4, 8, 32, 4, 8)
    assert whole.planned_rank(0.5) == rank_for(0.5, 72, 32) == 11
    assert heads.planned_rank(0.5) == rank_for(0.5, 8, 32) == 3
    assert heads.planned_bytes(0.5) == 4 * 3 * (8 + 32) * 4
    assert heads.dense_bytes == 4 * 8 * 32 * 4


def test_no_rank_beyond_the_spectrum():
    assert Candidate(1, 72, 32, 4, 5).planned_rank(0.5) == 5


def test_factors_that_save_nothing_are_not_planned():
    assert Candidate(1, 2, 2, 4, 2).planned_rank(0.9) is None  # rank 1 has as many parameters
    assert Candidate(1, 2, 2, 4, 2).planned_bytes(0.9) == 16


@settings(deadline=None)
@given(CANDIDATES, st.floats(0.01, 1.2))
def test_a_budget_holds_and_is_used_up(candidates, part):
    budget = int(part * sum(c.dense_bytes for c in candidates))
    share = share_within(candidates, budget)
    least = sum(c.planned_bytes(0.0) for c in candidates)
    assert (share is None) == (least > budget)
    if share is not None:
        assert sum(c.planned_bytes(share) for c in candidates) <= budget
        larger = sum(c.planned_bytes(share + 1e-6) for c in candidates)
        assert share > 1 - 1e-6 or larger > budget


def test_what_a_low_spectrum_leaves_goes_to_the_others():
    full, low = Candidate(1, 40, 40, 4, 40), Candidate(1, 40, 40, 4, 2)
    budget = 2 * 40 * 40 * 4 // 2
    alone = share_within([full, full], budget)
    beside = share_within([full, low], budget)
    assert full.planned_rank(alone) == 10
    assert full.planned_rank(beside) == 18
    assert low.planned_rank(beside) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_the_rank_of_stored_low_rank_matrices(dtype, rank):
    torch.manual_seed(0)
    u, v = torch.randn(rank, 96, dtype=torch.float64), torch.randn(48, rank, dtype=torch.float64)
    matrix = (v @ u / rank**0.5).to(dtype)
    found = spectrum(matrix, Form(1, False))
    assert found.rank == rank
    exact = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(found.sigma, exact, rtol=1e-9, atol=1e-6 * float(exact[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_matrices_have_full_rank_and_zeros_have_one(dtype):
    torch.manual_seed(0)
    matrix = torch.randn(3, 24, 48).to(dtype)
    assert spectrum(matrix.flatten(0, 1), Form(3, False)).rank == 24
    assert spectrum(matrix.flatten(0, 1).t(), Form(3, True)).rank == 24
    assert spectrum(matrix.flatten(0, 1) * 0, Form(3, False)).rank == 1


def test_heads_have_the_largest_rank_of_them():
    torch.manual_seed(0)
    matrix = torch.cat([torch.randn(8, r) @ torch.randn(r, 20) for r in (2, 5)])
    found = spectrum(matrix, Form(2, False))
    assert found.rank == 5
    assert found.sigma.shape == (2, 8)


def test_the_error_of_a_spectrum():
    torch.manual_seed(0)
    matrix = torch.randn(12, 20)
    q, sigma, zh = torch.linalg.svd(matrix, full_matrices=False)
    cut = (q[:, :4] * sigma[:4]) @ zh[:4]
    want = float((matrix - cut).norm() / matrix.norm())
    assert spectrum(matrix, Form(1, False)).error(4) == pytest.approx(want, rel=1e-5)
    assert spectrum(matrix * 0, Form(1, False)).error(4) == 0
    assert spectrum(matrix / 0, Form(1, False)) is None


def test_a_transposed_weight_has_the_heads_of_its_columns():
    torch.manual_seed(0)
    matrix = torch.randn(20, 12)
    assert torch.equal(Form(3, True).matrices(matrix), matrix.t().reshape(3, 4, 20))
