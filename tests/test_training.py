"""Gradients, updated weights, dropout and autocast through compiled low-rank layers."""

import math

import pytest
import torch
from flashsvd_compile.lowering import ops
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from flashsvd_compile import explain
from tests.spelled import (
    LONE_PRODUCTS,
    OPTIONS,
    Attention,
    hidden_states,
    low_rank,
    no_pass_may_fail,
)


class Layer(nn.Module):
    """Post-norm encoder layer: one attention and one feed-forward site."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = Attention()
        self.dropout = nn.Dropout(dropout)
        self.up, self.down = low_rank(30, 60), low_rank(60, 30)

    def forward(self, x, mask=None):
        x = x + self.attention(x, x, mask)
        return x + self.down(self.dropout(nn.functional.gelu(self.up(x))))


pytestmark = pytest.mark.usefixtures("fresh")


def compiled(model, compiler):
    return torch.compile(model, backend="flashsvd", options={**OPTIONS, "compiler": compiler})


def gradients(model, forward, x, **kwargs):
    model.zero_grad()
    x = x.detach().requires_grad_()
    forward(x, **kwargs).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def assert_within_eagers_error(got, expected, exact):
    """At most 1.1 times eager's error against float64, plus roundings of the sums."""
    for have, want, truth in zip(got, expected, exact, strict=True):
        eps = torch.finfo(want.dtype).eps
        budget = 1.1 * (want.double() - truth).abs().max() + 32 * eps * truth.abs().max()
        assert (have.double() - truth).abs().max() <= budget


def in_float64(model):
    double = type(model)().double()
    double.load_state_dict(model.state_dict())
    return double


def is_fused(model, *args):
    lowered = {s.kind: s.lowering for s in explain(model, *args, options=OPTIONS).sites
               if s.kind not in LONE_PRODUCTS}  # fmt: skip
    return lowered == {"attention": "rank_space", "feed_forward": "row_blocks"}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_gradients(compiler):
    model, x = Layer(), hidden_states()
    assert is_fused(model, x)
    exact_model = in_float64(model)
    exact = gradients(exact_model, exact_model, x.double())
    expected = gradients(model, model, x)
    with no_pass_may_fail():
        got = gradients(model, compiled(model, compiler), x)
    assert_within_eagers_error(got, expected, exact)


def test_gradients_with_a_padding_mask():
    model, x = Layer(), hidden_states()
    mask = torch.ones(x.size(0), 1, 1, x.size(1), dtype=torch.bool)
    mask[1, ..., 3:] = False
    expected = gradients(model, model, x, mask=mask)
    with no_pass_may_fail():
        got = gradients(model, compiled(model, "aot_eager"), x, mask=mask)
    for have, want in zip(got, expected, strict=True):
        torch.testing.assert_close(have, want)


class HeadsFirst(nn.Module):
    """Its attention leaves the graph laid out by head, as SDPA makes of heads that lie so."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(30, 4, bias=False) for _ in "qkv")
        self.up = nn.ParameterList(torch.randn(3, 4, 8) for _ in "qkv")

    def forward(self, x):
        q, k, v = (u(x)[:, None] @ v for u, v in zip(self.down, self.up, strict=True))
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_gradients_through_a_result_laid_out_anew(compiler):
    model, x = HeadsFirst(), hidden_states()
    fast = compiled(model, compiler)
    with no_pass_may_fail():
        result = fast(x)
        assert result.is_contiguous()
        exact_model = in_float64(model)
        exact = gradients(exact_model, exact_model, x.double())
        got = gradients(model, fast, x)
    assert_within_eagers_error(got, gradients(model, model, x), exact)


def test_frozen_factors_get_no_gradient():
    model, x = Layer(), hidden_states()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name)
    expected = gradients(model, model, x)
    got = gradients(model, compiled(model, "aot_eager"), x)
    assert [g is None for g in got] == [e is None for e in expected]
    for have, want in zip(got, expected, strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_optimizer_steps_are_seen(compiler):
    model, twin, x = Layer(), Layer(), hidden_states()
    twin.load_state_dict(model.state_dict())
    run = compiled(model, compiler)
    losses: list[list[float]] = [[], []]
    for of, (module, forward) in enumerate(((model, run), (twin, twin))):
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
        for _ in range(4):
            optimizer.zero_grad()
            loss = forward(x).square().mean()
            loss.backward()
            optimizer.step()
            losses[of].append(float(loss.detach()))
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("update", ["load_state_dict", "copy_", "add_", "data"])
def test_new_weights_are_seen_without_a_recompile(update):
    model, other, x = Layer(), Layer(), hidden_states()
    compiles = torch._dynamo.utils.counters["stats"]
    with torch.no_grad():
        run = compiled(model, "aot_eager")
        before = run(x)
        graphs = compiles["unique_graphs"]
        if update == "load_state_dict":
            model.load_state_dict(other.state_dict())
        for mine, new in zip(model.parameters(), other.parameters(), strict=True):
            if update == "copy_":
                mine.copy_(new)
            elif update == "add_":
                mine.add_(new)
            elif update == "data":
                mine.data = new.data.clone()
        torch.testing.assert_close(run(x), model(x))
        assert not torch.allclose(run(x), before)
    assert compiles["unique_graphs"] == graphs


def test_dropout_in_training_skips_visibly():
    model, x = Layer(dropout=0.5), hidden_states()
    kinds = {s.kind: s for s in explain(model.train(), x, options=OPTIONS).sites}
    assert kinds["attention"].lowering == "rank_space"
    assert kinds["feed_forward"].lowering is None
    assert "dropout" in str(kinds["feed_forward"].reason)
    torch._dynamo.reset()
    run = compiled(model, "eager")
    torch.manual_seed(3)
    got = run(x)
    torch.manual_seed(3)
    torch.testing.assert_close(got, model(x))
    assert is_fused(model.eval(), x)


def test_autocast_training():
    model, x = Layer(), hidden_states()

    def under_autocast(forward):
        def loss(given):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return forward(given).float()

        return gradients(model, loss, x)

    exact_model = in_float64(model)
    exact = gradients(exact_model, exact_model, x.double())
    expected = under_autocast(model)
    for compiler in ("eager", "aot_eager"):
        torch._dynamo.reset()
        with no_pass_may_fail():
            got = under_autocast(compiled(model, compiler))
        for have, want, truth in zip(got, expected, exact, strict=True):
            assert have.dtype == want.dtype
            budget = 2 * (want.double() - truth).norm() + 0.01 * truth.norm()
            assert (have.double() - truth).norm() <= budget


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = low_rank(30, 60), low_rank(60, 30)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.down(nn.functional.gelu(self.up(x)))


def test_gradients_of_gradients():
    """A gradient penalty: what the first gradient was made of must have gradients, too."""
    model, x = FeedForward().double(), hidden_states().double()

    def penalty(forward):
        model.zero_grad()
        given = x.detach().requires_grad_()
        y = forward(given)
        (gradient,) = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        ((gradient.norm() - 1) ** 2 + y.square().mean()).backward()
        return [p.grad for p in model.parameters()]

    expected = penalty(model)
    with no_pass_may_fail():
        got = penalty(compiled(model, "eager"))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_autocast_around_a_backward_is_none_of_its_business():
    """What ran in float32 is computed anew in float32, where torch's own backward may not be."""
    model, x = FeedForward(), hidden_states()

    def under_autocast(forward):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            forward(x).square().mean().backward()
        return [p.grad for p in model.parameters()]

    model(x).square().mean().backward()
    exact = [p.grad.double() for p in model.parameters()]
    expected = under_autocast(model)
    for compiler in ("eager", "aot_eager"):
        torch._dynamo.reset()
        with no_pass_may_fail():
            got = under_autocast(compiled(model, compiler))
        for have, want, truth in zip(got, expected, exact, strict=True):
            error = (want - truth).norm()
            assert (have - truth).norm() <= error + 1e-6 * truth.norm()


# ---- the operators ------------------------------------------------------------------------------

B, H, M, N, D, R = 2, 3, 4, 5, 6, 2


def _drawn(*shape, dtype=torch.float64):
    return (torch.randn(shape, dtype=dtype) / math.sqrt(shape[-1])).requires_grad_()


def _attention_arguments():
    mask = torch.ones(B, 1, 1, N, dtype=torch.bool)
    mask[0, ..., 3:] = False
    latents = (_drawn(B, H, M, R), _drawn(B, H, N, R), _drawn(B, H, N, R))
    tensors = (_drawn(H, D, R), _drawn(H, D), _drawn(H, D, R), _drawn(H, D, R), _drawn(H, D))
    numbers = {"num_heads": H, "is_causal": False, "scale": 0.4, "tile": []}
    shared = (_drawn(B, 1, M, R), _drawn(B, 1, N, D), _drawn(B, 1, N, R))
    return {
        "all_low_rank": ((*latents, *tensors, mask), numbers),
        "causal": ((*latents, *tensors), {**numbers, "is_causal": True}),
        "shared_and_dense": (
            (*shared, _drawn(H, D, R), None, None, _drawn(H, D, R)),
            numbers,
        ),
    }


def _feed_forward_arguments():
    T, F = 7, 9
    up, down = (_drawn(T, R), _drawn(F, R)), _drawn(4, F)
    numbers = {"activation": "gelu", "block_rows": 3}
    gate = (_drawn(T, 3), _drawn(F, 3), _drawn(F))
    return {
        "plain": ((*up, down), numbers),
        "biases": ((*up, down, _drawn(F), None, None, None, _drawn(4)), numbers),
        "gated": ((*up, down, None, *gate), {**numbers, "activation": "silu"}),
    }


def _whole_arguments():
    T, K, F, OUT = 5, 6, 9, 4
    required = (_drawn(T, K), _drawn(R, K), _drawn(F, R), _drawn(3, F), _drawn(OUT, 3))
    gate = (_drawn(T, 7), _drawn(3, 7), _drawn(F, 3), _drawn(3), _drawn(F))
    numbers = {"activation": "gelu", "tile": []}
    silu = {**numbers, "activation": "silu"}
    return {
        "plain": (required, numbers),
        "biases": ((*required, _drawn(R), _drawn(F), *[None] * 5, _drawn(3), _drawn(OUT)), numbers),
        "gated": ((*required, None, None, *gate), silu),
        "gated_by_its_latent": ((*required, None, None, None, None, _drawn(F, R)), silu),
        "gated_by_its_x": ((*required, None, None, None, _drawn(3, K), _drawn(F, 3)), silu),
    }


def _chain_arguments():
    required = (_drawn(5, 6), _drawn(R, 6), _drawn(4, R))
    numbers = {"tile": []}
    return {"plain": (required, numbers), "biases": ((*required, _drawn(R), _drawn(4)), numbers)}


def _siblings_arguments():
    x, weights = _drawn(7, 6), [_drawn(3, 6), _drawn(6, 4).detach().t().requires_grad_()]
    return {
        "plain": ((x, weights, []), {"biased": [], "tile": []}),
        "one_bias": ((x, weights, [_drawn(4)]), {"biased": [1], "tile": []}),
    }


CHECKED = {
    f"{op._opname}-{name}": (op, make, name)
    for op, make in (
        (ops.rank_space_attention, _attention_arguments),
        (ops.row_blocks_feed_forward_op, _feed_forward_arguments),
        (ops.streamed_whole_feed_forward, _whole_arguments),
        (ops.streamed_chain, _chain_arguments),
        (ops.sibling_linears, _siblings_arguments),
    )
    for name in make()
}


@pytest.mark.parametrize(("op", "make", "name"), CHECKED.values(), ids=CHECKED)
def test_opcheck(op, make, name):
    args, kwargs = make()[name]
    torch.library.opcheck(op, args, kwargs)


@pytest.mark.parametrize(("op", "make", "name"), CHECKED.values(), ids=CHECKED)
def test_gradcheck(op, make, name):
    args, kwargs = make()[name]
    leaves, spec = tree_flatten(args)
    tensors = [a for a in leaves if isinstance(a, torch.Tensor) and a.is_floating_point()]

    def of(*given):
        filled = iter(given)
        full = [next(filled) if any(a is t for t in tensors) else a for a in leaves]
        found = op(*tree_unflatten(full, spec), **kwargs)
        return tuple(found) if isinstance(found, list) else found

    assert torch.autograd.gradcheck(of, tensors, fast_mode=True)


@pytest.mark.parametrize("name", _siblings_arguments())
def test_siblings_under_autocast(name):
    (x, weights, biases), numbers = _siblings_arguments()[name]
    leaves = [t.detach().float().requires_grad_() for t in (x, *weights, *biases)]
    count = len(weights)
    outs = ops.sibling_linears(leaves[0], leaves[1 : 1 + count], leaves[1 + count :], **numbers)
    loss = sum(out.square().sum() for out in outs)
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_the_streamed_feed_forward_has_shape_and_gradient_everywhere():
    """Its kernel needs CUDA; fake tensors do not."""
    (up, up_factor, down), _ = _feed_forward_arguments()["plain"]
    meta = [t.detach().to("meta").requires_grad_() for t in (up, up_factor, down)]
    out = ops.streamed_feed_forward(*meta, activation="gelu", tile=[])
    assert out.shape == (7, 4)
    out.sum().backward()
    assert [t.grad.shape for t in meta] == [t.shape for t in meta]


def test_gradients_when_used_twice():
    args, kwargs = _feed_forward_arguments()["plain"]

    def twice(op):
        first = op(*args)
        second = op(*args)
        return torch.autograd.grad((first * second.sin()).sum(), args)

    op = ops.row_blocks_feed_forward_op
    got = twice(lambda *t: op(*t, **kwargs))
    run = torch.compile(lambda *t: op(*t, **kwargs), backend="aot_eager")
    again = twice(run)

    def plain(up, up_factor, down):
        return nn.functional.gelu(up @ up_factor.T) @ down.T

    for one, two, want in zip(got, again, twice(plain), strict=True):
        torch.testing.assert_close(one, want)
        torch.testing.assert_close(two, want)
