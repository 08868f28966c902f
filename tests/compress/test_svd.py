"""`compress_` on small models: the factors are optimal, and nothing else about a model changes."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flashsvd_compile import compress_
from flashsvd_compile.compress.modules import LowRankLinear, PerHeadLowRankLinear
from flashsvd_compile.compress.svd import rank_for, truncated_svd


class Block(nn.Module):
    """Attention projections of 3 heads of width 5, and a feed-forward."""

    def __init__(self, **kwargs):
        super().__init__()
        self.num_heads = 3
        self.q_proj = nn.Linear(14, 15, **kwargs)
        self.k_proj = nn.Linear(14, 15, bias=False, **kwargs)
        self.v_proj = nn.Linear(14, 15, **kwargs)
        self.up = nn.Linear(15, 33, **kwargs)
        self.down = nn.Linear(33, 14, **kwargs)

    def forward(self, x):
        mixed = self.q_proj(x) * self.k_proj(x) + self.v_proj(x)
        return self.down(self.up(mixed).relu())


def optimal_error(weight, rank):
    """‖W − best rank-r‖ / ‖W‖ from the singular values, heads on a leading axis."""
    sigma = torch.linalg.svdvals(weight.detach().double())
    return float(sigma[..., rank:].square().sum().sqrt() / sigma.square().sum().sqrt())


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (3, 7, 4)])
def test_full_rank_is_exact(shape):
    weight = torch.randn(shape)
    u, v = truncated_svd(weight, min(shape[-2:]))
    torch.testing.assert_close(v @ u, weight, rtol=0, atol=2e-6)


def test_full_share_of_a_low_rank_weight_is_exact():
    block = Block(dtype=torch.float64)
    with torch.no_grad():
        block.up.weight.copy_(torch.randn(33, 2).double() @ torch.randn(2, 15).double())
    x = torch.randn(4, 14, dtype=torch.float64)
    expected = block(x)
    report = compress_(block, keep=1.0, include=["up"])
    assert report.rows[3].rank == 10  # 33·15 / 48, rounded down
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_singular_values_are_split_evenly():
    u, v = truncated_svd(torch.randn(9, 7, dtype=torch.float64), 4)
    torch.testing.assert_close(u @ u.T, v.T @ v)


def test_errors_are_the_optimal_ones_and_reported():
    block = Block()
    dense = copy.deepcopy(block)
    report = compress_(block, keep=0.5)
    for row in report.rows:
        weight = dense.get_submodule(row.path).weight
        if row.kind == "per_head":
            weight = weight.unflatten(0, (3, 5))
        assert row.error == pytest.approx(optimal_error(weight, row.rank), rel=1e-4)
    q = block.q_proj
    assert isinstance(q, PerHeadLowRankLinear)
    head = dense.q_proj.weight[5:10]
    gap = (head - q.v[1] @ q.u[1]).norm() / head.norm()
    assert gap.item() == pytest.approx(optimal_error(head, q.rank), rel=1e-4)


def test_report_totals_are_the_parameters_bytes():
    block = Block()
    before = sum(p.numel() * p.element_size() for p in block.parameters())
    report = compress_(block, keep=0.6, exclude=["down"])
    after = sum(p.numel() * p.element_size() for p in block.parameters())
    assert (report.model_bytes_before, report.model_bytes_after) == (before, after)
    assert sum(row.bytes_before - row.bytes_after for row in report.rows) == before - after
    assert [row.kind for row in report.rows] == ["per_head"] * 3 + ["matrix", "dense"]
    assert report.rows[-1].reason == "excluded"


@given(
    keep=st.floats(1e-3, 1, exclude_min=True),
    m=st.integers(1, 5000),
    n=st.integers(1, 5000),
)
def test_rank_is_the_largest_within_the_share(keep, m, n):
    rank = rank_for(keep, m, n)
    assert 1 <= rank <= max(1, min(m, n) - 1)
    slack = 1e-6 * (m + n)
    assert rank == 1 or rank * (m + n) <= keep * m * n + slack
    assert (rank + 1) * (m + n) > keep * m * n


def test_rank_of_an_exact_share_is_not_lost_to_rounding():
    assert rank_for(0.3, 100, 100) == 15
    assert rank_for(0.7, 20, 20) == 7


def test_factors_that_are_no_smaller_leave_it_dense():
    model = nn.Sequential(nn.Linear(9, 1), nn.Linear(9, 3))
    first, second = compress_(model, keep=0.1).rows
    assert (first.kind, first.reason) == ("dense", "factors of rank 1 are no smaller than [1, 9]")
    assert (second.kind, second.rank) == ("matrix", 1)
    assert type(model[0]) is nn.Linear


def test_mode_hooks_and_gradient_flags_are_kept():
    block = Block().eval()
    block.up.train()
    block.down.weight.requires_grad_(False)
    bias, seen = block.down.bias, []
    handle = block.down.register_forward_hook(lambda *_: seen.append("down"))
    block.down.note = "mine"
    compress_(block)
    assert (block.up.training, block.down.training) == (True, False)
    assert not block.down.u.requires_grad
    assert not block.down.v.requires_grad
    assert block.up.u.requires_grad
    assert block.down.bias is bias
    assert block.down.note == "mine"
    block(torch.randn(2, 14))
    handle.remove()
    block(torch.randn(2, 14))
    assert seen == ["down"]


def test_a_layer_at_two_places_stays_one():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = compress_(model)
    assert [row.path for row in report.rows] == ["a"]
    assert isinstance(model["a"], LowRankLinear)
    assert model["a"] is model["b"][0]


def test_a_tied_bias_stays_tied():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    model["b"].bias = model["a"].bias
    compress_(model)
    assert model["b"].bias is model["a"].bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_rounding_bounded(dtype):
    block = Block(dtype=dtype)
    dense = copy.deepcopy(block)
    report = compress_(block)
    assert {p.dtype for p in block.parameters()} == {dtype}
    weight = dense.up.weight
    # Each factor is off by half a unit in the last place, relative to a product of norm ≤ ‖W‖.
    slack = 2 * torch.finfo(dtype).eps + 1e-6
    assert report.rows[3].error <= optimal_error(weight, report.rows[3].rank) + slack


def test_training_moves_every_parameter():
    torch.manual_seed(0)
    block = Block()
    compress_(block)
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    optimiser = torch.optim.SGD(block.parameters(), lr=0.1)
    block(torch.randn(8, 14)).square().sum().backward()
    optimiser.step()
    assert all(not torch.equal(p, before[name]) for name, p in block.named_parameters())


def test_state_dict_loads_into_another_compressed_model():
    block, other = Block(), Block()
    compress_(block)
    compress_(other)
    other.load_state_dict(pickle.loads(pickle.dumps(block.state_dict())), strict=True)
    x = torch.randn(3, 14)
    assert torch.equal(other(x), block(x))
    assert torch.equal(copy.deepcopy(block)(x), block(x))


def test_a_second_call_finds_nothing_new():
    block = Block()
    compress_(block, exclude=["up"])
    modules = dict(block.named_modules())
    assert [row.path for row in compress_(block).rows] == ["up"]
    assert block.down is modules["down"]


def unchanged(block, action, error, match):
    """``action`` raises and leaves every module and parameter in place."""
    modules = dict(block.named_modules())
    state = {name: p.clone() for name, p in block.state_dict().items()}
    with pytest.raises(error, match=match):
        action(block)
    assert dict(block.named_modules()) == modules
    for name, value in block.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("keep", [0, 1.01, -0.5, float("nan")])
def test_keep_out_of_range(keep):
    unchanged(Block(), lambda b: compress_(b, keep), ValueError, r"keep must be in \(0, 1\]")


@pytest.mark.parametrize("keep", ["half", True])
def test_keep_of_another_type(keep):
    unchanged(Block(), lambda b: compress_(b, keep), TypeError, r"number in \(0, 1\], got")


def test_weights_that_are_not_finite():
    block = Block()
    with torch.no_grad():
        block.down.weight[3, 2] = float("nan")  # the last layer: others are factored before it
    unchanged(block, compress_, ValueError, "down: its weight holds values that are not finite")


def test_meta_device():
    with torch.device("meta"):
        block = Block()
    with pytest.raises(ValueError, match="q_proj: its weight is on the meta device; load"):
        compress_(block)


def test_nothing_to_compress():
    with pytest.raises(ValueError, match="Embedding holds no nn"):
        compress_(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="the model itself is a linear layer"):
        compress_(nn.Linear(3, 4))
