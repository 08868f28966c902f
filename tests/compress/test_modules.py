"""The low-rank modules alone: shapes, numerics, and everything an nn.Module must survive."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from flashsvd_compile.compress.modules import (
    FusedPerHeadLowRankLinear,
    LowRankLinear,
    PerHeadLowRankLinear,
)

# name -> (constructor, leading axes, rows of one matrix); sizes are neither even nor powers of two
CASES = {
    "matrix": (lambda **kw: LowRankLinear(11, 21, 3, **kw), (), 21),
    "per_head": (lambda **kw: PerHeadLowRankLinear(11, 3, 7, 3, **kw), (3,), 7),
    "fused": (lambda **kw: FusedPerHeadLowRankLinear(11, 3, 2, 7, 3, **kw), (3, 2), 7),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_parameters_have_the_documented_shapes(case):
    make, lead, rows = case
    module = make()
    assert module.u.shape == (*lead, 3, 11)
    assert module.v.shape == (*lead, rows, 3)
    assert module.bias.shape == (module.out_features,)
    assert module.weight.shape == (module.out_features, module.in_features)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(11,), (5, 11), (2, 5, 11), (0, 11)])
def test_forward_is_the_dense_linear_with_the_product(case, bias, shape):
    make, _, _ = case
    module = make(bias=bias, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    expected = nn.functional.linear(x, module.weight, module.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_each_head_has_its_own_factors():
    module = PerHeadLowRankLinear(11, 3, 7, 3, bias=False)
    x = torch.randn(5, 11)
    before = module(x)
    with torch.no_grad():
        module.v[1].zero_()
    changed = (module(x) != before).any(0)
    assert changed.tolist() == [False] * 7 + [True] * 7 + [False] * 7


def test_gradients_reach_factors_and_bias(case):
    make, _, _ = case
    module = make(dtype=torch.float64)
    x = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    names = ("u", "v", "bias")
    values = tuple(getattr(module, name).detach().requires_grad_() for name in names)

    def call(x, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, parameters, x)

    assert torch.autograd.gradcheck(call, (x, *values))


def test_autocast_gives_the_dtype_of_the_dense_linear(case):
    make, _, _ = case
    x = torch.randn(5, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make()(x).dtype is nn.Linear(11, 3)(x).dtype is torch.bfloat16


def test_one_graph_holds_the_forward(case):
    make, _, _ = case
    module = make()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    x = torch.randn(2, 5, 11)
    torch.testing.assert_close(compiled(x), module(x))


def test_state_dict_survives_pickling_and_strict_loading(case):
    make, _, _ = case
    module, other = make(), make()
    state = pickle.loads(pickle.dumps(module.state_dict()))
    assert list(state) == ["u", "v", "bias"]
    other.load_state_dict(state, strict=True)
    x = torch.randn(5, 11)
    assert torch.equal(other(x), module(x))


def test_copies_are_independent(case):
    make, _, _ = case
    module = make()
    x = torch.randn(5, 11)
    before = module(x)
    twin = copy.deepcopy(module)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        module.u.zero_()
    assert torch.equal(twin(x), before)
    assert torch.equal(loaded(x), before)


def test_half_and_to(case):
    make, _, _ = case
    module = make().half()
    assert {p.dtype for p in module.parameters()} == {torch.float16}
    assert module.to(torch.float64)(torch.randn(5, 11, dtype=torch.float64)).dtype is torch.float64
    assert make(device="meta").u.is_meta


def test_start_values_spread_like_a_dense_linear():
    torch.manual_seed(0)
    spread = LowRankLinear(256, 256, 64).weight.detach().std().item()
    assert spread == pytest.approx((3 * 256) ** -0.5, rel=0.1)


def test_weight_is_read_only(case):
    make, _, _ = case
    with pytest.raises(AttributeError):
        make().weight = torch.zeros(21, 11)


def test_repr_names_the_sizes(case):
    make, _, _ = case
    module = make(bias=False)
    assert f"in_features=11, out_features={module.out_features}, rank=3, bias=False" in repr(module)


def test_bad_sizes_say_what_is_allowed():
    with pytest.raises(ValueError, match=r"rank must be in \[1, 7\].*\(7, 11\), got 8"):
        PerHeadLowRankLinear(11, 3, 7, 8)
    with pytest.raises(ValueError, match=r"rank must be in \[1, 11\]"):
        LowRankLinear(11, 21, 0)
    with pytest.raises(ValueError, match=r"sizes must be at least 1, got \(0, 7, 11\)"):
        PerHeadLowRankLinear(11, 0, 7, 1)
