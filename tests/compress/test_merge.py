"""`merge_` replaces what costs more than its matrix, and says what it left and why."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from flashsvd_compile import compress_, explain, merge_
from flashsvd_compile.compress.modules import (
    FusedPerHeadLowRankLinear,
    LowRankLinear,
    PerHeadLowRankLinear,
)

# name -> (constructor of a layer whose rank is too large, what it is called with)
OVERFULL = {
    "matrix": lambda **kw: LowRankLinear(12, 20, 8, **kw),  # 12 · 20 / 32 = 7.5
    "per_head": lambda **kw: PerHeadLowRankLinear(12, 3, 5, 4, **kw),  # 12 · 5 / 17 = 3.5
    "fused": lambda **kw: FusedPerHeadLowRankLinear(12, 3, 2, 5, 4, **kw),
}
WITHIN = {
    "matrix": lambda **kw: LowRankLinear(12, 20, 7, **kw),
    "per_head": lambda **kw: PerHeadLowRankLinear(12, 3, 5, 3, **kw),
    "fused": lambda **kw: FusedPerHeadLowRankLinear(12, 3, 2, 5, 3, **kw),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pair(rank=8, bias=True, **kw):
    return nn.Sequential(
        nn.Linear(12, rank, bias=False, **kw), nn.Linear(rank, 20, bias=bias, **kw)
    )


def holding(layer):
    return nn.ModuleDict({"a": layer}).eval()


def only(report):
    (row,) = report.rows
    return row


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OVERFULL)
def test_factors_become_their_product(name, dtype, bias):
    model = holding(OVERFULL[name](bias=bias, dtype=dtype))
    layer, kept = model["a"], copy.deepcopy(model["a"]).double()
    row = only(merge_(model))
    merged = model["a"]
    assert type(merged) is nn.Linear
    assert (merged.in_features, merged.out_features) == (12, layer.out_features)
    assert torch.equal(merged.weight, kept.weight.to(dtype))
    assert merged.bias is layer.bias
    assert row.is_merged
    assert 0 <= row.error <= torch.finfo(dtype).eps
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    exact = kept(x)
    error = (merged(x.to(dtype)).double() - exact).norm()
    eager = (layer(x.to(dtype)).double() - exact).norm()
    assert error <= 1.1 * eager + 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("name", WITHIN)
def test_factors_that_cost_less_stay(name):
    model = holding(WITHIN[name]())
    layer = model["a"]
    row = only(merge_(model))
    assert model["a"] is layer
    assert "costs less than a matrix of" in row.reason
    assert row.bytes_before == row.bytes_after


def test_totals_are_the_parameters_bytes():
    model = nn.ModuleDict({"a": OVERFULL["matrix"](), "b": WITHIN["matrix"]()}).eval()
    before = sum(p.nbytes for p in model.parameters())
    report = merge_(model)
    after = sum(p.nbytes for p in model.parameters())
    assert (report.model_bytes_before, report.model_bytes_after) == (before, after)
    assert sum(row.bytes_before - row.bytes_after for row in report.rows) == before - after > 0
    assert [row.is_merged for row in report.rows] == [True, False]
    text = str(report)
    assert "1 of 2 low-rank layers merged; all parameters" in text
    assert "costs less" in text
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["rank"] == 8


# ---- two linears in a row -----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_sequential_keeps_its_indices(bias):
    model = nn.Sequential(nn.ReLU(), *pair(bias=bias), nn.GELU()).double().eval()
    x = torch.randn(3, 12, dtype=torch.float64)
    expected, keys = model(x), set(model.state_dict())
    row = only(merge_(model))
    assert row.path == "2"
    assert [type(layer) for layer in model] == [nn.ReLU, nn.Identity, nn.Linear, nn.GELU]
    assert set(model.state_dict()) == keys - {"1.weight"}
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_three_in_a_row_are_one_pair_and_one_more():
    layers = [nn.Linear(12, 9, bias=False), nn.Linear(9, 12, bias=False), nn.Linear(12, 12)]
    model = nn.Sequential(*layers).eval()
    assert only(merge_(model)).path == "1"
    assert model[2] is layers[2]


def test_a_bias_or_an_activation_between_is_no_pair():
    with_bias = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12))
    apart = nn.Sequential(nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 12))
    assert merge_(nn.ModuleList([with_bias, apart]).eval()).rows == ()


def test_one_sequential_at_two_places_stays_one():
    shared = pair()
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})}).eval()
    assert only(merge_(model)).is_merged
    assert model["a"] is model["b"]["c"]
    assert type(model["a"][1]) is nn.Linear
    assert type(model["a"][0]) is nn.Identity


# ---- what is kept -------------------------------------------------------------------------------


def test_hooks_flags_and_notes_are_kept():
    model = holding(OVERFULL["per_head"]())
    layer, seen = model["a"], []
    layer.u.requires_grad_(False)
    layer.v.requires_grad_(False)
    handle = layer.register_forward_hook(lambda *_: seen.append("a"))
    layer.note = "mine"
    merge_(model)
    merged = model["a"]
    assert not merged.training
    assert not merged.weight.requires_grad
    assert merged.bias.requires_grad
    assert merged.note == "mine"
    assert not hasattr(merged, "num_heads")
    merged(torch.randn(2, 12))
    handle.remove()
    merged(torch.randn(2, 12))
    assert seen == ["a"]


def test_a_layer_at_two_places_stays_one():
    shared = OVERFULL["matrix"]()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}).eval()
    assert only(merge_(model)).path == "a"
    assert model["a"] is model["b"][0]


def test_what_is_trained_is_merged_only_where_allowed():
    model = holding(OVERFULL["matrix"]()).train()
    assert "being trained" in only(merge_(model)).reason
    assert only(merge_(model, allow_training=True)).is_merged
    assert model["a"].training
    assert model["a"].weight.requires_grad
    frozen = holding(OVERFULL["matrix"]()).train()
    frozen["a"].requires_grad_(False)
    assert only(merge_(frozen)).is_merged


def test_patterns():
    def model():
        return nn.ModuleDict({"a": OVERFULL["matrix"](), "b": pair()}).eval()

    def merged(**how):
        return [row.path for row in merge_(model(), **how).rows if row.is_merged]

    assert merged() == ["a", "b.1"]
    assert merged(include=["b.*"]) == ["b.1"]
    assert merged(exclude=["b.*"]) == ["a"]
    with pytest.raises(ValueError, match=r"matches no linear layer of the model; .* 'b\.1'"):
        merge_(model(), include=["b.2"])


# ---- near-misses --------------------------------------------------------------------------------


class _Twice(LowRankLinear):
    def forward(self, x):
        return 2 * super().forward(x)


class _Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _changed(change):
    def make():
        layer = OVERFULL["matrix"]()
        change(layer)
        return layer

    return make


def _hooked_pair():
    layers = pair()
    layers[0].register_forward_hook(lambda *_: None)
    return layers


def _replaced(layer):
    layer.forward = lambda x: x


def _half_bias(layer):
    layer.bias = nn.Parameter(layer.bias.detach().half())


def _huge(layer):
    layer.half()
    nn.init.constant_(layer.u, 200.0)
    nn.init.constant_(layer.v, 200.0)


def _shared_factor():
    first, second = OVERFULL["matrix"](), OVERFULL["matrix"]()
    second.u = first.u
    return nn.ModuleList([first, second])


def _linear_used_elsewhere():
    layers = pair()
    return nn.ModuleList([layers, layers[0]])


NEAR_MISSES = {
    "subclass": (lambda: _Twice(12, 20, 8), "_Twice is not a plain low-rank layer"),
    "replaced_forward": (_changed(_replaced), "its forward has been replaced"),
    "parametrized": (
        _changed(lambda layer: parametrize.register_parametrization(layer, "u", _Double())),
        "its factors are parametrized"),
    "buffer": (
        _changed(lambda layer: layer.register_buffer("scale", torch.ones(1))), "it holds more"),
    "dtypes": (_changed(_half_bias), "its parameters differ in dtype"),
    "overflow": (_changed(_huge), "its matrix is not finite in float16"),
    "shared_factor": (_shared_factor, "its u is shared with a."),
    "hooked_pair": (_hooked_pair, "a linear of it has hooks"),
    "used_elsewhere": (_linear_used_elsewhere, "is also used elsewhere"),
    "unfit": (
        lambda: nn.Sequential(nn.Linear(12, 8, bias=False), nn.Linear(9, 12)),
        "its linears do not fit each other"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    make, reason = NEAR_MISSES[name]
    model = holding(make())
    before = dict(model.named_modules())
    report = merge_(model)
    assert report.rows
    for row in report.rows:
        assert reason in row.reason
    assert dict(model.named_modules()) == before


def test_refuses_what_it_cannot_replace_or_compute():
    with pytest.raises(ValueError, match="the model itself"):
        merge_(OVERFULL["matrix"]().eval())
    model = nn.ModuleDict({"a": OVERFULL["matrix"](), "b": OVERFULL["matrix"](device="meta")})
    with pytest.raises(ValueError, match="b: factors on the meta device"):
        merge_(model.eval())
    assert type(model["a"]) is LowRankLinear


# ---- with the rest ------------------------------------------------------------------------------


def test_what_the_compiler_tells_is_what_is_merged():
    model = nn.ModuleList([OVERFULL["matrix"](), WITHIN["matrix"]()]).eval()
    x = torch.randn(5, 12)

    def chains():
        sites = explain(lambda x: tuple(layer(x) for layer in model), x).sites
        return [site.reason for site in sites if site.kind == "chain"]

    with torch.no_grad():
        told = chains()
        assert [r.code.value for r in told] == ["rank_too_large", "no_fused_lowering"]
        assert "flashsvd_compile.merge_" in str(told[0])
        assert [row.is_merged for row in merge_(model).rows] == [True, False]
        assert [r.code.value for r in chains()] == ["no_fused_lowering"]


def test_a_compiled_model_sees_the_matrix():
    torch._dynamo.reset()
    model = nn.Sequential(OVERFULL["matrix"]().double(), nn.ReLU()).eval()
    x = torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        compiled = torch.compile(model, backend="flashsvd", options={"compiler": "eager"})
        expected = compiled(x)
        merge_(model)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)
        model[0].weight.data.zero_()
        model[0].bias.data.fill_(1.0)
        assert torch.equal(compiled(x), torch.ones(5, 20, dtype=torch.float64))


def test_what_compress_makes_is_never_merged():
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64)).eval()
    compress_(model, keep=0.9)
    assert not any(row.is_merged for row in merge_(model).rows)
