"""Down-projections that read the same activations: found however spelled, merged, right."""

import pytest
import torch
import torch.nn.functional as F
from flashsvd_compile.kernels.siblings_tiles import MAX_SIBLINGS
from torch import nn

from flashsvd_compile import explain
from tests.spelled import (
    OPTIONS,
    Attention,
    Spelled,
    assert_as_good_as_eager,
    hidden_states,
    in_float64,
    low_rank,
    no_pass_may_fail,
)

MERGED = {**OPTIONS, "siblings": "merged"}


pytestmark = pytest.mark.usefixtures("fresh")


def siblings(model, *args, options=MERGED):
    """(lowering, ranks or the reason's code) of each site of siblings, and the code after."""
    told = explain(model, *args, options=options)
    found = [
        (s.lowering, list(s.to_dict()["plan"]["ranks"].values()) if s.plan else s.reason.code.value)
        for s in told.sites
        if s.kind == "siblings"
    ]
    (graph,) = told.graphs
    return found, graph.after


def check(model, *calls, compiler="eager", **how):
    """Compile once, run every call of it: as good as eager, and no pass fails."""
    options = {**MERGED, "compiler": compiler}
    compiled = torch.compile(model, backend="flashsvd", options=options, **how)
    with no_pass_may_fail():
        for args in calls:
            assert_as_good_as_eager(model, compiled, args)


# ---- spellings: each returns two latents of ranks 4 and 6 of x [2, 5, 30] -----------------------


def _linear(self, x):
    return F.linear(x, self.u.t()), F.linear(x, self.w.t(), self.b)


def _addmm(self, x):
    flat = x.view(-1, 30)
    first = torch.addmm(self.a, x.view(-1, 30), self.u).view(2, 5, 4)
    return first, torch.addmm(self.b, flat, self.w).view(2, 5, 6)


SPELLINGS = {
    "matmul": Spelled(lambda self, x: (x @ self.u, x @ self.w), u=(30, 4), w=(30, 6)),
    "linear": Spelled(_linear, u=(30, 4), w=(30, 6), b=(6,)),
    "stored_as_linear": Spelled(
        lambda self, x: (F.linear(x, self.u), F.linear(x, self.w)),
        {"u": -1, "w": -1}, u=(4, 30), w=(6, 30),
    ),
    "addmm_of_views": Spelled(_addmm, u=(30, 4), w=(30, 6), a=(4,), b=(6,)),
    "mixed": Spelled(
        lambda self, x: (x @ self.u, torch.mm(x.flatten(0, 1), self.w)), u=(30, 4), w=(30, 6)
    ),
    "by_head": Spelled(
        lambda self, x: tuple(torch.einsum("bmd,hrd->bhmr", x, w) for w in (self.u, self.w)),
        {"u": -1, "w": -1}, u=(2, 2, 30), w=(2, 3, 30),
    ),
    "by_head_inputs_first": Spelled(
        lambda self, x: tuple(torch.einsum("bsd,dhr->bshr", x, w) for w in (self.u, self.w)),
        {"u": 0, "w": 0}, u=(30, 2, 2), w=(30, 2, 3),
    ),
    "views_of_weights": Spelled(
        lambda self, x: (F.linear(x, self.u.flatten(0, 1)), F.linear(x, self.w.flatten(0, 1))),
        {"u": -1, "w": -1}, u=(2, 2, 30), w=(2, 3, 30),
    ),
    "parts_of_one_weight": Spelled(
        lambda self, x: tuple(F.linear(x, w) for w in self.u.split((4, 6))), {"u": -1}, u=(10, 30)
    ),
    "picked_late": Spelled(
        lambda self, x: (F.linear(x, self.w[:4]), F.linear(x, self.u.chunk(2)[1])),
        {"u": -1, "w": -1}, u=(12, 30), w=(5, 30),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name):
    model, x = SPELLINGS[name], hidden_states()
    found, after = siblings(model, x)
    assert found == [("merged", ["4", "6"])]
    assert after.count("flashsvd.sibling_linears") == 1
    for gone in ("aten.linear", "aten.matmul", "aten.mm", "aten.addmm", "aten.einsum"):
        assert gone not in after
    for copied in ("aten.cat", "aten.clone", "aten.contiguous", "aten.stack"):
        assert copied not in after
    with torch.no_grad():
        check(model, (x,))


@pytest.mark.parametrize("name", ["linear", "by_head", "mixed"])
def test_dynamic_sizes_take_one_graph(name):
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        check(SPELLINGS[name], (hidden_states(2, 5),), (hidden_states(3, 7),), dynamic=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_one_row_and_one_dimension():
    model = SPELLINGS["stored_as_linear"]
    assert siblings(model, torch.randn(30))[0] == [("merged", ["4", "6"])]
    with torch.no_grad():
        check(model, (torch.randn(30),))


def test_many_are_split_evenly():
    count = MAX_SIBLINGS + 1
    model = nn.ModuleList([nn.Linear(30, 3 + i) for i in range(count)])

    def run(x):
        return tuple(layer(x) for layer in model)

    found, after = siblings(run, hidden_states())
    assert [len(ranks) for _, ranks in found] == [count // 2, count - count // 2]
    assert after.count("flashsvd.sibling_linears") == 2


def test_one_weight_read_twice_moves_once():
    """Both families need the same view, and the second one would find it ahead of itself."""

    def both(self, x, y):
        a, b = F.linear(x, self.u), F.linear(y, self.u)
        view = self.w.flatten(0, 1)
        return a, b, F.linear(x, view), F.linear(y, view)

    model = Spelled(both, {"u": -1, "w": -1}, u=(4, 30), w=(2, 3, 30))
    x, y = hidden_states(), hidden_states()
    assert siblings(model, x, y)[0] == [("merged", ["4", "6"])] * 2
    with torch.no_grad():
        check(model, (x, y))


# ---- beside other sites -------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention and a gated feed-forward, all low-rank: two families of siblings."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.gate, self.up = low_rank(30, 60), low_rank(30, 60, rank=7)
        self.down = low_rank(60, 30)

    def forward(self, x):
        x = x + self.attention(x, x)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def test_sites_read_the_latents_of_one_launch():
    model, x = Layer(), hidden_states()
    told = explain(model, x, options=MERGED)
    fused = [(s.kind, s.lowering) for s in told.sites if s.lowering not in ("unfused", None)]
    assert fused == [
        ("attention", "rank_space"),
        ("feed_forward", "row_blocks"),
        ("siblings", "merged"),
        ("siblings", "merged"),
    ]
    with torch.no_grad():
        check(model, (x,))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_gradients(compiler):
    model, x = Layer(), hidden_states()
    exact_model = Layer().double()
    exact_model.load_state_dict(model.state_dict())
    options = {**MERGED, "compiler": compiler}
    compiled = torch.compile(model, backend="flashsvd", options=options)

    def gradients(of, forward, x):
        of.zero_grad()
        x = x.detach().requires_grad_()
        forward(x).square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in of.parameters())]

    exact, expected = gradients(exact_model, exact_model, x.double()), gradients(model, model, x)
    with no_pass_may_fail():
        got = gradients(model, compiled, x)
    for have, want, truth in zip(got, expected, exact, strict=True):
        eps = torch.finfo(want.dtype).eps
        budget = 1.1 * (want.double() - truth).abs().max() + 32 * eps * truth.abs().max()
        assert (have.double() - truth).abs().max() <= budget


def test_updated_weights_are_seen():
    model, x = SPELLINGS["linear"], hidden_states()
    with torch.no_grad():
        compiled = torch.compile(model, backend="flashsvd", options=MERGED)
        before = compiled(x)
        kept = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.data = parameter.data * 2
        assert_as_good_as_eager(model, compiled, (x,))
        assert all((a != b).any() for a, b in zip(before, compiled(x), strict=True))
        model.load_state_dict(kept)


def test_inside_autocast_operands_are_cast_as_torch_does():
    model, x = Layer(), hidden_states()

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    found, _ = siblings(run, x)
    assert [lowering for lowering, _ in found] == ["merged", "merged"]
    with torch.no_grad(), no_pass_may_fail():
        compiled = torch.compile(run, backend="flashsvd", options=MERGED)
        got, want, exact = compiled(x), run(x), in_float64(model, (x,))
    assert got.dtype == want.dtype
    budget = 1.5 * (want.double() - exact).norm() + 0.004 * exact.norm()
    assert (got.double() - exact).norm() <= budget


# ---- choices ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "code"), [("auto", "unsupported_device"), ("unfused", "forced")])
def test_left_alone(asked, code):
    model, x = SPELLINGS["linear"], hidden_states()
    told = explain(model, x, options={"siblings": asked})
    assert [(s.kind, s.lowering, s.reason.code.value) for s in told.sites] == [
        ("siblings", "unfused", code)
    ]
    assert "sibling_linears" not in told.graphs[0].after
    assert "r0 4, r1 6" in str(told)


@pytest.mark.parametrize(
    "model",
    [
        Spelled(lambda self, x: (x @ self.u, x @ self.w), u=(30, 30), w=(30, 40)),
        Spelled(lambda self, x: (x @ self.u, x.detach() @ self.w), u=(30, 4), w=(30, 6)),
        Spelled(lambda self, x: (x @ self.u, (x * 2) @ self.w), u=(30, 4), w=(30, 6)),
        Spelled(lambda self, x: (x @ self.u, x.transpose(0, 1) @ self.w), u=(30, 4), w=(30, 6)),
        Spelled(lambda self, x: (x @ self.u, x @ x.sum((0, 1))[:, None].expand(30, 6)), u=(30, 4)),
        Spelled(lambda self, x: (x @ self.u, torch.einsum("bmd,mr->bdr", x, self.w)),
                u=(30, 4), w=(5, 2)),
    ],
    ids=["widening", "detached", "another_tensor", "another_order", "no_weight", "another_axis"],
)  # fmt: skip
def test_no_siblings(model):
    assert siblings(model, hidden_states())[0] == []


# ---- near-misses: two products of one x that cannot be one launch -------------------------------


def _autocast_around_one(self, x):
    first = x @ self.u
    with torch.autocast("cpu", torch.bfloat16):
        second = x @ self.w
    return first, second


def _no_grad_around_one(self, x):
    first = x @ self.u
    with torch.no_grad():
        second = x @ self.w
    return first, second


def _written_input(self, x):
    first = x @ self.u
    x.mul_(2.0)
    return first, x @ self.w


def _written_weight(self, x):
    first = x @ self.u
    with torch.no_grad():
        self.w.mul_(1.0)
    return first, x @ self.w


def _weight_computed_late(self, x):
    first = x @ self.u
    return first, x @ (self.w * 2)


def _bias_of_rows(self, x):
    flat = x.view(-1, 30)
    return flat @ self.u, torch.addmm(self.c, flat, self.w)


def _scaled(self, x):
    flat = x.view(-1, 30)
    return flat @ self.u, torch.addmm(self.b, flat, self.w, alpha=0.5)


SHAPES = {"u": (30, 4), "w": (30, 6), "b": (6,), "c": (10, 6)}
NEAR_MISSES = {
    "autocast": (_autocast_around_one, ["region_crossed"], "switches between"),
    "grad_mode": (_no_grad_around_one, ["region_crossed"], "switches between"),
    "written_input": (_written_input, ["mutated"] * 2, "written in place"),
    "written_weight": (_written_weight, ["mutated"], "written in place"),
    "late_weight": (_weight_computed_late, ["not_yet_computed"], "mul is computed after matmul"),
    "bias_of_rows": (_bias_of_rows, ["op_not_carried"], "a bias of shape [10, 6]"),
    "scaled": (_scaled, ["op_not_carried"], "times 0.5"),
    "lies_otherwise": (
        lambda self, x: (x @ self.u, F.linear(x, self.w.view(6, 30))), ["bad_layout"], "innermost"),
    "no_view": (
        lambda self, x: (x @ self.u, torch.einsum("bmd,hdr->bmhr", x, self.w.view(2, 30, 3))),
        ["bad_layout"], "strides (90, 3, 1)"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    forward, codes, observed = NEAR_MISSES[name]
    model = Spelled(forward, **SHAPES)
    told = explain(model, hidden_states(), options=MERGED)
    misses = [s for s in told.sites if s.kind == "siblings"]
    assert [(s.lowering, s.reason.code.value) for s in misses] == [(None, code) for code in codes]
    assert observed in str(misses[0].reason)
    options = MERGED
    torch._dynamo.reset()
    with torch.no_grad(), no_pass_may_fail():
        x = hidden_states()
        expected = model(x.clone())
        got = torch.compile(model, backend="flashsvd", options=options)(x.clone())
    for have, want in zip(got, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_a_third_one_does_not_spoil_two():
    def three(self, x):
        first = x @ self.u
        return first, x @ (self.u * 2), x @ self.w

    model = Spelled(three, u=(30, 4), w=(30, 6))
    assert siblings(model, hidden_states())[0] == [
        ("merged", ["4", "6"]),
        (None, "not_yet_computed"),
    ]
    with torch.no_grad():
        check(model, (hidden_states(),))


def test_where_tells_the_module():
    (site,) = [s for s in explain(nn.Sequential(Layer()), hidden_states(), options=MERGED).sites
               if s.kind == "siblings" and s.where.endswith("attention")]  # fmt: skip
    assert site.where == "0.attention"


class TwoLatents(nn.Module):
    """``latents(self, x)`` of two weights [8, 32] and a bias as long as there are rows."""

    def __init__(self, latents):
        super().__init__()
        self.u, self.w = (nn.Parameter(torch.randn(8, 32) / 32**0.5) for _ in "uw")
        self.b = nn.Parameter(torch.randn(8))
        self.latents = latents

    def forward(self, x):
        return self.latents(self, x)


def _without_grad(self, x):
    with torch.no_grad():
        view = x.view(-1, 32)
    return F.linear(x, self.u) + F.linear(view, self.w)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_no_gradient_flows_through_a_view_made_without(compiler):
    model = TwoLatents(_without_grad)
    compiled = torch.compile(model, backend="flashsvd", options={**MERGED, "compiler": compiler})
    grads = []
    for run in (model, compiled):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model.zero_grad()
        with no_pass_may_fail():
            run(x).sin().sum().backward()
        grads.append([x.grad, model.u.grad, model.w.grad])
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_the_same_bytes_in_another_dtype_are_another_tensor():
    def latents(self, x):
        return F.linear(x, self.u), F.linear(x.view(torch.float16), self.w.half())

    model = TwoLatents(latents).bfloat16()
    compiled = torch.compile(model, backend="flashsvd", options=MERGED)
    x = (torch.rand(4, 32) + 1).bfloat16()
    with no_pass_may_fail():
        for got, want in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(got, want)


@torch.no_grad()
def test_a_bias_along_rows_is_none_along_columns():
    """As many rows as columns, so that sizes do not tell."""

    def latents(self, x):
        return F.linear(self.u, x, self.b), F.linear(self.w, x, self.b)

    check(TwoLatents(latents), (torch.randn(8, 32),))


@torch.no_grad()
def test_inputs_that_share_memory_are_written_together():
    def latents(x, y, u, w):
        first = F.linear(x, u)
        y.add_(1)
        return first, F.linear(x, w)

    weights = torch.randn(8, 32), torch.randn(8, 32)
    compiled = torch.compile(latents, backend="flashsvd", options=MERGED)
    x, twin = (torch.randn(5, 32, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    with no_pass_may_fail():
        for got, want in zip(
            compiled(x, x[:2], *weights), latents(twin, twin[:2], *weights), strict=True
        ):
            torch.testing.assert_close(got, want)
