"""Narrow linears alone: shapes, numerics, refusals, and the compiler's view of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flashsvd_compile as fsc
from flashsvd_compile.compress.joint_modules import NarrowHeadsLinear, NarrowInputLinear


def heads(**kwargs):
    return NarrowHeadsLinear(11, 3, 7, 4, **kwargs)


def read(**kwargs):
    return NarrowInputLinear(11, 3, 7, 4, **kwargs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (5,), (2, 5), (0,)])
def test_heads_are_latents_and_zeros(bias, lead):
    module = heads(bias=bias, dtype=torch.float64)
    x = torch.randn(*lead, 11, dtype=torch.float64)
    made = module(x).unflatten(-1, (3, 7))
    expected = torch.einsum("...c,hrc->...hr", x, module.weight)
    if bias:
        expected = expected + module.bias.view(3, 4)
    torch.testing.assert_close(made[..., :4], expected)
    assert not made[..., 4:].any()
    assert (module.in_features, module.out_features) == (11, 21)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [heads, read])
def test_dense_weight_is_what_it_multiplies_with(make, bias):
    module = make(bias=bias, dtype=torch.float64)
    assert module.dense_weight().shape == (module.out_features, module.in_features)
    x = torch.randn(5, module.in_features, dtype=torch.float64)
    zero = torch.zeros_like(x)
    expected = F.linear(x, module.dense_weight()) + module(zero)
    torch.testing.assert_close(module(x), expected)


def test_what_lies_behind_the_rank_is_not_read():
    module = read()
    x = torch.randn(2, 5, 3, 7)
    expected = module(x.flatten(-2))
    x[..., 4:] = float("nan")
    assert torch.equal(module(x.flatten(-2)), expected)


@pytest.mark.parametrize("make", [heads, read])
def test_gradients(make):
    module = make(dtype=torch.float64)
    x = torch.randn(3, module.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("make", [heads, read])
def test_survives_what_modules_do(make):
    module = make()
    state = module.state_dict()
    assert set(state) == {"weight", "bias"}
    other = make()
    other.load_state_dict(state)
    x = torch.randn(2, module.in_features)
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.device("meta"):
        empty = make()
    empty.to_empty(device="cpu").reset_parameters()
    empty.load_state_dict(state)
    torch.testing.assert_close(empty(x), other(x))
    assert "rank=4" in repr(module)


@pytest.mark.parametrize("make", [heads, read])
def test_autocast(make):
    module = make()
    x = torch.randn(2, module.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("kind", [NarrowHeadsLinear, NarrowInputLinear])
def test_refuses_ranks(kind, rank):
    with pytest.raises(ValueError, match=rf"rank must be in \[1, 7\] .* got {rank}"):
        kind(11, 3, 7, rank)
    with pytest.raises(ValueError, match="at least 1"):
        kind(0, 3, 7, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = (NarrowHeadsLinear(96, 3, 32, 8) for _ in "qk")
        self.v, self.o = NarrowHeadsLinear(96, 3, 32, 16), NarrowInputLinear(96, 3, 32, 16)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (3, 32)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


@pytest.mark.usefixtures("fresh_inference")
def test_the_backend_attends_in_rank_space():
    model, x = Attention(), torch.randn(2, 40, 96)
    options = {"attention": "rank_space"}
    (site,) = [s for s in fsc.explain(model, x, options=options).sites if s.kind == "attention"]
    assert site.lowering == "rank_space"
    compiled = torch.compile(model, backend="flashsvd", options=options)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
