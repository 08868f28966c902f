"""Ranks from one list: as good as trying everything, up to the last step, and within the bytes."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashsvd_compile.compress.ranks import RANK_STEP, Layer, plan_ranks


def layer(sigmas, rank_bytes=10, dense_bytes=10**9):
    """Loses the squares of the ``sigmas`` that it does without."""
    squares = [s * s for s in sorted(sigmas, reverse=True)]
    return Layer([sum(squares[r:]) for r in range(len(squares) + 1)], rank_bytes, dense_bytes)


def cost(one, rank):
    return one.dense_bytes if rank is None else rank * one.rank_bytes


def loss(one, rank):
    return 0.0 if rank is None else one.losses[rank]


layers = st.lists(
    st.builds(
        layer,
        st.lists(st.floats(0, 10), min_size=1, max_size=6),
        st.integers(1, 20),
        st.integers(1, 120),
    ),
    min_size=1,
    max_size=3,
)


@settings(deadline=None, max_examples=200)
@given(layers, st.integers(1, 300))
def test_nothing_cheaper_loses_less(found, budget):
    named = {str(i): one for i, one in enumerate(found)}
    options = [
        [r for r in range(1, len(one.losses)) if r * one.rank_bytes < one.dense_bytes] + [None]
        for one in found
    ]
    least = sum(min(cost(one, r) for r in own) for one, own in zip(found, options, strict=True))
    if least > budget:
        with pytest.raises(ValueError, match=f"{least} bytes, more than {budget}"):
            plan_ranks(named, budget)
        return
    ranks = list(plan_ranks(named, budget).values())
    used = sum(map(cost, found, ranks))
    lost = sum(map(loss, found, ranks))
    assert used <= budget
    assert all(rank in own for rank, own in zip(ranks, options, strict=True))
    largest_step = max(
        (cost(one, b) - cost(one, a) for one, own in zip(found, options, strict=True)
         for a, b in itertools.combinations(own, 2)), default=0,
    )  # fmt: skip
    for other in itertools.product(*options):
        if sum(map(cost, found, other)) <= used - largest_step * len(found):
            assert sum(map(loss, found, other)) >= lost - 1e-9


def test_what_matters_more_gets_more():
    ranks = plan_ranks({"much": layer([9] * 64), "little": layer([1] * 64)}, 10 * 80)
    assert ranks == {"much": 64, "little": 16}


def test_steps_are_those_of_the_kernels():
    sigmas = [2.0**-i for i in range(64)]
    ranks = plan_ranks({"a": layer(sigmas), "b": layer(sigmas)}, 10 * 90)
    assert all(rank % RANK_STEP == 0 for rank in ranks.values())


def test_a_small_matrix_has_ranks_to_choose_from():
    assert plan_ranks({"a": layer([1] * 12)}, 10 * 6) == {"a": 6}


def test_the_matrix_stays_where_factors_would_be_as_large():
    flat = layer([1] * 32, rank_bytes=10, dense_bytes=200)
    assert plan_ranks({"a": flat}, 200) == {"a": None}
    assert plan_ranks({"a": flat}, 170) == {"a": 16}
