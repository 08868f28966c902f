"""Python floats that Dynamo made symbolic: a guard only where a rewrite relies on the value.

Under dynamic shapes every float is symbolic, those that modules hold included. Where no site reads
one, the backend must compile as often as ``backend="eager"`` does.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from tests.spelled import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    check,
    hidden_states,
    low_rank,
    no_pass_may_fail,
    sdpa,
    to_heads,
)

FACTORS = (1.0, 0.5, 0.7, 1.3)  # at 1.0 more is a site than elsewhere


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Model(nn.Module):
    """``use(self, x, factor)`` over low-rank and dense projections."""

    def __init__(self, use):
        super().__init__()
        width = HEADS * HEAD_DIM
        self.q, self.k, self.v = (low_rank(HIDDEN, width) for _ in range(3))
        self.dense = nn.Linear(HIDDEN, width)
        self.up, self.down = low_rank(HIDDEN, INTERMEDIATE), low_rank(INTERMEDIATE, HIDDEN)
        self.scaling = 0.3
        self.use = use

    def forward(self, x, factor):
        return self.use(self, x, factor)

    def heads(self, x):
        return (to_heads(p(x), "view_transpose", HEADS) for p in (self.q, self.k, self.v))

    def dense_heads(self, x):
        return (to_heads(self.dense(x), "view_transpose", HEADS) for _ in range(3))


def _by_hand(q, k, v, scale):
    return (q @ k.transpose(2, 3) * scale).softmax(-1) @ v


def _returned_scores(self, x, factor):
    q, k, v = self.heads(x)
    scores = q @ k.transpose(2, 3) * factor
    return scores.softmax(-1) @ v, scores


def _scaled_query(self, x, factor):
    q, k, v = self.heads(x)
    return sdpa(q * factor, k, v, scale=1.0)


# The factor stands where no site is, or where a site is missed.
UNUSED = {
    "after_a_site": lambda self, x, f: sdpa(*self.heads(x), scale=0.3) * f,
    "before_a_site": lambda self, x, f: sdpa(*self.heads(x * f), scale=0.3),
    "mixed_with_the_result": lambda self, x, f: x + self.down(F.gelu(self.up(x))) / f,
    "lifted_but_no_site": lambda self, x, f: torch.cumsum(self.up(x) * f, -1),
    "dense_sdpa": lambda self, x, f: sdpa(*self.dense_heads(x), scale=f),
    "dense_by_hand": lambda self, x, f: _by_hand(*self.dense_heads(x), f),
    "dense_addmm": lambda self, x, f: torch.addmm(x[0], x[0], x[0].T @ x[0], beta=f, alpha=f),
    "filled": lambda self, x, f: x + torch.full((), f) * self.up(x).sum(),
    "missed_attention": _returned_scores,
    "missed_feed_forward": lambda self, x, f: self.down(F.mish(self.up(x) * f)),
}  # fmt: skip

# A site computes with it.
USED = {
    "sdpa_scale": lambda self, x, f: sdpa(*self.heads(x), scale=f),
    "by_hand": lambda self, x, f: _by_hand(*self.heads(x), f),
    "divided": lambda self, x, f: _by_hand(*self.heads(x), 1 / f),
    "scaled_query": _scaled_query,
    "scaled_by_a_filled_tensor": lambda self, x, f: _by_hand(*self.heads(x), torch.full((), f)),
    "scaled_lift": lambda self, x, f: self.down(F.gelu(self.up(x) * f)),
    "temperature_of_silu": lambda self, x, f: self.down(
        self.up(x) * torch.sigmoid(self.up(x) * f)),
}  # fmt: skip


def _compiles(model, backend, dynamic, **options):
    """How many graphs the calls of one compiled model take; results must be eager's."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, **options)
    for rows, factor in enumerate(FACTORS, start=4):
        x = hidden_states(rows=rows)
        torch.testing.assert_close(compiled(x, factor), model(x, factor), rtol=1e-4, atol=1e-5)
    return counters["stats"]["unique_graphs"]


def _ours(model, dynamic):
    forced = {"compiler": "eager", "attention": "rank_space", "feed_forward": "row_blocks"}
    with no_pass_may_fail():
        return _compiles(model, "flashsvd", dynamic, options=forced)


@pytest.mark.parametrize("dynamic", [None, True], ids=("automatic", "dynamic"))
@pytest.mark.parametrize("use", UNUSED)
def test_a_float_that_no_site_reads_costs_no_compile(use, dynamic):
    model = Model(UNUSED[use])
    assert _ours(model, dynamic) == _compiles(model, "eager", dynamic)


@pytest.mark.parametrize("use", USED)
def test_a_float_that_a_site_reads_is_always_the_right_one(use):
    model = Model(USED[use])
    assert _ours(model, True) >= _compiles(model, "eager", True)


@pytest.mark.parametrize(
    "use",
    [
        lambda self, x, _: sdpa(*self.heads(x), scale=self.scaling),
        lambda self, x, _: _by_hand(*self.heads(x), self.scaling),
    ],
    ids=("sdpa", "by_hand"),
)
def test_a_scale_that_a_module_holds_is_a_number(use, tmp_path):
    calls = [(hidden_states(rows=rows), 1.0) for rows in (4, 5)]
    check(Model(use), *calls, into=tmp_path, found=["attention rank_space"], dynamic=True)
